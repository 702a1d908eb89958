"""The card of an exported model: its quality, size and speed, and which units each layer kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
class Input:
    """A column that the model of a table takes.

    Attributes:
        name: of the column; its unit is what the name says.
        categories: the words that it holds; empty: numbers.
        mean, scale: what is taken from a number, and what it is divided by then; 0 and 1 of categories.
        marked: whether an input of its own says that the cell is missing.
    """

    name: str
    categories: tuple[str, ...]
    mean: float
    scale: float
    marked: bool


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
        inputs: the columns of a table, in order; none of other data.
        takes: what the file is given and returns, in a sentence.
        answer: what the model of a table answers: ``target``, ``classes``, ``unit``, ``mean`` and ``scale``.
    """

    title: str
    file: str
    format: str
    checked: dict[str, Any]
    layers: tuple[Layer, ...]
    figures: tuple[Figures, ...]
    inputs: tuple[Input, ...] = ()
    takes: str = ""
    answer: dict[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """Return the card as Markdown."""
        checked = self.checked
        metric = metric_of(checked)
        intro = (
            f"`{self.file}` ({self.format}): {self._cut()} It was compared with the masked model of the "
            f"run on {checked['count']} rows ({checked['rows']}): outputs differ by at most "
            f"{checked['deviation']:.1e} of the largest one, {checked['differ']} predictions differ, "
            f"{metric.shown} {metric.text(checked[metric.name])}."
        )
        lines = [f"# {self.title}", "", intro, "", self.takes, "", *self._columns()]
        lines += [_row("", *(f.name for f in self.figures)), "|---|" + "---|" * len(self.figures)]
        lines += [_row(label, *(shown(f) for f in self.figures)) for label, shown in _ROWS]
        lines += ["", "Latency: one row, one thread, median of 30 after 5.", ""]
        lines += [_row("layer", "units kept", "of"), "|---|---|---|"]
        for layer in self.layers:
            kept = layer.reason or f"{layer.kept} {layer.kind}{'' if layer.kept == 1 else 's'}"
            lines.append(_row(f"`{layer.name}`", kept, str(layer.units or "")))
        return "\n".join(lines) + "\n"

    def _cut(self) -> str:
        """Return in a sentence what pruning cut out of the model."""
        by_name = {figure.name: figure for figure in self.figures}
        dense, masked, slim = by_name["dense"], by_name["masked"], by_name["slim"]
        if slim.parameters < dense.parameters:
            left = f"{slim.parameters:,} of {dense.parameters:,} parameters are left"
            return f"this is the physically slim model: whole units were cut out, {left}."
        zeros = dense.parameters - masked.nonzero
        return (
            f"nothing was cut out, it is as large as the dense model. Pruning set {zeros:,} of {dense.parameters:,} "
            "single weights to zero and removed no whole unit; train with granularity=channel for a model that is "
            "physically smaller."
        )

    def _columns(self) -> list[str]:
        """Return the table of what a model of a table takes and answers."""
        if not self.inputs:
            return []
        lines = [_row("column", "holds", "mean", "scale", "a missing cell"), "|---|---|---|---|---|"]
        for one in self.inputs:
            missing = "marked" if one.marked else "none in training"
            if one.categories:
                lines.append(_row(_code(one.name), ", ".join(map(_code, one.categories)), "", "", missing))
            else:
                lines.append(_row(_code(one.name), "a number", f"{one.mean:.6g}", f"{one.scale:.6g}", missing))
        unit = f" in {self.answer['unit']}" if self.answer["unit"] else ""
        what = (
            f"one of {', '.join(map(_code, self.answer['classes']))}" if self.answer["classes"] else f"a number{unit}"
        )
        return [*lines, "", f"It answers {_code(self.answer['target'])}: {what}.", ""]


def _code(text: str) -> str:
    """Return a name of a table's as code in a cell of Markdown."""
    return "`" + text.replace("|", "\\|").replace("`", "'").replace("\n", " ") + "`"


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
