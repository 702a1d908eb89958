"""Figures as plotly reads them: plain data and layout; colours of the paper are left to the page that shows them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from secateur.report.statistics import Curve, Interval, interval
from secateur.report.terminal import size

Figure = dict[str, Any]
AXES = {
    "rounds": "rounds", "carried": "bytes carried, both ways", "worked": "client seconds",
    "linked": "seconds on the link (a model)",
}  # fmt: skip
# Okabe and Ito's palette, told apart by colour-blind readers; dashes where colours come again
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B8A900")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")


@dataclass(frozen=True)
class Drawn:
    """A line of a comparison as figures need it; see ``standings.Line`` for the fields.

    Attributes:
        curves: of each seed, by axis (``rounds``, ``carried``, ``worked``).
        variant: what it is, or what it is a control of; lines of one variant share a colour.
        control: empty, or which control it is; ``dense`` is FedAvg.
    """

    name: str
    variant: str
    control: str
    metric: str
    curves: Mapping[str, Sequence[Curve]]
    quality: Interval
    bytes: Interval
    lowest: Interval
    local: Interval
    apart: Mapping[str, Interval]
    front: bool = False


def compared(lines: Sequence[Drawn]) -> list[Figure]:
    """Return the figures that set lines beside each other."""
    found = [quality(lines), pareto(lines), fairness(lines), *([apart(lines)] if any(ln.apart for ln in lines) else [])]
    return [figure for figure in found if figure]


def quality(lines: Sequence[Drawn]) -> Figure:
    """Return quality against rounds, bytes and client seconds: means over seeds, with 95 % intervals."""
    metric, views = lines[0].metric, []
    for axis, words in AXES.items():
        if not any(any(curves) for curves in (line.curves[axis] for line in lines)):
            continue
        traces: list[Figure] = []
        for line, look in zip(lines, looks(lines), strict=True):
            points = _mean(line.curves[axis])
            traces += _band(line, points, look) if points else []
        layout = _layout(words, _worded(metric), money=axis == "carried")
        views.append({"name": words, "data": traces, "layout": _bounded(layout, metric)})
    ends = "; ".join(f"{ln.name} ends at {_said(ln.quality.mean, metric)}" for ln in lines if not ln.control)
    return _figure("quality", f"{_worded(metric).capitalize()} against what it cost", f"{ends}.", views)


def pareto(lines: Sequence[Drawn]) -> Figure:
    """Return quality against all bytes, one point a line; the front is joined."""
    metric = lines[0].metric
    traces = [
        {
            "type": "scatter", "name": line.name,
            "mode": "markers+text" if line.control in {"", "dense"} else "markers",
            "x": [line.bytes.mean], "y": [line.quality.mean], "text": [line.name], "textposition": "top center",
            "marker": {"size": 9 if line.control else 12, "color": look["color"], "symbol": look["symbol"]},
            "error_y": _error(line.quality), "error_x": _error(line.bytes), "opacity": 0.6 if line.control else 1.0,
        }
        for line, look in zip(lines, looks(lines), strict=True)
    ]  # fmt: skip
    best = sorted((ln for ln in lines if ln.front), key=lambda ln: ln.bytes.mean)
    traces.append(
        {
            "type": "scatter", "mode": "lines", "name": "front", "x": [ln.bytes.mean for ln in best],
            "y": [ln.quality.mean for ln in best], "line": {"dash": "dot", "color": "#7F7F7F"}, "hoverinfo": "skip",
        }
    )  # fmt: skip
    alt = "On the front, by rising bytes: " + "; ".join(
        f"{ln.name} with {_said(ln.quality.mean, metric)} for {size(ln.bytes.mean)}" for ln in best
    )
    layout = {**_layout("bytes carried in all", _worded(metric), money=True), "showlegend": False}
    layout = _bounded(layout, metric)
    return _figure("pareto", "Quality for bytes", f"{alt}.", [{"name": "", "data": traces, "layout": layout}])


_SHARES = (("all clients", attrgetter("local")), ("the tenth that fares worst", attrgetter("lowest")))


def fairness(lines: Sequence[Drawn]) -> Figure:
    """Return the mean over clients' own rows beside the tenth of clients that fare worst."""
    shown = [line for line in lines if line.control in {"", "dense"}]
    if not any(line.local.mean for line in shown):
        return {}
    metric, names = lines[0].metric, [line.name for line in shown]
    traces = [
        {
            "type": "bar", "name": name, "x": names, "y": [of(line).mean for line in shown],
            "error_y": {"type": "data", "array": [_half(of(line)) for line in shown]}, "marker": {"color": _colour(n)},
        }
        for n, (name, of) in enumerate(_SHARES)
    ]  # fmt: skip
    alt = "; ".join(f"{ln.name}: all {_said(ln.local.mean, metric)}, worst tenth {_said(ln.lowest.mean, metric)}"
                    for ln in shown)  # fmt: skip
    layout = _bounded({**_layout("", f"{_worded(metric)} on clients' own test rows"), "barmode": "group"}, metric)
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    return _figure("fairness", "Who loses by pruning?", f"{alt}.", [{"name": "", "data": traces, "layout": layout}])


