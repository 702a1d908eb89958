"""How fast a federation is simulated: secateur beside Flower's simulation, pfl-research and the floor.

    python benchmarks/simulate.py --json simulate.json
    python benchmarks/simulate.py --quick
    python benchmarks/simulate.py --only sparse together memory autocast
    python benchmarks/simulate.py --only peers --set wire.count=computed wire.packing=none
    python benchmarks/simulate.py --render docs/speed.md simulate.json

All contestants get the same model, rows, cohort size and local steps, in processes of their own, one after the other
(``contestants.py``); a round's time is the median of those after the first, evaluation apart. The floor is a plain
PyTorch loop in as many processes as there are cores, which sends, averages and saves nothing; its images lie in memory
channels last, as ours do, which Flower's and pfl-research's clients do not unless the case says so. ``overhead`` is
secateur's round over the floor's, less 1. pfl-research has requirements that other packages here exclude: it is run
where ``--pfl`` names a Python that has it (``pip install pfl``), and left out otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pages
from contestants import PARTS, Case
from safetensors.torch import load_file

from secateur.report.formatting import size

HERE = Path(__file__).parent
MLP = Case("mlp", (1, 8, 8), 100, 100, 18, batch=16, options=(("hidden", (64, 64)),))
TWOCNN = Case("twocnn", (1, 28, 28), 100, 10, 600)
RESNET = Case("resnet20", (3, 32, 32), 100, 10, 100, rounds=4)
PEERS = {
    "MLP, 9 k": MLP,
    "MLP, 9 k, 5 epochs": replace(MLP, epochs=5, batch=10),
    "MLP, 9 k, 400 clients": replace(MLP, clients=400, cohort=400, rows=4),
    "MLP, 9 k, 1,000 clients": replace(MLP, clients=1000, cohort=100),
    "MLP, 9.2 M": replace(MLP, clients=20, cohort=20, rows=90, rounds=5, options=(("hidden", (3000, 3000)),)),
    "TwoCNN": TWOCNN,
    "TwoCNN, all with channels last": replace(TWOCNN, channels_last=True),
    "TwoCNN, 5 epochs": replace(TWOCNN, epochs=5, rows=120),
    "TwoCNN, 1,000 clients": replace(TWOCNN, clients=1000, cohort=100, rows=60, batch=10, rounds=4),
    "ResNet-20": RESNET,
    "ResNet-20, 1,000 clients": replace(RESNET, clients=1000, cohort=100, rows=10, batch=10),
}
CEILINGS = ("MLP, 9 k, 400 clients", "MLP, 9.2 M", "TwoCNN", "ResNet-20")
MEBI = 2**20


def watch(process: subprocess.Popen[str], every: float = 0.25) -> tuple[int, int]:
    """Wait for a process; return the largest resident set of it and of any of its descendants, in bytes."""
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for pid in _family(process.pid):
            peaks[pid] = max(peaks.get(pid, 0), _peak(pid))
        time.sleep(every)
    return peaks.pop(process.pid, 0), max(peaks.values(), default=0)


def _family(root: int) -> Iterator[int]:
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    known = {root}
    while new := {pid for pid, parent in parents.items() if parent in known} - known:
        known |= new
    yield from known


def _peak(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def play(name: str, case: Case, *settings: str, python: str = sys.executable) -> dict[str, Any]:
    """Run one contestant; return what it said, when it began, peak memory, and the final model if it is ours."""
    with tempfile.TemporaryDirectory(prefix="simulate-") as place:
        folder = Path(place)
        case.write(folder)
        command = [python, str(HERE / "contestants.py"), name, str(folder), *settings]
        if name == "pfl":
            command[:1] = [python, "-m", "torch.distributed.run", f"--nproc-per-node={case.workers}"]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent / "src")}
        begun = time.time()
        with (folder / "said").open("w+") as said, (folder / "log").open("w+") as log:
            process = subprocess.Popen(command, stdout=said, stderr=log, text=True, env=environment)
            root, child = watch(process)
            said.seek(0)
            log.seek(0)
            if process.returncode:
                raise SystemExit(f"{name} failed on {case}:\n{log.read()[-3000:]}")
            told = json.loads(said.read().splitlines()[-1])
        ours = name == "secateur"
        model = load_file(folder / "run" / "model.safetensors") if ours else {}
        bytes_ = _traffic(folder / "run") if ours else 0
    return {"told": told, "begun": begun, "root": root, "worker": child, "model": model, "bytes": bytes_}


def run(name: str, case: Case, *settings: str, python: str = sys.executable) -> dict[str, Any]:
    """Run one contestant; return its median round and start-up beside what ``play`` returns."""
    one = play(name, case, *settings, python=python)
    ends = one.pop("told")
    # ours evaluates with its last round
    rounds = [after - before for before, after in itertools.pairwise(ends)]
    steady = rounds[:-1] if name == "secateur" and len(rounds) > 1 else rounds
    middle = statistics.median(steady)
    return {**one, "seconds": middle, "spread": [min(steady), max(steady)], "start": ends[0] - one["begun"] - middle}


def _traffic(folder: Path) -> float:
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["phase"] == "train"][-1]
    return float(last["bytes_down"] + last["bytes_up"])


def in_turn(runs: dict[str, Callable[[], dict[str, Any]]], repeats: int) -> dict[str, dict[str, Any]]:
    """Run contestants one after the other, ``repeats`` times; return each one's run of the median time.

    What this machine does beside, and where memory happens to lie, moves a single run by a tenth.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, one in runs.items():
            found[name].append(one())
    middle = {name: sorted(all_, key=lambda r: r["seconds"])[len(all_) // 2] for name, all_ in found.items()}
    return {
        name: {**one, "spread": [min(r["seconds"] for r in found[name]), max(r["seconds"] for r in found[name])]}
        for name, one in middle.items()
    }


def peers(
    cases: dict[str, Case], pfl: str | None, repeats: int, settings: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield a row for each case; ``settings`` are secateur's."""
    for title, case in cases.items():
        last = replace(case, channels_last=case.model != "mlp")
        runs: dict[str, Callable[[], dict[str, Any]]] = {
            "floor": partial(run, "floor", last), "secateur": partial(run, "secateur", case, *settings),
            "flower": partial(run, "flower", case),
        }  # fmt: skip
        runs |= {"pfl": partial(run, "pfl", case, python=pfl)} if pfl else {}
        found = in_turn(runs, repeats)
        ours, floor = found["secateur"], found["floor"]
        yield {
            "table": "peers", "case": title, "model": case.model, "clients": case.clients, "cohort": case.cohort,
            "epochs": case.epochs, "batch": case.batch,
            **{name: {k: v for k, v in one.items() if k != "model"} for name, one in found.items()},
            "overhead": ours["seconds"] / floor["seconds"] - 1,
            "vs_flower": found["flower"]["seconds"] / ours["seconds"],
            "vs_pfl": found["pfl"]["seconds"] / ours["seconds"] if pfl else None,
            "memory": ours["worker"] / floor["worker"],
        }  # fmt: skip


def ceilings(cases: dict[str, Case], repeats: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each case: its least time by operations and by bytes of weights, beside the floor and ours."""
    for title, case in cases.items():
        last = replace(case, channels_last=case.model != "mlp")
        flops, bandwidth = play("peak", case)["told"]
        found = in_turn({"floor": partial(run, "floor", last), "secateur": partial(run, "secateur", case)}, repeats)
        operations, moved = case.work()
        yield {
            "table": "ceilings", "case": title, "operations": operations, "moved": moved, "flops": flops,
            "bandwidth": bandwidth, "by_operations": operations / flops, "by_bytes": moved / bandwidth,
            "floor": found["floor"]["seconds"], "secateur": found["secateur"]["seconds"],
        }  # fmt: skip


SPARSE = {
    "FedAvg": (),
    "FedSparsify 90 %": ("method=fedsparsify", "schedule=every_round", "schedule.sparsity=0.9"),
    "AutoFLIP, T_p 0.5": ("method=autoflip", "schedule.sparsity=0.5", "criterion.explore.epochs=1"),
    "FedSparsify, half of the channels": (
        "method=fedsparsify", "granularity=channel", "schedule=every_round", "schedule.sparsity=0.5",
    ),
}  # fmt: skip


def sparse(repeats: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each pruning method on the case of TwoCNN, beside dense training."""
    case = replace(TWOCNN, rounds=7)
    found = in_turn({title: partial(run, "secateur", case, *settings) for title, settings in SPARSE.items()}, repeats)
    for title, one in found.items():
        yield {"table": "sparse", "case": title, "seconds": one["seconds"], "spread": one["spread"],
               "ratio": one["seconds"] / found["FedAvg"]["seconds"], "bytes": one["bytes"]}  # fmt: skip


TOGETHER = {
    "MLP, 9 k": (MLP, 50),
    "MLP, 9 k, 5 epochs": (PEERS["MLP, 9 k, 5 epochs"], 50),
    "MLP, 9 k, 400 clients": (PEERS["MLP, 9 k, 400 clients"], 200),
    "TwoCNN": (replace(TWOCNN, rounds=4), 5),
    "ResNet-20": (RESNET, 5),
}


def together() -> Iterator[dict[str, Any]]:
    """Yield a row for each case: clients by themselves, and several in one step, and how far the models differ."""
    for title, (case, count) in TOGETHER.items():
        alone = run("secateur", case)
        stacked = run("secateur", case, f"compute.together={count}")
        yield {"table": "together", "case": title, "together": count, "alone": alone["seconds"],
               "stacked": stacked["seconds"], "speedup": alone["seconds"] / stacked["seconds"],
               "deviation": _deviation(alone["model"], stacked["model"])}  # fmt: skip


def _deviation(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference of two models' weights, as a share of the root mean square of their tensor."""
    return max(float((one[n] - other[n]).abs().max() / one[n].square().mean().sqrt().clamp(min=1e-12)) for n in one)


def memory(cohorts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of clients a round: ResNet-18, 44.7 MB of weights, a single row for each client."""
    for count in cohorts:
        case = Case("resnet18", (3, 32, 32), count, count, 1, rounds=2)
        one = run("secateur", case)
        yield {"table": "memory", "cohort": count, "server": one["root"], "worker": one["worker"],
               "seconds": one["seconds"]}  # fmt: skip


def autocast() -> Iterator[dict[str, Any]]:
    """Yield a row for each network: time and deviation of bfloat16."""
    for title, case in (("TwoCNN", replace(TWOCNN, rounds=4)), ("ResNet-20", RESNET)):
        exact, rough = run("secateur", case), run("secateur", case, "compute.autocast=bf16")
        yield {"table": "autocast", "case": title, "fp32": exact["seconds"], "bf16": rough["seconds"],
               "deviation": _deviation(exact["model"], rough["model"])}  # fmt: skip


def workers() -> Iterator[dict[str, Any]]:
    """Yield a row for each number of workers, each with one thread."""
    for title, case in (("MLP, 9 k, 400 clients", PEERS["MLP, 9 k, 400 clients"]), ("TwoCNN", TWOCNN)):
        for count in (1, 2, 3, 4):
            one = run("secateur", replace(case, workers=count))
            yield {"table": "workers", "case": title, "workers": count, "seconds": one["seconds"],
                   "spread": one["spread"]}  # fmt: skip


def profile() -> Iterator[dict[str, Any]]:
    """Yield a row for each case: where one process spends its time."""
    pruned = SPARSE["FedSparsify 90 %"]
    for title, case, settings in (
        ("MLP, 9 k, 400 clients", PEERS["MLP, 9 k, 400 clients"], ()),
        ("MLP, 9.2 M", PEERS["MLP, 9.2 M"], ()),
        ("TwoCNN", TWOCNN, ()),
        ("TwoCNN, FedSparsify 90 %", TWOCNN, pruned),
    ):
        yield {"table": "profile", "case": title, **play("profile", case, *settings)["told"]}


FIRST = """
import os, sys, time
from pathlib import Path
from secateur.engines.workers import warm
warm()  # as the command line begins
from secateur.federation import prepare, server
from secateur.study.runtime import Runtime
from secateur.study.study import parse_study
def watch(row):
    if row["event"] == "reply":
        print(time.time(), flush=True)
        os._exit(0)
made = parse_study({"method": "fedavg"})
with prepare.federation(made) as shards:
    server.start(made, Runtime(), Path(sys.argv[1]), shards=shards, watch=watch)
"""


def startup() -> Iterator[dict[str, Any]]:
    """Yield how long it takes until there is something to see."""
    times: dict[str, list[float]] = {"secateur --help": [], "digits: first reply of a client": []}
    for _ in range(5):
        begun = time.time()
        subprocess.run([sys.executable, "-m", "secateur", "--help"], check=True, capture_output=True)
        times["secateur --help"].append(time.time() - begun)
        with tempfile.TemporaryDirectory() as place:
            command, begun = [sys.executable, "-c", FIRST, f"{place}/run"], time.time()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            times["digits: first reply of a client"].append(float(done.stdout) - begun)
    for what, found in times.items():
        yield {"table": "startup", "what": what, "seconds": statistics.median(found),
               "spread": [min(found), max(found)]}  # fmt: skip


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


def _mega(value: float) -> str:
    return f"{value / MEBI:.0f} MiB"


def _peer(row: dict[str, Any]) -> list[str]:
    there = [_seconds(row[name]["seconds"]) if name in row else "-" for name in ("floor", "secateur", "flower", "pfl")]
    faster = "-" if row["vs_pfl"] is None else f"{row['vs_pfl']:.2f}"
    starts = [f"{row[name]['start']:.1f}" for name in ("secateur", "flower")]
    return [
        row["case"], f"{row['cohort']} of {row['clients']}, E {row['epochs']}, B {row['batch']}", *there,
        f"{100 * row['overhead']:+.0f} %", f"{row['vs_flower']:.1f}", faster, " / ".join(starts),
        f"{row['memory']:.2f}",
    ]  # fmt: skip


TABLES = {
    "peers": (
        ["case", "clients", "floor", "secateur", "Flower", "pfl", "overhead", "Flower / secateur", "pfl / secateur",
         "start-up, secateur / Flower (s)", "memory of a worker over the floor's"],
        _peer,
    ),
    "ceilings": (
        ["case", "GFLOP a round", "GB of weights", "GFLOP/s and GB/s of the machine", "least (s), by operations",
         "by bytes", "floor (s)", "secateur (s)", "share of the nearer ceiling, floor / secateur"],
        lambda r: [r["case"], f"{r['operations'] / 1e9:.3g}", f"{r['moved'] / 1e9:.3g}",
                   f"{r['flops'] / 1e9:.0f}, {r['bandwidth'] / 1e9:.1f}", _seconds(r["by_operations"]),
                   _seconds(r["by_bytes"]), _seconds(r["floor"]), _seconds(r["secateur"]),
                   " / ".join(f"{100 * max(r['by_operations'], r['by_bytes']) / r[who]:.0f} %"
                              for who in ("floor", "secateur"))],
    ),
    "sparse": (
        ["method", "seconds a round", "least to most", "over dense", "bytes a round"],
        lambda r: [r["case"], _seconds(r["seconds"]), " to ".join(map(_seconds, r["spread"])), f"{r['ratio']:.2f}",
                   size(r["bytes"])],
    ),
    "together": (
        ["case", "together", "each by itself", "together (s)", "speed-up", "largest deviation of a weight"],
        lambda r: [r["case"], str(r["together"]), _seconds(r["alone"]), _seconds(r["stacked"]),
                   f"{r['speedup']:.2f}", f"{r['deviation']:.1e}"],
    ),
    "workers": (
        ["case", "workers", "seconds a round", "least to most"],
        lambda r: [r["case"], str(r["workers"]), _seconds(r["seconds"]), " to ".join(map(_seconds, r["spread"]))],
    ),
    "profile": (
        ["case", *PARTS, "the rest"],
        lambda r: [r["case"], *(f"{100 * r[part] / r['whole']:.0f} %" for part in PARTS),
                   f"{100 * (1 - sum(r[part] for part in PARTS) / r['whole']):.0f} %"],
    ),
    "startup": (
        ["until", "seconds (median of 5)", "least to most"],
        lambda r: [r["what"], _seconds(r["seconds"]), " to ".join(map(_seconds, r["spread"]))],
    ),
    "memory": (
        ["clients a round", "peak of the server", "peak of a worker", "seconds a round"],
        lambda r: [str(r["cohort"]), _mega(r["server"]), _mega(r["worker"]), _seconds(r["seconds"])],
    ),
    "autocast": (
        ["case", "float32 (s)", "bfloat16 (s)", "largest deviation of a weight"],
        lambda r: [r["case"], _seconds(r["fp32"]), _seconds(r["bf16"]), f"{r['deviation']:.1e}"],
    ),
}  # fmt: skip


def table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows of one table as Markdown."""
    head, cells = TABLES[name]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(cells(row))} |" for row in rows)])


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of all tables that were asked for."""
    cases = {name: case for name, case in PEERS.items() if not given.cases or name in given.cases}
    cases = {"MLP, 9 k": replace(MLP, rounds=3)} if given.quick else cases
    repeats = 1 if given.quick else given.repeats
    wanted = given.only or (["peers"] if given.quick else list(TABLES))
    makers = {
        "peers": lambda: peers(cases, given.pfl, repeats, given.set),
        "ceilings": lambda: ceilings({name: case for name, case in cases.items() if name in CEILINGS}, repeats),
        "sparse": lambda: sparse(repeats),
        "together": together,
        "workers": workers,
        "profile": profile,
        "startup": startup,
        "memory": lambda: memory([10, 100, 1000]),
        "autocast": autocast,
    }
    for name in wanted:
        yield from makers[name]()


def main() -> None:
    """Measure and print, or render what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=TABLES)
    parser.add_argument("--cases", nargs="+", choices=PEERS, metavar="CASE", help="of the tables of peers and ceilings")
    parser.add_argument("--repeats", type=int, default=3, help="of the tables of peers, ceilings and pruning methods")
    parser.add_argument("--pfl", metavar="PYTHON")
    parser.add_argument("--set", nargs="+", default=[], metavar="SETTING", help="of secateur, in the table of peers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--render", nargs=2, type=Path, metavar=("PAGE", "JSON"))
    given = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(given.render[1].read_text()) if given.render else []
    for row in () if given.render else measure(given):
        rows.append(row)
        print(table(row["table"], [row]).splitlines()[-1], flush=True)
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1))
    for name in dict.fromkeys(row["table"] for row in rows):
        written = table(name, [row for row in rows if row["table"] == name])
        if given.render:
            pages.insert(given.render[0], name, written + "\n")
        else:
            print(f"\n{written}")


if __name__ == "__main__":
    main()
