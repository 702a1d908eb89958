"""The contract that every method keeps, those of the package and anyone's; no method is named in a check."""

import ast
import inspect
import itertools
import random
import sys

import pytest
import torch

from helpers import (
    INLINE,
    Killing,
    KillingRelays,
    Wrapped,
    edited,
    model_of,
    play,
    resumed,
    rows_of,
    same,
    small,
    tiny_shards,
)
from secateur import methods
from secateur.engines import Failure
from secateur.errors import ConfigError, NobodyTrainedError
from secateur.federation import checkpoint, server
from secateur.federation.folder import reserve
from secateur.study.options import flatten
from secateur.study.runtime import Runtime
from secateur.wire.codec import encode, part_sizes
from secateur.wire.message import Message

METHODS = [*methods.names(), "toy_method"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory, shards):
    """Run each method once, undisturbed; return its folder."""
    folders = {}

    def of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("reference")
            play(small(name), folders[name], shards)
        return folders[name]

    return of


# the setting at which a method prunes nothing and gives everyone the whole model
OFF = dict.fromkeys(("sparsity", "rate", "strength", "target", "l1", "prox", "tau", "clusters"), 0)
OFF |= {"levels": 1, "parts": 1, "width": 1}


def off_options(study):
    """Return path=value for each setting that switches a method off."""
    found = flatten(study.build_method())
    return [f"{p}={OFF[p.rpartition('.')[2]]}" for p in found if p.rpartition(".")[2] in OFF]


def sparsity_options(study):
    return [p for p, v in flatten(study.build_method()).items() if p.rpartition(".")[2] == "sparsity" and v]


@pytest.mark.parametrize("name", METHODS)
def test_switched_off_is_fedavg_bit_for_bit(name, tmp_path, shards):
    if not small(name).build_method().trains_weights:
        pytest.skip("it learns no weights, so there is no setting at which it is FedAvg")
    off = small(name, *off_options(small(name)))
    play(off, tmp_path / "off", shards)
    play(off.dense(), tmp_path / "dense", shards)
    assert same(model_of(tmp_path / "off"), model_of(tmp_path / "dense"))


@pytest.mark.parametrize("name", METHODS)
def test_state_survives_save_and_load(name, tmp_path, shards, reference):
    """Stop after every single exchange, as a new process would find it, and go on from disk."""
    folder = tmp_path / "run"
    resumed(small(name), folder, shards)
    assert same(model_of(folder), model_of(reference(name)))
    assert without_seconds(folder) == without_seconds(reference(name))


def without_seconds(folder):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(folder)]


@pytest.mark.parametrize("name", METHODS)
def test_budget_shapes_and_dtypes(name, reference):
    study = small(name)
    tensors = model_of(reference(name))
    masks = {n.removeprefix("mask/"): t.bool() for n, t in tensors.items() if n.startswith("mask/")}
    model = {n: t for n, t in tensors.items() if not n.startswith("mask/")}
    levels = [flatten(study.build_method())[p] for p in sparsity_options(study)]
    total, kept = sum(m.numel() for m in masks.values()), sum(int(m.sum()) for m in masks.values())
    if levels:
        assert kept <= total - int(max(levels) * total + 1e-6)
        assert kept > 0
    assert all(t.dtype == torch.float32 for t in model.values())
    assert {n: tuple(t.shape) for n, t in model.items()} == {n: tuple(masks[n].shape) for n in masks} | {
        n: tuple(t.shape) for n, t in model.items() if n not in masks
    }
    for n, mask in masks.items():
        assert (model[n][~mask] == 0).all()
        assert not torch.signbit(model[n][~mask]).any()


@pytest.mark.parametrize("name", METHODS)
def test_no_regrowth_unless_declared(name, tmp_path, shards):
    seen = []

    class Watched(Wrapped):
        def exchange(self, requests, deadline=None):
            yield from self.inner.exchange(requests, deadline)

    study = small(name)
    reserve(tmp_path / "run", study)
    original = checkpoint.save

    def save(folder, state, *rest):
        seen.append(state.mask)
        original(folder, state, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        server.resume(tmp_path / "run", INLINE, shards=shards, open_engine=Watched.open)
    if not study.build_method().regrows:
        pairs = [(a, b) for a, b in itertools.pairwise(seen) if a is not None]
        assert all(b is not None and not (b[n] & ~a[n]).any() for a, b in pairs for n in a)


class Shuffled(Wrapped):
    """Answers arrive in another order."""

    def exchange(self, requests, deadline=None):
        answers = list(self.inner.exchange(requests, deadline))
        random.Random(len(answers)).shuffle(answers)
        yield from answers


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("nine"), clients=9, rows=144)


