"""The headline of a page: which method to use under which budget, or what a single run saved, in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from secateur.bandwidth import Spent
from secateur.report.drawing import Figure, colour, figure, layout, view
from secateur.report.formatting import percent, plain, size, spread
from secateur.report.statistics import SIGNIFICANCE, front, p_greater, paired, significant
from secateur.report.verdicts import DENSE, MARGIN, OWN, SHARE, Line, is_error, margin_of

_SENTENCES = 5  # budgets that are spoken of
_NAMED = 3  # methods that one sentence names
_SERIES = (((1, 2, 5), 1), ((1,), 1), ((1,), 3))  # leading digits of budgets, and of which powers of ten
_SHARES = (
    ("bytes carried", "bytes"), ("client seconds", "seconds"), ("shipped bytes", "size"),
    ("MACs, zeros skipped", "macs"), ("MACs, units removed", "macs_physical"),
)  # fmt: skip


def headline(here: Sequence[Line]) -> dict[str, Any]:
    """Return the sentences of one place, and the figure that says the same where only one method was run.

    Args:
        here: the lines of one place.

    Returns:
        ``sentences``, a list of text, and ``figure``, which is empty where methods are compared: the figure of quality
        against cost is theirs.
    """
    methods = [line for line in here if not line.control]
    dense = [line for line in here if line.control == DENSE]
    if len(methods) == 1 and len(dense) < 2:
        said = [*saved(methods[0], dense), *on_link(here)]
        return {"sentences": said, "figure": shares(methods[0], dense[0]) if dense else {}}
    going = ["Some runs are not finished: this is what is known so far."] if not all(map(_finished, here)) else []
    return {"sentences": [*going, *by_budget(here), *as_good_as_dense(here), *on_link(here)], "figure": {}}


def by_budget(here: Sequence[Line]) -> list[str]:
    """Return a sentence for each budget of bytes a client: what is best within it, and against what that is shown.

    It is shown to be better than another line if Student's paired t test over common seeds says so at 5 %, two-sided
    and corrected (Bonferroni) for all pairs of lines: the best one was chosen by the same scores.
    """
    if not all(map(_client_bytes, here)):
        return []
    best = front(here, _client_bytes, lambda line: line.score.mean, lower_is_better=is_error(here))
    said = []
    for limit, number in budgets([_client_bytes(line) for line in best]):
        one, within = best[number], [line for line in here if _client_bytes(line) <= limit]
        said.append(f"Up to {size(limit)} a client: {_some([one.name])}, {_score(one)}{_shown(one, within, here)}.")
    return said


def budgets(costs: Sequence[float]) -> list[tuple[float, int]]:
    """Return round budgets, each with the index of the dearest cost within it; of those that share one, the highest.

    >>> budgets([1.3e6, 4.1e6, 5.2e6])
    [(2000000.0, 0), (5000000.0, 1), (10000000.0, 2)]

    Args:
        costs: by rising cost.
    """
    found: dict[int, float] = {}
    first, last = math.floor(math.log10(costs[0])), math.ceil(math.log10(costs[-1]))
    for digits, powers in _SERIES:
        found = {}
        for limit in (
            float(digit * 10**power) for power in range(first, last + powers + 1, powers) for digit in digits
        ):
            index = sum(cost <= limit for cost in costs) - 1
            done = index in found and index == len(costs) - 1
            if index >= 0 and not done:
                found[index] = limit
        if len(found) <= _SENTENCES:
            break
    return [(limit, index) for index, limit in found.items()]


def on_link(here: Sequence[Line]) -> list[str]:
    """Return a sentence that says what seconds on a network go to, and from where on fewer bytes are not felt.

    It is of dense FedAvg, or else of the first line; there is none without a network.
    """
    line = next((line for line in here if line.control == DENSE), here[0])
    spent = [one.on_link for one in line.runs.values() if one.on_link is not None]
    whole = sum(spent, start=Spent())
    if not whole.seconds:
        return []
    named = {"its bytes": whole.link, "the fixed cost of exchanges": whole.fixed, "training": whole.work}
    first, *rest = sorted(named, key=lambda name: -named[name])
    told = ", ".join(f"{100 * named[name] / whole.seconds:.0f} % to {name}" for name in rest)
    unseen = size(max(one.unseen for one in line.runs.values()))
    share = 100 * named[first] / whole.seconds
    seen = f"Where a client carries less than {unseen} in an exchange, fewer bytes shorten it by less than a tenth."
    return [f"On this link (a model) {share:.0f} % of the seconds of {line.name} go to {first}, {told}. {seen}"]


def _shown(best: Line, within: Sequence[Line], here: Sequence[Line]) -> str:
    others = [line for line in within if line is not best]
    if not others:
        return "; nothing else fits"
    if len(best.runs) < 2:
        return ", one seed: not shown to be better than anything else"
    pairs = len(here) * (len(here) - 1) / 2
    unshown = [line.name for line in others if 2 * _p_better(best, line) * pairs >= SIGNIFICANCE]
    if not unshown:
        return "; shown to be better than all else that fits"
    return f"; not shown to be better than {_some(unshown)}"


def _p_better(one: Line, other: Line) -> float:
    difference = paired(_signed(one), _signed(other))
    return p_greater(difference) if difference else 1.0


def _signed(line: Line) -> dict[int, float]:
    figure_ = "local" if line.rows == OWN else "quality"
    return {seed: line.metric.sign * float(getattr(run, figure_)) for seed, run in line.runs.items()}


def as_good_as_dense(here: Sequence[Line]) -> list[str]:
    """Return a sentence that names the methods that are as good as dense FedAvg, the cheapest first; or says: none.

    As good is what one-sided paired t tests, corrected by Holm over the methods of one place, show not to be worse by
    the margin of equivalence or more.
    """
    tested = [line for line in here if DENSE in line.differences and len(line.runs) > 1]
    if not tested:
        return []
    least = f"no more than {_margin_words(tested[0])} worse"
    tests = {n: p_greater(line.differences[DENSE], -margin_of(line, DENSE)) for n, line in enumerate(tested)}
    good = sorted((tested[n] for n in significant(tests)), key=_client_bytes)
    if not good:
        return [f"No method is shown to be as good as dense FedAvg ({least})."]
    dense = [line for line in here if line.control == DENSE]
    share = ""
    if len(dense) == 1 and _client_bytes(dense[0]):
        share = f", {100 * _client_bytes(good[0]) / _client_bytes(dense[0]):.0f} % of FedAvg's"
    more = f"; so {'is' if len(good) == 2 else 'are'} {_some([line.name for line in good[1:]])}" if good[1:] else ""
    cheapest = f"{_some([good[0].name])}, with {size(_client_bytes(good[0]))} a client{share}"
    return [f"Shown to be as good as dense FedAvg ({least}), for the fewest bytes: {cheapest}{more}."]


def _margin_words(line: Line) -> str:
    if line.metric.share:
        margin = 100 * (line.margin or MARGIN)
        return f"{margin:g} point{'' if margin == 1 else 's'}"
    return f"{line.margin:g}" if line.margin else f"{100 * SHARE:g} % of its error"


def saved(line: Line, dense: Sequence[Line]) -> list[str]:
    """Return what a single method reached and saved, beside its dense FedAvg where there is one.

    Args:
        line: the method.
        dense: its dense FedAvg, or nothing.
    """
    pruned = f", {percent(line.of('sparsity').mean)} % of its weights removed" if line.of("sparsity").mean else ""
    if not _finished(line):
        return [f"Not finished: {line.name} has reached {_score(line)} so far{pruned}."]
    reached = f"{line.name} reached {_score(line)}{pruned}."
    if not dense or not _finished(dense[0]):
        why = "No dense FedAvg was run beside it" if not dense else "Its dense FedAvg is not finished"
        return [reached, f"{why}: what it saved is not known."]
    difference = line.differences.get(DENSE)
    unit = " points" if line.metric.share else ""
    shown = percent if line.metric.share else plain
    apart = f": {spread(difference, shown)}{unit} (above 0 is better)" if difference else ""
    verdict = f", level within {_margin_words(line)}" if DENSE in line.level else ", not shown to be level"
    verdict = verdict if len(line.runs) > 1 else ", one seed: nothing is shown"
    parts = [_change(name, line.of(of).mean, dense[0].of(of).mean) for name, of in _SHARES if dense[0].of(of).mean]
    return [
        reached,
        f"Beside dense FedAvg, with {_score(dense[0])}{apart}{verdict}.",
        f"Of what dense FedAvg took, it took {', '.join(parts)}.",
    ]


def _change(name: str, ours: float, theirs: float) -> str:
    return f"{100 * ours / theirs:.0f} % of the {name}"


def shares(line: Line, dense: Line) -> Figure:
    """Return the figure of what a single method cost, each cost in percent of dense FedAvg's; empty before both end."""
    known = [(name, line.of(of).mean, dense.of(of).mean) for name, of in _SHARES]
    known = [one for one in known if one[2]]
    if not (known and _finished(line) and _finished(dense)):
        return {}
    names, values = [name for name, _, _ in known], [100 * ours / theirs for _, ours, theirs in known]
    bars = {
        "type": "bar", "orientation": "h", "name": line.name, "y": names, "x": values, "showlegend": False,
        "marker": {"color": colour(0)}, "text": [f"{value:.0f} %" for value in values], "textposition": "auto",
    }  # fmt: skip
    frame = layout("% of dense FedAvg's", "") | {"height": 90 + 40 * len(names)}
    frame["yaxis"] |= {"autorange": "reversed"}
    frame["xaxis"] |= {"range": [0, 1.08 * max(100.0, *values)]}
    frame["shapes"] = [{"type": "line", "x0": 100, "x1": 100, "yref": "paper", "y0": 0, "y1": 1,
                        "line": {"dash": "dot", "color": "#7F7F7F"}}]  # fmt: skip
    alt = "; ".join(f"{name} {value:.0f} %" for name, value in zip(names, values, strict=True))
    return figure("saved", "What it cost, beside dense FedAvg", f"{alt}.", [view([bars], frame)],
                  caption="The dotted line is dense FedAvg: left of it is saved.", wide=True)  # fmt: skip


def _finished(line: Line) -> bool:
    return all(run.size for run in line.runs.values())


def _client_bytes(line: Line) -> float:
    """Return the most bytes that one client carried in any of its runs."""
    return max(run.client_bytes for run in line.runs.values())


def _score(line: Line) -> str:
    """Return the score with its name, interval and unit: ``accuracy 82.1 ± 0.4 %``."""
    shown, unit = (percent, " %") if line.metric.share else (plain, "")
    return f"{line.metric.shown} {spread(line.score, shown)}{unit}"


def _some(names: Sequence[str]) -> str:
    """Return the first names of a list and how many more there are.

    >>> _some(["A", "B"]), _some(["A", "B", "C", "D", "E"])
    ('A and B', 'A, B, C and 2 more')
    """
    names = [f"“{name}”" if {",", ":"} & set(name) else name for name in names]  # a list of them must be read as one
    last = f"{len(names) - _NAMED} more" if len(names) > _NAMED else names[-1]
    first = names[:_NAMED] if len(names) > _NAMED else names[:-1]
    return f"{', '.join(first)} and {last}" if first else last
