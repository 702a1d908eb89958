"""Figures that set the lines of a comparison beside each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from secateur.learning.metrics import Metric
from secateur.report.drawing import COLOURS, DASHES, GREY, Figure, colour, dash, figure, layout, symbol, view
from secateur.report.statistics import Curve, Interval, front, interval
from secateur.report.terminal import size

AXES = {
    "rounds": "rounds", "carried": "bytes carried, both ways", "worked": "client seconds",
    "linked": "seconds on the link (a model)",
}  # fmt: skip
_CURVE = 3  # points
_CROWD = 24  # variants: of more, figures that are not lists of them name or show at first only those on the front
_LISTED = 12  # of a crowd, in words; in a list, what its usual height has room for
_APART = 0.06  # decades of cost: points that are nearer have no room for two names
_NEAR = 1.1  # times the density: variants that differ by less make no line by sparsity
_TICKS = [1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001]


@dataclass(frozen=True)
class Drawn:
    """A line of a comparison as figures need it; see ``standings.Line`` and ``outcomes.Outcome`` for the fields.

    Attributes:
        curves: of each seed, by axis (``rounds``, ``carried``, ``worked``, ``linked``).
        variant: what it is, or what it is a control of; lines of one variant share a colour.
        control: empty, or which control it is; ``dense`` is FedAvg.
        family: what variants that differ in their sparsity are called together.
        better: the controls that it is shown to be better than.
        own: it is scored on clients' own rows, with the models that they use.
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
    apart: Mapping[str, Interval]
    front: bool = False
    family: str = ""
    better: frozenset[str] = frozenset()
    own: bool = False

    @property
    def told(self) -> bool:
        """Return whether it has a name of its own in figures: a variant or FedAvg."""
        return self.control in {"", "dense"}


def compared(lines: Sequence[Drawn]) -> list[Figure]:
    """Return the figures that set lines beside each other."""
    found = [sparsities(lines), quality(lines), pareto(lines), fairness(lines), apart(lines)]
    return [one for one in found if one]


# ---- by sparsity

Side = Callable[[Drawn], Interval]
_MODELS: tuple[tuple[str, Side, Side], ...] = (
    ("the shipped model", attrgetter("sparsity"), attrgetter("quality")),
    ("clients' own models, on their own rows", attrgetter("local_sparsity"), attrgetter("local")),
)


def sparsities(lines: Sequence[Drawn]) -> Figure:
    """Return quality against sparsity, a line for each family of at least three variants; nothing where there is none.

    What a personal method ships may be dense while clients' own models are sparse: these have a view of their own.
    """
    families: dict[str, list[Drawn]] = {}
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
                 if 1 - sparsity(of[0]).mean > _NEAR * (1 - sparsity(of[-1]).mean)}  # fmt: skip
        if not any(value(line).mean for of in shown.values() for line in of):
            continue
        views.append(_by_sparsity(lines, shown, styles, (name, sparsity, value)))
        said = (f"{family} {' to '.join(_ends(of, sparsity, value))}" for family, of in shown.items())
        alt = alt or f"{name[0].upper()}{name[1:]}: {'; '.join(said)}."
    title = f"{_score(lines[0]).capitalize()} by sparsity"
    return figure("sparsities", title, alt, views, wide=True) if views else {}


