"""Damaged files of runs, lost and changed ones: each is refused in one line, or changes nothing."""

import hashlib
import importlib.util
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

import secateur
from helpers import INLINE, model_of, play, rows_of, same, small, tiny_shards
from secateur.comparison import grid
from secateur.comparison.suite import Cell
from secateur.errors import CheckpointError, SecateurError
from secateur.export.export import export
from secateur.federation import checkpoint, origin, seals, server
from secateur.federation.folder import read_records, read_study, reserve
from secateur.report.gather import Subject, gather
from secateur.report.outcomes import outcome
from secateur.report.page import subject_data
from secateur.report.trackers import log_records

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def damage():
    spec = importlib.util.spec_from_file_location("benchmark_damage", ROOT / "benchmarks" / "damage.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def test_flipped_bits_and_cut_files_are_refused_or_change_nothing(tmp_path, monkeypatch, damage, shards):
    """A sample of what ``benchmarks/damage.py`` does to every file of a run."""
    monkeypatch.setattr(damage, "study", lambda: small("dispfl"))
    told = []
    found = damage.measure(damage.make(shards, tmp_path), 8, 5, told.append)["found"]
    assert not told
    assert damage.bad(found) == 0
    counted = Counter(what for ways in found.values() for verdicts in ways.values() for what in verdicts.elements())
    assert sum(counted.values()) == 2 * 8 * len(damage.TARGETS)
    assert counted["refused"] > 0.9 * sum(counted.values())


class Stop(BaseException):
    pass


def stopped(folder, shards, study, *, at):
    """Make a run and stop it once a round is recorded."""

    def stop(event):
        if event["event"] == "row" and event["round"] == at:
            raise Stop

    reserve(folder, study)
    with pytest.raises(Stop):
        server.resume(folder, INLINE, shards=shards, watch=stop)


def test_each_record_carries_the_digest_of_itself_and_all_before_it(tmp_path, shards):
    """Computed again from the file's text alone: BLAKE2b of the digest before and the line without its own."""
    play(small(), tmp_path / "run", shards)
    before = ""
    for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines():
        text, _, digest = line.removesuffix('"}').rpartition(', "chain": "')
        before = hashlib.blake2b(f"{before}{text}}}".encode(), digest_size=8).hexdigest()
        assert digest == before
    assert read_records(tmp_path / "run") == rows_of(tmp_path / "run")


def test_the_digests_of_a_finished_run_are_those_of_its_files(tmp_path, shards):
    play(small(), tmp_path / "run", shards)
    known = seals.read(tmp_path / "run")
    assert set(known) == {"study.toml", "rounds.jsonl", "plan.json", "model.safetensors", "summary.json"}
    for name, digest in known.items():
        assert hashlib.blake2b((tmp_path / "run" / name).read_bytes(), digest_size=16).hexdigest() == digest


def test_records_of_another_run_or_with_a_line_gone_are_refused(tmp_path, shards):
    for name, study in (("one", small()), ("other", small(seed=1))):
        stopped(tmp_path / name, shards, study, at=2)
    path = tmp_path / "one" / "rounds.jsonl"
    first, second = path.read_text().splitlines(keepends=True)
    for text, told in (
        ((tmp_path / "other" / "rounds.jsonl").read_text(), "shorter than|not of the run that its checkpoint"),
        (first, "is shorter than its checkpoint says; the records of this run are lost"),
        (second, "is damaged in line 1"),
        (first + second.replace('"round": 2', '"round": 3'), "is damaged in line 2"),
    ):
        path.write_text(text)
        for read in (lambda: outcome(tmp_path / "one"), lambda: server.resume(tmp_path / "one", INLINE, shards=shards)):
            with pytest.raises(CheckpointError, match=told):
                read()
    path.write_text(first + second + '{"half a li')
    assert [row["round"] for row in read_records(tmp_path / "one")] == [1, 2]


def test_a_finished_run_whose_model_is_damaged_is_made_again_from_its_checkpoint(tmp_path, shards):
    folder = tmp_path / "run"
    play(small("fedsparsify"), folder, shards)
    whole = (folder / checkpoint.MODEL).read_bytes()
    (folder / checkpoint.MODEL).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model.safetensors was changed .* delete its summary.json"):
        server.resume(folder, INLINE, shards=shards)
    (folder / "summary.json").unlink()
    server.resume(folder, INLINE, shards=shards)
    assert (folder / checkpoint.MODEL).read_bytes() == whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shards):
    folder = grid.folder_of(tmp_path_factory.mktemp("out"), small("fedsparsify"))
    play(small("fedsparsify"), folder, shards)
    return folder


READERS = {
    "resume": lambda folder: server.resume(folder, INLINE, shards=Path("/nowhere")),
    "report": lambda folder: [subject_data(one) for one in gather([folder]).subjects],
    "budget": lambda folder: gather([folder]).lines,
    "log": lambda folder: log_records(folder, "tensorboard"),
    "load": secateur.load,
    "export": lambda folder: export(folder, "safetensors", folder / "export"),
    "compare": lambda folder: run_one(folder.parents[1]),
}
READ = {
    "rounds.jsonl": {"resume", "report", "budget", "log", "compare"},
    "summary.json": set(READERS),
    "model.safetensors": set(READERS) - {"log"},
    "plan.json": {"resume", "load", "export", "compare"},
    "study.toml": {"resume", "report", "budget", "log", "load", "compare"},
}


