"""Pictures of Pillow as one array of bytes."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from secateur.errors import DataError

_EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"}


def common_mode(modes: Collection[str], name: str) -> str:
    """Return the mode that pictures are turned into: grey if all are, colour with transparency if all are, or colour.

    Raises:
        DataError: some have other than 8 bits a channel.
    """
    found = set(modes)
    if not found <= _EIGHT_BITS:
        raise DataError(f"data set {name!r} has images that are missing or not of 8 bits: {sorted(found)}")
    return "L" if found <= {"1", "L"} else "RGBA" if found == {"RGBA"} else "RGB"


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """Return images (n, height, width), or with channels behind, as (n, channels, height, width) in one piece."""
    return np.ascontiguousarray(pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2))