def _by_sparsity(
    lines: Sequence[Drawn], shown: Mapping[str, Sequence[Drawn]], styles: Mapping[str, Figure],
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


def _points(name: str, of: Sequence[Drawn], sparsity: Side, value: Side, look: Figure) -> Figure:
    return {
        "type": "scatter", "name": name, "x": [1 - sparsity(line).mean for line in of],
        "y": [value(line).mean for line in of], "text": [line.name for line in of],
        "error_y": {"type": "data", "array": [_half(value(line)) for line in of], "thickness": 0.7, "width": 2}, **look,
    }  # fmt: skip


def _ends(of: Sequence[Drawn], sparsity: Side, value: Side) -> list[str]:
    return [f"{ln.metric.text(value(ln).mean)} at {100 * sparsity(ln).mean:.1f} %" for ln in (of[0], of[-1])]


# ---- line by line


def quality(lines: Sequence[Drawn]) -> Figure:
    """Return quality against rounds, bytes and client seconds: means over seeds, with 95 % intervals.

    Of a crowd controls are left out, and at first only FedAvg and what is on the front is shown.
    """
    metric, views, crowded = lines[0].metric, [], _crowded(lines)
    drawn = [(line, look) for line, look in zip(lines, looks(lines), strict=True) if line.told or not crowded]
    for axis, words in AXES.items():
        if not any(any(curves) for curves in (line.curves[axis] for line in lines)):
            continue
        traces: list[Figure] = []
        for line, look in drawn:
            points = _mean(line.curves[axis])
            shown = line.control == "dense" or (not line.control and (line.front or not crowded))
            traces += _band(line, points, look, shown=shown) if points else []
        frame = layout(words, _score(lines[0]), money=axis == "carried") | ({"height": 800} if crowded else {})
        views.append(view(traces, _bounded(frame, metric), words))
    alt = _told(f"{ln.name} ends at {metric.text(ln.quality.mean)}" for ln in lines if not ln.control)
    if crowded:
        alt = f"At first FedAvg and what lies on the front are drawn; a click on a name adds its line. {alt}"
    return (
        figure("quality", f"{_score(lines[0]).capitalize()} against what it cost", alt, views, wide=True)
        if views
        else {}
    )


_COSTS: tuple[tuple[str, str, Callable[[float], str], str], ...] = (
    ("bytes", "bytes carried in all", size, "for all bytes"),
    ("seconds", "client seconds in all", "{:.3g} s".format, "for client seconds"),
    ("size", "bytes of the shipped model", size, "for the shipped model's size"),
)


def pareto(lines: Sequence[Drawn]) -> Figure:
    """Return quality for bytes, client seconds and the size of what is shipped; the front of each is joined.

    Of a crowd controls are left out but on the front, only that is named, and costs are drawn by their logarithm.
    """
    metric, crowded = lines[0].metric, _crowded(lines)
    views, alts = [], []
    for name, across, shown, words in _COSTS:
        cost = attrgetter(name)
        if not all(cost(line).mean for line in lines):
            continue  # of runs that are not finished nothing was shipped
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
        frame = {**layout(across, _score(lines[0]), money=shown is size), "showlegend": False}
        if crowded:
            frame["xaxis"] |= {"type": "log", "dtick": "D2"}
            frame["margin"] |= {"t": 90, "r": 60}
            frame["annotations"] = _slanted([*best, *(line for line in lines if line.control == "dense")], cost)
        views.append(view(traces, _bounded(frame, metric), across))
    return figure("pareto", "Quality for what it costs", f"{'. '.join(alts)}.", views, wide=crowded) if views else {}


def _spots(lines: Sequence[Drawn], cost: Side, best: Sequence[Drawn], *, crowded: bool) -> list[Figure]:
    right = 0.8 * max(cost(line).mean for line in lines)  # a name there would be cut off by the figure's edge
    return [
        {
            "type": "scatter", "name": line.name, "mode": "markers+text" if line.told and not crowded else "markers",
            "x": [cost(line).mean], "y": [line.quality.mean], "text": [line.name],
            "textposition": "top left" if cost(line).mean > right else "top center",
            "marker": {"size": 9 if line.control else 12, "color": look["color"], "symbol": look["symbol"]},
            "error_y": _error(line.quality), "error_x": _error(cost(line)), "opacity": 0.6 if line.control else 1.0,
        }
        for line, look in zip(lines, looks(lines), strict=True)
        if line.told or not crowded or line in best
    ]  # fmt: skip


def _front(lines: Sequence[Drawn], cost: Side) -> list[Drawn]:
    return front(lines, lambda ln: cost(ln).mean, lambda ln: ln.quality.mean, least=not lines[0].metric.higher)


def _slanted(lines: Sequence[Drawn], cost: Side) -> list[Figure]:
    """Return names beside points; of points that lie too near to each other only the first is named."""
    named: list[Drawn] = []
    for line in lines:
        if all(abs(math.log10(cost(line).mean / cost(other).mean)) > _APART for other in named):
            named.append(line)
    return [
        {"text": line.name, "x": math.log10(cost(line).mean), "y": line.quality.mean, "textangle": -50,
         "showarrow": False, "xanchor": "left", "yanchor": "bottom"}
        for line in named
    ]  # fmt: skip


_SHARES = (("all clients", attrgetter("local")), ("the tenth that fares worst", attrgetter("lowest")))


def fairness(lines: Sequence[Drawn]) -> Figure:
    """Return the mean over clients' own rows beside the tenth of clients that fare worst."""
    shown = [line for line in lines if line.told]
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
    alt = _told(f"{ln.name}: all {metric.text(ln.local.mean)}, worst tenth {metric.text(ln.lowest.mean)}"
                for ln in shown)  # fmt: skip
    frame = _listed(layout(f"{metric.worded} on clients' own test rows", ""), len(shown)) | {"barmode": "group"}
    frame["xaxis"] |= {"autorangeoptions": _clip(metric)}
    return figure("fairness", "Who loses by pruning?", alt, [view(traces, frame)], wide=len(shown) > _LISTED)


def apart(lines: Sequence[Drawn]) -> Figure:
    """Return each variant's paired differences to its controls; above 0 it is better.

    Each interval is for itself: of many some lie above 0 by chance, which the table's verdicts are corrected for.
    """
    shown = [line for line in lines if line.apart]
    if not shown:
        return {}
    names = list(dict.fromkeys(name for line in shown for name in line.apart))
    traces = []
    for n, name in enumerate(names):
        of = [(line.name, line.apart[name]) for line in shown if name in line.apart]
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": f"against {name}", "y": [who for who, _ in of],
                "x": [value.mean for _, value in of],
                "error_x": {"type": "data", "array": [_half(value) for _, value in of]},
                "marker": {"size": 10, "color": colour(n), "symbol": symbol(n)},
            }
        )  # fmt: skip
    alt = _told(
        f"{line.name} against {name}: {line.metric.text(value.mean)}" + (", shown" if name in line.better else "")
        for line in shown
        for name, value in line.apart.items()
    )
    frame = _listed(layout("better by, paired by seed, each with its own 95 % interval", ""), len(shown))
    frame["xaxis"] |= {"zeroline": True, "zerolinewidth": 2}
    return figure("apart", "Better than its controls?", alt, [view(traces, frame)], wide=True)


