"""Statistics of clients of which two of twenty lie within every range: AutoFLIP's deviations, and votes."""

import pytest
import torch

from helpers import Wrapped, noted, play, rows_of, small, tiny_shards
from secateur.engines import Failure
from secateur.errors import ConfigError
from secateur.federation.server import Run
from secateur.study.runtime import Runtime
from secateur.wire.codec import decode, encode
from secateur.wire.head import context_of
from secateur.wire.message import Expected, Message


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"), clients=20, rows=400)


def exploring(*settings):
    return small(
        "autoflip", "data.clients=20", "criterion.explore.epochs=4", "granularity=weight", *settings, rounds=1,
        participation=0.5,
    )  # fmt: skip


def hostile(study, folder, shards, change):
    """Return an engine whose clients 3 and 7 change their deviations."""
    setting = Run(study, Runtime(workers=0), folder, shards).setting
    specs = {name: setting.specs[name] for name in setting.layout.trainable}

    class Lies(Wrapped):
        """Clients 3 and 7 lie in the exploration."""

        def exchange(self, requests, deadline=None):
            self.count, asked = getattr(self, "count", 0) + 1, {}
            for client, answer in self.inner.exchange(noted(requests, asked), deadline):
                if client not in {3, 7} or isinstance(answer, Failure) or self.count > 1:
                    yield client, answer
                    continue
                told = decode(answer, Expected(specs))
                made = {n: change(t) for n, t in told.tensors.items()}
                yield client, encode(Message(made, None, told.scalars), context=context_of(asked[client]))

    return Lies.open


def flat(deviation):
    """Return 1e30 everywhere: beside it nothing honest is seen, all weights score alike, and the quantile takes all."""
    return torch.full_like(deviation, 1e30)


@pytest.mark.parametrize("merge", ["median", "trimmed"])
def test_two_of_twenty_explorers_do_not_decide_what_is_pruned(merge, tmp_path, shards):
    study = exploring(f"criterion.merge={merge}")
    clean = play(study, tmp_path / "clean", shards)["final"]["sparsity"]
    engine = hostile(study, tmp_path / "run", shards, flat)
    summary = play(study, tmp_path / "run", shards, open_engine=engine)
    assert summary["left_out"] == {}
    assert abs(summary["final"]["sparsity"] - clean) <= 0.02


def test_with_the_mean_the_same_two_decide(tmp_path, shards):
    study = exploring()
    engine = hostile(study, tmp_path / "run", shards, flat)
    assert play(study, tmp_path / "run", shards, open_engine=engine)["final"]["sparsity"] > 0.9


def test_a_deviation_below_zero_costs_its_sender_the_exploration(tmp_path, shards):
    """Before: it was accepted, and the mean fell below every honest deviation."""
    study = exploring()
    engine = hostile(study, tmp_path / "run", shards, lambda deviation: -deviation - 1)
    play(study, tmp_path / "run", shards, open_engine=engine)
    left = rows_of(tmp_path / "run")[0]["left_out"]
    assert [entry["client"] for entry in left] == [3, 7]
    assert all("0 to inf is expected" in entry["reason"] for entry in left)


@pytest.mark.parametrize(("settings", "words"), [
    (("criterion=synflow", "criterion.merge=median"), "criterion.merge = 'median' must be mean"),
    (("criterion=taylor", "criterion.merge=medium"), "criterion.merge"),
    (("criterion=magnitude", "criterion.merge=median"), "unknown option of Magnitude 'criterion.merge'"),
    (("consensus=majority", "consensus.floor=1"), "consensus.floor = 1.0 must be in"),
])  # fmt: skip
def test_a_rule_that_does_not_fit_is_refused_in_one_line(settings, words):
    with pytest.raises(ConfigError, match=words):
        small("fedsparsify", *settings)


def test_a_rule_that_is_the_default_does_not_rename_a_run():
    plain = small("fedsparsify", "criterion=taylor")
    assert plain.hash() == small("fedsparsify", "criterion=taylor", "criterion.merge=mean").hash()
    assert plain.hash() != small("fedsparsify", "criterion=taylor", "criterion.merge=median").hash()
    assert "criterion.merge" in plain.complete().options


@pytest.mark.parametrize("merge", ["median", "trimmed"])
def test_statistics_of_gradients_are_merged_by_the_rule(merge, tmp_path, shards):
    play(
        small("fedsparsify", "criterion=fisher", f"criterion.merge={merge}", "data.clients=20"), tmp_path / "a", shards
    )
    assert [row["phase"] for row in rows_of(tmp_path / "a")].count("score") >= 1
