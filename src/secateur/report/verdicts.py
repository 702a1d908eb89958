"""Verdicts: the lines of a comparison, each beside its controls, and what is shown of them over seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from secateur.learning.metrics import Metric
from secateur.report.outcomes import Outcome
from secateur.report.statistics import Curve, Interval, at, exceeds, front, interval, level, paired, reach, shown

DENSE = "dense"
SERVER, OWN = "server", "own"
LETTERS = {"random": "r", "ramped": "p", "shuffled": "s", "narrow": "n"}
AXES = ("bytes", "seconds")
AS_IT_IS = "as it is"
MARGIN, SHARE = 0.01, 0.05  # of accuracy; of an error
_SPARSITY = re.compile(r"[ ,]*(\d+(?:\.\d+)? %)$")


@dataclass(frozen=True)
class Line:
    """One line of a comparison: a variant, or one of its controls, on one partition and one kind of test rows.

    Attributes:
        partition, variant, control: as of its cells; FedAvg stands once for each study that it was trained by.
        runs: outcomes by seed.
        apart: paired differences of the score to each control, by its name, better being positive (of a variant only).
        rows: whose test rows it is scored on: the ``server``'s, or each client's ``own``. Personal models stand only
            among the latter, with what the others have there.
        better: the controls that it is shown to be better than; of one table together, by Holm.
        level: the controls that it is shown to be level with, within the margin; corrected likewise.
        equal: paired difference to the FedAvg beside it when both had spent what the one that spent less spends in all,
            in ``bytes`` and in client ``seconds``; None where a seed had no score by then.
        needed: what it had spent when it reached what that FedAvg ends with; None where a seed never did.
        to_target: bytes and client seconds when the target was reached on validation rows; None where some seed never
            did.
        central: it was scored on the server's rows on the way, not on clients' own.
        front: no other line here is as cheap in bytes and better, or as good and cheaper.
        margin: what the suite says; 0: the usual.
    """

    partition: str
    variant: str
    control: str
    runs: Mapping[int, Outcome]
    apart: Mapping[str, Interval] = field(default_factory=dict)
    rows: str = SERVER
    better: frozenset[str] = frozenset()
    level: frozenset[str] = frozenset()
    equal: Mapping[str, Interval | None] = field(default_factory=dict)
    needed: Mapping[str, Interval | None] = field(default_factory=dict)
    to_target: Mapping[str, Interval | None] = field(default_factory=dict)
    central: bool = True
    front: bool = False
    margin: float = 0.0

    @property
    def name(self) -> str:
        """Return what it is called in a table."""
        return f"{self.variant}: {self.control}" if self.control not in {"", DENSE} else self.variant

    @property
    def place(self) -> str:
        """Return its partition, and that it is scored on clients' own rows where it is."""
        return f"{self.partition}, clients' own rows" if self.rows == OWN else self.partition

    @property
    def family(self) -> str:
        """Return what variants that differ in their sparsity are called together: FedSparsify, for FedSparsify 90 %."""
        return _SPARSITY.sub("", self.variant)

    @property
    def asked(self) -> str:
        """Return the sparsity at the end of the variant's name, such as 90 %; else that it runs as it is."""
        found = _SPARSITY.search(self.variant)
        return found[1] if found else AS_IT_IS

    @property
    def metric(self) -> Metric:
        """Return what its runs are scored by."""
        return next(iter(self.runs.values())).metric

    @property
    def score(self) -> Interval:
        """Return the interval of its quality on these rows."""
        return self.of("local" if self.rows == OWN else "quality")

    def of(self, figure: str) -> Interval:
        """Return the interval of a figure of ``Outcome`` over seeds."""
        return interval([float(getattr(one, figure)) for one in self.runs.values()])

    @property
    def verdict(self) -> str:
        """Say what it is level with, and which controls it is not shown to be better than; nothing of one seed."""
        if len(self.runs) < 2:
            return ""
        weak = [name for name in self.apart if name not in {DENSE, *self.better, *self.level}]
        same = [name for name in self.apart if name in self.level and name not in self.better]
        told = [f"level with {', '.join(same)}"] if same else []
        return "; ".join(told + ([f"not shown to be better than {', '.join(weak)}"] if weak else []))


@dataclass(frozen=True)
class Group:
    """The runs of a line before it is set beside others.

    Attributes:
        variant, control, runs: as of the line.
        beside: the name of the FedAvg that it is set beside; empty: none.
        personal: clients use models or masks of their own.
        central: as of the line.
    """

    variant: str
    control: str
    runs: dict[int, Outcome]
    beside: str = ""
    personal: bool = False
    central: bool = True


def compared(partition: str, groups: Sequence[Group], *, target: float = 0.0, margin: float = 0.0) -> list[Line]:
    """Return the lines of groups: those of shared models on the server's rows; where any are personal, all on clients'.

    Personal models have no score on the server's rows, and what others have there is no measure for them.

    Args:
        partition: of all of them.
        groups: FedAvg's before all others.
        target, margin: as of ``Suite``.
    """
    personal = {group.beside for group in groups if group.personal}
    wanted = {group.beside for group in groups if not group.personal and group.control != DENSE}
    shared = [g for g in groups if not g.personal and (g.control != DENSE or g.variant not in personal - wanted)]
    scored = [group for group in groups if group.personal or group.control in {"", DENSE}] if personal else []
    every = [group for group in scored if all(one.local for one in group.runs.values())]  # not before a run has ended
    return [
        *_judged(_view(partition, SERVER, shared, target, margin)),
        *_judged(_view(partition, OWN, every, 0.0, margin)),
    ]


