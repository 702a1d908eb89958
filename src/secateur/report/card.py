"""The card of an exported model: its quality, size and speed, and which units each layer kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from secateur.learning.metrics import metric_of
from secateur.report.formatting import amount, size


@dataclass(frozen=True)
class Layer:
    """A layer and how many of its units were kept; or the reason why none could be removed."""

    name: str
    kind: str
    kept: int
    units: int
    reason: str


@dataclass(frozen=True)
class Figures:
    """The size and the speed of a model.

    Attributes:
        name: ``dense``, ``masked`` or ``slim``.
        parameters, nonzero: the number of parameters, and of those that are not zero.
        parameter_bytes: bytes of parameters and buffers in memory.
        activation_bytes: bytes that one training step on a single row keeps for its backward pass.
        macs: MACs of one row, by torch's counter.
        macs_surviving: MACs of one row, on surviving weights.
        file_bytes: bytes of the exported file.
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
    """The facts about an exported model.

    Attributes:
        title: the method, the data and the study.
        file, format: the name and format of the exported file.
        checked: the comparison with the masked model: on which rows, how many, the largest deviation of the outputs,
            how many predictions differ, and the exported file's own score.
        layers: the layers, see ``Layer``.
        figures: of the dense, the masked and the slim model.
    """

    title: str
    file: str
    format: str
    checked: dict[str, Any]
    layers: tuple[Layer, ...]
    figures: tuple[Figures, ...]

    def markdown(self) -> str:
        """Return the card as Markdown."""
        checked = self.checked
        metric = metric_of(checked)
        whole = len({figure.parameters for figure in self.figures}) == 1
        what = (
            "is as large as the dense model: pruning removed single weights and no whole unit. Train with "
            "granularity=channel for a model that is physically smaller"
            if whole
            else "is the physically slim model"
        )
        intro = (
            f"`{self.file}` ({self.format}) {what}. It was compared with the masked model of the "
            f"run on {checked['count']} rows ({checked['rows']}): outputs differ by at most "
            f"{checked['deviation']:.1e} of the largest one, {checked['differ']} predictions differ, "
            f"{metric.name} {checked[metric.name]:.4f}."
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