KILLED = ((Runtime(workers=2), Killing), (Runtime(workers=0, relays=3), KillingRelays))
SHUFFLED = ((Runtime(workers=4), Shuffled), (Runtime(workers=2, relays=1), Shuffled))


@pytest.mark.parametrize("name", METHODS)
def test_workers_and_shuffled_replies_change_nothing(name, tmp_path, nine):
    """Cohorts of nine are three blocks, the last of one client, and each of three relays has one.

    In every exchange a worker, or a relay, is killed in the middle of a task. Every fourth method is also asked to bear
    replies as bytes that come in another order, of four workers and of a relay with two.
    """
    study = small(name, rounds=2, participation=1.0, data={"clients": 9, "partition": "iid", "test_fraction": 0.2})
    play(study, tmp_path / "0", nine)
    for number, (runtime, engine) in enumerate(KILLED + (SHUFFLED if name in METHODS[::4] else ()), 1):
        folder = tmp_path / str(number)
        play(study, folder, nine, runtime=runtime, open_engine=engine.open)
        assert same(model_of(folder), model_of(tmp_path / "0"))
        assert records_of(folder) == records_of(tmp_path / "0")
        assert all(("relayed" in row) == (engine is KillingRelays) for row in rows_of(folder))


def records_of(folder):
    """Return the records of a run without what depends on its runtime."""
    return [{k: v for k, v in row.items() if "seconds" not in k and "relayed" not in k} for row in rows_of(folder)]


@pytest.mark.parametrize("name", METHODS)
def test_ledger_equals_bytes_carried(name, tmp_path, shards):
    carried = []

    class Counting(Wrapped):
        def exchange(self, requests, deadline=None):
            count = {"down": 0, "up": 0}
            carried.append(count)

            def counted():
                for client, request in requests:
                    count["down"] += len(request)
                    yield client, request

            for client, reply in self.inner.exchange(counted(), deadline):
                count["up"] += len(reply)
                yield client, reply

    summary = play(small(name), tmp_path / "run", shards, open_engine=Counting.open)
    rows = rows_of(tmp_path / "run")
    scoring, exchanges = 0, iter(carried)
    for row in rows:
        count = next(exchanges)
        assert (row["bytes_down"], row["bytes_up"]) == (count["down"], count["up"])
        if "evaluate_bytes" in row:  # scored on clients' rows
            scoring += sum(next(exchanges).values())
    assert summary["final"]["evaluate_bytes"] == scoring + sum(next(exchanges).values())
    assert next(exchanges, None) is None
    for direction in ("down", "up"):
        assert all(sum(r[direction].values()) == r[f"bytes_{direction}"] for r in rows)
        totals = sum(phase[f"bytes_{direction}"] for phase in summary["phases"].values())
        assert totals == sum(r[f"bytes_{direction}"] for r in rows)


def nan_reply(reply):
    del reply
    return encode(Message({"fc1.weight": torch.full((12, 16), torch.nan)}))


