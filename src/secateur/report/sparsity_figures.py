"""The figure of quality by sparsity, with a line for each family of variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter

from secateur.report.drawing import GREY, Figure, colour, dash, figure, layout, symbol, view
from secateur.report.figure_lines import FigureLine, bounded, error_bars, looks, score_title, score_words
from secateur.report.statistics import Interval

_CURVE = 3  # points
_DENSITY_RANGE = 1.1  # ratio of densities that a family must span to have a line by sparsity
_TICKS = [1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001]


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
                 if _kept(sparsity(of[0])) > _DENSITY_RANGE * _kept(sparsity(of[-1]))}  # fmt: skip
        if not any(value(line).mean for of in shown.values() for line in of):
            continue
        views.append(_by_sparsity(lines, shown, styles, (name, sparsity, value)))
        said = (f"{family} {' to '.join(_ends(of, sparsity, value))}" for family, of in shown.items())
        alt = alt or f"{name[0].upper()}{name[1:]}: {'; '.join(said)}."
    title, caption = f"{score_words(lines[0]).capitalize()} by sparsity", "Sparsity is the share of weights removed."
    return figure("sparsities", title, alt, views, caption=caption, wide=True) if views else {}


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
    kept = [_kept(sparsity(line)) for among in shown.values() for line in among]
    traces += [
        {"type": "scatter", "mode": "lines", "name": line.name, "x": [max(kept), min(kept)],
         "y": [value(line).mean] * 2, "line": {"color": look["color"], "dash": look["dash"], "width": 2},
         "meta": {"line": line.name}}
        for line, look in zip(lines, looks(lines), strict=True) if line.control == "dense"
    ]  # fmt: skip
    frame = bounded(layout("sparsity", score_title(lines[0])), lines[0])
    frame["xaxis"] |= {"type": "log", "autorange": "reversed", "tickvals": _TICKS,
                       "ticktext": [f"{100 - 100 * tick:g} %" for tick in _TICKS]}  # fmt: skip
    return view(traces, frame, name)


def _points(name: str, of: Sequence[FigureLine], sparsity: Side, value: Side, look: Figure) -> Figure:
    return {
        "type": "scatter", "name": name, "x": [_kept(sparsity(line)) for line in of],
        "y": [value(line).mean for line in of], "meta": {"family": [line.name for line in of]},
        "text": [f"{line.name}: {sparsity(line).mean:.1f} % removed" for line in of],
        "hovertemplate": "%{text}, %{y:.4~g}<extra></extra>",
        "error_y": error_bars(map(value, of)), **look,
    }  # fmt: skip


def _ends(of: Sequence[FigureLine], sparsity: Side, value: Side) -> list[str]:
    return [f"{ln.text(value(ln).mean)} at {sparsity(ln).mean:.1f} %" for ln in (of[0], of[-1])]


def _kept(sparsity: Interval) -> float:
    """Return the share of weights that is left, of a sparsity in percent."""
    return 1 - sparsity.mean / 100
