"""Predictions for new rows, by the model of a finished run or by an exported ONNX file, in words and units."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.data.new_arrays import Arrays, read_new_arrays
from secateur.data.new_rows import NewRows, read_new_rows
from secateur.data.schema import Schema
from secateur.data.shards import Shape
from secateur.data.table_options import TableOptions
from secateur.errors import CheckpointError, ConfigError, DataError, ModelError, need
from secateur.export.by_column import OUTPUT, READING_KEY, SCHEMA_KEY, SHAPE_KEY, cells_of
from secateur.export.deployed import deployed
from secateur.export.export import read, table_options
from secateur.federation import checkpoint

_BATCH = 1024

Network = Callable[[NDArray[np.generic]], NDArray[np.float32]]


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for some rows.

    Attributes:
        target: what is predicted: the target's name; ``class`` or ``value`` where it has none.
        unit: of a number; empty: unknown, or a class.
        classes: their names, numbers where none are known; empty: a number is predicted.
        values: the number of each row's class, or its number in the target's unit, shape (rows,).
        probabilities: of each class, shape (rows, classes); of numbers (rows, 0).
        places: the number of each row in its file, or the name of its image.
        others: the cells of the columns that the model does not take, as text, by column.
        remarks: what a reader should know, one line each.
    """

    target: str
    unit: str
    classes: tuple[str, ...]
    values: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    places: tuple[str, ...]
    others: dict[str, list[str]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def answers(self) -> list[str]:
        """Return each row's class by its name, or its number as text with seven digits."""
        if self.classes:
            return [self.classes[int(value)] for value in self.values]
        return [f"{value:.7g}" for value in self.values]

    def csv(self) -> str:
        """Return a CSV table: a row's number, the columns that were carried along, the prediction, probabilities."""
        answer = f"predicted {self.target}" + (f" in {self.unit}" if self.unit and self.unit not in self.target else "")
        head = ["row", *self.others, answer, *(f"probability of {name}" for name in self.classes)]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(head)
        others = list(self.others.values())
        for at, (place, said) in enumerate(zip(self.places, self.answers, strict=True)):
            chances = (f"{chance:.6f}" for chance in self.probabilities[at])
            writer.writerow([place, *(cells[at] for cells in others), said, *chances])
        return text.getvalue()

    def write(self, path: Path) -> None:
        """Write ``csv`` as a file.

        Raises:
            ConfigError: its folder is missing or may not be written.
        """
        try:
            checkpoint.write(path, self.csv().encode())
        except CheckpointError as broken:
            reason = getattr(broken.__cause__, "strerror", None) or "it cannot be written"
            raise ConfigError(f"--out {path}: {reason}: nothing was written") from broken


@dataclass(frozen=True)
class _Model:
    """A model that predicts: the schema of its table or the shape of its rows, and its network."""

    schema: Schema | None
    shape: Shape | None
    options: TableOptions
    network: Network


def predict(source: Path, data: Path) -> Predictions:
    """Predict for new rows.

    Args:
        source: the folder of a finished run, or an ONNX file that ``export`` wrote.
        data: of the model of a table a CSV or Parquet file, whose columns are found by their names; of others an .npz
            file with an array ``x``, or a folder of images.

    Raises:
        CheckpointError: the run is not finished or its files are damaged.
        ConfigError: the source is neither.
        DataError: the rows are not such as the model takes; the text says where.
    """
    if not data.exists():
        raise DataError(f"--data {data}: there is no such file or folder")
    model = _run(source) if source.is_dir() else _file(source)
    if model.schema is not None:
        return _of_table(model, model.schema, read_new_rows(data, model.schema, model.options))
    if model.shape is None:
        raise ModelError(f"{source} does not say what it takes: export it again")
    return _of_arrays(model, model.shape, read_new_arrays(data, model.shape))


def _run(folder: Path) -> _Model:
    shipped = read(folder)
    whole = deployed(shipped.schema, shipped.shape, shipped.slim).eval()

    def network(x: NDArray[np.generic]) -> NDArray[np.float32]:
        with torch.no_grad():
            found: NDArray[np.float32] = whole(torch.from_numpy(x)).numpy()
        return found

    options = table_options(shipped.study.data.reading) if shipped.schema else TableOptions()
    return _Model(shipped.schema, shipped.shape, options, network)


def _file(path: Path) -> _Model:
    if path.suffix != ".onnx" or not path.is_file():
        raise ConfigError(f"{path} is neither the folder of a run nor an .onnx file: give one of them")
    runtime = need("onnxruntime", extra="export")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as broken:  # a runtime raises classes of its own
        raise ConfigError(f"{path} cannot be read as ONNX: {' '.join(str(broken).split())[:200]}") from broken
    facts = session.get_modelmeta().custom_metadata_map
    schema = Schema.from_json(facts[SCHEMA_KEY]) if SCHEMA_KEY in facts else None
    shape = None
    if SHAPE_KEY in facts:
        said = json.loads(facts[SHAPE_KEY])
        shape = Shape(**{**said, "input_shape": tuple(said["input_shape"])})

    def network(x: NDArray[np.generic]) -> NDArray[np.float32]:
        cells = {"input": x} if schema is None else cells_of(schema, x.astype(np.float64))
        found: NDArray[np.float32] = session.run([OUTPUT], cells)[0]
        return found

    return _Model(schema, shape, table_options(json.loads(facts.get(READING_KEY, "{}"))), network)


def _of_table(model: _Model, schema: Schema, rows: NewRows) -> Predictions:
    values, chances = _answered(_outputs(model.network, rows.raw), learnt=bool(schema.classes))
    unit = "" if schema.classes else schema.unit
    places = tuple(str(place) for place in rows.places)
    return Predictions(
        schema.target.name, unit, schema.classes, values, chances, places, rows.others, rows.remarks
    )  # fmt: skip


def _of_arrays(model: _Model, shape: Shape, rows: Arrays) -> Predictions:
    found = _outputs(model.network, rows.x)
    learnt = shape.task != "regression"
    values, chances = _answered(found, learnt=learnt)
    classes = tuple(str(number) for number in range(found.shape[1])) if learnt else ()
    return Predictions("class" if learnt else "value", shape.unit, classes, values, chances, rows.places)


def _outputs(network: Network, x: NDArray[np.generic]) -> NDArray[np.float64]:
    parts = [network(x[at : at + _BATCH]) for at in range(0, len(x), _BATCH)]
    return np.concatenate(parts).astype(np.float64).reshape(len(x), -1)


def _answered(found: NDArray[np.float64], *, learnt: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each row's class and the classes' probabilities, or its number and none."""
    if not learnt:
        return found[:, 0], found[:, :0]
    raised = np.exp(found - found.max(axis=1, keepdims=True))
    return found.argmax(axis=1).astype(np.float64), raised / raised.sum(axis=1, keepdims=True)
