"""Damage the files of runs, one bit or one cut at a time: each must be refused in one line, or change nothing.

    python benchmarks/damage.py --each 1000
    python benchmarks/damage.py --each 1000 --json damage.json

Two small runs are made: one that is finished, and one that was stopped in its middle. A file of one of them is damaged,
and what reads it is called as the commands do: ``resume``, ``report`` (``compare``, ``budget`` and ``log`` read through
the same functions), ``secateur.load`` (as ``export``). What comes out is an error of the package in one line, or what
comes of the undamaged file: the same figures, the same plan, and after ``resume`` the same bits of the model. Anything
else is printed with its place, and ends the program with 1.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.export.export import read as read_shipped
from secateur.federation import checkpoint, prepare, seals, server, store
from secateur.federation.folder import PLAN, ROUNDS, STUDY, SUMMARY, read_study, reserve
from secateur.report.outcomes import outcome
from secateur.study.runtime import Runtime
from secateur.study.study import Study, parse_study

WAYS = ("bit flip", "truncation")
_INLINE = Runtime(workers=0)


def study() -> Study:
    """Return a small study whose clients keep something between rounds, and whose model loses units."""
    return parse_study(
        {
            "method": "dispfl",
            "rounds": 4,
            "participation": 0.75,
            "data": {"source": "digits", "clients": 4, "partition": "iid", "test_fraction": 0.2},
            "model": {"name": "mlp", "options": {"hidden": (12, 8)}},
            "training": {"epochs": 1, "batch_size": 256, "lr": 0.1},
        }
    )


class Halt(BaseException):
    """Ends a run in its middle, as a kill would."""


@dataclass(frozen=True)
class Runs:
    """The runs whose files are damaged.

    Attributes:
        shards: the rows of their clients.
        finished: the folder of a run that is finished.
        stopped: the folder of one that was stopped after half of its rounds.
    """

    shards: Path
    finished: Path
    stopped: Path


def make(shards: Path, folder: Path) -> Runs:
    """Make the runs in a folder."""
    made = Runs(shards, folder / "finished", folder / "stopped")
    for place in (made.finished, made.stopped):
        reserve(place, study())

    def stop(event: Mapping[str, Any]) -> None:
        if event["event"] == "row" and event["round"] == 2:
            raise Halt

    server.resume(made.finished, _INLINE, shards=shards)
    try:
        server.resume(made.stopped, _INLINE, shards=shards, watch=stop)
    except Halt:
        return made
    raise RuntimeError("the run was to be stopped, and was not")


Read = Callable[[Path, Path], object]
"""(a run's folder, the rows of its clients) -> what came of reading it, which can be compared."""


def resumed(folder: Path, shards: Path) -> object:
    """Go on with a run; return the bytes of its model."""
    read_study(folder)
    server.resume(folder, _INLINE, shards=shards)
    return (folder / checkpoint.MODEL).read_bytes()


def reported(folder: Path, shards: Path) -> object:
    """Return the figures that reports show of a run; measured seconds are of this very run, and are among them."""
    del shards
    return repr(outcome(folder))


def loaded(folder: Path, shards: Path) -> object:
    """Return the model that is exported, and its plan."""
    del shards
    shipped = read_shipped(folder)
    return {n: t.numpy().tobytes() for n, t in shipped.slim.state_dict().items()}, shipped.plan, shipped.summary


@dataclass(frozen=True)
class Target:
    """A file that is damaged, and what reads it.

    Attributes:
        name: what it is.
        place: returns the folder of its run.
        files: its path in that folder, perhaps of several alike.
        reads: each of them reads it, in turn.
    """

    name: str
    place: Callable[[Runs], Path]
    files: str
    reads: tuple[Read, ...]


def _finished(runs: Runs) -> Path:
    return runs.finished


def _stopped(runs: Runs) -> Path:
    return runs.stopped


TARGETS = (
    Target("checkpoint", _stopped, checkpoint.NAME, (resumed, reported)),
    Target("records", _stopped, ROUNDS, (resumed, reported)),
    Target("records of a finished run", _finished, ROUNDS, (resumed, reported)),
    Target("summary", _finished, SUMMARY, (resumed, reported, loaded)),
    Target("model", _finished, checkpoint.MODEL, (resumed, reported, loaded)),
    Target("plan", _finished, PLAN, (resumed, loaded)),
    Target("study", _finished, STUDY, (resumed, reported)),
    Target("study of a stopped run", _stopped, STUDY, (resumed, reported)),
    Target("client state", _stopped, "clients/*.state", (resumed,)),
    Target("store", _stopped, store.NAME, (resumed,)),
    Target("digests", _finished, seals.NAME, (resumed, reported, loaded)),
)


def damaged(data: bytes, way: str, draw: random.Random) -> bytes:
    """Return bytes with one bit flipped, or only the first of them."""
    if way == "truncation":
        return data[: draw.randrange(len(data))]
    at, bit = draw.randrange(len(data)), draw.randrange(8)
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def judged(read: Read, folder: Path, shards: Path, expected: object) -> tuple[str, str]:
    """Return what came of reading a damaged file (``refused``, ``the same``, ``traceback``, ``differs``), and why."""
    try:
        found = read(folder, shards)
    except SecateurError as told:
        return ("refused", str(told)) if "\n" not in str(told) else ("traceback", str(told))
    except Exception:  # noqa: BLE001 -- it is what is looked for
        return "traceback", traceback.format_exc()
    return ("the same", "") if found == expected else ("differs", "")


def trials(runs: Runs, target: Target, each: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Damage a file ``each`` times in both ways; yield the way, what came of it, and why."""
    draw, work = random.Random(f"{seed} {target.name}"), runs.stopped.parent / "work"
    whole = target.place(runs)

    def fresh() -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)

    expected = {}
    for read in target.reads:
        fresh()
        expected[read] = read(work, runs.shards)
    fresh()
    paths = sorted(work.glob(target.files))
    for way in WAYS:
        for number in range(each):
            path, read = draw.choice(paths), target.reads[number % len(target.reads)]
            data = path.read_bytes()
            path.write_bytes(damaged(data, way, draw))
            verdict, why = judged(read, work, runs.shards, expected[read])
            if verdict == "refused":  # nothing in the folder was changed
                path.write_bytes(data)
            else:
                fresh()
            yield way, verdict, why


def measure(
    runs: Runs, each: int, seed: int, tell: Callable[[str], None], *, show: Callable[[str], None] = print,
    only: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Return what came of the trials, by file and way; tell of those that came to no good, and show the counts."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for target in (target for target in TARGETS if not only or target.name in only):
        ways = counts.setdefault(target.name, {way: Counter() for way in WAYS})
        for way, verdict, why in trials(runs, target, each, seed):
            ways[way][verdict] += 1
            if verdict not in {"refused", "the same"}:
                tell(f"{target.name}, {way}: {verdict}\n{why}")
        for way, verdicts in ways.items():
            show(f"{target.name:26} {way:11} {dict(verdicts)}")
    return {"each": each, "seed": seed, "found": counts}


def bad(found: Mapping[str, Mapping[str, Mapping[str, int]]]) -> int:
    """Return how many trials came to no good."""
    return sum(ways[way].get(what, 0) for ways in found.values() for way in ways for what in ("traceback", "differs"))


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=1000, help="trials for each file and each way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=(), choices=[target.name for target in TARGETS])
    parser.add_argument("--json", type=Path, help="where the counts are written")
    given, begun = parser.parse_args(), time.perf_counter()
    with prepare.federation(study()) as shards, tempfile.TemporaryDirectory() as folder:
        runs = make(shards, Path(folder))
        result = measure(runs, given.each, given.seed, _say, show=_say, only=given.only)
    print(f"{time.perf_counter() - begun:.0f} s")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))
    return min(1, bad(result["found"]))


if __name__ == "__main__":
    sys.exit(main())
