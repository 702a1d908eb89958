"""What it costs to have many registered clients: 1,000 to 1,000,000 of them, 100 asked in a round, a tiny model.

    python benchmarks/registered.py --json registered.json
    python benchmarks/registered.py --quick
    python benchmarks/registered.py --counts 1000 1000000 --methods subfedavg

All registered clients were heard of before: the store has the name of a mask and a number of rows of each. For each
number of clients and each method a process of its own plays some rounds. *Seconds*: median of a round, from one record
to the next, with the checkpoint; *of the server's processor*: what the server computes in it. *Memory*: of the server
when it ends, workers apart. *Checkpoint*: the file that is written anew after each exchange. *Store*: what an exchange
adds to the store's log. *Disk*: what the server gave to the disk in a round, in blocks of the system: checkpoint,
store, and what clients keep. *apart* is the largest over the least over all numbers of clients, less 1.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur.data import Source
from secateur.data.shards import make_shards
from secateur.federation import checkpoint, server, store
from secateur.federation.folder import reserve
from secateur.study.runtime import Runtime
from secateur.study.study import parse_study

COUNTS = (1_000, 10_000, 100_000, 1_000_000)
METHODS = ("fedsparsify", "subfedavg", "lotteryfl")
OPTIONS: dict[str, dict[str, Any]] = {
    "fedsparsify": {},  # its ramp, so that the mask changes in every round
    "subfedavg": {"accuracy": 0.01},
    "lotteryfl": {"accuracy": 0.01},
}
COHORT, ROWS, WARM = 100, 4, 3
COLUMNS = {
    "seconds": ("seconds a round", 1, "{:.3f}"),
    "server": ("of the server's processor", 1, "{:.3f}"),
    "memory": ("server, MiB", 2**20, "{:.0f}"),
    "checkpoint": ("checkpoint, kB", 1e3, "{:.1f}"),
    "store": ("store, kB an exchange", 1e3, "{:.1f}"),
    "disk": ("disk, kB a round", 1e3, "{:.0f}"),
}


class _Enough(Exception):  # noqa: N818 -- no error
    """The rounds to be measured are over."""


def rows(count: int, folder: Path) -> None:
    """Write the shards of so many clients: a few rows of noise for each."""
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (count * ROWS, 1, 4, 4), dtype=np.uint8), draw.integers(0, 4, count * ROWS)
    source = Source("noise", x, y, x[:100], y[:100], None, 4, kind="image", scale=255.0, task="classification")
    make_shards(source, list(np.arange(count * ROWS).reshape(count, ROWS)), test_fraction=0.0, seed=0, folder=folder)


def heard_of(run: Any, count: int) -> None:
    """Note a mask and a number of rows of all clients, and begin the store's log anew."""
    for client in (*range(0, count, 2), *range(1, count, 2)):  # in one go all pages would be full, as they never stay
        run.books.store.put("mask", client, f"{client:032x}")
        run.books.store.put("train rows", client, ROWS)
    run.books.store.commit()
    mark = run.books.store.commit()  # the first one can no longer be taken back, so that nothing of it is left to write
    run.books.store.close()
    run.books.store.open(mark)


def rounds(method: str, count: int, measured: int, shards: Path, folder: Path) -> dict[str, Any]:
    """Play some rounds of a federation; return what they cost."""
    made = parse_study(
        {
            "method": method, "rounds": 2 * (WARM + measured), "participation": COHORT / count,
            "evaluate_every": 10_000,
            "data": {"clients": count, "partition": "iid", "test_fraction": 0.0, "validation_fraction": 0.0},
            "model": {"name": "mlp", "options": {"hidden": (32, 16)}},
            "training": {"epochs": 2, "batch_size": 4, "lr": 0.05}, "options": OPTIONS[method],
        }
    )  # fmt: skip
    ends: list[tuple[float, float, int, int]] = []
    log = folder / f"{store.NAME}-wal"

    def watch(row: dict[str, Any]) -> None:
        if row["event"] == "row":
            ends.append((time.perf_counter(), time.process_time(), log.stat().st_size, _given_to_disk()))
            if len(ends) == WARM + measured:
                raise _Enough

    reserve(folder, made)
    run = server.Run(made, Runtime(workers=1), folder, shards)
    with contextlib.closing(run.books), contextlib.suppress(_Enough):
        state = run.create()
        heard_of(run, count)
        run.play(state, watch)
    steps = [[after - before for before, after in zip(a, b, strict=True)] for a, b in itertools.pairwise(ends)]
    seconds, server_seconds, logged, disk = zip(*steps[WARM - 1 :], strict=True)
    return {
        "method": method, "clients": count, "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)], "server": statistics.median(server_seconds), "memory": _memory(),
        "checkpoint": (folder / checkpoint.NAME).stat().st_size, "store": statistics.median(logged),
        "disk": statistics.mean(disk), "file": (folder / store.NAME).stat().st_size,
    }  # fmt: skip


def _memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def _given_to_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def play(counts: Sequence[int], methods: Sequence[str], measured: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of clients and each method."""
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="registered-") as place:
            shards = Path(place) / "shards"
            shards.mkdir()
            _child("rows", str(count), str(shards))
            for method in methods:
                yield json.loads(_child("rounds", method, str(count), str(measured), str(shards), f"{place}/{method}"))


def _child(*words: str) -> str:
    command = [sys.executable, __file__, "--child", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip().rpartition("\n")[2]


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown, and for each method how far they are apart."""
    heads = [head for head, _, _ in COLUMNS.values()]
    lines = [f"| method | registered | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 2)]
    for method in dict.fromkeys(row["method"] for row in found):
        mine = [row for row in found if row["method"] == method]
        for row in mine:
            cells = [form.format(row[name] / unit) for name, (_, unit, form) in COLUMNS.items()]
            lines.append(f"| {method} | {row['clients']:,} | {' | '.join(cells)} |")
        apart = [max(row[name] for row in mine) / max(1e-9, min(row[name] for row in mine)) - 1 for name in COLUMNS]
        lines.append(f"| {method} | apart | {' | '.join(f'{100 * share:.0f} %' for share in apart)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=("fedsparsify", "subfedavg"))
    parser.add_argument("--rounds", type=int, default=12, help="that are measured, after three")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        what, *words = given.child
        if what == "rows":
            rows(int(words[0]), Path(words[1]))
        else:
            method, count, measured, shards, folder = words
            print(json.dumps(rounds(method, int(count), int(measured), Path(shards), Path(folder))))
        return
    counts, measured = ((1_000, 10_000), 4) if given.quick else (given.counts, given.rounds)
    found: list[dict[str, Any]] = []
    for row in play(counts, given.methods, measured):
        found.append(row)
        print(table([row]).splitlines()[2], flush=True)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1))
    print(f"\n{table(found)}")


if __name__ == "__main__":
    main()
