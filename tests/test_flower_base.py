"""Frozen tensors that only the server has, on Flower: each node is sent them once, for all its runs."""

import logging

import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]' in a clone of secateur")

from flwr.app import RecordDict

from helpers import model_of, play, rows_of, same
from loopgrid import LoopGrid, Node
from secateur.errors import NobodyTrainedError
from secateur.federation import prepare
from secateur.flower import apps, asked, bases, client_app
from secateur.flower import node as node_of
from secateur.flower.codes import RefusedError
from secateur.flower.site import site_of
from secateur.wire.known import digest
from test_sent_base import apart, base_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
    pytest.mark.usefixtures("quick"),
]
NAMED = 16 + 1


@pytest.fixture
def file(tmp_path):
    draw = torch.Generator().manual_seed(3)
    body = {"weight": torch.randn(12, 64, generator=draw), "bias": torch.randn(12, generator=draw)}
    torch.save({"body": body, "past": torch.full((12,), -torch.inf)}, tmp_path / "body.pt")
    return tmp_path / "body.pt"


@pytest.fixture
def settings(tmp_path, file):
    return {
        "method": "fedsparsify", "rounds": 3, "data.clients": 4, "participation": 0.75, "data.partition": "iid",
        "schedule.sparsity": 0.5, "model.name": "test_sent_base:pretrained", "model.options.file": str(file),
        "out": str(tmp_path / "flower"),
    }  # fmt: skip


def grid_of(settings, file, **config):
    """Return a grid of four nodes on which the file is missing; ``config``: of each, by a function of its number."""
    nodes = {}
    for k in range(4):
        own = {name: value(k) for name, value in config.items()}
        allow = "model.name=test_sent_base:pretrained"
        node = Node(client_app(), 10 + k, settings, **{"partition-id": k, "allow": allow, **own})
        node.answer = without(file, node.answer)
        nodes[10 + k] = node
    return LoopGrid(nodes)


def without(file, answer):
    def answered(message):
        away = file.rename(file.with_suffix(".away"))
        try:
            return answer(message)
        finally:
            away.rename(file)

    return answered


def ledger(folder):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(folder)]


@pytest.mark.parametrize("place", ["context", "folder"])
def test_the_model_and_ledger_are_those_of_the_local_engine(place, settings, file, tmp_path):
    config = {"state": lambda k: str(tmp_path / "state" / str(k))} if place == "folder" else {}
    grid = grid_of(settings, file, **config)
    summary = apps.serve(grid, settings)
    assert summary["left_out"] == {}
    made, _ = apps.study_of(settings)
    with prepare.federation(made) as shards:
        play(made, tmp_path / "local", shards, open_engine=apart(file).open)
        play(made, tmp_path / "both", shards)
    assert same(model_of(tmp_path / "flower"), model_of(tmp_path / "local"))
    assert same(model_of(tmp_path / "flower"), model_of(tmp_path / "both"))
    assert ledger(tmp_path / "flower") == ledger(tmp_path / "local")
    assert any(row["down"]["base"] > NAMED * len(row["clients"]) for row in ledger(tmp_path / "flower"))
    # another run of the same model: every node has it
    again = {**settings, "out": str(tmp_path / "again"), "rounds": 2}
    for node in grid.nodes.values():
        node.context.run_config = again
        if place == "folder":  # a new run of Flower, and of the node's process
            node.context.state = RecordDict()
            assert [p.name for p in (tmp_path / "state" / str(node.context.node_config["partition-id"]) / "base")
                    .iterdir()] == [digest(base_of(file))]  # fmt: skip
    node_of._participant.cache_clear()
    apps.serve(grid, again)
    assert [row["down"]["base"] for row in ledger(tmp_path / "again")] == [3 * NAMED] * 2


def test_an_owner_may_take_nothing(settings, file, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    some = grid_of(settings, file, base=lambda k: "own" if k < 2 else "taken")
    summary = apps.serve(some, settings)
    assert set(summary["left_out"]) <= {"0", "1"}
    reasons = {o["reason"] for row in rows_of(tmp_path / "flower") for o in row["left_out"]}
    assert all("give both sides the same model.name, pretrained file and torch" in reason for reason in reasons)
    assert all(digest(base_of(file)) in reason for reason in reasons)
    assert reasons
    with pytest.raises(NobodyTrainedError, match=rf"frozen tensors \([0-9a-f]{{32}}, not {digest(base_of(file))}\)"):
        apps.serve(grid_of(settings, file, base=lambda _: "own"), {**settings, "out": str(tmp_path / "none")})
    with pytest.raises(RefusedError, match="base = 'mine': input should be 'taken' or 'own'"):
        site_of({"base": "mine"})


def test_a_context_keeps_the_last_one():
    kept = bases.KeptInContext(asked.Node(1, 1, {}, {}))
    assert kept.own
    assert "a" not in kept
    assert kept.get("a") is None
    kept.put("a", b"one")
    kept.put("b", memoryview(b"two"))
    assert ("a" in kept, kept.get("a"), kept.get("b")) == (False, None, b"two")
