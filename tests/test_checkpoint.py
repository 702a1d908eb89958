"""Checkpoints: exact, atomic, and damage is named."""

import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from helpers import environment, same
from secateur.contract.state import Setting, State
from secateur.errors import CheckpointError
from secateur.federation import checkpoint
from secateur.pruning.structure import Layout

SETTING = Setting(0, 3, 2, 1.0, Layout({}), {})


def state(mask=True):
    return State(
        SETTING, 2, {"w": torch.tensor([-0.0, 1e-40]), "a/b": torch.tensor(3.0)},
        {"w": torch.tensor([True, False])} if mask else None,
        {"velocity": {"w": torch.zeros(0), "a/b": torch.ones(2, 2).t()}}, {"explore": 1, "x": "y"},
    )  # fmt: skip


@pytest.mark.parametrize("mask", [True, False])
def test_round_trip_is_exact(tmp_path, mask):
    before = state(mask)
    checkpoint.save(tmp_path, before, {"records": 5})
    saved = checkpoint.load(tmp_path, SETTING)
    after = saved.state
    assert saved.extra == {"records": 5}
    assert (after.round, after.notes, list(after.weights), list(after.memory)) == (
        2,
        before.notes,
        ["w", "a/b"],
        ["velocity"],
    )
    assert after.weights["w"].numpy().tobytes() == before.weights["w"].numpy().tobytes()
    assert torch.equal(after.memory["velocity"]["a/b"], torch.ones(2, 2))
    assert (after.mask is None) == (not mask)


def test_the_archive_of_a_state_is_the_one_that_is_given(tmp_path):
    checkpoint.save(tmp_path, state(), {})
    archive = {}
    assert checkpoint.load(tmp_path, SETTING, archive).state.archive is archive


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    shared = torch.arange(4.0)
    before = replace(state(), memory={"one": {"w": shared}, "two": {"w": shared, "part": shared[1:3]}})
    checkpoint.save(tmp_path, before, {})
    memory = checkpoint.load(tmp_path, SETTING).state.memory
    assert memory["one"]["w"].tolist() == memory["two"]["w"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert memory["two"]["part"].tolist() == [1.0, 2.0]


def test_every_kind_of_damage_is_one_clear_error(tmp_path):
    checkpoint.save(tmp_path, state(), {})
    path = tmp_path / checkpoint.NAME
    whole = path.read_bytes()
    cases = {
        "tensor bit": whole[:-1] + bytes([whole[-1] ^ 1]),
        "truncated": whole[:-9],
        "empty": b"",
        "noise": b"x" * 500,
    }
    head = int.from_bytes(whole[:8], "little")
    cases["header"] = whole[:20] + b"#" * 8 + whole[28 : 8 + head] + whole[8 + head :]
    for data in cases.values():
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="checkpoint.*secateur run --config"):
            checkpoint.load(tmp_path, SETTING)
    path.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoint.load(tmp_path, SETTING)


def test_the_header_is_under_the_digest_too(tmp_path):
    """The round, and all else that is no tensor."""
    checkpoint.save(tmp_path, state(), {"records": 5, "store": {"exchange": 7}, "left": {3: "why"}})
    path = tmp_path / checkpoint.NAME
    assert checkpoint.load(tmp_path, SETTING).extra["left"] == {"3": "why"}
    whole = path.read_bytes()
    for before, after in ((rb"\"round\": 2", rb"\"round\": 5"), (rb"\"records\": 5", rb"\"records\": 6")):
        assert whole.count(before) == 1
        path.write_bytes(whole.replace(before, after))
        with pytest.raises(CheckpointError, match=r"is damaged \(its digest differs\)"):
            checkpoint.load(tmp_path, SETTING)


def test_a_checkpoint_of_another_version_is_refused_with_the_reason(tmp_path):
    checkpoint.save(tmp_path, state(), {})
    path = tmp_path / checkpoint.NAME
    path.write_bytes(path.read_bytes().replace(rb"\"format\": 3", rb"\"format\": 1"))
    with pytest.raises(
        CheckpointError, match="of format 1, .*from format 3 only: finish.*secateur run --config.*reported"
    ):
        checkpoint.load(tmp_path, SETTING)


def test_notes_beyond_what_a_header_can_hold_are_one_clear_error(tmp_path):
    """Safetensors takes headers of 100 MB at most."""
    long = replace(state(), notes={"long": "x" * 101_000_000})
    with pytest.raises(CheckpointError, match="state of round 2 cannot be written"):
        checkpoint.save(tmp_path, long, {})


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from secateur.federation import checkpoint
from secateur.errors import CheckpointError
from secateur.contract.state import Setting, State
from secateur.pruning.structure import Layout

folder = Path(sys.argv[1])
setting = Setting(0, 3, 2, 1.0, Layout({}), {})
checkpoint.save(folder, State(setting, 1, {"w": torch.ones(1000)}), {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    checkpoint.save(folder, State(setting, 2, {"w": torch.ones(100000)}), {})
except CheckpointError as error:
    print(error)
try:
    for _ in range(1000):
        checkpoint.append(folder / "rounds.jsonl", "x" * 1000)
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    """A real failing write: the kernel refuses to let the file grow."""
    if not hasattr(resource, "RLIMIT_FSIZE"):
        pytest.skip("this system cannot limit the size of a file")
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True,
        env=environment(),
    )  # fmt: skip
    first, second = done.stdout.strip().splitlines()
    assert "cannot write" in first
    assert "untouched" in first
    assert "secateur resume" in first
    assert "rounds.jsonl" in second
    assert checkpoint.load(tmp_path, SETTING).state.round == 1
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_ship_writes_dense_layout_and_mask(tmp_path):
    model, mask = {"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([False, True])}
    checkpoint.ship(tmp_path, model, mask, {"study": "study text"})
    with safe_open(tmp_path / checkpoint.MODEL, framework="pt") as file:
        assert file.get_tensor("w").tolist() == [0.0, 2.0]
        assert file.get_tensor("mask/w").tolist() == [0, 1]
    assert checkpoint.shipped(tmp_path)[2] == {"study": "study text"}
    assert same(checkpoint.shipped(tmp_path)[0], model)
    assert same(checkpoint.shipped(tmp_path)[1], mask)


def test_append_needs_a_writable_place(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write"):
        checkpoint.append(tmp_path / "no folder" / "rounds.jsonl", "x")


def test_a_failed_write_says_what_to_do_and_leaves_no_rest(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write .*untouched.*secateur resume"):
        checkpoint.write(tmp_path / "no folder" / "file", b"x")
    (tmp_path / "taken").mkdir()
    with pytest.raises(CheckpointError, match="cannot write"):
        checkpoint.write(tmp_path / "taken", b"x")  # a folder cannot be replaced by a file
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
    checkpoint.write(tmp_path / "file", b"old")
    checkpoint.write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_memory_that_could_not_be_read_back_is_refused(tmp_path):
    state = State(None, 0, {"w": torch.zeros(1)}, memory={"mask/0": {"w": torch.zeros(1)}})
    with pytest.raises(CheckpointError, match=r"State\.memory\['mask/0'\]"):
        checkpoint.save(tmp_path, state, {})
