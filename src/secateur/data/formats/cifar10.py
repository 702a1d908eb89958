"""CIFAR-10's binary file format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from secateur.data.sources import Source, folder_of
from secateur.errors import DataError


def load(argument: str, seed: int) -> Source:
    """`cifar10:FOLDER`: CIFAR-10 from the standard binary layout (data_batch_*.bin, test_batch.bin).

    Reference: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009
    """
    del seed
    folder = folder_of(argument, "cifar10")
    if (folder / "cifar-10-batches-bin").is_dir():
        folder = folder / "cifar-10-batches-bin"
    batches = sorted(folder.glob("data_batch_*.bin"))
    if not batches:
        raise DataError(f"{folder} holds no data_batch_*.bin: give the folder of the binary version of CIFAR-10")
    train = [_read_cifar(path) for path in batches]
    x, y = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return Source("cifar10", x, y, *_read_cifar(folder / "test_batch.bin"), None, 10)


def _read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        raw = np.fromfile(path, np.uint8)
    except OSError as broken:
        raise DataError(f"cannot read {path}: {broken.strerror}") from broken
    if not len(raw) or len(raw) % 3073:
        raise DataError(f"{path} has {len(raw)} bytes, which is no multiple of a record's 3,073")
    records = raw.reshape(-1, 3073)
    if records[:, 0].max() > 9:
        raise DataError(f"{path} has labels above 9: not a CIFAR-10 batch")
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)
