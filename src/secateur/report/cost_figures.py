"""The figure of quality against what it costs, with the Pareto front of each cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter

from secateur.report.drawing import GREY, Figure, figure, layout, logarithmic, view
from secateur.report.figure_lines import FigureLine, bounded, error_bars, is_crowd, looks, score_title
from secateur.report.formatting import size
from secateur.report.statistics import Interval, front
from secateur.report.verdicts import DENSE

_COSTS: tuple[tuple[str, str, Callable[[float], str], str], ...] = (
    ("client_bytes", "most bytes of one client", size, "for the bytes of a client"),
    ("bytes", "bytes carried in all", size, "for all bytes"),
    ("seconds", "client seconds in all", "{:.3g} s".format, "for client seconds"),
    ("size", "bytes of the shipped model", size, "for the shipped model's size"),
)
_LOGARITHMIC = 5  # ratio of the highest to the lowest cost from which an axis is logarithmic


def pareto(lines: Sequence[FigureLine]) -> Figure:
    """Return quality against bytes, client seconds and shipped size, each with its Pareto front.

    In a crowd only controls on the front are drawn, and only the front and FedAvg are named.
    """
    views, alts = [], []
    for name, across, shown, words in _COSTS:
        cost = attrgetter(name)
        if not all(cost(line).mean for line in lines):
            continue  # an unfinished run has shipped nothing
        best = _front(lines, cost)
        traces = [_stairs(best, cost), *_spots(lines, cost, shown, best)]
        alts.append(
            f"On the front {words}: "
            + "; ".join(f"{ln.name} with {ln.text(ln.quality.mean)} for {shown(cost(ln).mean)}" for ln in best)
        )
        frame = {**layout(across, score_title(lines[0]), in_bytes=shown is size), "showlegend": True}
        costs = [cost(line).mean for line in lines]
        if max(costs) > _LOGARITHMIC * min(costs):
            frame["xaxis"] |= logarithmic(min(costs), max(costs), shown)
        views.append(view(traces, bounded(frame, lines[0]), across))
    caption = "Up and left is better. The dotted line joins what nothing cheaper beats."
    title = "Final quality against cost"
    return figure("pareto", title, f"{'. '.join(alts)}.", views, caption=caption, wide=True) if views else {}


def _stairs(best: Sequence[FigureLine], cost: Callable[[FigureLine], Interval]) -> Figure:
    """Return the line of the best score that each budget buys."""
    return {
        "type": "scatter", "mode": "lines", "name": "front", "x": [cost(ln).mean for ln in best],
        "y": [ln.quality.mean for ln in best], "line": {"dash": "dot", "color": GREY, "shape": "hv"},
        "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip


def _spots(
    lines: Sequence[FigureLine],
    cost: Callable[[FigureLine], Interval],
    shown: Callable[[float], str],
    best: Sequence[FigureLine],
) -> list[Figure]:
    """Return a point for each line; the page puts names beside those whose ``meta`` asks for it."""
    crowd = is_crowd(lines)
    return [
        {
            "type": "scatter", "name": line.name, "mode": "markers", "x": [cost(line).mean], "y": [line.quality.mean],
            "text": [f"{line.text(line.quality.mean)}, {shown(cost(line).mean)}"],
            "hovertemplate": "%{fullData.name}: %{text}<extra></extra>",
            "marker": {"size": 9 if line.control not in {"", DENSE} else 12, "color": look["color"],
                       "symbol": look["symbol"] if line.control else _mark(look["dash"])},
            "error_y": error_bars([line.quality]), "error_x": error_bars([cost(line)]),
            "meta": {"line": line.name, "label": line in best or line.control == DENSE or (line.named and not crowd)},
        }
        for line, look in zip(lines, looks(lines), strict=True)
        if line.named or not crowd or line in best
    ]  # fmt: skip


def _mark(dash: str) -> str:
    """Return the marker of a variant: another one where its line has another dash than the first of its colour."""
    return {"solid": "circle", "dash": "diamond", "dot": "pentagon", "dashdot": "hexagon"}.get(dash, "hexagram")


def _front(lines: Sequence[FigureLine], cost: Callable[[FigureLine], Interval]) -> list[FigureLine]:
    lower = not lines[0].metric.higher
    return front(lines, lambda ln: cost(ln).mean, lambda ln: ln.quality.mean, lower_is_better=lower)
