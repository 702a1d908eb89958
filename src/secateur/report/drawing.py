"""Parts that all figures share, as plotly's JSON; the page itself sets the colours of background and text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Figure = dict[str, Any]
# Near Okabe and Ito's palette, which colour-blind readers can tell apart, each at least 3 : 1 against the page's
# background in the light and in the dark theme; lines beyond it differ in their dashes
COLOURS = ("#0077BB", "#D55E00", "#009070", "#C0609A", "#A87900", "#7B68D9", "#8A5A44", "#5F8A00")
GREY = "#7F7F7F"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "pentagon", "hexagram")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_TICKS = 8  # that a phone has room for


def figure(
    name: str, title: str, alt: str, views: Sequence[Figure], *, caption: str = "", wide: bool = False
) -> Figure:
    """Return a figure of one or several views.

    Args:
        name: its id.
        title: its heading.
        alt: what it shows in words, for those who do not see it.
        views: what it can be switched between.
        caption: how to read it, in a short sentence or two.
        wide: it takes both columns of the page.
    """
    return {"id": name, "title": title, "alt": alt, "caption": caption, "views": list(views), "wide": wide}


def view(data: Sequence[Figure], layout: Figure, name: str = "") -> Figure:
    """Return one view of a figure: its traces and layout; ``name`` labels the switch between views."""
    return {"name": name, "data": list(data), "layout": layout}


def layout(across: str, up: str, *, in_bytes: bool = False) -> Figure:
    """Return a layout with titled axes; with ``in_bytes`` the first axis counts bytes."""
    return {
        "xaxis": {"title": {"text": across}, "automargin": True, **(BYTES if in_bytes else {})},
        "yaxis": {"title": {"text": up}, "automargin": True},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
    }  # fmt: skip


BYTES: Figure = {"tickformat": "~s", "ticksuffix": "B"}
"""The format of an axis that counts bytes."""


def counted(most: float) -> Figure:
    """Return the ticks of an axis that counts from 0 or 1 to ``most``: whole numbers, few enough for a phone.

    >>> counted(3)["dtick"], counted(20)["dtick"], counted(100)["dtick"]
    (1, 5, 20)
    """
    step = 1
    while most / step > _TICKS:
        step = step * 5 // 2 if str(step)[0] == "2" else step * 2
    return {"tick0": 0, "dtick": step, "tickformat": "d"}


def logarithmic(least: float, most: float, shown: Callable[[float], str]) -> Figure:
    """Return a logarithmic axis whose ticks are written as numbers are in tables: 1, 2 and 5, or 1 of each power of 10.

    Args:
        least, most: the ends of what is drawn, both above 0.
        shown: the text of a number.

    >>> logarithmic(900, 4000, str)["ticktext"]
    ['1000.0', '2000.0']
    """
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    for digits in ((1, 2, 5), (1,)):
        ticks = [digit * 10.0**power for power in powers for digit in digits if least <= digit * 10.0**power <= most]
        if len(ticks) <= _TICKS:
            break
    return {"type": "log", "tickvals": ticks, "ticktext": [shown(tick) for tick in ticks]}


def colour(number: int) -> str:
    """Return the colour of the line with this number."""
    return COLOURS[number % len(COLOURS)]


def dash(number: int) -> str:
    """Return the dash of the line with this number: another one for each time that the colours come again."""
    return pattern(number // len(COLOURS))


def pattern(number: int) -> str:
    """Return the dash with this number; no two are alike."""
    if number < len(_DASHES):
        return _DASHES[number]
    return f"{3 * (number - len(_DASHES)) + 5}px,3px,1px,3px"


def symbol(number: int) -> str:
    """Return the marker of the line with this number."""
    return SYMBOLS[number % len(SYMBOLS)]