def apart(lines: Sequence[Drawn]) -> Figure:
    """Return each variant's paired differences to its controls; above 0 it is better."""
    shown = [line for line in lines if line.apart]
    names = list(dict.fromkeys(name for line in shown for name in line.apart))
    traces = []
    for n, name in enumerate(names):
        of = [(line.name, line.apart[name]) for line in shown if name in line.apart]
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": f"against {name}", "y": [who for who, _ in of],
                "x": [value.mean for _, value in of],
                "error_x": {"type": "data", "array": [_half(value) for _, value in of]},
                "marker": {"size": 10, "color": _colour(n), "symbol": SYMBOLS[n % len(SYMBOLS)]},
            }
        )  # fmt: skip
    alt = "; ".join(
        f"{line.name} against {name}: {_said(value.mean, line.metric)}" + ("" if value.above else ", not above 0")
        for line in shown
        for name, value in line.apart.items()
    )
    layout = _layout("better by, paired by seed, with 95 % intervals", "")
    layout["xaxis"] |= {"zeroline": True, "zerolinewidth": 2}
    layout["yaxis"] |= {"automargin": True, "autorange": "reversed"}
    views = [{"name": "", "data": traces, "layout": layout}]
    return _figure("apart", "Better than its controls?", f"{alt}.", views)


