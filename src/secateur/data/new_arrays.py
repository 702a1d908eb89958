"""New rows that are no table's, as a model takes them: arrays from an .npz file, or a folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.data.formats.arrays import read_arrays
from secateur.data.formats.images import IMAGES, pixels_of
from secateur.data.shards import Shape
from secateur.errors import DataError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Arrays:
    """Rows to predict for: a model's inputs, and the name of each row."""

    x: NDArray[np.generic]
    places: tuple[str, ...]


def read_new_arrays(path: Path, shape: Shape) -> Arrays:
    """Read rows of a shape.

    Args:
        path: an .npz file whose array ``x`` holds rows as those that the model learnt from, and ``ids``, if there is
            any, their names; or a folder of images, which are resized to the model's size.
        shape: what the model takes.

    Raises:
        DataError: the rows have another shape, or cannot be read.
    """
    if path.is_dir():
        return _images(path, shape)
    held = read_arrays(path)
    if "x" not in held:
        raise DataError(f"{path} holds {', '.join(sorted(held)) or 'nothing'}: name the rows to predict for x")
    x = held["x"]
    if shape.kind == "image" and x.ndim == len(shape.input_shape) and shape.input_shape[0] == 1:
        x = x[:, None]  # grey images without a channel
    if x.shape[1:] != shape.input_shape or not len(x):
        raise DataError(f"{path}: x has shape {held['x'].shape}, and the model takes (rows, {_inside(shape)})")
    places = tuple(str(one) for one in held.get("ids", range(1, len(x) + 1)))
    if len(places) != len(x):
        raise DataError(f"{path} has {len(places)} ids for {len(x)} rows of x")
    return Arrays(_input(x, shape), places)


def _inside(shape: Shape) -> str:
    return ", ".join(map(str, shape.input_shape))


def _input(x: np.ndarray, shape: Shape) -> NDArray[np.generic]:
    if shape.kind == "tokens":
        return x.astype(np.int64)
    scale = np.float32(shape.scale if shape.kind == "image" else 1)
    return x.astype(np.float32) / scale


def _images(folder: Path, shape: Shape) -> Arrays:
    if shape.kind != "image" or shape.input_shape[0] not in _MODES:
        raise DataError(f"{folder} is a folder, and the model takes (rows, {_inside(shape)}): give an .npz file with x")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if not files:
        raise DataError(f"{folder} holds no image that ends in {', '.join(sorted(IMAGES))}")
    channels, height, width = shape.input_shape
    x = pixels_of(files, _MODES[channels], (width, height))
    return Arrays(_input(x, shape), tuple(str(path.relative_to(folder)) for path in files))
