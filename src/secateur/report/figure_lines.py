"""The lines that figures of a comparison draw: their data in the units of the tables, and their looks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from secateur.learning.metrics import Metric
from secateur.report.drawing import COLOURS, GREY, Figure, pattern
from secateur.report.statistics import Curve, Interval
from secateur.report.verdicts import DENSE, OWN, Line

AXES = {
    "by_round": "rounds", "by_bytes": "bytes carried, both ways", "by_seconds": "client seconds",
    "by_link": "seconds on the link (a model)",
}  # fmt: skip
LISTED = 12  # variants that a text lists of a crowd, and that fit into a figure of the usual height
_CROWD = 24  # variants; with more, a figure names, or shows at first, only those on the Pareto front


@dataclass(frozen=True)
class FigureLine:
    """The part of a comparison's line that figures need; see ``verdicts.Line`` and ``outcomes.Outcome`` for the fields.

    Scores, shares of weights and differences of scores are in percent where tables have them in percent.

    Attributes:
        curves: the curve of each seed by axis, one of ``AXES``.
        variant: the variant that it is, or is a control of; lines of one variant share a colour.
        control: empty for a variant, else the kind of control; ``dense`` is FedAvg.
        client_bytes: the most bytes that one client carried.
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
    client_bytes: Interval
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
        return self.control in {"", DENSE}

    @property
    def unit(self) -> str:
        """Return what stands behind a score: `` %``, or nothing."""
        return " %" if self.metric.share else ""

    def text(self, score: float) -> str:
        """Return a score as text, with as many decimals as in tables."""
        return f"{score:.1f}{self.unit}" if self.metric.share else f"{score:.2f}"


def figure_line(line: Line) -> FigureLine:
    """Return what figures need of a line.

    On clients' own rows it has curves only if clients scored it there during the run.
    """
    own, by = line.rows == OWN, 100.0 if line.metric.share else 1.0
    scored = not (own and line.central)
    curves = {
        axis: [[(spent, by * score) for spent, score in getattr(one, axis)] for one in line.runs.values()]
        if scored else [] for axis in AXES
    }  # fmt: skip
    shipped = Interval(0.0, 0.0, len(line.runs)) if own else line.of("size")
    return FigureLine(
        line.name, line.variant, line.control, line.metric, curves, _times(line.score, by), line.of("bytes"),
        line.of("client_bytes"), line.of("seconds"), shipped, _times(line.of("sparsity"), 100.0),
        _times(line.of("lowest"), by), _times(line.of("local"), by), _times(line.of("local_sparsity"), 100.0),
        {name: _times(value, by) for name, value in line.differences.items()}, line.front, line.family, line.better,
        own,
    )  # fmt: skip


def _times(value: Interval, factor: float) -> Interval:
    return Interval(factor * value.mean, factor * value.half, value.count)


_STYLES = {"": "solid", "random": "dash", "ramped": "longdashdot", "shuffled": "dot", "narrow": "dashdot"}
_MARKS = {"": "circle", "random": "x", "ramped": "triangle-up", "shuffled": "cross", "narrow": "square"}
_DENSE_MARKS = ("star", "star-square", "star-diamond")


def looks(lines: Sequence[FigureLine]) -> list[Figure]:
    """Return colour, dash and symbol of each line; no two lines have both colour and dash in common.

    FedAvg is grey, a second one another grey line. A variant has a colour, and each kind of control a dash, as long as
    there are enough; then what is free. Of a crowd those on the front, which are drawn at first, choose before others.
    """
    order = sorted(range(len(lines)), key=lambda n: (not lines[n].front, n) if is_crowd(lines) else (False, n))
    variants = list(dict.fromkeys(lines[n].variant for n in order if lines[n].control != DENSE))
    taken: set[tuple[str, str]] = set()
    others = [lines[n].variant for n in order if lines[n].control == DENSE]
    found: dict[int, Figure] = {}
    for n in order:
        line = lines[n]
        if line.control == DENSE:
            wished, marker = (GREY, "solid"), _DENSE_MARKS[others.index(line.variant) % len(_DENSE_MARKS)]
        else:
            number = variants.index(line.variant)
            wished, marker = (COLOURS[number % len(COLOURS)], _STYLES[line.control]), _MARKS[line.control]
        look = _free(wished, taken)
        taken.add(look)
        found[n] = {"color": look[0], "dash": look[1], "symbol": marker}
    return [found[n] for n in range(len(lines))]


def _free(wished: tuple[str, str], taken: set[tuple[str, str]]) -> tuple[str, str]:
    """Return the wished pair of colour and dash; if it is taken, the next dash of this colour that is free."""
    others = ((wished[0], pattern(number)) for number in count())
    return wished if wished not in taken else next(pair for pair in others if pair not in taken)


def score_title(line: FigureLine) -> str:
    """Return the title of an axis of scores: the metric, on whose rows, and its unit."""
    return f"{score_words(line)}{line.unit}"


def score_words(line: FigureLine) -> str:
    """Return the metric in words, and the rows where they are clients' own."""
    return f"{line.metric.worded} on clients' own rows" if line.own else line.metric.worded


def bounded(frame: Figure, line: FigureLine) -> Figure:
    """Return a layout whose second axis ends where the metric does, however wide an interval is."""
    return {**frame, "yaxis": {**frame["yaxis"], "autorangeoptions": clip(line)}}


def clip(line: FigureLine) -> Figure:
    """Return the ends that an axis of scores may not pass: those of the metric."""
    by = 100.0 if line.metric.share else 1.0
    ends = {"clipmin": line.metric.least, "clipmax": line.metric.most}
    return {name: by * end for name, end in ends.items() if end is not None}


def is_crowd(lines: Sequence[FigureLine]) -> bool:
    """Return whether there are too many lines to name each in a figure."""
    return sum(line.named for line in lines) > _CROWD


def joined(parts: Iterable[str]) -> str:
    """Return parts joined to one text; of a crowd only the first ones."""
    given = list(parts)
    more = f"; and {len(given) - LISTED} more, as the table tells" if len(given) > _CROWD else ""
    return "; ".join(given[:LISTED] if more else given) + f"{more}."


def half_of(value: Interval) -> float:
    """Return half the width of an interval; 0 for a single value."""
    return value.half if math.isfinite(value.half) else 0.0


def error_bars(values: Iterable[Interval]) -> Figure:
    """Return the error bars of some points; the page gives them a colour that is seen in its theme."""
    return {"type": "data", "array": [half_of(value) for value in values], "thickness": 1.5, "width": 4}
