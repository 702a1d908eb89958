"""Parts that all figures share, as plotly's JSON; the page itself sets the colours of background and text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Figure = dict[str, Any]
# Okabe and Ito's palette, which colour-blind readers can tell apart; lines beyond it differ in their dashes
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B8A900")
DASHES = ("solid", "dash", "dot", "dashdot")
GREY = "#7F7F7F"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")


def figure(name: str, title: str, alt: str, views: Sequence[Figure], *, wide: bool = False) -> Figure:
    """Return a figure of one or several views; a ``wide`` one takes both columns of the page."""
    return {"id": name, "title": title, "alt": alt, "views": list(views), "wide": wide}


def view(data: Sequence[Figure], layout: Figure, name: str = "") -> Figure:
    """Return one view of a figure: its traces and layout; ``name`` labels the switch between views."""
    return {"name": name, "data": list(data), "layout": layout}


def layout(across: str, up: str, *, in_bytes: bool = False) -> Figure:
    """Return a layout with titled axes; with ``in_bytes`` the first axis counts bytes."""
    ticks = {"tickformat": ".2s", "ticksuffix": "B"} if in_bytes else {}
    return {
        "xaxis": {"title": {"text": across}, "automargin": True, **ticks},
        "yaxis": {"title": {"text": up}, "automargin": True},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
    }  # fmt: skip


def colour(number: int) -> str:
    """Return the colour of the line with this number."""
    return COLOURS[number % len(COLOURS)]


def dash(number: int) -> str:
    """Return the dash of the line with this number."""
    return DASHES[number // len(COLOURS) % len(DASHES)]


def symbol(number: int) -> str:
    """Return the marker of the line with this number."""
    return SYMBOLS[number % len(SYMBOLS)]
