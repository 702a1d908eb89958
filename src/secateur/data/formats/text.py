"""Plain text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from secateur.data.characters import LETTERS, WINDOW, windows
from secateur.data.sources import Source
from secateur.errors import DataError


def load(argument: str, seed: int) -> Source:
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
    x, y, ids, late = windows(codes)
    if late.all() or not late.any():
        raise DataError(f"{path}: no role speaks long enough for a window of {WINDOW} characters and a test part")
    outputs = max(len(LETTERS), len(vocabulary))
    return Source(f"text:{path.name}", x[~late], y[~late], x[late], y[late], ids[~late], outputs, "tokens")


def _roles(text: str) -> list[str]:
    """Return the joined speeches of each role; a paragraph without a role's name belongs to the role before it."""
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
