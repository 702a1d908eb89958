"""What physical removal of channels saves: time of a training step and of an inference, beside the MACs.

    python benchmarks/slim.py [--quick] [--json FILE] [--render docs/structure.md] [--profile resnet20]

Every model is cut to 70, 50, 30 and 10 % of each layer's units (channels, hidden units, heads and neurons; the best
first, by the magnitude of random weights) and timed against its dense self in the same process: one thread, a few
calls of each in turn, medians. ``--multiple 8`` rounds the kept units up to multiples of 8. ``--quick`` takes fewer
repeats and leaves ResNet-18 at 50 %.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pages import insert
from torch import nn
from torch.profiler import ProfilerActivity, profile

from secateur import cost, models
from secateur.learning.resident import enforce
from secateur.pruning.allocation import Uniform
from secateur.pruning.discovery import layout
from secateur.pruning.granularity import Channel, Head
from secateur.pruning.mask import Mask, intersect
from secateur.pruning.structure import Layout, plan
from secateur.pruning.surgery import shrink

CASES = {
    "twocnn": ("conv", (1, 28, 28), 32),
    "resnet20": ("conv", (3, 32, 32), 32),
    "resnet18": ("conv", (3, 32, 32), 16),
    "charlstm": ("lstm", (80,), 32),
    "chartransformer": ("transformer", (80,), 32),
    "mlp": ("mlp", (1, 28, 28), 32),
}
SPARSITIES = (0.3, 0.5, 0.7, 0.9)
VOCABULARY = 80


def network(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a model with a batch of inputs and targets."""
    _, shape, rows = CASES[name]
    tokens = name.startswith("char")
    model = models.build(name, input_shape=shape, outputs=VOCABULARY if tokens else 10, tokens=tokens)
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(rows, *shape, generator=draw)
    return model, (x * VOCABULARY).long() if tokens else x, torch.arange(rows) % 10


def mask_of(model: nn.Module, found: Layout, sparsity: float, multiple: int) -> Mask:
    """Return the mask that leaves each layer its share of channels, and each attention its share of heads."""
    scores = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
    mask: Mask | None = None
    for kind, granularity in (("channel", Channel(multiple=multiple)), ("head", Head())):
        if found.of(kind):  # type: ignore[arg-type]
            mask = intersect(mask, granularity.mask(scores, found, allocation=Uniform(), sparsity=sparsity))
    return mask or {}


def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """Return one training step of plain SGD, without the update, which is a copy's time in both models."""

    def run() -> None:
        model.train()
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]

    return run


def inference(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Return one forward pass in evaluation mode."""

    def run() -> None:
        model.eval()
        with torch.no_grad():
            model(x)

    return run


def in_turn(calls: list[Callable[[], None]], repeats: int) -> list[float]:
    """Return each call's median seconds.

    They take turns of five calls, so that what disturbs one disturbs all; the first two of a turn do not count, as they
    find the other's data in the caches.
    """
    taken: list[list[float]] = [[] for _ in calls]
    while len(taken[0]) < repeats:
        for call, seconds in zip(calls, taken, strict=True):
            for n in range(5):
                begun = time.perf_counter()
                call()
                if n > 1:
                    seconds.append(time.perf_counter() - begun)
    return [median(seconds) for seconds in taken]


def measure(name: str, sparsity: float, multiple: int, repeats: int) -> dict[str, Any]:
    """Return one row of the table."""
    model, x, y = network(name)
    found = layout(model, example=x[:1])
    mask = mask_of(model, found, sparsity, multiple)
    enforce(model, mask)
    small = shrink(model, plan(mask, found.groups))
    apart = float((model.eval()(x) - small.eval()(x)).abs().max().detach())
    steps = in_turn([step(model, x, y), step(small, x, y)], repeats)
    forward = in_turn([inference(model, x), inference(small, x)], repeats)
    macs = [cost.counted(net, x[:1]) for net in (model, small)]
    held = [cost.memory(net, x) for net in (model, small)]
    return {
        "model": name, "kind": CASES[name][0], "channel_sparsity": sparsity, "multiple": multiple,
        "time_ratio": steps[1] / steps[0], "inference_ratio": forward[1] / forward[0], "macs_ratio": macs[1] / macs[0],
        "step_ms": 1e3 * steps[0], "slim_step_ms": 1e3 * steps[1], "apart": apart,
        "parameters_ratio": held[1].parameters / held[0].parameters,
        "activations_ratio": held[1].activations / held[0].activations,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = ["model", "channel sparsity", "step, dense", "step, slim", "step ratio", "inference ratio", "MACs ratio"]
    head += ["step ÷ MACs", "parameters", "activations"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in rows:
        rounded = f", units in {r['multiple']}s" if r["multiple"] > 1 else ""
        cells = [
            r["model"] + rounded,
            f"{r['channel_sparsity']:.0%}",
            f"{r['step_ms']:.1f} ms",
            f"{r['slim_step_ms']:.1f} ms",
        ]
        cells += [f"{r[k]:.3f}" for k in ("time_ratio", "inference_ratio", "macs_ratio")]
        cells += [f"{r['time_ratio'] / r['macs_ratio']:.2f}"]
        cells += [f"{r[k]:.3f}" for k in ("parameters_ratio", "activations_ratio")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def show_profile(name: str, sparsity: float) -> None:
    """Print where a training step's time goes, dense and slim."""
    model, x, y = network(name)
    found = layout(model, example=x[:1])
    mask = mask_of(model, found, sparsity, 1)
    for label, net in (("dense", model), ("slim", shrink(model, plan(mask, found.groups)))):
        run = step(net, x, y)
        run()
        with profile(activities=[ProfilerActivity.CPU]) as taken:
            run()
        print(f"{name}, {label}:")
        print(taken.key_averages().table(sort_by="self_cpu_time_total", row_limit=10, max_name_column_width=48))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--render", type=Path, metavar="PAGE")
    parser.add_argument("--multiple", type=int, default=1)
    parser.add_argument("--profile", choices=CASES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.profile:
        show_profile(given.profile, 0.5)
        return
    rows = []
    for name in CASES:
        for sparsity in (0.5,) if given.quick and name == "resnet18" else SPARSITIES:
            repeats = 5 if given.quick else 25
            rows.append(measure(name, sparsity, given.multiple, repeats))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))
    if given.render:
        insert(given.render, "slim", table(rows))


if __name__ == "__main__":
    main()
