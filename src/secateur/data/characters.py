"""Text as data for next-character prediction: character codes, and windows with the character that follows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 80
# LEAF's vocabulary of 80, in its order
LETTERS = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
_CODES = {letter: code for code, letter in enumerate(LETTERS)}


def codes(text: str | None) -> np.ndarray:
    """Return LEAF's code of each character; one that LEAF does not have becomes a space."""
    return np.array([_CODES.get(letter, _CODES[" "]) for letter in text or ""], dtype=np.uint8)


def windows(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut the character codes of texts into windows, each with the character after it.

    Returns:
        windows (n, 80), next characters (n,), number of the text (n,), and whether the character to predict
        is in the last tenth of its text: such characters are the test part and no training row's target.
    """
    rows = [np.zeros((0, WINDOW + 1), np.uint8)]
    ids, late = [np.zeros(0, np.int64)], [np.zeros(0, np.bool_)]
    for number, text in enumerate(texts):
        if len(text) > WINDOW:
            rows.append(np.lib.stride_tricks.sliding_window_view(text, WINDOW + 1)[:: WINDOW // 8])
            ids.append(np.full(len(rows[-1]), number))
            late.append(np.arange(len(rows[-1])) * (WINDOW // 8) >= 0.9 * len(text) - WINDOW)
    found = np.concatenate(rows)
    return found[:, :WINDOW].copy(), found[:, WINDOW].astype(np.int64), np.concatenate(ids), np.concatenate(late)
