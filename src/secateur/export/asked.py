"""What an exported model is asked and answers, for its card: columns, units, classes, and how the file takes them."""

from __future__ import annotations

from typing import Any

from secateur.data.schema import Schema
from secateur.data.shards import Shape
from secateur.report.card import Input


def inputs_of(schema: Schema | None) -> tuple[Input, ...]:
    """Return the columns that the model of a table takes, in order; nothing for other data."""
    if schema is None:
        return ()
    every = zip(schema.features, schema.mean, schema.scale, schema.marked, strict=True)
    return tuple(Input(f.name, f.categories, mean, scale, marked) for f, mean, scale, marked in every)


def answer_of(schema: Schema | None) -> dict[str, Any]:
    """Return what the model of a table answers: the target's name, its classes, its unit, mean and scale."""
    if schema is None:
        return {}
    answer: dict[str, Any] = {"target": schema.target.name, "classes": list(schema.classes), "unit": schema.unit}
    return answer if schema.classes else answer | {"mean": schema.target_mean, "scale": schema.target_scale}


def taken(schema: Schema | None, shape: Shape, to: str) -> str:
    """Return in a sentence what the exported model is given, and what it returns."""
    if schema is None:
        made = {"image": f"images as float32, divided by {shape.scale:g}, shape (rows, "
                         f"{', '.join(map(str, shape.input_shape))})",
                "tokens": "tokens as int64", "tabular": "features as float32, as in the arrays"}  # fmt: skip
        return f"Inputs: batch first; {made[shape.kind]}."
    if to == "onnx":
        return (
            "Inputs: one for each column, by its name, shape (rows,): numbers as float64 in their own unit, NaN where "
            "a cell is missing; categories as text, as in the table. Means, scales and categories are in the graph. "
            "Outputs: " + ("`label` (a class's name), `probabilities` and `output` (logits)."
                           if schema.classes else "`output`, in the target's own unit.")
        )  # fmt: skip
    if to == "safetensors":
        return (
            "Inputs of these weights: scaled numbers, one-hot categories and marks of missing cells, as `schema.json` "
            "and the table below say."
        )
    return (
        "Inputs: float64 (rows, columns) in the order below: numbers in their own unit, a category as its place in its "
        "list from 0 (-1: none of them), NaN where a cell is missing. Means and scales are in the graph."
    )
