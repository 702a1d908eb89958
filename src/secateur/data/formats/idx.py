"""MNIST's file format."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from secateur.data.sources import Source, folder_of
from secateur.errors import DataError


def load(argument: str, seed: int) -> Source:
    """`idx:FOLDER`: MNIST or Fashion-MNIST from a folder with their four idx .gz files.

    Reference: LeCun et al., MNIST; Xiao et al., Fashion-MNIST, arXiv 1708.07747
    """
    del seed
    folder = folder_of(argument, "idx")
    parts = {}
    for part in ("train", "t10k"):
        images = _read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
        labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
        if len(images) != len(labels):
            raise DataError(f"data in {folder}: {len(images)} {part} images but {len(labels)} labels")
        parts[part] = (images[:, None], labels.astype(np.int64))
    outputs = int(max(parts["train"][1].max(), parts["t10k"][1].max())) + 1
    return Source(f"idx:{folder.name}", *parts["train"], *parts["t10k"], None, outputs)


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