HOSTILE = {
    "negative samples": edited(samples=-5),
    "endless samples": edited(samples=2**60),
    "more samples": edited(samples=1000),
    "infinite loss": edited(loss=float("inf")),
    "negative seconds": edited(seconds=-1.0),
    "garbage": lambda reply: b"\x00garbage" * 7,
    "empty": lambda reply: b"",
    "truncated": lambda reply: reply[: len(reply) // 2],
    "flipped": lambda reply: reply[:40] + bytes([reply[40] ^ 1]) + reply[41:],
    "another message": lambda reply: encode(Message({}, None, {"samples": 1})),
    "nan": nan_reply,
}


class Hostile(Wrapped):
    """Client 1 sends something else; or, with ``attack`` None, nothing at all."""

    attack = None

    def exchange(self, requests, deadline=None):
        for client, reply in self.inner.exchange(requests, deadline):
            if client == 1 and not isinstance(reply, Failure):
                yield client, Failure(1, "silent") if self.attack is None else HOSTILE[self.attack](reply)
            else:
                yield client, reply


@pytest.mark.parametrize("name", METHODS)
def test_a_hostile_reply_costs_only_its_sender(name, tmp_path, shards):
    models = {}
    for attack in (None, *HOSTILE):
        engine = type("Attack", (Hostile,), {"attack": attack})
        summary = play(small(name), tmp_path / str(attack), shards, open_engine=engine.open)
        models[attack] = model_of(tmp_path / str(attack))
        left = [entry for row in rows_of(tmp_path / str(attack)) for entry in row["left_out"]]
        assert left
        assert {entry["client"] for entry in left} == {1}
        assert sum(p["left_out"] for p in summary["phases"].values()) == len(left)
    assert all(same(models[None], models[attack]) for attack in HOSTILE)


@pytest.mark.parametrize("name", METHODS)
def test_without_any_reply_the_model_is_kept_and_the_end_is_an_error(name, tmp_path, shards):
    class Deaf(Wrapped):
        def exchange(self, requests, deadline=None):
            yield from ((client, Failure(client, "silent")) for client, _ in requests)

    study = small(name)
    with pytest.raises(NobodyTrainedError, match=r"no reply of any client counted.* because: silent"):
        play(study, tmp_path / "run", shards, open_engine=Deaf.open)
    assert len({(row["phase"], row["round"]) for row in rows_of(tmp_path / "run")}) == 1
    assert [row.get("attempt", 0) for row in rows_of(tmp_path / "run")] == [0, 1, 2]
    held = server.Run(study, INLINE, tmp_path / "run", shards)
    state = held.restore()
    assert all(torch.isfinite(t.float()).all() for t in state.weights.values())
    assert not {"summary.json", "model.safetensors"} & {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("name", METHODS)
def test_docstring_has_a_reference_and_options_have_defaults(name):
    cls = methods.find(name)
    text = inspect.cleandoc(sys.modules[cls.__module__].__doc__)
    assert "\nReference: " in text
    assert text.splitlines()[0].endswith((".", ":"))
    cls()
    if name != "toy_method":
        assert "Departures: " in text
        assert "eproduced" in text


@pytest.mark.parametrize("name", METHODS)
def test_values_and_masks_are_told_apart_in_every_payload(name, tmp_path, shards):
    class Parts(Wrapped):
        def exchange(self, requests, deadline=None):
            for client, reply in self.inner.exchange(requests, deadline):
                assert sum(part_sizes(reply).values()) == len(reply)
                yield client, reply

    play(replace_rounds(small(name), 2), tmp_path / "run", shards, open_engine=Parts.open)


def replace_rounds(study, rounds):
    return study.model_copy(update={"rounds": rounds})


def code_lines(source):
    """Count lines that are neither blank, nor comments, nor docstrings."""
    tree, text = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            text |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(1 for n, line in lines if n not in text and line.strip() and not line.strip().startswith("#"))


def test_a_method_file_is_small_and_shares_little():
    """At most 100 code lines, and no two files share more than 15 lines in a row."""
    files = {n: inspect.getsource(sys.modules[methods.find(n).__module__]).splitlines() for n in methods.names()}
    sizes = [code_lines("\n".join(lines)) for lines in files.values()]
    assert max(sizes) <= 100
    for one, other in itertools.combinations(files.values(), 2):
        blocks = {"\n".join(one[i : i + 16]) for i in range(max(0, len(one) - 15))}
        assert not any("\n".join(other[i : i + 16]) in blocks for i in range(len(other) - 15))
    assert len(inspect.getsource(sys.modules[methods.find("toy_method").__module__]).splitlines()) <= 40


def test_a_method_for_the_contract_of_before_is_told_what_to_change(tmp_path, monkeypatch):
    head = '"""Old.\n\nReference: none\n"""\nfrom dataclasses import dataclass\n'
    body = "@dataclass(frozen=True)\nclass Old(Composition):\n    def absorb(self, state, replies):\n        pass\n"
    imports = "from secateur import Composition\n"
    (tmp_path / "their_old.py").write_text(head + imports + body)
    (tmp_path / "their_older.py").write_text(head + "from secateur.method import Method\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"absorb\(state, replies\) is absorb\(state, reduced\) now.*migration"):
        small("their_old")
    with pytest.raises(ConfigError, match=r"No module named 'secateur.method'; docs/migration.md says where"):
        small("their_older")
