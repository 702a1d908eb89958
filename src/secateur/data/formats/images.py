"""Folders of image files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from secateur.data.hold import hold_out
from secateur.data.pictures import channels_first, common_mode
from secateur.data.source import Source, named
from secateur.data.sources import folder_of
from secateur.errors import DataError, need

IMAGES = {".png", ".jpg", ".jpeg"}
Named = list[tuple[Path, int]]


@dataclass(frozen=True)
class ImageOptions:
    """What a folder of images does not say of itself.

    Attributes:
        size: the size that every image is resized to, as ``32`` or ``WIDTHxHEIGHT``; empty: all have one size already.
        classes: the names of all classes, where this folder may lack some; their order numbers them.
    """

    size: str = ""
    classes: tuple[str, ...] = ()


def load(argument: str, seed: int, options: ImageOptions) -> Source:
    """`images:FOLDER`: PNG and JPEG files in a folder for each class; or in train/CLASS and test/CLASS.

    Classes are numbered in the order of their names. Without a test folder a seeded fifth of each class is the test
    set. Images are grey if all of them are, else in colour.

    Reference: none; the layout of torchvision's ImageFolder
    """
    folder = folder_of(argument, "images")
    parts = [folder / "train", folder / "test"]
    places = parts if all(part.is_dir() for part in parts) else [folder]
    there = sorted({name for place in places for name in _classes(place)})
    classes = list(options.classes) or there
    _check_plain(classes)
    twice = next((name for name in classes if classes.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"data.options.classes names {twice!r} twice")
    if not there:
        raise DataError(f"{folder} holds no folders: put the images of each class into a folder of its name")
    strange = sorted(set(there) - set(classes))
    if strange:
        raise DataError(f"{folder} holds a folder {strange[0]!r}, which is none of data.options.classes")
    files = [_files(place, classes) for place in places]
    remarks = _left_out(folder, places, classes, files)
    bare = [
        name for number, name in enumerate(there) if not any(label == number for part in files for _, label in part)
    ]
    if bare and not options.classes:
        remarks += (f"{folder}: no image lies in {', '.join(map(repr, bare))}: a class without rows",)
    x = _pixels(f"images:{argument}", [path for part in files for path, _ in part], _size(options.size))
    y = np.array([label for part in files for _, label in part], np.int64)
    if len(files) == 2:
        train, test = np.split(np.arange(len(y)), [len(files[0])])
    else:
        train, test = hold_out(y, seed)
    name = f"images:{folder.name}"
    return Source(
        name, x[train], y[train], x[test], y[test], None, len(classes), remarks=remarks, classes=named(classes)
    )


def _check_plain(classes: Sequence[str]) -> None:
    """Refuse names of classes that lead out of the folder.

    Raises:
        DataError: one does.
    """
    strange = next((name for name in classes if name in {"", ".", ".."} or "/" in name or os.sep in name), None)
    if strange is not None:
        raise DataError(f"data.options.classes holds {strange!r}: a class is the name of a folder, without a path")


def _classes(place: Path) -> list[str]:
    return [folder.name for folder in place.iterdir() if folder.is_dir() and not folder.name.startswith(".")]


def _files(place: Path, classes: list[str]) -> Named:
    """Return the image files of a part with their classes, in the order of classes and names."""
    return [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((place / name).glob("*"))
        if path.suffix.lower() in IMAGES and not path.name.startswith(".")
    ]


def _left_out(folder: Path, places: list[Path], classes: list[str], files: list[Named]) -> tuple[str, ...]:
    """Return a remark on files that are no images.

    Raises:
        DataError: there is no image.
    """
    count = sum(map(len, files))
    if not count:
        raise DataError(
            f"{folder} holds no {', '.join(sorted(IMAGES))} in a folder of a class: put them into {folder}/CLASS, or "
            f"into {folder}/train/CLASS and {folder}/test/CLASS"
        )
    there = sum(path.is_file() for place in places for name in classes for path in (place / name).glob("*"))
    return (f"{folder}: {there - count} files are no PNG or JPEG: left out",) if there > count else ()


def _size(text: str) -> tuple[int, int] | None:
    """Return width and height, None where none are given."""
    if not text:
        return None
    found = re.fullmatch(r"(\d{1,4})(?:x(\d{1,4}))?", text)
    size = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not all(size):
        raise DataError(f"data.options.size = {text!r}: write it as 32, or as WIDTHxHEIGHT in pixels")
    return size


def _pixels(name: str, files: list[Path], size: tuple[int, int] | None) -> np.ndarray:
    """Return images (n, channels, height, width), uint8.

    Raises:
        DataError: a file is no image, or sizes differ and none is given.
    """
    heads = [_read(path, lambda image: (image.mode, image.size)) for path in files]
    mode = common_mode({mode for mode, _ in heads}, name)
    first = heads[0][1]
    if size is None:
        other = next((path for path, (_, found) in zip(files, heads, strict=True) if found != first), None)
        if other is not None:
            raise DataError(
                f"{other} is {_times(dict(zip(files, heads, strict=True))[other][1])} pixels, {files[0]} is "
                f"{_times(first)}: set data.options.size={_times(first)} to resize all"
            )
    return pixels_of(files, mode, size)


def pixels_of(files: list[Path], mode: str, size: tuple[int, int] | None) -> np.ndarray:
    """Return images (n, channels, height, width), uint8.

    Args:
        files: the files.
        mode: Pillow's name of grey, colour or colour with transparency.
        size: width and height that each is resized to; None: all have one size.

    Raises:
        DataError: a file is no image.
        MissingExtraError: there is no Pillow.
    """
    made = need("PIL.Image", extra="images")

    def pixels(image: Any) -> np.ndarray:
        image = image.convert(mode)
        return np.asarray(image if size is None else image.resize(size, made.Resampling.BILINEAR), np.uint8)

    return channels_first(np.stack([_read(path, pixels) for path in files]))


def _read(path: Path, use: Any) -> Any:
    made = need("PIL.Image", extra="images")
    try:
        with made.open(path) as image:
            return use(image)
    except (OSError, SyntaxError, ValueError, made.DecompressionBombError) as broken:
        raise DataError(f"cannot read the image {path}: {' '.join(str(broken).split())[:200]}") from broken


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
