"""Verdicts: each line of a comparison is tested against its controls, over seeds and with Holm's correction."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from secateur.errors import ConfigError
from secateur.learning.metrics import Metric
from secateur.report.outcomes import Outcome
from secateur.report.statistics import (
    Curve,
    Interval,
    cost_to_reach,
    front,
    interval,
    p_equivalent,
    p_greater,
    paired,
    quality_within,
    significant,
)

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
        partition, variant, control: those of its cells. Each dense FedAvg has one line, however many variants it is
            the baseline of.
        runs: outcomes by seed.
        differences: the score minus each control's, paired by seed, by the control's name; positive is better. Only
            variants have any.
        rows: the test rows that it is scored on: the ``server``'s, or each client's ``own``. Personal models are scored
            on the latter alone.
        better: the controls that it is significantly better than (Holm's correction over the whole table).
        level: the controls that it is equivalent to within the margin; corrected likewise.
        equal: the difference to its baseline at an equal budget, which is what the cheaper of the two spends in all, in
            ``bytes`` and in client ``seconds``; None where a seed had no score within it.
        needed: bytes and client seconds at which it reached its baseline's final quality; None where a seed never did.
        to_target: bytes and client seconds at which it reached the target on validation rows; None where a seed never
            did.
        central: during the run it was scored on the server's rows, not on clients' own.
        front: it is on the Pareto front of quality and bytes.
        margin: the suite's margin of equivalence; 0 is the default.
    """

    partition: str
    variant: str
    control: str
    runs: Mapping[int, Outcome]
    differences: Mapping[str, Interval] = field(default_factory=dict)
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
        """Return its name in tables."""
        return f"{self.variant}: {self.control}" if self.control not in {"", DENSE} else self.variant

    @property
    def place(self) -> str:
        """Return its partition and the rows that it is scored on: lines of one place may be compared."""
        return f"{self.partition}, clients' own rows" if self.rows == OWN else self.partition

    @property
    def family(self) -> str:
        """Return the variant's name without its sparsity: FedSparsify, for FedSparsify 90 %."""
        return _SPARSITY.sub("", self.variant)

    @property
    def sparsity_asked(self) -> str:
        """Return the sparsity at the end of the variant's name, such as 90 %; ``as it is`` where there is none."""
        found = _SPARSITY.search(self.variant)
        return found[1] if found else AS_IT_IS

    @property
    def metric(self) -> Metric:
        """Return what its runs are scored by."""
        return next(iter(self.runs.values())).metric

    @property
    def score(self) -> Interval:
        """Return the interval of its score on its rows."""
        return self.of("local" if self.rows == OWN else "quality")

    def of(self, figure: str) -> Interval:
        """Return the interval over seeds of a field of ``Outcome``."""
        return interval([float(getattr(one, figure)) for one in self.runs.values()])

    @property
    def verdict(self) -> str:
        """Return in words what it is level with and not shown to be better than; empty for one seed."""
        if len(self.runs) < 2:
            return ""
        weak = [name for name in self.differences if name not in {DENSE, *self.better, *self.level}]
        same = [name for name in self.differences if name in self.level and name not in self.better]
        parts = [f"level with {', '.join(same)}"] if same else []
        return "; ".join(parts + ([f"not shown to be better than {', '.join(weak)}"] if weak else []))


@dataclass(frozen=True)
class Group:
    """The runs of a line before it is compared with others.

    Attributes:
        variant, control, runs, central: those of the line.
        baseline: the name of the dense FedAvg that it is compared with; empty: none.
        personal: clients use models or masks of their own.
    """

    variant: str
    control: str
    runs: dict[int, Outcome]
    baseline: str = ""
    personal: bool = False
    central: bool = True


def compare_groups(partition: str, groups: Sequence[Group], *, target: float = 0.0, margin: float = 0.0) -> list[Line]:
    """Return the lines of some groups with their verdicts.

    Shared models are compared on the server's test rows. Personal models have no score there: where there are any,
    all groups are compared once more on clients' own test rows.

    Args:
        partition: the partition of all groups.
        groups: those of FedAvg before all others.
        target, margin: those of ``Suite``.

    Raises:
        ConfigError: their bytes are known in different ways.
    """
    kinds = {one.count: f"{group.variant} {group.control}".strip() for group in groups for one in group.runs.values()}
    if len(kinds) > 1:
        told = ", ".join(f"{kind} in {name}" for kind, name in sorted(kinds.items()))
        raise ConfigError(
            f"bytes are {told}: figures of different kinds are not set side by side; run all with one wire.count"
        )
    personal = {group.baseline for group in groups if group.personal}
    wanted = {group.baseline for group in groups if not group.personal and group.control != DENSE}
    shared = [g for g in groups if not g.personal and (g.control != DENSE or g.variant not in personal - wanted)]
    scored = [group for group in groups if group.personal or group.control in {"", DENSE}] if personal else []
    ended = [group for group in scored if all(one.local for one in group.runs.values())]  # clients score at the end
    return [
        *_judged(_view(partition, SERVER, shared, target, margin)),
        *_judged(_view(partition, OWN, ended, 0.0, margin)),
    ]


