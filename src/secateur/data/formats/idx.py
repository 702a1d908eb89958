"""MNIST's file format."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from secateur.data.sources import Source, folder_of
from secateur.errors import DataError, check
from secateur.streams import stream


@dataclass(frozen=True)
class IdxOptions:
    """How images are read.

    Attributes:
        rows: the number of training rows, drawn from the seed without replacement; 0: all of them.
    """

    rows: int = 0

    def __post_init__(self) -> None:
        check(self.rows >= 0, name="rows", value=self.rows, must="be 0 or more", error=DataError)


def load(argument: str, seed: int, options: IdxOptions = IdxOptions()) -> Source:
    """`idx:FOLDER`: MNIST or Fashion-MNIST from a folder with their four idx .gz files.

    Reference: LeCun et al., MNIST; Xiao et al., Fashion-MNIST, arXiv 1708.07747
    """
    folder = folder_of(argument, "idx")
    parts = {}
    for part in ("train", "t10k"):
        images = _read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
        labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
        if len(images) != len(labels):
            raise DataError(f"data in {folder}: {len(images)} {part} images but {len(labels)} labels")
        parts[part] = (images[:, None], labels.astype(np.int64))
    if options.rows:
        parts["train"] = _drawn(*parts["train"], options.rows, seed, folder)
    outputs = int(max(parts["train"][1].max(), parts["t10k"][1].max())) + 1
    return Source(f"idx:{folder.name}", *parts["train"], *parts["t10k"], None, outputs)


def _drawn(x: np.ndarray, y: np.ndarray, rows: int, seed: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return some of the rows, in their order."""
    if rows > len(y):
        raise DataError(f"data option rows = {rows}: {folder} has {len(y)} training rows")
    chosen = np.sort(torch.randperm(len(y), generator=stream(seed, "rows"))[:rows].numpy())
    return x[chosen], y[chosen]


def _read_idx(path: Path, dims: int) -> np.ndarray:
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing: the folder must hold the four idx .gz files of the data set") from None
    except (OSError, EOFError, zlib.error) as broken:
        raise DataError(f"{path} is not a complete gzip file ({broken}): fetch it again") from broken
    head = 4 + 4 * dims
    if len(raw) < head or raw[:4] != bytes([0, 0, 8, dims]):
        raise DataError(f"{path} is not an idx file of unsigned bytes in {dims} dimensions")
    shape = struct.unpack(f">{dims}I", raw[4:head])
    if len(raw) - head != math.prod(shape) or not shape[0]:
        raise DataError(f"{path} announces {shape} but holds {len(raw) - head} bytes")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)
