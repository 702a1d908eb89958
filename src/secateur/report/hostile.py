"""What a crossed comparison shows of attacks: quality by method, rule and attack, who was named, and what survives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from secateur.comparison.crossing import VARIANT
from secateur.comparison.grid import folder_of
from secateur.comparison.suite import Cell, Suite
from secateur.contract.ask import EVALUATE
from secateur.federation.folder import ROUNDS, read_failure, read_records, read_summary
from secateur.learning.metrics import metric_of
from secateur.report.drawing import Figure, figure, view
from secateur.report.formatting import markdown, percent, spread
from secateur.report.statistics import interval, paired

RULE, ATTACK = "rule", "attack"
"""The axes of a suite whose comparison is shown so."""

NONE = "none"
"""The value of the axis ``attack`` where all clients are honest."""

_LEFT_OUT, _SUSPECTED = "left_out", "suspected"
_GUARD, _OF_MAGNITUDE = "guard", frozenset({"scale", "huge", "NaN", "inflated"})


@dataclass
class Named:
    """Requests to clients, and how many of their replies were refused or suspected.

    Attributes:
        asked: requests to clients.
        refused: replies that were refused or did not come, each with a reason that can be proved.
        suspected: replies that a robust rule left out of its result.
    """

    asked: int = 0
    refused: int = 0
    suspected: int = 0

    def add(self, other: Named) -> None:
        """Add the counts of others."""
        self.asked += other.asked
        self.refused += other.refused
        self.suspected += other.suspected


@dataclass
class Standing:
    """The runs of one variant over all seeds.

    Attributes:
        place: the value of each axis.
        quality: the accuracy by seed, of runs with a result.
        ended: the seeds of runs that ended without a result.
        missing: the number of runs that have not been made.
        hostile, honest: who was named.
    """

    place: Mapping[str, str]
    quality: dict[int, float] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    missing: int = 0
    hostile: Named = field(default_factory=Named)
    honest: Named = field(default_factory=Named)

    @property
    def made(self) -> int:
        """Return the number of runs that have been made."""
        return len(self.quality) + len(self.ended)

    def words(self) -> str:
        """Return the accuracy in per cent with its spread; ``ended`` where runs had no result."""
        if self.ended:
            return f"ended, {len(self.ended)} of {self.made}"
        return spread(interval(list(self.quality.values())), percent) if self.quality else "not run"


def shows(suite: Suite) -> bool:
    """Return whether a suite is crossed by rules and attacks."""
    return any({RULE, ATTACK} <= place.keys() for place in suite.places.values())


def is_honest(place: Mapping[str, str]) -> bool:
    """Return whether all clients are honest at a place of a crossed suite, or of any other suite."""
    return place.get(ATTACK, NONE) == NONE


def standings(suite: Suite, cells: Iterable[Cell], out: Path) -> list[Standing]:
    """Return the runs of each variant, in the order of the suite.

    Args:
        suite: a suite that ``shows`` accepts.
        cells: its cells.
        out: the comparison's folder; runs that are not there yet are counted as missing.
    """
    found = {name: Standing(place) for name, place in suite.places.items()}
    for cell in cells:
        if not cell.control:
            _read(found[cell.variant], cell, folder_of(out, cell.study))
    return list(found.values())


def _read(standing: Standing, cell: Cell, folder: Path) -> None:
    summary, failure = read_summary(folder), read_failure(folder)
    if summary is None and failure is None:
        standing.missing += 1
        return
    if summary is None:
        standing.ended.add(cell.seed)
    else:
        standing.quality[cell.seed] = float(summary["final"][metric_of(summary["final"]).name])
    for row in read_records(folder) if (folder / ROUNDS).exists() else ():
        if row["phase"] == EVALUATE:
            continue
        hostile = set(row.get("attackers", ()))
        for counts, who in ((standing.hostile, hostile), (standing.honest, set(row["clients"]) - hostile)):
            counts.asked += len(who & set(row["clients"]))
            counts.refused += sum(entry["client"] in who for entry in row[_LEFT_OUT])
            counts.suspected += sum(entry["client"] in who for entry in row.get(_SUSPECTED, ()))


# ---- what is shown


def split(name: str) -> tuple[str, str]:
    """Return the share of attackers in an attack's name, and the attack.

    >>> split("20 % ALIE"), split("none")
    (('20 %', 'ALIE'), ('', 'none'))
    """
    share, mark, attack = name.partition(" % ")
    return (f"{share} %", attack) if mark else ("", name)


def sections(found: Sequence[Standing]) -> list[tuple[str, str, list[dict[str, str]]]]:
    """Return the tables: a title, a note and rows each; accuracy by rule and attack, then who was named."""
    made = []
    for variant in _values(found, VARIANT):
        of = [one for one in found if one.place[VARIANT] == variant]
        for share in dict.fromkeys(split(one.place[ATTACK])[0] for one in of if one.place[ATTACK] != NONE):
            note = "Accuracy in per cent, mean and 95 % interval over seeds; ended: the federation had no result."
            if rows := accuracy(of, share):
                made.append((f"{variant}, {share} attackers", note, rows))
        named = by_rule(of)
        if named:
            note = (
                "Of all requests over the attacks above, in per cent. Refused: the reply was a provable lie, or none "
                "came. Suspected: the rule left it out of its result."
            )
            made.append((f"{variant}: who is named", note, named))
    return made


def accuracy(found: Sequence[Standing], share: str) -> list[dict[str, str]]:
    """Return a row for each rule, with the accuracy without and under each attack of a share of attackers.

    Rules and attacks that nothing has been run of are left out.
    """
    here = {(one.place[RULE], one.place[ATTACK]): one for one in found}
    ran = {name for (_, name), one in here.items() if one.made}
    wanted = [name for name in _values(found, ATTACK) if name in ran and (name == NONE or split(name)[0] == share)]
    under = [name for name in wanted if name != NONE]
    rules = [
        rule for rule in _values(found, RULE)
        if any((rule, name) in here for name in under) and any(here[rule, n].made for n in wanted if (rule, n) in here)
    ]  # fmt: skip
    return [
        {RULE: rule}
        | {split(name)[1]: here[rule, name].words() if (rule, name) in here else "" for name in wanted}
        for rule in rules
    ]  # fmt: skip


def by_rule(found: Sequence[Standing]) -> list[dict[str, str]]:
    """Return a row for each rule: the shares of replies that were refused or suspected, of attackers and of others."""
    rows = []
    for rule in _values(found, RULE):
        hostile, honest, clean = Named(), Named(), Named()
        for one in found:
            if one.place[RULE] == rule:
                hostile.add(one.hostile)
                (honest if one.place[ATTACK] != NONE else clean).add(one.honest)
        if hostile.asked:
            rows.append(
                {
                    RULE: rule,
                    "attackers refused": _share(hostile.refused, hostile.asked),
                    "attackers suspected": _share(hostile.suspected, hostile.asked),
                    "honest refused": _share(honest.refused, honest.asked),
                    "honest suspected": _share(honest.suspected, honest.asked),
                    "honest suspected, no attack": _share(clean.suspected, clean.asked),
                }
            )
    return rows


def lost(one: Standing, clean: Standing) -> float | None:
    """Return the points of accuracy that a variant is below another, over the seeds that both have; None without one.

    A federation that ended without a result has lost all of it.
    """
    difference = paired(clean.quality, {**one.quality, **dict.fromkeys(one.ended, 0.0)})
    return None if difference is None else 100 * difference.mean


def losses(found: Sequence[Standing]) -> dict[tuple[str, str, str], float]:
    """Return the points lost by variant, rule and attack, against the first rule without an attack."""
    here = {(one.place[VARIANT], one.place[RULE], one.place[ATTACK]): one for one in found}
    points = {}
    for (variant, rule, attack), one in here.items():
        clean = next((other for key, other in here.items() if key[0] == variant and key[2] == NONE), None)
        value = None if clean is None else lost(one, clean)
        if value is not None:
            points[variant, rule, attack] = value
    return points


def heat(found: Sequence[Standing]) -> Figure:
    """Return a heat map of the points that each attack costs under each rule, one view for each variant."""
    points, views = losses(found), []
    for variant in _values(found, VARIANT):
        of = {key[1:]: value for key, value in points.items() if key[0] == variant}
        rules, attacks = list(dict.fromkeys(rule for rule, _ in of)), list(dict.fromkeys(name for _, name in of))
        values = [[of.get((rule, name)) for name in attacks] for rule in rules]
        text = [["" if value is None else f"{value:.0f}" for value in row] for row in values]
        trace = {
            "type": "heatmap", "x": attacks, "y": rules, "z": values, "text": text, "texttemplate": "%{text}",
            "colorscale": [[0, "#F7F7F7"], [0.25, "#E69F00"], [1, "#7A1F00"]], "zmin": 0, "zmax": 40,
            "colorbar": {"title": {"text": "points lost"}},
            "hovertemplate": "%{y}, %{x}: %{z:.1f} points<extra></extra>",
        }  # fmt: skip
        frame = {
            "xaxis": {"automargin": True, "tickangle": -60}, "yaxis": {"automargin": True, "autorange": "reversed"},
            "margin": {"l": 10, "r": 10, "t": 10, "b": 10}, "height": 160 + 26 * len(rules),
        }  # fmt: skip
        views.append(view([trace], frame, variant))
    alt = "Points of accuracy lost, by rule and attack, against the mean without an attack."
    return figure("attacks", "What attacks cost, in points of accuracy", alt, views, wide=True)


def sentences(found: Sequence[Standing]) -> list[str]:
    """Return in words which rule has the least worst case, what magnitude costs behind a guard, and who was named."""
    points = losses(found)
    said = [*_best(found, points), *_magnitude(points)]
    honest = Named()
    for one in found:
        honest.add(one.honest)
    said.append(
        f"Honest clients were refused in {honest.refused} of {honest.asked} requests, and suspected by a rule in "
        f"{honest.suspected} of them ({_share(honest.suspected, honest.asked)} %)."
    )
    made, gone = sum(one.made for one in found), sum(one.missing for one in found)
    return said + ([f"{made} of {made + gone} runs have been made; the others are not shown."] if gone else [])


def _magnitude(points: Mapping[tuple[str, str, str], float]) -> list[str]:
    """Return what the worst attack of magnitude costs each variant whose rule is a guard."""
    said = []
    for variant, rule in dict.fromkeys((of, rule) for of, rule, _ in points if _GUARD in rule):
        worst = [
            (value, attack) for (of, by, attack), value in points.items()
            if (of, by) == (variant, rule) and split(attack)[1] in _OF_MAGNITUDE
        ]  # fmt: skip
        if worst:
            value, attack = max(worst)
            said.append(f"{variant}, {rule}: the worst attack of magnitude ({attack}) costs {value:.1f} points.")
    return said


def _best(found: Sequence[Standing], points: Mapping[tuple[str, str, str], float]) -> list[str]:
    """Return the rule with the least worst case, for each variant and share of attackers."""
    said = []
    for variant in _values(found, VARIANT):
        for share in dict.fromkeys(split(one.place[ATTACK])[0] for one in found if one.place[ATTACK] != NONE):
            under: dict[str, dict[str, float]] = {}
            for (of, rule, attack), value in points.items():
                if of == variant and split(attack)[0] == share:
                    under.setdefault(rule, {})[split(attack)[1]] = value
            common = set.intersection(*map(set, under.values())) if len(under) > 1 else set[str]()
            if common:  # a rule that fewer attacks were tried on is not better for that
                worst = {rule: max((tried[attack], attack) for attack in common) for rule, tried in under.items()}
                best = min(worst, key=lambda rule: worst[rule])
                value, attack = worst[best]
                said.append(
                    f"{variant}, {share} attackers: of {len(worst)} rules {best} has the least worst case over "
                    f"{len(common)} attacks: {attack} costs {value:.1f} points."
                )
    return said


def text(found: Sequence[Standing]) -> str:
    """Return all of it as Markdown."""
    parts = ["## What survives", "\n".join(f"- {sentence}" for sentence in sentences(found))]
    for title, note, rows in sections(found):
        parts += [f"## {title}", note, markdown(rows)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _values(found: Sequence[Standing], axis: str) -> list[str]:
    return list(dict.fromkeys(one.place[axis] for one in found))


def _share(count: int, whole: int) -> str:
    return percent(count / whole) if whole else ""