def _view(partition: str, rows: str, groups: Sequence[Group], target: float, margin: float) -> list[Line]:
    """Return the lines of groups that are scored on the same rows, without verdicts."""
    named = {(group.variant, group.control): group.runs for group in groups}
    made = []
    for group in groups:
        dense = named.get((group.baseline, DENSE), {})
        line = Line(partition, group.variant, group.control, group.runs, {}, rows, central=group.central, margin=margin)
        others = {} if group.control else {DENSE: dense, **{n: named.get((group.variant, n), {}) for n in LETTERS}}
        differences = {name: paired(_scores(line, group.runs), _scores(line, other)) for name, other in others.items()}
        line = replace(line, differences={name: found for name, found in differences.items() if found})
        made.append(_spent(line, dense, target) if rows == SERVER else line)
    best = front(made, lambda line: line.of("bytes").mean, lambda line: line.score.mean, lower_is_better=is_error(made))
    return [replace(line, front=line in best) for line in made]


def is_error(lines: Sequence[Line]) -> bool:
    """Return whether lines are scored by an error, which is better the lower it is."""
    return bool(lines) and not lines[0].metric.higher


def _scores(line: Line, of: Mapping[int, Outcome]) -> dict[int, float]:
    """Return scores by seed on a line's rows; an error is negated, so that higher is better."""
    return {seed: line.metric.sign * (one.local if line.rows == OWN else one.quality) for seed, one in of.items()}


def _spent(line: Line, dense: Mapping[int, Outcome], target: float) -> Line:
    """Return a line with what its quality cost, compared with its own baseline alone."""
    least = not line.metric.higher
    pairs = [(one, dense[seed]) for seed, one in line.runs.items() if seed in dense]
    usual = (1.05 if least else 0.95) * interval([_ended(other) for _, other in pairs]).mean if pairs else 0.0
    aim, equal, needed, reached = target or usual, {}, {}, {}
    for axis in AXES:
        if pairs and line.control != DENSE:
            equal[axis] = _interval_of_all(_at_equal(one, other, axis) for one, other in pairs)
            needed[axis] = _interval_of_all(
                cost_to_reach(_curve(one, axis), other.quality, lower_is_better=least) for one, other in pairs
            )
        if aim:
            reached[axis] = _interval_of_all(_until(one, axis, aim) for one in line.runs.values())
    return replace(line, equal=equal, needed=needed, to_target=reached)


def _curve(one: Outcome, axis: str) -> Curve:
    return one.by_bytes if axis == "bytes" else one.by_seconds


def _ended(one: Outcome) -> float:
    """Return a run's final quality on validation rows; on test rows where it has none."""
    return one.quality if math.isnan(one.validation) else one.validation


def _until(one: Outcome, axis: str, aim: float) -> float | None:
    """Return the cost by the first round that reaches the aim on validation rows (test rows where there are none).

    A target says when a run might have been stopped, and test rows must not decide that.
    """
    round_ = cost_to_reach(one.validation_by_round or one.by_round, aim, lower_is_better=not one.metric.higher)
    spent = zip(one.by_round, _curve(one, axis), strict=True)
    return None if round_ is None else next((cost for (at_, _), (cost, _) in spent if at_ >= round_), None)


def _at_equal(one: Outcome, other: Outcome, axis: str) -> float | None:
    """Return how much better one is at the budget that the cheaper of the two spends in all."""
    budget = min(float(getattr(one, axis)), float(getattr(other, axis)))
    here, there = quality_within(_curve(one, axis), budget), quality_within(_curve(other, axis), budget)
    if here is None or there is None:
        return None
    return one.metric.sign * (here - there)


def _interval_of_all(values: Iterable[float | None]) -> Interval | None:
    """Return the interval of some values; None where one of them is missing."""
    given = list(values)
    known = [value for value in given if value is not None]
    return interval(known) if len(known) == len(given) else None


def _judged(lines: Sequence[Line]) -> list[Line]:
    """Return the lines of one table with their verdicts, corrected for all tests in it."""
    asked = {(number, name): value for number, line in enumerate(lines) for name, value in line.differences.items()}
    better = significant({key: p_greater(value) for key, value in asked.items() if key[1] != DENSE})
    same = significant(
        {(n, name): p_equivalent(value, margin_of(lines[n], name)) for (n, name), value in asked.items()}
    )
    return [
        replace(
            line,
            better=frozenset(name for n, name in better if n == number),
            level=frozenset(name for n, name in same if n == number),
        )
        for number, line in enumerate(lines)
    ]


def margin_of(line: Line, name: str) -> float:
    """Return the margin of equivalence to a control; of errors it is a share of the control's error."""
    if line.margin or line.metric.share:
        return line.margin or MARGIN
    control = line.score.mean - line.metric.sign * line.differences[name].mean
    return SHARE * abs(control)
