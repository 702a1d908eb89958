"""Figures of a comparison: quality over time, fairness, differences to controls; and all figures of one place."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from operator import attrgetter

from secateur.report.cost_figures import pareto
from secateur.report.drawing import Figure, colour, counted, figure, layout, symbol, view
from secateur.report.figure_lines import (
    AXES,
    LISTED,
    FigureLine,
    bounded,
    clip,
    error_bars,
    half_of,
    is_crowd,
    joined,
    looks,
    score_title,
    score_words,
)
from secateur.report.sparsity_figures import sparsities
from secateur.report.statistics import Curve, interval
from secateur.report.verdicts import DENSE


def all_figures(lines: Sequence[FigureLine]) -> list[Figure]:
    """Return the figures that compare lines, without those that have nothing to show; what to use comes first."""
    figures = [pareto(lines), quality(lines), sparsities(lines), fairness(lines), differences(lines)]
    return [one for one in figures if one]


def quality(lines: Sequence[FigureLine]) -> Figure:
    """Return quality against rounds, bytes and client seconds: means over seeds, with 95 % intervals.

    In a crowd controls are left out, and at first only FedAvg and the Pareto front are visible.
    """
    crowd, views = is_crowd(lines), []
    drawn = [(line, look) for line, look in zip(lines, looks(lines), strict=True) if line.named or not crowd]
    for axis, words in AXES.items():
        if not any(any(curves) for curves in (line.curves[axis] for line in lines)):
            continue
        traces: list[Figure] = []
        last = 0.0
        for line, look in drawn:
            points = _mean(line.curves[axis])
            shown = line.control == DENSE or (not line.control and (line.front or not crowd))
            traces += _band(line, points, look, shown=shown) if points else []
            last = max([last, *(spent for spent, _, _ in points)])
        frame = layout(words, score_title(lines[0]), in_bytes=axis == "by_bytes")
        frame["xaxis"] |= counted(last) if axis == "by_round" else {}
        views.append(view(traces, bounded(frame, lines[0]), words))
    alt = joined(f"{ln.name} ends at {ln.text(ln.quality.mean)}" for ln in lines if not ln.control)
    caption = "Bands: 95 % intervals of the mean." if max(line.quality.count for line in lines) > 1 else ""
    if crowd:
        caption = f"FedAvg and the front are drawn; a click on a name below, or a filter, adds lines. {caption}"
    elif any(not line.named for line in lines):
        caption = f"{caption} A click on a control's name adds its line."
    title = f"{score_words(lines[0]).capitalize()} during training"
    return figure("quality", title, alt, views, caption=caption.strip(), wide=True) if views else {}


_SHARES = (("all clients", attrgetter("local")), ("worst tenth", attrgetter("lowest")))


def fairness(lines: Sequence[FigureLine]) -> Figure:
    """Return the mean score of all clients and of the worst tenth, each client on its own rows."""
    shown = [line for line in lines if line.named]
    if not any(line.local.mean for line in shown):
        return {}
    first, names = lines[0], [line.name for line in shown]
    traces = [
        {
            "type": "bar", "orientation": "h", "name": name, "y": names, "x": [of(line).mean for line in shown],
            "error_x": error_bars(map(of, shown)), "marker": {"color": colour(n)}, "meta": {"rows": True},
        }
        for n, (name, of) in enumerate(_SHARES)
    ]  # fmt: skip
    alt = joined(f"{ln.name}: all {ln.text(ln.local.mean)}, worst tenth {ln.text(ln.lowest.mean)}" for ln in shown)
    frame = _listed(layout(f"{first.metric.worded} on clients' own test rows{first.unit}", ""), len(shown))
    frame["xaxis"] |= {"autorangeoptions": clip(first)}
    caption = "Each client is scored on its own test rows; the worst tenth are those that fare worst."
    views = [view(traces, frame | {"barmode": "group"})]
    return figure("fairness", "Who loses by pruning?", alt, views, caption=caption, wide=len(shown) > LISTED)


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
                "x": [value.mean for _, value in of], "error_x": error_bars(value for _, value in of),
                "marker": {"size": 10, "color": colour(n), "symbol": symbol(n)}, "meta": {"rows": True},
            }
        )  # fmt: skip
    points = " points" if shown[0].metric.share else ""
    alt = joined(
        f"{line.name} against {name}: {value.mean:.{1 if points else 2}f}{points}"
        + (", shown" if name in line.better else "")
        for line in shown
        for name, value in line.differences.items()
    )
    frame = _listed(
        layout(f"better by{' (points of ' + shown[0].metric.worded + ')' if points else ''}", ""), len(shown)
    )
    frame["xaxis"] |= {"zeroline": True, "zerolinewidth": 2}
    caption = "Right of 0 is better. Paired by seed; bars are single 95 % intervals, verdicts stand in the table."
    wide = len(shown) > LISTED
    return figure("differences", "Better than its controls?", alt, [view(traces, frame)], caption=caption, wide=wide)


def _band(line: FigureLine, points: Sequence[tuple[float, float, float]], look: Figure, *, shown: bool) -> list[Figure]:
    """Return a mean curve and its 95 % band; if not ``shown`` it is hidden until its name in the legend is clicked."""
    across, visible = [_short(x) for x, _, _ in points], True if shown else "legendonly"
    common = {"legendgroup": line.name, "visible": visible, "meta": {"line": line.name}}
    mean = {
        "type": "scatter", "mode": "lines", "name": line.name, "x": across, "y": [_short(y) for _, y, _ in points],
        "line": {"color": look["color"], "dash": look["dash"], "width": 2.5 if line.named else 1.5}, **common,
    }  # fmt: skip
    if all(half == 0 for _, _, half in points):
        return [mean]
    around = [_short(y + half) for _, y, half in points] + [_short(y - half) for _, y, half in reversed(points)]
    band = {
        "type": "scatter", "mode": "lines", "x": across + across[::-1], "y": around, "fill": "toself",
        "fillcolor": look["color"], "opacity": 0.15, "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False,
        **common,
    }  # fmt: skip
    return [band, mean]


def _short(value: float) -> float:
    """Return a value with the digits that a screen can show: a page of hundreds of lines stays small."""
    return float(f"{value:.6g}")


def _listed(frame: Figure, count: int) -> Figure:
    """Return a layout with ``count`` names on the second axis, from the top, and room for all of them."""
    frame["yaxis"] |= {"automargin": True, "range": [count - 0.4, -0.6], "dtick": 1}
    return frame | {"height": 120 + 26 * max(count, LISTED // 2)}


def _mean(curves: Sequence[Curve]) -> list[tuple[float, float, float]]:
    """Return (mean cost, mean quality, half its 95 % interval) for each evaluation that all seeds have."""
    found = []
    for points in zip(*curves, strict=False):
        value = interval([quality for _, quality in points])
        found.append((statistics.fmean(spent for spent, _ in points), value.mean, half_of(value)))
    return found