_STYLES = {"": "solid", "random": "dash", "ramped": "longdashdot", "shuffled": "dot", "narrow": "dashdot"}
_MARKS = {"": "circle", "random": "x", "ramped": "triangle-up", "shuffled": "cross", "narrow": "square"}


def looks(lines: Sequence[Drawn]) -> list[Figure]:
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


def _band(line: Drawn, points: Sequence[tuple[float, float, float]], look: Figure, *, shown: bool) -> list[Figure]:
    """Return a mean with a band around it; one that is not shown at first is there for who asks for it."""
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
    """Return a layout whose second axis does not go beyond what the metric can be, however wide an interval is."""
    return {**frame, "yaxis": {**frame["yaxis"], "autorangeoptions": _clip(metric)}}


def _clip(metric: Metric) -> Figure:
    ends = {"clipmin": metric.least, "clipmax": metric.most}
    return {name: end for name, end in ends.items() if end is not None}


def _listed(frame: Figure, count: int) -> Figure:
    """Return a layout with a name on each line of the second axis, from above, and room for all of them."""
    frame["yaxis"] |= {"automargin": True, "range": [count - 0.4, -0.6], "dtick": 1}
    frame["legend"] = {"orientation": "h", "y": 1.0, "yanchor": "bottom"}
    return frame | ({"height": 120 + 24 * count} if count > _LISTED else {})


def _crowded(lines: Sequence[Drawn]) -> bool:
    return sum(line.told for line in lines) > _CROWD


def _told(parts: Iterable[str]) -> str:
    """Return parts as one text, of a crowd the first ones."""
    given = list(parts)
    more = f"; and {len(given) - _LISTED} more, as the table tells" if len(given) > _CROWD else ""
    return "; ".join(given[:_LISTED] if more else given) + f"{more}."


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


def _score(line: Drawn) -> str:
    """Return what the lines of a figure are scored by, and where."""
    return f"{line.metric.worded} on clients' own rows" if line.own else line.metric.worded
