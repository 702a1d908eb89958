"""How fast a device trains a cohort: a plain loop, one batched step of ``vmap``, and whole rounds of secateur.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --quick
    python benchmarks/gpu.py --render docs/speed.md gpu.json

On the first CUDA device if torch finds one; otherwise it says so and runs the same code on the CPU, with small sizes.
*Loop* is a plain PyTorch loop over the clients, with model and rows on the device, *vmap* the same steps of all as one
batched step; both only train: no message, no mean, no record. *secateur* is a whole round: requests, stacks,
replies that are written, counted and checked, their mean, a record and a checkpoint. A round's time is the median of
those after the first. The two ceilings are measured by a product of matrices and a copy, as in ``simulate.py``. What
does not fit into the time (``--seconds``, five minutes at most) is left out, and said.
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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pages
import torch
from contestants import LR, Case
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from secateur.federation import server
from secateur.federation.folder import reserve
from secateur.study.runtime import Runtime
from secateur.study.study import assign, parse_study

CASES = {
    "TwoCNN, 100 x 60": Case("twocnn", (1, 28, 28), 100, 100, 60, batch=10, rounds=5),
    "ResNet-20, 100 x 60": Case("resnet20", (3, 32, 32), 100, 100, 60, batch=10, rounds=4),
    "ResNet-20, 10 x 500": Case("resnet20", (3, 32, 32), 10, 10, 500, rounds=4),
    "MLP, 400 x 18": Case("mlp", (1, 8, 8), 400, 400, 18, batch=16, rounds=6, options=(("hidden", (64, 64)),)),
}
SMALL = {
    "TwoCNN, 100 x 60": {"clients": 4, "cohort": 4, "rows": 20, "rounds": 3},
    "ResNet-20, 100 x 60": {"clients": 4, "cohort": 4, "rows": 20, "rounds": 3},
    "ResNet-20, 10 x 500": {"clients": 2, "cohort": 2, "rows": 64, "rounds": 3},
    "MLP, 400 x 18": {"clients": 40, "cohort": 40, "rounds": 3},
}
COMPUTED = ("wire.packing=none", "wire.count=computed")
METHODS = {
    "FedAvg": (),
    "FedAvg, computed": COMPUTED,
    "FedSparsify 90 %": ("method=fedsparsify", "schedule=every_round", "schedule.sparsity=0.9"),
    "FedSparsify 90 %, computed": (
        "method=fedsparsify",
        "schedule=every_round",
        "schedule.sparsity=0.9",
        *COMPUTED,
    ),
    "AutoFLIP": ("method=autoflip", "schedule.sparsity=0.5", "criterion.explore.epochs=1"),
}


@dataclass(frozen=True)
class Device:
    """Where cases run.

    Attributes:
        name: torch's name of the device.
        title: what is printed of it.
    """

    name: str
    title: str

    @classmethod
    def found(cls) -> Device:
        """Return the first CUDA device, or the CPU."""
        if torch.cuda.is_available():
            return cls("cuda", torch.cuda.get_device_name(0))
        threads = torch.get_num_threads()
        return cls("cpu", f"a CPU with {threads} threads: torch finds no CUDA device, so sizes are small")

    def wait(self) -> None:
        """Wait until the device has done what it was asked."""
        if self.name == "cuda":
            torch.cuda.synchronize()


def rounds(device: Device, count: int, one: Callable[[], object]) -> list[float]:
    """Return the seconds of each round but the first."""
    seconds = []
    for _ in range(count):
        device.wait()
        begun = time.perf_counter()
        one()
        device.wait()
        seconds.append(time.perf_counter() - begun)
    return seconds[1:]


def rows_of(case: Case, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise and chance labels, (clients, rows, ...), on the device."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (case.cohort, case.rows, *case.shape), generator=draw, dtype=torch.uint8)
    y = torch.randint(0, 10, (case.cohort, case.rows), generator=draw)
    return x.to(device.name), y.to(device.name)


def loop(case: Case, device: Device) -> list[float]:
    """Train the cohort with a plain loop; return the seconds of each round."""
    x, y = rows_of(case, device)
    model = case.make_model().to(device.name).train()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=LR)

    def one() -> None:
        for k in range(case.cohort):
            model.load_state_dict(start)
            for index in torch.randperm(case.rows).to(device.name).split(case.batch):
                optimiser.zero_grad()
                cross_entropy(model(x[k, index].float() / 255), y[k, index]).backward()
                optimiser.step()

    return rounds(device, case.rounds, one)


def batched(case: Case, device: Device) -> list[float]:
    """Train the cohort by batched steps of ``vmap``; return the seconds of each round."""
    x, y = rows_of(case, device)
    model = case.make_model().to(device.name).train()
    start = {name: p.detach() for name, p in model.named_parameters()}
    clients = torch.arange(case.cohort, device=device.name)[:, None]

    def loss(own: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(functional_call(model, own, (x,)), y)

    def one() -> None:
        weights = {name: p.expand(case.cohort, *p.shape).clone() for name, p in start.items()}
        order = torch.stack([torch.randperm(case.rows) for _ in range(case.cohort)]).to(device.name)
        for index in order.split(case.batch, dim=1):
            slopes = vmap(grad(loss))(weights, x[clients, index].float() / 255, y[clients, index])
            for name, slope in slopes.items():
                weights[name] -= LR * slope

    return rounds(device, case.rounds, one)


def secateur(case: Case, device: Device, settings: Sequence[str]) -> dict[str, Any]:
    """Play rounds of secateur; return the seconds of each, and the kind of its bytes."""
    values: dict[str, Any] = {
        "method": "fedavg", "rounds": case.rounds, "participation": 1.0, "evaluate_every": case.rounds,
        "data": {"clients": case.clients, "test_fraction": 0.0},
        "model": {"name": case.model, "init": "torch", "options": dict(case.options)},
        "training": {"epochs": case.epochs, "batch_size": case.batch, "lr": LR},
        "compute": {"together": case.cohort, "device": device.name},
    }  # fmt: skip
    for setting in settings:
        assign(values, setting)
    ends: list[float] = []

    def watch(row: dict[str, Any]) -> None:
        if row["event"] == "row" and row["phase"] == "train":
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory(prefix="gpu-") as place:
        case.write(Path(place))
        made = parse_study(values)
        reserve(Path(place) / "run", made)
        server.resume(Path(place) / "run", Runtime(workers=0), shards=Path(place), watch=watch)
    steady = [after - before for before, after in itertools.pairwise(ends)]
    # the last round is followed by an evaluation
    return {"seconds": steady[:-1] or steady, "bytes": made.wire.count}


@contextlib.contextmanager
def utilisation(device: Device) -> Iterator[list[float]]:
    """Yield a list that gets the share of time in which the device was busy, if its driver says it."""
    said: list[float] = []
    if device.name != "cuda":
        yield said
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:  # no such program here: nothing is said
        yield said
        return
    reader = threading.Thread(target=lambda: said.extend(_numbers(process)), daemon=True)
    reader.start()
    try:
        yield said
    finally:
        process.terminate()
        process.wait()
        reader.join(timeout=2)


def _numbers(process: subprocess.Popen[str]) -> Iterator[float]:
    for line in process.stdout or ():
        with contextlib.suppress(ValueError):
            yield float(line.split("\n")[0])


def ceilings(device: Device) -> tuple[float, float]:
    """Return operations a second of a large product, and bytes a second of a copy."""
    side = 8192 if device.name == "cuda" else 1024
    square = torch.rand(side, side, device=device.name)
    wide = torch.rand(2**28 if device.name == "cuda" else 2**24, device=device.name)
    copy = torch.empty_like(wide)
    product = min(rounds(device, 6, lambda: torch.mm(square, square)))
    return 2 * side**3 / product, 2 * wide.nbytes / min(rounds(device, 6, lambda: copy.copy_(wide)))


def measure(device: Device, cases: dict[str, Case], seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a row for each case and contestant, until the time is over."""
    end, (flops, bandwidth) = time.monotonic() + seconds, ceilings(device)
    yield {"table": "device", "device": device.title, "torch": torch.__version__, "flops": flops, "bytes": bandwidth}
    for title, case in cases.items():
        operations, moved = case.work()
        least = max(operations / flops, moved / bandwidth)
        runs: dict[str, Callable[[], Any]] = {
            "loop": lambda case=case: loop(case, device), "vmap": lambda case=case: batched(case, device),
            **{name: lambda case=case, how=how: secateur(case, device, how) for name, how in METHODS.items()},
        }  # fmt: skip
        for name, run in runs.items():
            row = {"table": "gpu", "case": title, "contestant": name, "least": least}
            if time.monotonic() > end:
                yield {**row, "left_out": f"not measured: {seconds:g} s were over"}
                continue
            with utilisation(device) as busy:
                made = run()
            taken, kind = (made["seconds"], made["bytes"]) if isinstance(made, dict) else (made, "none")
            middle = statistics.median(taken)
            yield {**row, "seconds": middle, "spread": [min(taken), max(taken)], "share": least / middle,
                   "busy": statistics.mean(busy) / 100 if busy else None, "bytes": kind}  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    (device,) = (row for row in rows if row["table"] == "device")
    rates = f"{device['flops'] / 1e9:,.0f} GFLOP/s, {device['bytes'] / 1e9:,.0f} GB/s"
    lines = [
        f"Device: {device['device']}; torch {device['torch']}; {rates}.",
        "",
        "| case | contestant | seconds a round | least and most | share of the nearer ceiling | device busy | bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["table"] != "gpu":
            continue
        if "left_out" in row:
            lines.append(f"| {row['case']} | {row['contestant']} | {row['left_out']} | | | | |")
            continue
        busy = "not to be had" if row["busy"] is None else f"{row['busy']:.0%}"
        low, high = row["spread"]
        lines.append(
            f"| {row['case']} | {row['contestant']} | {row['seconds']:.3g} | {low:.3g} to {high:.3g} | "
            f"{row['share']:.1%} | {busy} | {row['bytes']} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, or put a table into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--quick", action="store_true", help="small sizes, on any device")
    parser.add_argument("--seconds", type=float, default=270, help="after which nothing more is begun (default 270)")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--render", type=Path, nargs=2, metavar=("PAGE", "JSON"), help="put the table into a page")
    given = parser.parse_args()
    if given.render:
        page, file = given.render
        pages.insert(page, "gpu", table(json.loads(file.read_text())))
        return
    device = Device.found()
    small = given.quick or device.name == "cpu"
    cases = {name: replace(CASES[name], **SMALL[name]) if small else CASES[name] for name in given.cases}
    rows = []
    for row in measure(device, cases, given.seconds):
        rows.append(row)
        sys.stderr.write(f"{json.dumps(row)}\n")
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1))
    sys.stdout.write(table(rows))


if __name__ == "__main__":
    main()
