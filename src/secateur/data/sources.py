"""Sources: a specification such as ``idx:FOLDER`` -> arrays with a train and a test part.

Each loader is a function ``_NAME(argument, seed)``; its docstring is what ``secateur list`` shows.
"""

from __future__ import annotations

import gzip
import importlib
import inspect
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from secateur.data import embedded
from secateur.data.graphs import CLASSES, communities
from secateur.data.hold import hold_out
from secateur.data.tables import table
from secateur.errors import DataError, SecateurError, need, unknown

Kind = Literal["image", "tokens", "tabular"]
WINDOW = 80
# LEAF's vocabulary of 80, in its order
LETTERS = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
_CODES = {letter: code for code, letter in enumerate(LETTERS)}


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
        task: what is learnt: ``classification``, ``regression``, or your own ``module:Class`` of ``learning.task``.
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
    task: str = "classification"


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


def load(spec: str, *, seed: int, whole: bool = True) -> Source:
    """Load a source.

    Args:
        spec: as ``names`` tells, such as ``digits`` or ``idx:FOLDER``, or your own
            ``module:function:FOLDER``; the function gets (folder, seed) and returns a ``Source``.
        seed: draws the test part where the data set has none.
        whole: there must be a test part too; one node's own rows need none.

    Raises:
        DataError: unknown source, or files that are missing or not what they should be.
        MissingExtraError: a package that the source needs is not installed.
    """
    name, _, argument = spec.partition(":")
    if name in _LOADERS:
        if name not in embedded.NAMES and not argument:
            raise DataError(f"data {spec!r}: say where it is, as {names()[name].name}")
        source = _LOADERS[name](argument, seed)
    elif argument:
        source = _yours(name, *argument.partition(":")[::2], seed)
    else:
        raise unknown("data source", name, _LOADERS, error=DataError)
    if not len(source.x_train) or (whole and not len(source.x_test)):
        raise DataError(f"data {spec!r} has {len(source.x_train)} training and {len(source.x_test)} test rows")
    if source.x_train.shape[1:] != source.x_test.shape[1:]:
        shapes = f"{source.x_train.shape[1:]} and {source.x_test.shape[1:]}"
        raise DataError(f"data {spec!r} has training and test rows of different shapes: {shapes}")
    return source