def layers(rows: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> Figure:
    """Return the sparsity of each layer over a run's rounds."""
    told = [row for row in rows if row["phase"] == "train" and row.get("layers")]
    if not told:
        return {}
    names = [name for name in told[-1]["layers"] if sizes.get(name)]
    traces = [
        {
            "type": "scatter", "mode": "lines", "name": name, "x": [row["round"] for row in told],
            "y": [1 - row["layers"].get(name, sizes[name]) / sizes[name] for row in told],
            "line": {"color": _colour(n), "dash": _dash(n)},
        }
        for n, name in enumerate(names)
    ]  # fmt: skip
    alt = "; ".join(f"{trace['name']} ends at {100 * trace['y'][-1]:.1f} %" for trace in traces)
    view = {"name": "", "data": traces, "layout": _layout("rounds", "sparsity")}
    return _figure("layers", "Sparsity of each layer", f"{alt}.", [view])


def traffic(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the bytes of each exchange, by direction and part."""
    parts = [(way, part) for way in ("down", "up") for part in dict.fromkeys(p for row in rows for p in row[way])]
    labels = [f"{row['phase'] if row['phase'] != 'train' else ''} {row['round']}".strip() for row in rows]
    traces = [
        {
            "type": "bar", "name": f"{way}, {part}", "x": list(range(len(rows))), "text": labels,
            "textposition": "none", "y": [row[way].get(part, 0) for row in rows], "marker": {"color": _colour(n)},
        }
        for n, (way, part) in enumerate(parts)
        if any(row[way].get(part) for row in rows)
    ]  # fmt: skip
    total = sum(row["bytes_down"] + row["bytes_up"] for row in rows)
    layout = {**_layout("exchanges", "bytes"), "barmode": "stack"}
    alt = f"{len(rows)} exchanges carried {size(total)}: the first {size(_carried(rows[0]))}, the last "
    alt += f"{size(_carried(rows[-1]))}."
    return _figure("traffic", "What was carried", alt, [{"name": "", "data": traces, "layout": layout}])


def histogram(name: str, of: Mapping[str, Sequence[int]]) -> Figure:
    """Return how a figure of each weight is spread over [0, 1], tensor by tensor."""
    traces = []
    for n, (tensor, counts) in enumerate(of.items()):
        middles = [(k + 0.5) / len(counts) for k in range(len(counts))]
        total = max(1, sum(counts))
        traces.append(
            {
                "type": "scatter", "mode": "lines", "line": {"shape": "hvh", "color": _colour(n), "dash": _dash(n)},
                "name": tensor, "x": middles, "y": [count / total for count in counts],
            }
        )  # fmt: skip
    alt = "; ".join(f"{tensor}: {100 * counts[0] / max(1, sum(counts)):.0f} % of its weights are in the lowest bin"
                    for tensor, counts in of.items())  # fmt: skip
    layout = _layout(name, "share of a tensor's weights")
    layout["yaxis"] |= {"type": "log"}
    return _figure(
        name, f"{name.capitalize()} of each weight", f"{alt}.", [{"name": "", "data": traces, "layout": layout}]
    )


def clients(local: Sequence[float], dense: Sequence[float]) -> Figure:
    """Return how quality is spread over clients, beside the dense run's."""
    given = [(name, values) for name, values in (("pruned", local), ("dense FedAvg", dense)) if values]
    if not given:
        return {}
    traces = [
        {"type": "box", "name": name, "y": list(values), "boxpoints": "all", "jitter": 0.4, "pointpos": 0,
         "marker": {"color": _colour(n), "size": 4}}
        for n, (name, values) in enumerate(given)
    ]  # fmt: skip
    alt = "; ".join(
        f"{name}: from {min(v):.3g} to {max(v):.3g}, median {statistics.median(v):.3g}" for name, v in given
    )
    view = {"name": "", "data": traces, "layout": _layout("", "on each client's own test rows")}
    return _figure("clients", "Client by client", f"{alt}.", [view])


def mask(name: str, rows: Sequence[Sequence[int]]) -> Figure:
    """Return a layer's mask: a row for each filter, dark where a weight is kept."""
    if not rows:
        return {}
    kept = sum(map(sum, rows)) / max(1, sum(map(len, rows)))
    trace = {
        "type": "heatmap", "z": [list(row) for row in rows], "showscale": False, "zmin": 0, "zmax": 1,
        "colorscale": [[0, "#E8E8E8"], [1, "#0072B2"]], "hovertemplate": "filter %{y}, input %{x}<extra></extra>",
    }  # fmt: skip
    layout = _layout("inputs and kernel positions", "filters")
    layout["yaxis"] |= {"autorange": "reversed"}
    alt = f"{name}: {len(rows)} filters of {len(rows[0])} weights are drawn, {100 * kept:.1f} % of them kept."
    return _figure("mask", f"The mask of {name}", alt, [{"name": "", "data": [trace], "layout": layout}])


def _figure(name: str, title: str, alt: str, views: list[Figure]) -> Figure:
    return {"id": name, "title": title, "alt": alt, "views": views}


def _layout(across: str, up: str, *, money: bool = False) -> Figure:
    ticks = {"tickformat": ".2s", "ticksuffix": "B"} if money else {}
    return {
        "xaxis": {"title": {"text": across}, "automargin": True, **ticks},
        "yaxis": {"title": {"text": up}, "automargin": True},
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top"}, "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
    }  # fmt: skip


def looks(lines: Sequence[Drawn]) -> list[Figure]:
    """Return colour, dash and symbol of each line: a colour for each variant, FedAvg grey, a dash for each control."""
    variants = list(dict.fromkeys(line.variant for line in lines if line.control != "dense"))
    found = []
    for line in lines:
        if line.control == "dense":
            found.append({"color": "#7F7F7F", "dash": "solid", "symbol": "circle"})
            continue
        number = variants.index(line.variant)
        dash = {"": "solid", "random": "dash", "shuffled": "dot", "narrow": "dashdot"}[line.control]
        symbol = {"": "circle", "random": "x", "shuffled": "cross", "narrow": "square"}[line.control]
        dash = dash if number < len(COLOURS) or line.control else "longdash"
        found.append({"color": _colour(number), "dash": dash, "symbol": symbol})
    return found


def _band(line: Drawn, points: Sequence[tuple[float, float, float]], look: Figure) -> list[Figure]:
    """Return a mean with a band around it; controls are there for who asks for them."""
    across, shown = [x for x, _, _ in points], True if line.control in {"", "dense"} else "legendonly"
    mean = {
        "type": "scatter", "mode": "lines", "name": line.name, "legendgroup": line.name, "x": across,
        "y": [y for _, y, _ in points], "visible": shown,
        "line": {"color": look["color"], "dash": look["dash"], "width": 2.5 if shown is True else 1.5},
    }  # fmt: skip
    if all(half == 0 for _, _, half in points):
        return [mean]
    around = [y + half for _, y, half in points] + [y - half for _, y, half in reversed(points)]
    band = {
        "type": "scatter", "mode": "lines", "x": across + across[::-1], "y": around, "fill": "toself",
        "fillcolor": look["color"], "opacity": 0.15, "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False,
        "legendgroup": line.name, "visible": shown,
    }  # fmt: skip
    return [band, mean]


def _bounded(layout: Figure, metric: str) -> Figure:
    """Return a layout whose second axis does not go beyond what the metric can be, however wide an interval is."""
    clip = {"clipmin": 0} if metric == "mae" else {"clipmin": 0, "clipmax": 1}
    return {**layout, "yaxis": {**layout["yaxis"], "autorangeoptions": clip}}


def _mean(curves: Sequence[Curve]) -> list[tuple[float, float, float]]:
    """Return (mean of what was spent, mean quality, half its 95 % interval) for each evaluation that all seeds have."""
    found = []
    for points in zip(*curves, strict=False):
        value = interval([quality for _, quality in points])
        found.append((statistics.fmean(spent for spent, _ in points), value.mean, _half(value)))
    return found


def _half(value: Interval) -> float:
    return value.half if math.isfinite(value.half) else 0.0


def _error(value: Interval) -> Figure:
    return {"type": "data", "array": [_half(value)], "thickness": 1}


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _dash(number: int) -> str:
    return DASHES[number // len(COLOURS) % len(DASHES)]


def _worded(metric: str) -> str:
    return {"mae": "mean absolute error"}.get(metric, metric)


def _said(value: float, metric: str) -> str:
    return f"{value:.2f}" if metric == "mae" else f"{100 * value:.1f} %"


def _carried(row: Mapping[str, Any]) -> int:
    return int(row["bytes_down"]) + int(row["bytes_up"])