def _view(partition: str, rows: str, groups: Sequence[Group], target: float, margin: float) -> list[Line]:
    """Return the lines of groups that are scored on the same rows; nothing is judged yet."""
    named = {(group.variant, group.control): group.runs for group in groups}
    made = []
    for group in groups:
        dense = named.get((group.beside, DENSE), {})
        line = Line(partition, group.variant, group.control, group.runs, {}, rows, central=group.central, margin=margin)
        others = {} if group.control else {DENSE: dense, **{n: named.get((group.variant, n), {}) for n in LETTERS}}
        differences = {name: paired(_scores(line, group.runs), _scores(line, other)) for name, other in others.items()}
        line = replace(line, apart={name: apart for name, apart in differences.items() if apart})
        made.append(_spent(line, dense, target) if rows == SERVER else line)
    best = front(made, lambda line: line.of("bytes").mean, lambda line: line.score.mean, least=is_error(made))
    return [replace(line, front=line in best) for line in made]


def is_error(found: Sequence[Line]) -> bool:
    """Return whether lines are scored by an error, of which less is better."""
    return bool(found) and not found[0].metric.higher


def _scores(line: Line, of: Mapping[int, Outcome]) -> dict[int, float]:
    """Return scores by seed on a line's rows; higher is better."""
    return {seed: line.metric.sign * (one.local if line.rows == OWN else one.quality) for seed, one in of.items()}


def _spent(line: Line, dense: Mapping[int, Outcome], target: float) -> Line:
    """Return a line with what its score cost, beside FedAvg's alone: no third line changes that."""
    least = not line.metric.higher
    pairs = [(one, dense[seed]) for seed, one in line.runs.items() if seed in dense]
    usual = (1.05 if least else 0.95) * interval([_ended(other) for _, other in pairs]).mean if pairs else 0.0
    aim, equal, needed, reached = target or usual, {}, {}, {}
    for axis in AXES:
        if pairs and line.control != DENSE:
            equal[axis] = _all(_at_equal(one, other, axis) for one, other in pairs)
            needed[axis] = _all(reach(_curve(one, axis), other.quality, least=least) for one, other in pairs)
        if aim:
            reached[axis] = _all(_until(one, axis, aim) for one in line.runs.values())
    return replace(line, equal=equal, needed=needed, to_target=reached)


def _curve(one: Outcome, axis: str) -> Curve:
    return one.carried if axis == "bytes" else one.worked


def _ended(one: Outcome) -> float:
    """Return what a run ended with on validation rows; on test rows where it has none."""
    return one.quality if math.isnan(one.validation) else one.validation


def _until(one: Outcome, axis: str, aim: float) -> float | None:
    """Return what was spent by the first round that is as good as the aim on validation rows, where there are such.

    A target says when a run might have been stopped: test rows must not.
    """
    round_ = reach(one.validated or one.rounds, aim, least=not one.metric.higher)
    spent = zip(one.rounds, _curve(one, axis), strict=True)
    return None if round_ is None else next((cost for (at_, _), (cost, _) in spent if at_ >= round_), None)


def _at_equal(one: Outcome, other: Outcome, axis: str) -> float | None:
    """Return how much better one is when both had spent what the one that spent less spends in all."""
    budget = min(float(getattr(one, axis)), float(getattr(other, axis)))
    here, there = at(_curve(one, axis), budget), at(_curve(other, axis), budget)
    if here is None or there is None:
        return None
    return one.metric.sign * (here - there)


def _all(found: Iterable[float | None]) -> Interval | None:
    """Return the interval of values, None where one is missing."""
    given = list(found)
    known = [value for value in given if value is not None]
    return interval(known) if len(known) == len(given) else None


def _judged(found: Sequence[Line]) -> list[Line]:
    """Return the lines of one table with what is shown of them, corrected for all that is asked in it."""
    asked = {(number, name): apart for number, line in enumerate(found) for name, apart in line.apart.items()}
    better = shown({key: exceeds(apart) for key, apart in asked.items() if key[1] != DENSE})
    same = shown({(n, name): level(apart, _margin(found, n, name)) for (n, name), apart in asked.items()})
    return [
        replace(
            line,
            better=frozenset(name for n, name in better if n == number),
            level=frozenset(name for n, name in same if n == number),
        )
        for number, line in enumerate(found)
    ]


def _margin(found: Sequence[Line], number: int, name: str) -> float:
    """Return how far a line may be from a control that it is level with; of errors a share of the control's."""
    line = found[number]
    if line.margin or line.metric.share:
        return line.margin or MARGIN
    control = line.score.mean - line.metric.sign * line.apart[name].mean
    return SHARE * abs(control)
