"""The card of an exported model: what was pruned, how good it is, what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from secateur.learning.metrics import metric_of
from secateur.report.terminal import amount, size


@dataclass(frozen=True)
class Layer:
    """A layer's units: how many of them stayed; or, with a reason, why none could go."""

    name: str
    kind: str
    kept: int
    units: int
    reason: str


@dataclass(frozen=True)
class Figures:
    """What a model takes.

    Attributes:
        name: ``dense``, ``masked`` or ``slim``.
        parameters, nonzero: how many, and how many of them are not zero.
        parameter_bytes: of parameters and buffers in memory.
        activation_bytes: what one training step on a single row holds for its backward pass.
        macs: of one row, by torch's counter.
        macs_surviving: of one row, on surviving weights.
        file_bytes: of the exported file.
        seconds: median latency of one row in torch, one thread.
        runtime_seconds: the same in the format's own runtime; None: not measured.
    """

    name: str
    parameters: int
    nonzero: int
    parameter_bytes: int
    activation_bytes: int
    macs: int
    macs_surviving: int
    file_bytes: int
    seconds: float
    runtime_seconds: float | None


@dataclass(frozen=True)
class Card:
    """What is told of an exported model.

    Attributes:
        title: method, data, study.
        file, format: what was written.
        checked: on which rows, how many, how far the outputs are from the masked model's, how many predictions
            differ, and the exported file's own scores.
        layers: see ``Layer``.
        figures: dense, masked, slim.
    """

    title: str
    file: str
    format: str
    checked: dict[str, Any]
    layers: tuple[Layer, ...]
    figures: tuple[Figures, ...]

    def markdown(self) -> str:
        """Return the card as a page."""
        told = self.checked
        metric = metric_of(told)
        intro = (
            f"`{self.file}` ({self.format}) is the physically slim model. It was compared with the masked model of the "
            f"run on {told['count']} rows ({told['rows']}): outputs differ by at most {told['apart']:.1e} of the "
            f"largest one, {told['differ']} predictions differ, {metric.name} {told[metric.name]:.4f}."
        )
        inputs = "Inputs: batch first; images as float32 divided by the data's scale, tokens as int64."
        lines = [f"# {self.title}", "", intro, "", inputs, ""]
        lines += [_row("", *(f.name for f in self.figures)), "|---|" + "---|" * len(self.figures)]
        lines += [_row(label, *(shown(f) for f in self.figures)) for label, shown in _ROWS]
        lines += ["", "Latency: one row, one thread, median of 30 after 5.", ""]
        lines += [_row("layer", "units kept", "of"), "|---|---|---|"]
        for layer in self.layers:
            kept = layer.reason or f"{layer.kept} {layer.kind}{'' if layer.kept == 1 else 's'}"
            lines.append(_row(f"`{layer.name}`", kept, str(layer.units or "")))
        return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.3f} ms"


_ROWS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("parameters", lambda f: f"{f.parameters:,}"),
    ("of them not zero", lambda f: f"{f.nonzero:,}"),
    ("memory of parameters", lambda f: str(size(f.parameter_bytes))),
    ("held for a training step, one row", lambda f: str(size(f.activation_bytes))),
    ("MACs, torch's counter", lambda f: str(amount(f.macs))),
    ("MACs, surviving weights", lambda f: str(amount(f.macs_surviving))),
    ("file", lambda f: str(size(f.file_bytes))),
    ("latency in torch", lambda f: _milliseconds(f.seconds)),
    ("latency in the format's runtime", lambda f: _milliseconds(f.runtime_seconds)),
)
