"""The result of a run: its model, its figures, its page and its exports, read from the run's folder."""

from __future__ import annotations

import importlib.util
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from torch import nn

from secateur.api import notebook
from secateur.errors import CheckpointError
from secateur.export.export import export, load, read
from secateur.export.predict import Predictions, predict
from secateur.federation.folder import DENSE, read_records, read_study, read_summary
from secateur.federation.records import Row
from secateur.learning.metrics import metric_of
from secateur.models.held import HeldModel
from secateur.models.trial import take_shapes
from secateur.report import page
from secateur.report.formatting import size
from secateur.report.gather import attacks, gather
from secateur.report.outcomes import outcome
from secateur.report.terminal import comparison
from secateur.study.study import Study


class Shown:
    """A table that prints as text, and shows itself as HTML in a notebook.

    Args:
        tables: of rich.
    """

    def __init__(self, *tables: RenderableType) -> None:
        self._tables = tables

    def __str__(self) -> str:
        return notebook.as_text(*self._tables)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return notebook.as_html(*self._tables)


class Paged:
    """Base of results, which have a page.

    Attributes:
        folder: that of the run or comparison.
    """

    folder: Path

    def report(self, *, open: bool = False) -> Path:  # noqa: A002 -- what is asked for
        """Write the page and return its ``index.html``.

        Args:
            open: show it in a browser.

        Raises:
            MissingExtraError: plotly is not installed.
        """
        title, lines, subjects, _ = gather([self.folder])
        index = page.write(title, lines, subjects, self.folder / "page", attacks=attacks([self.folder]))
        if open:
            webbrowser.open(index.absolute().as_uri())
        return index

    def page(self) -> notebook.Inline:
        """Return the page to be shown in a notebook's cell."""
        return notebook.Inline(self.report())


class Result(Paged):
    """A finished run.

    Its objects, the rows and the model that it was given, are kept for as long as this is.

    Args:
        folder: the run's folder.
        held: the objects that its study names.

    Raises:
        CheckpointError: the folder holds no finished run.

    Example:
        >>> import secateur
        >>> result = secateur.run("fedsparsify", rounds=2, out="runs/mine")  # doctest: +SKIP
        >>> print(result.table())  # doctest: +SKIP
        >>> result.export("onnx")  # doctest: +SKIP
    """

    def __init__(self, folder: Path, *held: object) -> None:
        self.folder = Path(folder)
        self._held = held
        found = read_summary(self.folder)
        if found is None:
            raise CheckpointError(f"{self.folder} holds no finished run: call secateur.run(..., out=...) again")
        self.summary: dict[str, Any] = found

    @property
    def study(self) -> Study:
        """Return every setting that defines the result."""
        return read_study(self.folder)

    @property
    def score(self) -> float:
        """Return what runs are compared by, on test rows: accuracy, or the task's own first score."""
        final = self.summary["final"]
        return float(final[metric_of(final).name])

    @property
    def sparsity(self) -> float:
        """Return the fraction of the prunable weights that was removed."""
        return float(self.summary["final"]["sparsity"])

    @property
    def bytes(self) -> int:
        """Return the bytes that were carried, down and up, in all phases."""
        return sum(costs["bytes_down"] + costs["bytes_up"] for costs in self.summary["phases"].values())

    @property
    def records(self) -> Any:
        """Return a row for each exchange: a data frame where pandas is installed, else a list of mappings."""
        return framed(read_records(self.folder))

    @property
    def model(self) -> nn.Module:
        """Return the dense model with zeros where it is pruned, of the class that was given, in evaluation mode."""
        shipped = read(self.folder)
        made = next((one.make for one in self._held if isinstance(one, HeldModel)), None)
        if made is None:
            return shipped.masked
        own: Any = made(shipped.shape.input_shape, shipped.shape.outputs, **shipped.study.model.options)
        take_shapes(own, shipped.shape.input_shape, tokens=shipped.shape.kind == "tokens")
        own.load_state_dict(shipped.masked.state_dict())
        model: nn.Module = own.eval()
        return model

    def slim(self) -> nn.Module:
        """Return the physically smaller model, of torch's own layers; see ``secateur.load``."""
        return load(self.folder)

    def table(self) -> Shown:
        """Return quality and costs as a table, beside those of the dense run where there is one."""
        return Shown(comparison(self.summary, self._dense()))

    def export(self, to: str = "onnx", out: str | Path | None = None) -> Path:
        """Write the slim model, checked against the masked one, and its card beside it; return the model's file.

        Args:
            to: ``onnx``, ``torch``, ``safetensors`` or ``executorch``.
            out: the folder; default: ``export`` in the run's folder.

        Raises:
            SecateurError: see ``secateur.export.export.export``.
        """
        place = self.folder / "export" if out is None else Path(out)
        return place / export(self.folder, to, place).file

    def predict(self, data: str | Path) -> Predictions:
        """Predict for the rows of a file, as ``secateur predict`` does; see ``secateur.export.predict.predict``."""
        return predict(self.folder, Path(data))

    def _dense(self) -> Row | None:
        return read_summary(self.folder / DENSE)

    def __repr__(self) -> str:
        final = self.summary["final"]
        return (
            f"<{self.summary['method']}: {metric_of(final).shown} {self.score:.4g}, sparsity {self.sparsity:.3g}, "
            f"{size(self.bytes)}, in {self.folder}>"
        )

    def _repr_html_(self) -> str:
        places = {self.summary["method"]: self.folder}
        places |= {"dense fedavg": self.folder / DENSE} if self._dense() else {}
        curves = {name: outcome(place).by_round for name, place in places.items()}
        metric = metric_of(self.summary["final"]).shown
        return self.table()._repr_html_() + notebook.figure(curves, "round", metric)


def framed(rows: Sequence[Row]) -> Any:
    """Return rows as a data frame where pandas is installed, else as they are."""
    if importlib.util.find_spec("pandas") is None:
        return list(rows)
    return importlib.import_module("pandas").DataFrame(list(rows))
