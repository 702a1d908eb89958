"""A state that cannot be used is not saved, and nobody is named for what the server itself sent."""

import json

import pytest
import torch

from helpers import model_of, play, rows_of, same, small, tiny_shards
from secateur.contract.ask import TRAIN, Ask
from secateur.contract.state import Setting, State
from secateur.errors import DivergedError
from secateur.federation.archive import Archive
from secateur.federation.soundness import check_sendable, check_start, unsound
from secateur.pruning.structure import Layout
from secateur.wire.message import Expected, Message
from test_norms import lying

SETTING = Setting(0, 5, 20, 1.0, Layout({"w": "weight"}), {})
UPDATES = "wire.replies=updates"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def state(*values, **memory):
    return State(SETTING, 1, {"w": torch.tensor(values)}, memory={k: {"w": torch.tensor(v)} for k, v in memory.items()})


def test_what_can_be_saved_and_sent():
    """65504 is the largest half; what error feedback adds to it would be beyond, so a little room is kept."""
    assert unsound(state(1.0, -6e4), "fp16") == ""
    assert "'w' of its weights is beyond 6.5e+04" in unsound(state(1.0, 65504.0), "fp16")
    assert unsound(state(65504.0), "fp32") == ""
    assert "weights" in unsound(state(float("nan")), "fp32")
    assert "'second'" in unsound(state(1.0, second=[float("inf")]), "fp32")
    assert unsound(state(1.0, second=[1e38]), "fp16") == ""  # what is not sent may be larger than what is
    with pytest.raises(DivergedError, match="before any client is asked"):
        check_start(state(float("inf")), "fp32")
    ask = Ask(TRAIN, 3, (0,), Message({"w": torch.tensor([1e7])}), Expected({}), {})
    check_sendable(ask, "fp32")
    with pytest.raises(DivergedError, match="'w' of what clients would be sent in phase 'train' of round 3"):
        check_sendable(ask, "fp16")


def test_an_archive_goes_back_to_its_last_commit(tmp_path):
    archive = Archive(tmp_path)
    archive["kept"], archive["gone"] = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}
    archive.commit()
    archive.collect()
    archive["kept"], archive["new"] = {"w": torch.tensor([9.0])}, {"w": torch.tensor([8.0])}
    archive["kept"] = {"w": torch.tensor([7.0])}
    del archive["gone"]
    archive.revert()
    archive.commit()
    archive.collect()
    assert sorted(archive) == ["gone", "kept"]
    assert [archive[key]["w"].item() for key in sorted(archive)] == [2.0, 1.0]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("settings", [("aggregator=fed_yogi",), ("aggregator=fed_adam",)])
def test_a_sum_that_overflows_leaves_the_state_as_it_was(settings, tmp_path, shards):
    """Before: 3e38 became NaN in the server's memory, the checkpoint held it, and no resume went further."""
    study = small("fedavg", UPDATES, *settings, participation=1.0)
    engine = lying(study, tmp_path / "lied", shards, rounds=[2], change=lambda t: torch.full_like(t, -3.3e38))
    summary = play(study, tmp_path / "lied", shards, open_engine=engine)
    rows = rows_of(tmp_path / "lied")
    assert [row["round"] for row in rows] == [1, 2, 2, 3, 4]
    assert ["unsound" in row for row in rows] == [False, True, False, False, False]
    assert rows[1]["sparsity"] == rows[0]["sparsity"]
    assert summary["left_out"] == {}
    play(study, tmp_path / "clean", shards)
    assert same(model_of(tmp_path / "lied"), model_of(tmp_path / "clean"))


def test_a_run_in_which_nothing_usable_comes_ends_with_one_line(tmp_path, shards):
    study = small("fedavg", UPDATES, "aggregator=fed_yogi", participation=1.0)
    engine = lying(study, tmp_path, shards, change=lambda t: torch.full_like(t, -3.3e38))
    with pytest.raises(DivergedError, match="what the server made of the replies is not usable.*tried 3 times"):
        play(study, tmp_path, shards, open_engine=engine)
    assert json.loads((tmp_path / "failure.json").read_text())["left_out"] == {}


def test_nobody_is_named_for_what_the_server_sent(tmp_path, shards):
    """Before: one client made the model 1e30, and the three others were named for the NaN that this led to."""
    study = small("fedavg", UPDATES, participation=1.0)
    engine = lying(study, tmp_path, shards, rounds=[1], change=lambda t: torch.full_like(t, 1e30))
    with pytest.raises(DivergedError, match="replies in phase 'train' of round 2 hold NaN or infinity|of any client"):
        play(study, tmp_path, shards, open_engine=engine)
    rows = rows_of(tmp_path)
    assert all(row["left_out"] == [] for row in rows)
    assert {entry["client"] for row in rows[1:] for entry in row["blameless"]} >= {0, 2, 3}
