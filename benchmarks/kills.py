"""Kill a run at random moments, and go on with it until it is finished: the model must be that of an undisturbed run.

    python benchmarks/kills.py --trials 20

Each trial starts ``secateur resume`` and, at a random moment after its first record (every fifth: before it), kills the
command or one of its processes, or asks the command to end (SIGTERM). After SIGTERM nothing may be left: no process,
nothing in the temporary folder, no spool. What goes wrong is printed, and ends the program with 1.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from secateur.federation import checkpoint, prepare, server
from secateur.federation.folder import ROUNDS, SUMMARY, reserve
from secateur.study.runtime import Runtime
from secateur.study.study import Study, parse_study

WAYS = ("the command, SIGKILL", "one of its processes, SIGKILL", "the command, SIGTERM")


def study(rounds: int) -> Study:
    """Return a study whose clients keep something between rounds."""
    return parse_study({
        "method": "dispfl", "rounds": rounds, "data": {"source": "digits", "clients": 8, "partition": "iid"},
        "model": {"name": "mlp", "options": {"hidden": (16,)}}, "training": {"epochs": 1},
    })  # fmt: skip


def descendants(pid: int) -> list[int]:
    """Return all living descendants of a process."""
    tasks = Path(f"/proc/{pid}/task")
    try:
        direct = [int(c) for task in tasks.glob("*/children") for c in task.read_text().split()]
    except OSError:  # it has just ended
        return []
    return direct + [below for child in direct for below in descendants(child)]


def begun(folder: Path, place: Path) -> subprocess.Popen[str]:
    """Start going on with a run."""
    return subprocess.Popen(
        [sys.executable, "-m", "secateur", "resume", str(folder), "--workers", "2"], text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(place)},
    )  # fmt: skip


def moment(running: subprocess.Popen[str], folder: Path, draw: random.Random, *, early: bool) -> None:
    """Wait for the moment of a trial."""
    if not early:
        length, end = _length(folder), time.monotonic() + 120
        while running.poll() is None and _length(folder) <= length and time.monotonic() < end:
            time.sleep(0.01)
    time.sleep(draw.uniform(0, 4))


def _length(folder: Path) -> int:
    path = folder / ROUNDS
    return path.stat().st_size if path.exists() else 0


def ended(running: subprocess.Popen[str], way: str, draw: random.Random) -> list[int]:
    """End a command in one way; return the processes that it had."""
    below = descendants(running.pid)
    if way == WAYS[1]:
        for pid in draw.sample(below, min(1, len(below))):
            os.kill(pid, signal.SIGKILL)
        time.sleep(draw.uniform(0, 2))
        below = descendants(running.pid)
    running.send_signal(signal.SIGKILL if way == WAYS[0] else signal.SIGTERM)
    return below


def left(below: list[int], folder: Path, place: Path) -> list[str]:
    """Return what a command has left behind, a few seconds after it ended."""
    end = time.monotonic() + 10
    while time.monotonic() < end and any(Path(f"/proc/{pid}").exists() for pid in below):
        time.sleep(0.05)
    processes = [f"process {pid}" for pid in below if Path(f"/proc/{pid}").exists()]
    return [*processes, *(str(path) for path in [*place.iterdir(), *folder.glob("spool-*")])]


def main() -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, counts, wrong = random.Random(given.seed), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as top:
        folder, whole = Path(top) / "run", Path(top) / "whole"
        for made in (folder, whole):
            reserve(made, study(given.rounds))
        with prepare.federation(study(given.rounds)) as shards:
            server.resume(whole, Runtime(workers=0), shards=shards)
        for trial in range(given.trials):
            way = WAYS[trial % len(WAYS)]
            place = Path(top) / f"tmp{trial}"
            place.mkdir()
            with begun(folder, place) as running:
                moment(running, folder, draw, early=trial % 5 == 0)
                below = ended(running, way, draw) if running.poll() is None else []
                counts[way] += 1
                said = running.communicate()[1]
            if way != WAYS[0] and below:
                wrong += [f"trial {trial}: left {what}" for what in left(below, folder, place)]
                usual = {128 + signal.SIGTERM, -signal.SIGTERM} if trial % 5 == 0 else {128 + signal.SIGTERM}
                if running.returncode not in usual:  # Python itself may still have been starting
                    wrong.append(f"trial {trial}: exit code {running.returncode}")
            if "Traceback" in said:
                wrong.append(f"trial {trial}, {way}: {said}")
            print(trial, way, running.returncode, said.strip()[-200:], flush=True)
        with begun(folder, Path(top)) as running:
            said = running.communicate()[1]
        finished = (folder / SUMMARY).exists()
        same = finished and (folder / checkpoint.MODEL).read_bytes() == (whole / checkpoint.MODEL).read_bytes()
    print("\n".join([*wrong, f"{dict(counts)}; finished: {finished}; the same model: {same}"]))
    return int(bool(wrong) or not same)


if __name__ == "__main__":
    sys.exit(main())
