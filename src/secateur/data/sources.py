"""Sources: a specification such as ``idx:FOLDER`` -> arrays with a train and a test part.

Each loader is a function ``_NAME(argument, seed)``; its docstring is what ``secateur list`` shows.
"""

from __future__ import annotations

import gzip
import inspect
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from secateur.errors import DataError, need, unknown
from secateur.streams import stream

Kind = Literal["image", "tokens", "tabular"]
Task = Literal["classification", "regression"]
WINDOW = 80


@dataclass(frozen=True)
class Source:
    """A data set as arrays.

    Attributes:
        name: the specification it came from.
        x_train, x_test: rows; images uint8 (n, channels, height, width), tokens uint8 (n, characters),
            features float32 (n, features).
        y_train, y_test: int64 classes, or float32 values for regression.
        ids: natural client of each training row, or None.
        outputs: classes, or 1 for regression.
        kind: how a row becomes a model input.
        scale: what image values are divided by.
        task: what is learnt.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    ids: np.ndarray | None
    outputs: int
    kind: Kind = "image"
    scale: float = 255.0
    task: Task = "classification"


@dataclass(frozen=True)
class DataInfo:
    """A kind of source: what to type, one line on it, and where it comes from."""

    name: str
    summary: str
    reference: str


def names() -> dict[str, DataInfo]:
    """Return the sources that can be loaded."""
    found = {}
    for name, loader in _LOADERS.items():
        doc = inspect.cleandoc(loader.__doc__ or "")
        summary, _, rest = doc.partition("\n")
        written, _, text = summary.partition(": ")
        found[name] = DataInfo(written.strip("`"), text, " ".join(rest.partition("Reference: ")[2].split()))
    return found


def load(spec: str, *, seed: int) -> Source:
    """Load a source.

    Args:
        spec: ``digits``, ``idx:FOLDER``, ``cifar10:FOLDER``, ``text:FILE`` or ``hub:NAME``.
        seed: draws the test part where the data set has none.

    Raises:
        DataError: unknown source, or files that are missing or not what they should be.
        MissingExtraError: a package that the source needs is not installed.
    """
    name, _, argument = spec.partition(":")
    if name not in _LOADERS:
        raise unknown("data source", name, _LOADERS, error=DataError)
    if name != "digits" and not argument:
        raise DataError(f"data {spec!r}: say where it is, as {names()[name].name}")
    return _LOADERS[name](argument, seed)


def _digits(argument: str, seed: int) -> Source:
    """`digits`: handwritten digits, 1,797 images of 8x8, embedded; a seeded fifth of each class is the test set.

    Reference: Alpaydin and Kaynak, UCI Optical Recognition of Handwritten Digits; via scikit-learn
    """
    if argument:
        raise DataError(f"data 'digits:{argument}': digits are embedded and take no folder; write digits")
    data = need("sklearn.datasets", install="scikit-learn").load_digits()
    x = data.images.astype(np.uint8)[:, None]
    y = data.target.astype(np.int64)
    train, test = _hold_out(y, seed)
    return Source("digits", x[train], y[train], x[test], y[test], None, 10, scale=16.0)


def _idx(argument: str, seed: int) -> Source:
    """`idx:FOLDER`: MNIST or Fashion-MNIST from a folder with their four idx .gz files.

    Reference: LeCun et al., MNIST; Xiao et al., Fashion-MNIST, arXiv 1708.07747
    """
    del seed
    folder = _folder(argument, "idx")
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
    except (OSError, EOFError) as broken:
        raise DataError(f"{path} is not a complete gzip file ({broken}): fetch it again") from broken
    head = 4 + 4 * dims
    if len(raw) < head or raw[:4] != bytes([0, 0, 8, dims]):
        raise DataError(f"{path} is not an idx file of unsigned bytes in {dims} dimensions")
    shape = struct.unpack(f">{dims}I", raw[4:head])
    if len(raw) - head != int(np.prod(shape)) or not shape[0]:
        raise DataError(f"{path} announces {shape} but holds {len(raw) - head} bytes")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def _cifar10(argument: str, seed: int) -> Source:
    """`cifar10:FOLDER`: CIFAR-10 from the standard binary layout (data_batch_*.bin, test_batch.bin).

    Reference: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009
    """
    del seed
    folder = _folder(argument, "cifar10")
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


def _text(argument: str, seed: int) -> Source:
    """`text:FILE`: next-character prediction on plain text, windows of 80; roles ("NAME:" lines) are natural ids.

    Reference: LEAF, arXiv 1812.01097 (its Shakespeare task)
    """
    del seed
    path = Path(argument).expanduser()
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as broken:
        raise DataError(f"cannot read the text {path}: {broken}") from broken
    vocabulary = sorted(set(text))
    if len(vocabulary) > 255 or len(text) <= WINDOW:
        raise DataError(f"{path}: {len(vocabulary)} distinct characters, {len(text)} in all; at most 255, more than 80")
    rows: dict[str, list[tuple[np.ndarray, int, int]]] = {"train": [], "test": []}
    for number, speech in enumerate(_roles(text)):
        codes = np.searchsorted(vocabulary, list(speech)).astype(np.uint8)
        starts = range(0, len(codes) - WINDOW, WINDOW // 8)
        for at in starts:
            part = "test" if at >= 0.9 * len(codes) - WINDOW else "train"
            rows[part].append((codes[at : at + WINDOW], int(codes[at + WINDOW]), number))
    arrays = {part: [np.array(column) for column in zip(*found, strict=True)] for part, found in rows.items()}
    if not arrays["train"] or not arrays["test"]:
        raise DataError(f"{path}: no role speaks long enough for a window of {WINDOW} characters and a test part")
    (x, y, ids), (x_test, y_test, _) = arrays["train"], arrays["test"]
    outputs = max(80, len(vocabulary))
    return Source(f"text:{path.name}", x, y.astype(np.int64), x_test, y_test.astype(np.int64), ids, outputs, "tokens")


def _roles(text: str) -> list[str]:
    """Join what each role says; a text without roles is one."""
    speeches: dict[str, list[str]] = {}
    for block in text.split("\n\n"):
        name, colon, said = block.strip("\n").partition(":\n")
        if colon and "\n" not in name:
            speeches.setdefault(name, []).append(said + "\n")
    return ["".join(parts) for parts in speeches.values()] or [text]


def _hub(argument: str, seed: int) -> Source:
    """`hub:NAME`: any image or text classification set of the Hugging Face Hub; NAME#COLUMN names natural ids.

    Reference: Lhoest et al., Datasets, arXiv 2109.02846
    """
    datasets = need("datasets", install="secateur[hub]")
    name, _, id_column = argument.partition("#")
    try:
        on_disk = Path(name, "dataset_dict.json").exists() or Path(name, "dataset_info.json").exists()
        found = datasets.load_from_disk(name) if on_disk else datasets.load_dataset(name)
    except Exception as broken:
        raise DataError(f"data set {name!r} cannot be loaded: {' '.join(str(broken).split())[:300]}") from broken
    parts = found if isinstance(found, dict) else {"train": found}
    if "train" not in parts:
        raise DataError(f"data set {name!r} has no split named train, only {sorted(parts)}")
    features = parts["train"].features
    label = _label_column(name, features)
    arrays = {part: _columns(name, rows, features, label) for part, rows in parts.items() if part in {"train", "test"}}
    ids = None
    if id_column:
        if id_column not in features:
            raise DataError(f"data set {name!r} has no column {id_column!r}, only {sorted(features)}")
        ids = np.unique(np.array(parts["train"][id_column]), return_inverse=True)[1]
    (x, y), kind = arrays["train"][:2], arrays["train"][2]
    if "test" in arrays:
        x_test, y_test = arrays["test"][:2]
    else:
        train, test = _hold_out(y, seed)
        x_test, y_test, x, y, ids = x[test], y[test], x[train], y[train], None if ids is None else ids[train]
    return Source(f"hub:{argument}", x, y, x_test, y_test, ids, int(max(y.max(), y_test.max())) + 1, kind)


def _label_column(name: str, features: Any) -> str:
    for column, feature in features.items():
        if type(feature).__name__ == "ClassLabel":
            return str(column)
    for column in ("label", "labels", "fine_label"):
        if column in features:
            return column
    raise DataError(f"data set {name!r} has no class label among its columns {sorted(features)}")


def _columns(name: str, rows: Any, features: Any, label: str) -> tuple[np.ndarray, np.ndarray, Kind]:
    y = np.array(rows[label], dtype=np.int64)
    for column, feature in features.items():
        if type(feature).__name__ == "Image":
            return _images(name, rows, column), y, "image"
    for column, feature in features.items():
        if getattr(feature, "dtype", "") in {"string", "large_string"}:
            codes = [[min(ord(c), 127) for c in text[:WINDOW]] for text in rows[column]]
            padded = [row + [0] * (WINDOW - len(row)) for row in codes]
            return np.array(padded, dtype=np.uint8), y, "tokens"
    raise DataError(f"data set {name!r} has neither an image nor a text column: {sorted(features)}")


def _images(name: str, rows: Any, column: str) -> np.ndarray:
    pixels = [np.asarray(image.convert("L") if image.mode == "1" else image, np.uint8) for image in rows[column]]
    shapes = {p.shape for p in pixels}
    if len(shapes) != 1:
        raise DataError(f"data set {name!r} has images of {len(shapes)} different shapes; resize them to one first")
    stacked = np.stack(pixels)
    return np.ascontiguousarray(stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2))


def _hold_out(y: np.ndarray, seed: int, fraction: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Return (train rows, test rows): a seeded ``fraction`` of each class for the test, at least one row."""
    generator = stream(seed, "hold out")
    test = []
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        order = torch.randperm(len(rows), generator=generator).numpy()
        test.append(rows[order[: max(1, round(fraction * len(rows)))]])
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(y)), chosen), chosen


def _folder(argument: str, name: str) -> Path:
    folder = Path(argument).expanduser()
    if not folder.is_dir():
        raise DataError(f"data {name}:{argument}: there is no such folder")
    return folder


_LOADERS: dict[str, Callable[[str, int], Source]] = {
    "digits": _digits, "idx": _idx, "cifar10": _cifar10, "text": _text, "hub": _hub,
}  # fmt: skip
