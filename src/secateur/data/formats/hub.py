"""Data sets of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from secateur.data.characters import LETTERS, WINDOW, codes, windows
from secateur.data.hold import hold_out
from secateur.data.pictures import channels_first, common_mode
from secateur.data.sources import Kind, Source
from secateur.errors import DataError, need


def load(argument: str, seed: int) -> Source:
    """`hub:NAME`: any image or text classification set of the Hugging Face Hub; NAME#COLUMN names natural ids.

    Reference: Lhoest et al., Datasets, arXiv 2109.02846
    """
    name, _, id_column = argument.partition("#")
    parts = _splits(name)
    features = parts["train"].features
    ids = None
    if id_column:
        if id_column not in features:
            raise DataError(f"data set {name!r} has no column {id_column!r}, only {sorted(features)}")
        written = np.array(parts["train"][id_column][:])
        # rows without an id (None) cannot be sorted with the others; as text they are one client
        ids = np.unique(written.astype(str) if written.dtype == object else written, return_inverse=True)[1]
    inputs = {column: feature for column, feature in features.items() if column != id_column}
    label = _label_column(inputs)
    image, text = _input_columns({column: feature for column, feature in inputs.items() if column != label})
    if image is None and text is None:
        raise DataError(f"data set {name!r} has neither an image nor a text column: {sorted(features)}")
    if label is None:
        if image is not None or text is None:
            raise DataError(f"data set {name!r} has no class label among its columns {sorted(features)}")
        return _next_characters(f"hub:{argument}", parts, text, ids)
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


def _splits(name: str) -> dict[str, Any]:
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


def _next_characters(shown: str, parts: dict[str, Any], column: str, ids: np.ndarray | None) -> Source:
    """Return a source of next-character prediction; each natural id, or else each row, is one text."""
    rows = [codes(text) for text in parts["train"][column]]
    if ids is not None:
        rows = [np.concatenate([rows[at] for at in np.flatnonzero(ids == k)]) for k in range(ids.max() + 1)]
    x, y, text, late = windows(rows)
    if "test" in parts:
        x_test, y_test = windows([codes(line) for line in parts["test"][column]])[:2]
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
        row_codes = codes((text or "")[:WINDOW])
        found[row, : len(row_codes)] = row_codes
    return found


def _images(name: str, images: Any) -> np.ndarray:
    """Return images (n, channels, height, width): one channel if all are grey, else RGB, or RGBA if all are."""
    pictures = list(images)
    mode = common_mode({getattr(picture, "mode", "missing") for picture in pictures}, name)
    pixels = [np.asarray(picture.convert(mode), np.uint8) for picture in pictures]
    shapes = {p.shape for p in pixels}
    if len(shapes) > 1:
        raise DataError(f"data set {name!r} has images of {len(shapes)} different shapes; resize them to one first")
    if not pixels:
        return np.zeros((0, 1, 1, 1), np.uint8)
    return channels_first(np.stack(pixels))