def _yours(module: str, function: str, folder: str, seed: int) -> Source:
    """Return what a loader of anyone's own returns; whatever it raises is told with its name."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name != module.partition(".")[0]:
            raise DataError(f"data {module}:{function}: {missing}") from missing
        raise unknown("data source", module, _LOADERS, error=DataError) from missing
    try:
        source = getattr(found, function)(folder, seed)
    except SecateurError:
        raise
    except Exception as broken:
        raise DataError(
            f"data {module}:{function}: {type(broken).__name__}: {' '.join(str(broken).split())}"
        ) from broken
    if not isinstance(source, Source):
        raise DataError(f"data {module}:{function} returned {type(source).__name__}, not a secateur.data.Source")
    return source


def _digits(argument: str, seed: int) -> Source:
    """`digits`: handwritten digits, 1,797 images of 8x8, embedded; a seeded fifth of each class is the test set.

    Reference: Alpaydin and Kaynak, UCI Optical Recognition of Handwritten Digits; via scikit-learn
    """
    if argument:
        raise DataError(f"data 'digits:{argument}': digits are embedded and take no folder; write digits")
    pixels, y = embedded.digits()
    x = pixels.astype(np.uint8).reshape(-1, 1, 8, 8)
    train, test = hold_out(y, seed)
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
    except (OSError, EOFError, zlib.error) as broken:
        raise DataError(f"{path} is not a complete gzip file ({broken}): fetch it again") from broken
    head = 4 + 4 * dims
    if len(raw) < head or raw[:4] != bytes([0, 0, 8, dims]):
        raise DataError(f"{path} is not an idx file of unsigned bytes in {dims} dimensions")
    shape = struct.unpack(f">{dims}I", raw[4:head])
    if len(raw) - head != math.prod(shape) or not shape[0]:
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


def _communities(argument: str, seed: int) -> Source:
    """`communities`: nodes of a random graph with their neighbourhoods; the 10 communities are natural ids.

    Reference: stochastic block model of networkx; stands in for the subgraphs of FED-PUB, arXiv 2206.10206
    """
    del argument
    x, y, ids = communities(seed)
    train, test = hold_out(y, seed)
    return Source("communities", x[train], y[train], x[test], y[test], ids[train], CLASSES, "tabular", 1.0)


def _table(argument: str, seed: int) -> Source:
    """`table:FILE#TARGET#SITE`: numbers in a CSV file, sites as natural ids; or `table:FOLDER#TARGET`, a file each.

    Reference: none; a fifth of each site is the test set
    """
    made = table(argument, seed)
    return Source("table", *made.parts, made.outputs, "tabular", 1.0, made.task)


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
    codes = [np.searchsorted(vocabulary, list(speech)).astype(np.uint8) for speech in _roles(text)]
    x, y, ids, late = _windows(codes)
    if late.all() or not late.any():
        raise DataError(f"{path}: no role speaks long enough for a window of {WINDOW} characters and a test part")
    outputs = max(len(LETTERS), len(vocabulary))
    return Source(f"text:{path.name}", x[~late], y[~late], x[late], y[late], ids[~late], outputs, "tokens")


def _windows(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut texts into windows, each with the character after it.

    Returns:
        windows (n, 80), next characters (n,), number of the text (n,), and whether the character to predict
        is in the last tenth of its text: such characters are the test part and no training row's target.
    """
    rows = [np.zeros((0, WINDOW + 1), np.uint8)]
    ids, late = [np.zeros(0, np.int64)], [np.zeros(0, np.bool_)]
    for number, codes in enumerate(texts):
        if len(codes) > WINDOW:
            rows.append(np.lib.stride_tricks.sliding_window_view(codes, WINDOW + 1)[:: WINDOW // 8])
            ids.append(np.full(len(rows[-1]), number))
            late.append(np.arange(len(rows[-1])) * (WINDOW // 8) >= 0.9 * len(codes) - WINDOW)
    found = np.concatenate(rows)
    return found[:, :WINDOW].copy(), found[:, WINDOW].astype(np.int64), np.concatenate(ids), np.concatenate(late)


def _roles(text: str) -> list[str]:
    """Join what each role says; a paragraph without a role's name goes on with the last one's."""
    speeches: dict[str, list[str]] = {}
    role = ""
    for block in text.split("\n\n"):
        name, colon, said = (block.strip("\n") + "\n").partition(":\n")
        if colon and "\n" not in name:
            role = name
        else:
            said = block.strip("\n")
        if said:
            speeches.setdefault(role, []).append(said.rstrip("\n") + "\n")
    return [text] if set(speeches) == {""} else ["".join(parts) for parts in speeches.values()]


def _letters(text: str | None) -> np.ndarray:
    """Return LEAF's codes; what is not among its letters is a space."""
    return np.array([_CODES.get(letter, _CODES[" "]) for letter in text or ""], dtype=np.uint8)


def _hub(argument: str, seed: int) -> Source:
    """`hub:NAME`: any image or text classification set of the Hugging Face Hub; NAME#COLUMN names natural ids.

    Reference: Lhoest et al., Datasets, arXiv 2109.02846
    """
    name, _, id_column = argument.partition("#")
    parts = _hub_splits(name)
    features = parts["train"].features
    ids = None
    if id_column:
        if id_column not in features:
            raise DataError(f"data set {name!r} has no column {id_column!r}, only {sorted(features)}")
        written = np.array(parts["train"][id_column][:])
        # rows without an id (None) cannot be sorted beside others; as text they are one client
        ids = np.unique(written.astype(str) if written.dtype == object else written, return_inverse=True)[1]
    inputs = {column: feature for column, feature in features.items() if column != id_column}
    label = _label_column(inputs)
    image, text = _input_columns({column: feature for column, feature in inputs.items() if column != label})
    if image is None and text is None:
        raise DataError(f"data set {name!r} has neither an image nor a text column: {sorted(features)}")
    if label is None:
        if image is not None or text is None:
            raise DataError(f"data set {name!r} has no class label among its columns {sorted(features)}")
        return _hub_characters(f"hub:{argument}", parts, text, ids)
    kind: Kind = "tokens" if image is None else "image"
    arrays = {
        part: (_texts(rows[text]) if image is None else _images(name, rows[image]), _targets(name, rows, label))
        for part, rows in parts.items()
    }
    x, y = arrays["train"]
    if "test" in arrays:
        x_test, y_test = arrays["test"]
    else:
        train, test = hold_out(y, seed)
        x_test, y_test, x, y, ids = x[test], y[test], x[train], y[train], None if ids is None else ids[train]
    classes = getattr(features[label], "num_classes", None) or 0
    outputs = max(classes, int(np.concatenate([y, y_test]).max(initial=-1)) + 1)
    return Source(f"hub:{argument}", x, y, x_test, y_test, ids, outputs, kind)


def _hub_splits(name: str) -> dict[str, Any]:
    """Return the train split and, where there is one, the test split."""
    datasets = need("datasets", extra="hub")
    datasets.disable_progress_bars()
    folder = Path(name).expanduser()
    try:
        on_disk = (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists()
        found = datasets.load_from_disk(folder) if on_disk else datasets.load_dataset(name)
    except Exception as broken:
        raise DataError(f"data set {name!r} cannot be loaded: {' '.join(str(broken).split())[:300]}") from broken
    parts = found if isinstance(found, dict) else {"train": found}
    if "train" not in parts:
        raise DataError(f"data set {name!r} has no split named train, only {sorted(parts)}")
    return {part: rows for part, rows in parts.items() if part in {"train", "test"}}


def _hub_characters(shown: str, parts: dict[str, Any], column: str, ids: np.ndarray | None) -> Source:
    """Next-character prediction on a text column without labels; each natural id, or each row, is one text."""
    rows = [_letters(text) for text in parts["train"][column]]
    if ids is not None:
        rows = [np.concatenate([rows[at] for at in np.flatnonzero(ids == k)]) for k in range(ids.max() + 1)]
    x, y, text, late = _windows(rows)
    if "test" in parts:
        x_test, y_test = _windows([_letters(line) for line in parts["test"][column]])[:2]
    else:
        x_test, y_test = x[late], y[late]
        x, y, text = x[~late], y[~late], text[~late]
    return Source(shown, x, y, x_test, y_test, text, len(LETTERS), "tokens")


def _label_column(features: dict[str, Any]) -> str | None:
    for column, feature in features.items():
        if type(feature).__name__ == "ClassLabel":
            return column
    return next((column for column in ("label", "labels", "fine_label") if column in features), None)


def _input_columns(features: dict[str, Any]) -> tuple[str | None, str | None]:
    images = [column for column, feature in features.items() if type(feature).__name__ == "Image"]
    texts = [c for c, feature in features.items() if getattr(feature, "dtype", "") in {"string", "large_string"}]
    return images[0] if images else None, texts[0] if texts else None


def _targets(name: str, rows: Any, label: str) -> np.ndarray:
    y = np.array(rows[label][:])
    if y.size and (y.dtype.kind not in "iub" or y.min() < 0):
        raise DataError(
            f"data set {name!r}: column {label!r} must hold a class 0, 1, ... for each row; "
            "map names to numbers, and drop rows (or the test split) without a label"
        )
    return y.astype(np.int64)


def _texts(texts: Any) -> np.ndarray:
    """Return the first 80 characters of each text, filled up with line ends (code 0)."""
    found = np.zeros((len(texts), WINDOW), np.uint8)
    for row, text in enumerate(texts):
        codes = _letters((text or "")[:WINDOW])
        found[row, : len(codes)] = codes
    return found


def _images(name: str, images: Any) -> np.ndarray:
    """Return images (n, channels, height, width): one channel if all are grey, else RGB, or RGBA if all are."""
    pictures = list(images)
    modes = {getattr(picture, "mode", "missing") for picture in pictures}
    if not modes <= {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"}:
        raise DataError(f"data set {name!r} has images that are missing or not of 8 bits: {sorted(modes)}")
    mode = "L" if modes <= {"1", "L"} else "RGBA" if modes == {"RGBA"} else "RGB"
    pixels = [np.asarray(picture.convert(mode), np.uint8) for picture in pictures]
    shapes = {p.shape for p in pixels}
    if len(shapes) > 1:
        raise DataError(f"data set {name!r} has images of {len(shapes)} different shapes; resize them to one first")
    if not pixels:
        return np.zeros((0, 1, 1, 1), np.uint8)
    stacked = np.stack(pixels)
    return np.ascontiguousarray(stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2))


def _folder(argument: str, name: str) -> Path:
    folder = Path(argument).expanduser()
    if not folder.is_dir():
        raise DataError(f"data {name}:{argument}: there is no such folder")
    return folder


_LOADERS: dict[str, Callable[[str, int], Source]] = {
    "digits": _digits, "communities": _communities, "idx": _idx, "cifar10": _cifar10, "table": _table, "text": _text,
    "hub": _hub,
}  # fmt: skip