def run_one(out):
    """Go on with a comparison of one run."""
    cell = Cell("iid", "one", 0, small("fedsparsify"))
    with grid._Pool(out, grid.Here(), lambda *_: None) as pool:
        pool.finish([cell])


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("reader", READERS)
def test_every_command_refuses_a_damaged_file_that_it_reads(tmp_path, whole, reader, name):
    folder = tmp_path / "runs" / whole.name
    shutil.copytree(whole, folder)
    data = (folder / name).read_bytes()
    at = max(data.rfind(b"%d" % digit) for digit in range(10))  # another figure: as well formed as before
    (folder / name).write_bytes(data[:at] + b"%d" % ((data[at] - 48 + 1) % 10) + data[at + 1 :])
    if reader in READ[name]:
        with pytest.raises(CheckpointError, match=f"{name} was changed since the run wrote it, or is damage") as told:
            READERS[reader](folder)
        assert "\n" not in str(told.value)
    elif reader in {"load", "log"}:  # and what it does not read is no matter
        READERS[reader](folder)


def test_a_run_that_lost_its_checkpoint_does_not_begin_again(tmp_path, shards):
    stopped(tmp_path / "two", shards, small(), at=2)
    (tmp_path / "two" / checkpoint.NAME).unlink()
    for left in ("clients.sqlite", None):
        if left:
            (tmp_path / "two" / left).unlink()
        with pytest.raises(CheckpointError, match="is missing, though 2 exchanges of the run are recorded: bring it"):
            server.resume(tmp_path / "two", INLINE, shards=shards)
    assert len(rows_of(tmp_path / "two")) == 2
    # of a single one nobody can tell whether its checkpoint was ever written: it is made again, and said
    stopped(tmp_path / "one", shards, small(), at=1)
    (tmp_path / "one" / checkpoint.NAME).unlink()
    told = []
    summary = server.resume(tmp_path / "one", INLINE, shards=shards, watch=told.append)
    remark = "the run begins again: it had 1 exchange recorded and no checkpoint"
    assert {"event": "remark", "text": remark} in told
    assert remark in summary["remarks"]
    play(small(), tmp_path / "whole", shards)
    assert same(model_of(tmp_path / "one"), model_of(tmp_path / "whole"))


METHOD = '''"""Average, times one.

Reference: none
"""
from dataclasses import dataclass
from secateur.methods.kit.composition import Composition
from their_part import FACTOR

@dataclass(frozen=True)
class Times(Composition):
    factor: float = FACTOR
'''


def test_a_run_is_not_gone_on_with_other_code_unless_that_is_accepted(tmp_path, monkeypatch, shards):
    """The method's own module, and one that it imports; the package's own stand by their names."""
    place, folder = tmp_path / "code", tmp_path / "run"
    place.mkdir()
    (place / "their_times.py").write_text(METHOD)
    (place / "their_part.py").write_text("FACTOR = 1.0\n")
    monkeypatch.syspath_prepend(place)
    study = small("their_times")
    known = origin.code(study)
    assert {"their_times", "their_part", "secateur.methods.kit.composition", "secateur.guards.bounds"} <= set(known)
    assert not any(name.startswith(("secateur.pruning", "torch", "dataclasses")) for name in known)
    stopped(folder, shards, study, at=2)
    (place / "their_part.py").write_text("FACTOR = 2.0\n")
    with pytest.raises(CheckpointError, match=r"the code of their_part\. Bring back .* --accept-changes$"):
        server.resume(folder, INLINE, shards=shards)
    summary = server.resume(folder, INLINE, shards=shards, accept=True)
    assert "from round 3 on the code of their_part changed, and was accepted" in summary["remarks"]


def test_an_edited_study_can_be_accepted_and_a_model_of_another_shape_cannot(tmp_path, shards):
    folder = tmp_path / "run"
    stopped(folder, shards, small(), at=2)
    path = folder / "study.toml"
    whole = path.read_text()
    path.write_text(whole.replace("hidden = [\n    12,", "hidden = [\n    13,"))
    assert path.read_text() != whole
    with pytest.raises(CheckpointError, match="is another than it began with"):
        server.resume(folder, INLINE, shards=shards, accept=True)
    path.write_text(whole.replace("rounds = 4", "rounds = 5"))
    before = read_study(folder, edited=True)
    summary = server.resume(folder, INLINE, shards=shards, accept=True)
    assert (len(rows_of(folder)), read_study(folder)) == (5, before)
    (remark,) = [text for text in summary["remarks"] if "accepted" in text]
    assert remark.startswith("from round 3 on the study (it was ")
    assert outcome(folder).quality == summary["final"]["accuracy"]


def test_another_version_of_the_package_is_said():
    now = {"study": "a", "version": "2", "code": {"m": "1"}}
    assert origin.changes(now, now) == []
    assert origin.changes({**now, "version": "1"}, now) == ["the version of secateur (it was 1, it is 2)"]
    assert origin.changes({**now, "code": {"m": "1", "n": "2"}}, now) == ["the code of n"]


def test_a_run_from_before_there_were_digests_is_reported_and_said_to_be_unchecked(tmp_path, shards):
    folder = tmp_path / "run"
    summary = play(small(), folder, shards)
    assert seals.UNCHECKED not in subject_data(Subject("run", folder))["remarks"]
    path = folder / "rounds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(folder)))
    (folder / seals.NAME).unlink()
    assert seals.UNCHECKED in subject_data(Subject("run", folder))["remarks"]
    assert outcome(folder).quality == summary["final"]["accuracy"]
    path.write_text(path.read_text()[:-5])
    with pytest.raises(CheckpointError, match="is damaged in line 4"):
        outcome(folder)


def test_digests_that_are_damaged_themselves_are_refused(tmp_path, shards):
    stopped(tmp_path / "run", shards, small(), at=1)
    path = tmp_path / "run" / seals.NAME
    for text in ("", "[]", "{}", path.read_text().replace("study.toml", "study.tomb")):
        path.write_text(text)
        with pytest.raises(SecateurError, match=r"digests.json is damaged, so that the files beside it cannot"):
            read_study(tmp_path / "run")
