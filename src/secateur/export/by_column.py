"""ONNX graphs of tables: an input for each column, by its name, and the answer as a class's name or in the unit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.data.delimited import MISSING
from secateur.data.schema import Schema
from secateur.data.table_options import TableOptions
from secateur.errors import need

SCHEMA_KEY, READING_KEY, SHAPE_KEY = "secateur.schema", "secateur.reading", "secateur.shape"
"""The entries of an ONNX file's metadata: the schema, how tables were read, and the shape of other rows."""

LABEL, PROBABILITIES, OUTPUT = "label", "probabilities", "output"
"""The outputs: a class's name and each class's probability, where classes are learnt; what the network returns."""

_INNER = "network/"  # before the names of the network's own tensors: a column may be called anything
_ML = "ai.onnx.ml"


def by_column(path: Path, schema: Schema, options: TableOptions) -> None:
    """Give a file of a network that takes rows as one matrix an input for each column, and outputs in words.

    A column of numbers is float64 (rows,), NaN where a cell is missing. A column of categories is text (rows,): words
    as they stand in the table, whatever means a missing cell there, and any other word for none of the categories.

    Args:
        path: the ONNX file of ``Deployed``, which is replaced.
        schema: what its columns are.
        options: what else than usual means a missing cell.
    """
    onnx = need("onnx", extra="export")
    helper = onnx.helper
    model = onnx.compose.add_prefix(onnx.load(path), _INNER)
    names = [feature.name for feature in schema.features]
    cells = [helper.make_tensor(f"{_INNER}one column", onnx.TensorProto.INT64, [2], [-1, 1])]
    before, inputs = [], []
    for at, feature in enumerate(schema.features):
        column = f"{_INNER}column {at}"
        kind = onnx.TensorProto.STRING if feature.categories else onnx.TensorProto.DOUBLE
        inputs.append(helper.make_tensor_value_info(feature.name, kind, ["rows"]))
        source = feature.name
        if feature.categories:
            before += _coded(helper, feature.name, feature.categories, options, column)
            source = f"{column} as number"
        before.append(helper.make_node("Reshape", [source, cells[0].name], [column]))
    columns = [f"{_INNER}column {at}" for at in range(len(names))]
    before.append(helper.make_node("Concat", columns, [f"{_INNER}input"], axis=1))
    after, outputs = _answers(onnx, schema, model.graph.output[0].type)
    graph = helper.make_graph(
        [*before, *model.graph.node, *after], "columns", inputs, outputs, [*cells, *model.graph.initializer],
        value_info=list(model.graph.value_info),
    )  # fmt: skip
    opsets = [opset for opset in model.opset_import if opset.domain != _ML] + [helper.make_opsetid(_ML, 2)]
    whole = helper.make_model(
        graph, opset_imports=opsets, ir_version=model.ir_version, functions=list(model.functions),
    )  # fmt: skip
    onnx.checker.check_model(whole)
    onnx.save(whole, path)


def _coded(helper: Any, name: str, categories: tuple[str, ...], options: TableOptions, column: str) -> list[Any]:
    """Return the nodes that turn words into their places, NaN where they mean a missing cell, -1 for others."""
    empty = [word for word in (*MISSING, *options.missing) if word not in categories]
    encoder = helper.make_node(
        "LabelEncoder", [name], [f"{column} as place"], domain=_ML, keys_strings=[*categories, *empty],
        values_floats=[*map(float, range(len(categories))), *[float("nan")] * len(empty)], default_float=-1.0,
    )  # fmt: skip
    return [encoder, helper.make_node("Cast", [f"{column} as place"], [f"{column} as number"], to=_double())]


def _double() -> int:
    return int(need("onnx", extra="export").TensorProto.DOUBLE)


def _answers(onnx: Any, schema: Schema, kind: Any) -> tuple[list[Any], list[Any]]:
    helper, kinds, network = onnx.helper, onnx.TensorProto, f"{_INNER}output"
    last = helper.make_node("Identity", [network], [OUTPUT])
    info = helper.make_value_info(OUTPUT, kind)
    if not schema.classes:
        return [last], [info]
    chosen = f"{_INNER}chosen"
    nodes = [
        helper.make_node("Softmax", [network], [PROBABILITIES], axis=1),
        helper.make_node("ArgMax", [network], [chosen], axis=1, keepdims=0),
        helper.make_node("LabelEncoder", [chosen], [LABEL], domain=_ML, default_string="",
                         keys_int64s=list(range(schema.outputs)), values_strings=list(schema.classes)),
        last,
    ]  # fmt: skip
    return nodes, [
        helper.make_tensor_value_info(LABEL, kinds.STRING, ["rows"]),
        helper.make_tensor_value_info(PROBABILITIES, kinds.FLOAT, ["rows", schema.outputs]),
        info,
    ]


def cells_of(schema: Schema, raw: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    """Return rows of ``Schema.raw`` as the graph's inputs: columns by name, categories as words again."""
    found: dict[str, NDArray[Any]] = {}
    for at, feature in enumerate(schema.features):
        column = raw[:, at]
        if not feature.categories:
            found[feature.name] = column.astype(np.float64)
            continue
        other = "other"  # than all categories and all marks of a missing cell
        while other in feature.categories:
            other += "_"
        words = np.array([*feature.categories, other, ""], dtype=object)
        place = np.where(np.isnan(column), len(words) - 1, np.where(column < 0, len(words) - 2, column))
        found[feature.name] = words[place.astype(np.int64)]
    return found


def describe(path: Path, facts: Mapping[str, str]) -> None:
    """Write facts into an ONNX file, as its metadata."""
    onnx = need("onnx", extra="export")
    model = onnx.load(path)
    onnx.helper.set_model_props(model, dict(facts))
    onnx.save(model, path)


def reading(options: Mapping[str, object]) -> str:
    """Return how tables were read, as JSON for ``READING_KEY``: what a study says of a file's way of writing."""
    kept = {name: value for name, value in options.items() if name in {"delimiter", "decimal", "header", "missing"}}
    return json.dumps(kept)
