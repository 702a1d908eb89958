"""What a notebook shows: bars that move, tables and figures as HTML, and a page in a cell of its own."""

from __future__ import annotations

import html
import importlib
import io
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from secateur.learning.metrics import metric_of
from secateur.report.formatting import size

_EVERY = 0.2  # seconds between two looks of a bar
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BELOW = 560, 220, 84, 150, 34
_INKS = ("#1b6ca8", "#c0571b", "#2f7d4f", "#8a3ffc", "#a2195b", "#6b6b6b")
_PRE = '<pre style="line-height:1.2;font-family:monospace;white-space:pre;overflow-x:auto">{code}</pre>'

Points = Sequence[tuple[float, float]]


def here() -> bool:
    """Return whether this process is a notebook's kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")


class Bars:
    """Bars in a notebook's cell, one for each run and phase, drawn again as they move."""

    def __init__(self) -> None:
        shown: Any = importlib.import_module("IPython.display")  # there in a notebook only
        self._html, self._rows = shown.HTML, dict[str, tuple[int, int, str]]()
        self._handle, self._last = shown.display(shown.HTML(""), display_id=True), 0.0
        self._notes: list[str] = []

    def watch(self, name: str, rounds: int) -> Callable[[Mapping[str, Any]], None]:
        """Return the callback that shows the events of a run of ``rounds`` rounds under ``name``."""
        sent = {"bytes": 0}

        def on(event: Mapping[str, Any]) -> None:
            if event["event"] == "reply" and event["phase"] != "train":
                self._put(f"{name} {event['phase']}", event["done"], event["total"], "clients")
            elif event["event"] == "row":
                sent["bytes"] += event["bytes_down"] + event["bytes_up"]
                self._notes += [f"{name} round {event['round']}: client {one['client']} left out: {one['reason']}"
                                for one in event["left_out"]]  # fmt: skip
                if event["phase"] == "train":
                    self._put(name, event["round"], rounds, _facts(event, sent["bytes"]))

        return on

    def report(self, runs: int, of: int, rounds: int, of_rounds: int) -> None:
        """Show how many runs and rounds of a comparison are done."""
        self._put("comparison", rounds, of_rounds, f"rounds, {runs} of {of} runs")

    def _put(self, name: str, done: int, total: int, facts: str) -> None:
        self._rows[name] = (done, total, facts)
        if done >= total or time.monotonic() - self._last > _EVERY:
            self._last = time.monotonic()
            self._handle.update(self._html(self.text()))

    def text(self) -> str:
        """Return the bars as HTML."""
        lines = "".join(
            f'<tr><td>{html.escape(name)}</td><td><progress value="{done}" max="{total}"></progress></td>'
            f"<td>{done}/{total} {html.escape(facts)}</td></tr>"
            for name, (done, total, facts) in self._rows.items()
        )
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self._notes[-5:])
        return f"<table>{lines}</table>{notes}"


def _facts(row: Mapping[str, Any], sent: int) -> str:
    metric = metric_of(row)
    quality = f"{metric.shown} {row[metric.name]:.3f} " if metric.name in row else ""
    return f"rounds: {quality}sparsity {row['sparsity']:.2f} {size(sent)}"


def as_text(*shown: RenderableType) -> str:
    """Return tables of rich as text, as wide as the terminal."""
    text = io.StringIO()
    Console(file=text, width=Console().width, force_jupyter=False).print(
        *shown, sep="\n", highlight=False, markup=False
    )
    return text.getvalue().rstrip()


def as_html(*shown: RenderableType) -> str:
    """Return tables of rich as HTML."""
    console = Console(file=io.StringIO(), record=True, width=120, force_jupyter=False)
    console.print(*shown, sep="\n", highlight=False, markup=False)
    return console.export_html(inline_styles=True, code_format=_PRE)


def figure(curves: Mapping[str, Points], across: str, up: str) -> str:
    """Return curves, or single points, as a small SVG with its axes named; nothing where there are none.

    Args:
        curves: points (x, y) by name.
        across, up: what x and y are.
    """
    curves = {name: [point for point in curve if all(map(math.isfinite, point))] for name, curve in curves.items()}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    tall = max(_HEIGHT, 16 * len(curves) + _BELOW + 20)
    (left, right), (low, high) = (_range([point[axis] for point in points]) for axis in (0, 1))

    def place(point: tuple[float, float]) -> str:
        x = _LEFT + (point[0] - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT - 10)
        y = 10 + (high - point[1]) / (high - low) * (tall - _BELOW - 20)
        return f"{x:.1f},{y:.1f}"

    drawn = []
    for number, (name, curve) in enumerate(curves.items()):
        ink, path = _INKS[number % len(_INKS)], " ".join(map(place, curve))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="2"/>')
        drawn += [f'<circle cx="{x}" cy="{y}" r="3" fill="{ink}"/>' for x, y in (p.split(",") for p in path.split())]
        drawn.append(_label(_WIDTH - _RIGHT + 8, 18 + 16 * number, name, f'fill="{ink}"'))
    base = tall - _BELOW
    drawn.append(f'<path d="M{_LEFT - 4},6 V{base} H{_WIDTH - _RIGHT}" fill="none" stroke="currentColor"/>')
    drawn += [_label(2, 16, f"{high:.3g}"), _label(2, base, f"{low:.3g}"), _label(2, base / 2 + 12, up)]
    drawn += [_label(_LEFT, base + 14, f"{left:.4g}"), _label(_WIDTH - _RIGHT - 40, base + 14, f"{right:.4g}")]
    drawn.append(_label((_WIDTH - _RIGHT) / 2, base + 28, across))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(f"{up} by {across}")}" '
        f'viewBox="0 0 {_WIDTH} {tall}" width="{_WIDTH}" height="{tall}" font-size="12">{"".join(drawn)}</svg>'
    )


def _label(x: float, y: float, text: str, more: str = 'fill="currentColor"') -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" {more}>{html.escape(text)}</text>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def whole(index: Path) -> str:
    """Return a page as one HTML text: its styles, its scripts and the data of all its runs within it."""
    folder, text = index.parent, index.read_text("utf-8")

    def styled(found: re.Match[str]) -> str:
        return f"<style>{(folder / found[1]).read_text('utf-8')}</style>"

    def scripted(found: re.Match[str]) -> str:
        inner = (folder / found[1]).read_text("utf-8").replace("</script", "<\\/script")
        return f"<script>{inner}</script>"

    text = re.sub(r'<link rel="stylesheet" href="([^"]+)">', styled, text)
    runs = sorted(path.relative_to(folder).as_posix() for path in folder.glob("runs/*.js"))
    after = "".join(f'<script src="{path}"></script>' for path in runs)
    text = text.replace('<script src="data.js"></script>', f'<script src="data.js"></script>{after}')
    return re.sub(r'<script src="([^"]+)"></script>', scripted, text)


class Inline:
    """A page that a notebook shows in the cell's output.

    Args:
        index: the page's ``index.html``.
        height: in pixels.
    """

    def __init__(self, index: Path, height: int = 700) -> None:
        self.index, self.height = index, height

    def _repr_html_(self) -> str:
        source = html.escape(whole(self.index), quote=True)
        return f'<iframe srcdoc="{source}" width="100%" height="{self.height}" style="border:0"></iframe>'

    def __repr__(self) -> str:
        return f"the page {self.index}"
