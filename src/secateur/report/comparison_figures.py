"""Figures of a comparison: quality by sparsity, by cost and over time, fairness, differences to controls."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from secateur.learning.metrics import Metric
from secateur.report.drawing import COLOURS, DASHES, GREY, Figure, colour, dash, figure, layout, symbol, view
from secateur.report.formatting import size
from secateur.report.statistics import Curve, Interval, front, interval

AXES = {
    "by_round": "rounds", "by_bytes": "bytes carried, both ways", "by_seconds": "client seconds",
    "by_link": "seconds on the link (a model)",
}  # fmt: skip
_CURVE = 3  # points
_CROWD = 24  # variants; with more, a figure names, or shows at first, only those on the Pareto front
_LISTED = 12  # variants that a text lists of a crowd, and that fit into a figure of the usual height
_NAME_GAP = 0.06  # decades of cost between points that can both be named
_DENSITY_RANGE = 1.1  # ratio of densities that a family must span to have a line by sparsity
_TICKS = [1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001]


@dataclass(frozen=True)
class FigureLine:
    """The part of a comparison's line that figures need; see ``verdicts.Line`` and ``outcomes.Outcome`` for the fields.

    Attributes:
        curves: the curve of each seed by axis, one of ``AXES``.
        variant: the variant that it is, or is a control of; lines of one variant share a colour.
        control: empty for a variant, else the kind of control; ``dense`` is FedAvg.
        family: the variant's name without its sparsity.
        better: the controls that it is significantly better than.
        own: it is scored on clients' own rows, with the models that clients use.
    """

    name: str
    variant: str
    control: str
    metric: Metric
    curves: Mapping[str, Sequence[Curve]]
    quality: Interval
    bytes: Interval
    seconds: Interval
    size: Interval
    sparsity: Interval
    lowest: Interval
    local: Interval
    local_sparsity: Interval
    differences: Mapping[str, Interval]
    front: bool = False
    family: str = ""
    better: frozenset[str] = frozenset()
    own: bool = False

    @property
    def named(self) -> bool:
        """Return whether figures name it: it is a variant or dense FedAvg, not another control."""
        return self.control in {"", "dense"}


def all_figures(lines: Sequence[FigureLine]) -> list[Figure]:
    """Return the figures that compare lines, without those that have nothing to show."""
    figures = [sparsities(lines), quality(lines), pareto(lines), fairness(lines), differences(lines)]
    return [one for one in figures if one]


# ---- by sparsity

Side = Callable[[FigureLine], Interval]
_MODELS: tuple[tuple[str, Side, Side], ...] = (
    ("the shipped model", attrgetter("sparsity"), attrgetter("quality")),
    ("clients' own models, on their own rows", attrgetter("local_sparsity"), attrgetter("local")),
)


def sparsities(lines: Sequence[FigureLine]) -> Figure:
    """Return quality against sparsity, with a line for each family of at least three variants.

    Clients' own models have a view of their own: a personal method may ship a dense model while these are sparse.
    """
    families: dict[str, list[FigureLine]] = {}
    for line in lines:
        if not line.control:
            families.setdefault(line.family, []).append(line)
    styles = {
        name: {"mode": "lines+markers", "line": {"color": colour(n), "dash": dash(n)},
               "marker": {"color": colour(n), "symbol": symbol(n), "size": 8}}
        for n, name in enumerate(name for name, of in families.items() if len(of) >= _CURVE)
    }  # fmt: skip
    views: list[Figure] = []
    alt = ""
    for name, sparsity, value in _MODELS[1 if lines[0].own else 0 :]:
        shown = {family: sorted(families[family], key=lambda line: sparsity(line).mean) for family in styles}
        shown = {family: of for family, of in shown.items()
                 if 1 - sparsity(of[0]).mean > _DENSITY_RANGE * (1 - sparsity(of[-1]).mean)}  # fmt: skip
        if not any(value(line).mean for of in shown.values() for line in of):
            continue
        views.append(_by_sparsity(lines, shown, styles, (name, sparsity, value)))
        said = (f"{family} {' to '.join(_ends(of, sparsity, value))}" for family, of in shown.items())
        alt = alt or f"{name[0].upper()}{name[1:]}: {'; '.join(said)}."
    title = f"{_score(lines[0]).capitalize()} by sparsity"
    return figure("sparsities", title, alt, views, wide=True) if views else {}


def _by_sparsity(
    lines: Sequence[FigureLine], shown: Mapping[str, Sequence[FigureLine]], styles: Mapping[str, Figure],
    of: tuple[str, Side, Side],
) -> Figure:  # fmt: skip
    name, sparsity, value = of
    grey = {"mode": "markers", "marker": {"color": GREY, "symbol": "x-thin-open"}}
    variants = {line.variant for among in shown.values() for line in among}
    chance = [line for line in lines if line.control == "random" and line.variant in variants]
    traces = [_points("random mask, the control of each", chance, sparsity, value, grey)] if chance else []
    traces += [_points(family, among, sparsity, value, styles[family]) for family, among in shown.items()]
    kept = [1 - sparsity(line).mean for among in shown.values() for line in among]
    traces += [
        {"type": "scatter", "mode": "lines", "name": line.name, "x": [max(kept), min(kept)],
         "y": [value(line).mean] * 2, "line": {"color": look["color"], "dash": look["dash"], "width": 2}}
        for line, look in zip(lines, looks(lines), strict=True) if line.control == "dense"
    ]  # fmt: skip
    frame = _bounded(layout("sparsity", _score(lines[0])), lines[0].metric)
    frame["xaxis"] |= {"type": "log", "autorange": "reversed", "tickvals": _TICKS,
                       "ticktext": [f"{100 - 100 * tick:g} %" for tick in _TICKS]}  # fmt: skip
    return view(traces, frame, name)


def _points(name: str, of: Sequence[FigureLine], sparsity: Side, value: Side, look: Figure) -> Figure:
    return {
        "type": "scatter", "name": name, "x": [1 - sparsity(line).mean for line in of],
        "y": [value(line).mean for line in of], "text": [line.name for line in of],
        "error_y": {"type": "data", "array": [_half(value(line)) for line in of], "thickness": 0.7, "width": 2}, **look,
    }  # fmt: skip


def _ends(of: Sequence[FigureLine], sparsity: Side, value: Side) -> list[str]:
    return [f"{ln.metric.text(value(ln).mean)} at {100 * sparsity(ln).mean:.1f} %" for ln in (of[0], of[-1])]


# ---- against cost


def quality(lines: Sequence[FigureLine]) -> Figure:
    """Return quality against rounds, bytes and client seconds: means over seeds, with 95 % intervals.

    In a crowd controls are left out, and at first only FedAvg and the Pareto front are visible.
    """
    metric, views, crowded = lines[0].metric, [], _crowded(lines)
    drawn = [(line, look) for line, look in zip(lines, looks(lines), strict=True) if line.named or not crowded]
    for axis, words in AXES.items():
        if not any(any(curves) for curves in (line.curves[axis] for line in lines)):
            continue
        traces: list[Figure] = []
        for line, look in drawn:
            points = _mean(line.curves[axis])
            shown = line.control == "dense" or (not line.control and (line.front or not crowded))
            traces += _band(line, points, look, shown=shown) if points else []
        frame = layout(words, _score(lines[0]), in_bytes=axis == "by_bytes") | ({"height": 800} if crowded else {})
        views.append(view(traces, _bounded(frame, metric), words))
    alt = _joined(f"{ln.name} ends at {metric.text(ln.quality.mean)}" for ln in lines if not ln.control)
    if crowded:
        alt = f"At first FedAvg and what lies on the front are drawn; a click on a name adds its line. {alt}"
    return figure("quality", f"{_score(lines[0]).capitalize()} during training", alt, views, wide=True) if views else {}


_COSTS: tuple[tuple[str, str, Callable[[float], str], str], ...] = (
    ("bytes", "bytes carried in all", size, "for all bytes"),
    ("seconds", "client seconds in all", "{:.3g} s".format, "for client seconds"),
    ("size", "bytes of the shipped model", size, "for the shipped model's size"),
)


def pareto(lines: Sequence[FigureLine]) -> Figure:
    """Return quality against bytes, client seconds and shipped size, each with its Pareto front.

    In a crowd only controls on the front are drawn, only the front is named, and costs are on a logarithmic axis.
    """
    metric, crowded = lines[0].metric, _crowded(lines)
    views, alts = [], []
    for name, across, shown, words in _COSTS:
        cost = attrgetter(name)
        if not all(cost(line).mean for line in lines):
            continue  # an unfinished run has shipped nothing
        best = _front(lines, cost)
        traces = _spots(lines, cost, best, crowded=crowded)
        traces.append(
            {
                "type": "scatter", "mode": "lines", "name": "front", "x": [cost(ln).mean for ln in best],
                "y": [ln.quality.mean for ln in best], "line": {"dash": "dot", "color": GREY}, "hoverinfo": "skip",
            }
        )  # fmt: skip
        alts.append(
            f"On the front {words}: "
            + "; ".join(f"{ln.name} with {metric.text(ln.quality.mean)} for {shown(cost(ln).mean)}" for ln in best)
        )
        frame = {**layout(across, _score(lines[0]), in_bytes=shown is size), "showlegend": False}
        if crowded:
            frame["xaxis"] |= {"type": "log", "dtick": "D2"}
            frame["margin"] |= {"t": 90, "r": 60}
            frame["annotations"] = _slanted([*best, *(line for line in lines if line.control == "dense")], cost)
        views.append(view(traces, _bounded(frame, metric), across))
    return figure("pareto", "Final quality against cost", f"{'. '.join(alts)}.", views, wide=crowded) if views else {}


def _spots(lines: Sequence[FigureLine], cost: Side, best: Sequence[FigureLine], *, crowded: bool) -> list[Figure]:
    right = 0.8 * max(cost(line).mean for line in lines)  # further right a name would be cut off by the figure's edge
    return [
        {
            "type": "scatter", "name": line.name, "mode": "markers+text" if line.named and not crowded else "markers",
            "x": [cost(line).mean], "y": [line.quality.mean], "text": [line.name],
            "textposition": "top left" if cost(line).mean > right else "top center",
            "marker": {"size": 9 if line.control else 12, "color": look["color"], "symbol": look["symbol"]},
            "error_y": _error(line.quality), "error_x": _error(cost(line)), "opacity": 0.6 if line.control else 1.0,
        }
        for line, look in zip(lines, looks(lines), strict=True)
        if line.named or not crowded or line in best
    ]  # fmt: skip


def _front(lines: Sequence[FigureLine], cost: Side) -> list[FigureLine]:
    lower = not lines[0].metric.higher
    return front(lines, lambda ln: cost(ln).mean, lambda ln: ln.quality.mean, lower_is_better=lower)


def _slanted(lines: Sequence[FigureLine], cost: Side) -> list[Figure]:
    """Return names at points; where points are too close to each other only the first is named."""
    named: list[FigureLine] = []
    for line in lines:
        if all(abs(math.log10(cost(line).mean / cost(other).mean)) > _NAME_GAP for other in named):
            named.append(line)
    return [
        {"text": line.name, "x": math.log10(cost(line).mean), "y": line.quality.mean, "textangle": -50,
         "showarrow": False, "xanchor": "left", "yanchor": "bottom"}
        for line in named
    ]  # fmt: skip


_SHARES = (("all clients", attrgetter("local")), ("worst tenth", attrgetter("lowest")))


def fairness(lines: Sequence[FigureLine]) -> Figure:
    """Return the mean score of all clients and of the worst tenth, each client on its own rows."""
    shown = [line for line in lines if line.named]
    if not any(line.local.mean for line in shown):
        return {}
    metric, names = lines[0].metric, [line.name for line in shown]
    traces = [
        {
            "type": "bar", "orientation": "h", "name": name, "y": names, "x": [of(line).mean for line in shown],
            "error_x": {"type": "data", "array": [_half(of(line)) for line in shown]}, "marker": {"color": colour(n)},
        }
        for n, (name, of) in enumerate(_SHARES)
    ]  # fmt: skip
    alt = _joined(f"{ln.name}: all {metric.text(ln.local.mean)}, worst tenth {metric.text(ln.lowest.mean)}"
                for ln in shown)  # fmt: skip
    frame = _listed(layout(f"{metric.worded} on clients' own test rows", ""), len(shown)) | {"barmode": "group"}
    frame["xaxis"] |= {"autorangeoptions": _clip(metric)}
    return figure("fairness", "Who loses by pruning?", alt, [view(traces, frame)], wide=len(shown) > _LISTED)


def differences(lines: Sequence[FigureLine]) -> Figure:
    """Return each variant's paired differences to its controls; above 0 it is better.

    The intervals are not corrected for multiple testing, unlike the table's verdicts.
    """
    shown = [line for line in lines if line.differences]
    if not shown:
        return {}
    names = list(dict.fromkeys(name for line in shown for name in line.differences))
    traces = []
    for n, name in enumerate(names):
        of = [(line.name, line.differences[name]) for line in shown if name in line.differences]
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": f"against {name}", "y": [who for who, _ in of],
                "x": [value.mean for _, value in of],
                "error_x": {"type": "data", "array": [_half(value) for _, value in of]},
                "marker": {"size": 10, "color": colour(n), "symbol": symbol(n)},
            }
        )  # fmt: skip
    alt = _joined(
        f"{line.name} against {name}: {line.metric.text(value.mean)}" + (", shown" if name in line.better else "")
        for line in shown
        for name, value in line.differences.items()
    )
    frame = _listed(layout("better by, paired by seed, each with its own 95 % interval", ""), len(shown))
    frame["xaxis"] |= {"zeroline": True, "zerolinewidth": 2}
    return figure("differences", "Better than its controls?", alt, [view(traces, frame)], wide=True)


_STYLES = {"": "solid", "random": "dash", "ramped": "longdashdot", "shuffled": "dot", "narrow": "dashdot"}
_MARKS = {"": "circle", "random": "x", "ramped": "triangle-up", "shuffled": "cross", "narrow": "square"}


def looks(lines: Sequence[FigureLine]) -> list[Figure]:
    """Return colour, dash and symbol of each line: a colour for each variant, FedAvg grey, a dash for each control.

    A second FedAvg has another dash and symbol. Of a crowd those on the front, which are drawn at first, have colours
    before they come again.
    """
    crowded = _crowded(lines)
    order = sorted(lines, key=lambda line: not line.front) if crowded else lines
    variants = list(dict.fromkeys(line.variant for line in order if line.control != "dense"))
    dense = [line.variant for line in lines if line.control == "dense"]
    found = []
    for line in lines:
        if line.control == "dense":
            number = dense.index(line.variant)
            found.append({"color": GREY, "dash": DASHES[number % len(DASHES)], "symbol": symbol(number)})
            continue
        number = variants.index(line.variant)
        style = _STYLES[line.control]
        if crowded:
            style = dash(number)
        elif number >= len(COLOURS) and not line.control:
            style = "longdash"
        found.append({"color": colour(number), "dash": style, "symbol": _MARKS[line.control]})
    return found


def _band(line: FigureLine, points: Sequence[tuple[float, float, float]], look: Figure, *, shown: bool) -> list[Figure]:
    """Return a mean curve and its 95 % band; if not ``shown`` it is hidden until its name in the legend is clicked."""
    across, visible = [x for x, _, _ in points], True if shown else "legendonly"
    width = 2.5 if line.control in {"", "dense"} else 1.5
    mean = {
        "type": "scatter", "mode": "lines", "name": line.name, "legendgroup": line.name, "x": across,
        "y": [y for _, y, _ in points], "visible": visible,
        "line": {"color": look["color"], "dash": look["dash"], "width": width},
    }  # fmt: skip
    if all(half == 0 for _, _, half in points):
        return [mean]
    around = [y + half for _, y, half in points] + [y - half for _, y, half in reversed(points)]
    band = {
        "type": "scatter", "mode": "lines", "x": across + across[::-1], "y": around, "fill": "toself",
        "fillcolor": look["color"], "opacity": 0.15, "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False,
        "legendgroup": line.name, "visible": visible,
    }  # fmt: skip
    return [band, mean]


def _bounded(frame: Figure, metric: Metric) -> Figure:
    """Return a layout whose second axis ends where the metric does, however wide an interval is."""
    return {**frame, "yaxis": {**frame["yaxis"], "autorangeoptions": _clip(metric)}}


def _clip(metric: Metric) -> Figure:
    ends = {"clipmin": metric.least, "clipmax": metric.most}
    return {name: end for name, end in ends.items() if end is not None}


def _listed(frame: Figure, count: int) -> Figure:
    """Return a layout with ``count`` names on the second axis, from the top, and room for all of them."""
    frame["yaxis"] |= {"automargin": True, "range": [count - 0.4, -0.6], "dtick": 1}
    frame["legend"] = {"orientation": "h", "y": 1.0, "yanchor": "bottom"}
    return frame | ({"height": 120 + 24 * count} if count > _LISTED else {})


def _crowded(lines: Sequence[FigureLine]) -> bool:
    return sum(line.named for line in lines) > _CROWD


def _joined(parts: Iterable[str]) -> str:
    """Return parts joined to one text; of a crowd only the first ones."""
    given = list(parts)
    more = f"; and {len(given) - _LISTED} more, as the table tells" if len(given) > _CROWD else ""
    return "; ".join(given[:_LISTED] if more else given) + f"{more}."


def _mean(curves: Sequence[Curve]) -> list[tuple[float, float, float]]:
    """Return (mean cost, mean quality, half its 95 % interval) for each evaluation that all seeds have."""
    found = []
    for points in zip(*curves, strict=False):
        value = interval([quality for _, quality in points])
        found.append((statistics.fmean(spent for spent, _ in points), value.mean, _half(value)))
    return found


def _half(value: Interval) -> float:
    return value.half if math.isfinite(value.half) else 0.0


def _error(value: Interval) -> Figure:
    return {"type": "data", "array": [_half(value)], "thickness": 1}


def _score(line: FigureLine) -> str:
    """Return the metric in words, and the rows where they are clients' own."""
    return f"{line.metric.worded} on clients' own rows" if line.own else line.metric.worded
