"""Standings: what the runs of a comparison ended with, each method beside its controls, over seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur import checkpoint
from secateur import run as runs
from secateur.compare import RUNS, folder_of
from secateur.errors import CheckpointError
from secateur.outcomes import Outcome, outcome
from secateur.report.links import Links
from secateur.report.standing import latex, markdown, percent, plain, seconds, spread
from secateur.report.statistics import Interval, at, front, interval, paired, reach
from secateur.report.terminal import amount, size
from secateur.suite import Cell, Suite

DENSE = "dense"
RESULT = "comparison.json"
FEW = ("method", "accuracy %", "MAE", "to dense", "to random", "to shuffled", "to narrow", "bytes", "client seconds")
"""The columns that a terminal has room for."""
AS_IT_IS = "as it is"
_SPARSITY = re.compile(r"[ ,]*(\d+(?:\.\d+)? %)$")


@dataclass(frozen=True)
class Line:
    """One line of a comparison: a variant, or one of its controls, on one partition.

    Attributes:
        partition, variant, control: as of its cells; FedAvg stands under its own name, once for each aggregator.
        runs: outcomes by seed.
        apart: paired differences of quality to each control, by its name, better being positive (of a variant only).
        equal_bytes, equal_seconds: quality when it had spent what the cheapest line of the partition spends in all;
            None where some seed had no quality by then.
        to_target: bytes and client seconds when the target was reached; None where some seed never did.
        front: no other line of the partition is as cheap in bytes and better, or as good and cheaper.
    """

    partition: str
    variant: str
    control: str
    runs: Mapping[int, Outcome]
    apart: Mapping[str, Interval] = field(default_factory=dict)
    equal_bytes: Interval | None = None
    equal_seconds: Interval | None = None
    to_target: tuple[Interval, Interval] | None = None
    front: bool = False

    @property
    def name(self) -> str:
        """Return what it is called in a table."""
        return f"{self.variant}: {self.control}" if self.control not in {"", DENSE} else self.variant

    @property
    def family(self) -> str:
        """Return what variants that differ in their sparsity are called together: FedSparsify, for FedSparsify 90 %."""
        return _SPARSITY.sub("", self.variant)

    @property
    def asked(self) -> str:
        """Return the sparsity at the end of the variant's name, such as 90 %; else that it runs as it is."""
        found = _SPARSITY.search(self.variant)
        return found[1] if found else AS_IT_IS

    def of(self, figure: str) -> Interval:
        """Return the interval of a figure of ``Outcome`` over seeds."""
        return interval([float(getattr(one, figure)) for one in self.runs.values()])

    @property
    def verdict(self) -> str:
        """Say which controls it does not beat: the 95 % interval of the paired difference is not above 0."""
        weak = [name for name, apart in self.apart.items() if name != DENSE and not apart.above]
        return f"no better than {', '.join(weak)}" if weak else ""


def lines(suite: Suite, cells: Sequence[Cell], out: Path, links: Links | None = None) -> list[Line]:
    """Return the lines of a finished comparison, partition by partition, each variant before its controls."""
    made: list[Line] = []
    for partition in suite.partitions:
        groups: dict[tuple[str, str], dict[int, Outcome]] = {}
        dense: dict[str, str] = {}
        for cell in cells:
            if cell.partition == partition:
                name = _dense_name(cell) if cell.control == DENSE else cell.variant
                dense |= {cell.variant: name} if cell.control == DENSE else {}
                groups.setdefault((name, cell.control), {})[cell.seed] = outcome(folder_of(out, cell.study), links)
        order = sorted(groups, key=lambda key: (key[1] != DENSE, [*suite.variants, key[0]].index(key[0]), key[1] != ""))
        made += _partition(suite, partition, {key: groups[key] for key in order}, dense)
    return made


def _dense_name(cell: Cell) -> str:
    aggregator = str(cell.study.options.get("aggregator", "mean"))
    return "FedAvg" if aggregator == "mean" else f"FedAvg, {aggregator.replace('_', ' ')}"


Groups = Mapping[tuple[str, str], Mapping[int, Outcome]]


def _partition(suite: Suite, partition: str, groups: Groups, dense: Mapping[str, str]) -> list[Line]:
    everything = [one for group in groups.values() for one in group.values()]
    least = everything[0].metric == "mae"
    target = suite.target or _target(groups, least=least)
    points = {key: (_mean(group, "bytes"), _mean(group, "quality")) for key, group in groups.items()}
    best = front({str(key): point for key, point in points.items()}, least=least)
    budgets = min(one.bytes for one in everything), min(one.seconds for one in everything)
    made = []
    for (variant, control), group in groups.items():
        beside: dict[str, Interval] = {}
        for name in suite.controls if not control else ():
            other = groups.get((dense.get(variant, ""), DENSE) if name == DENSE else (variant, name), {})
            apart = paired(_by_seed(group, least=least), _by_seed(other, least=least))
            beside |= {str(name): apart} if apart else {}
        made.append(
            Line(
                partition, variant, control, group, beside,
                _each(group, lambda one: at(one.carried, budgets[0])),
                _each(group, lambda one: at(one.worked, budgets[1])),
                _to_target(group, target, least=least), str((variant, control)) in best,
            )
        )  # fmt: skip
    return made


def _target(groups: Groups, *, least: bool) -> float:
    """Return what is as good as 95 % of FedAvg's quality, or 105 % of its error."""
    group = next((group for (_, control), group in groups.items() if control == DENSE), next(iter(groups.values())))
    return (1.05 if least else 0.95) * _mean(group, "quality")


def _mean(group: Mapping[int, Outcome], figure: str) -> float:
    return interval([float(getattr(one, figure)) for one in group.values()]).mean


def _by_seed(group: Mapping[int, Outcome], *, least: bool) -> dict[int, float]:
    return {seed: -one.quality if least else one.quality for seed, one in group.items()}


def _each(group: Mapping[int, Outcome], figure: Callable[[Outcome], float | None]) -> Interval | None:
    found = [figure(one) for one in group.values()]
    known = [value for value in found if value is not None]
    return interval(known) if len(known) == len(found) else None


def _to_target(group: Mapping[int, Outcome], target: float, *, least: bool) -> tuple[Interval, Interval] | None:
    carried = _each(group, lambda one: reach(one.carried, target, least=least))
    worked = _each(group, lambda one: reach(one.worked, target, least=least))
    return (carried, worked) if carried and worked else None


# ---- tables


def table(found: Sequence[Line]) -> list[dict[str, str]]:
    """Return a row of text for each line, all with the same columns."""
    least = next(iter(found[0].runs.values())).metric == "mae"
    shown, unit = (plain, "") if least else (percent, " %")
    metric = "MAE" if least else "accuracy"
    beside = dict.fromkeys(name for line in found for name in line.apart)
    rows = []
    for line in found:
        bytes_, seconds_ = line.to_target or (None, None)
        rows.append(
            {
                "method": ("* " if line.front else "") + line.name,
                f"{metric}{unit}": spread(line.of("quality"), shown),
                "own rows": spread(line.of("local"), shown),
                "lowest tenth": spread(line.of("lowest"), shown),
                **{f"to {name}": spread(line.apart[name], shown) if name in line.apart else "" for name in beside},
                "verdict": line.verdict,
                "sparsity %": spread(line.of("sparsity"), percent),
                "bytes": spread(line.of("bytes"), size),
                "client seconds": spread(line.of("seconds"), seconds),
                **_linked(line),
                "MACs": spread(line.of("macs"), amount),
                "MACs, units removed": spread(line.of("macs_physical"), amount),
                "shipped bytes": spread(line.of("size"), size),
                "at equal bytes": spread(line.equal_bytes, shown),
                "at equal seconds": spread(line.equal_seconds, shown),
                "bytes to target": spread(bytes_, size),
                "seconds to target": spread(seconds_, seconds),
            }
        )
    return rows


def _linked(line: Line) -> dict[str, str]:
    """Return what a link model predicts beside what was measured, where there is one."""
    ends = [one.linked[-1][0] for one in line.runs.values() if one.linked]
    if not ends:
        return {}
    return {
        "seconds on the link (a model)": spread(interval(ends), seconds),
        "wall seconds": spread(line.of("wall"), seconds),
    }


def brief(found: Sequence[Line], partition: str, columns: Sequence[str] = FEW) -> list[dict[str, str]]:
    """Return a partition's rows of ``table`` with these columns, where they are known; controls but FedAvg left out."""
    here = [line for line in found if line.partition == partition and line.control in {"", DENSE}]
    return [{name: row[name] for name in columns if name in row} for row in table(here)]


def by_sparsity(found: Sequence[Line], partition: str, figure: str = "quality") -> list[dict[str, str]]:
    """Return a row for each family of variants, a column for each sparsity they ask for; empty where none differ in it.

    After a quality stand the first letters of the controls it is better than: the 95 % interval of the paired
    difference to the random, shuffled or narrow control lies above 0.
    """
    here = [line for line in found if line.partition == partition and line.control in {"", DENSE}]
    columns = sorted({line.asked for line in here}, key=lambda asked: float(asked.split()[0]) if "%" in asked else -1)
    if len(columns) < 2 + (AS_IT_IS in columns):
        return []
    least = next(iter(here[0].runs.values())).metric == "mae"
    shown = size if figure == "bytes" else plain if least else percent
    rows = {line.family: {"method": line.family} | dict.fromkeys(columns, "") for line in here}
    for line in here:
        better = "".join(name[0] for name, apart in line.apart.items() if name != DENSE and apart.above)
        marks = f" {better}" if better and figure == "quality" else ""
        rows[line.family][line.asked] = spread(line.of(figure), shown) + marks
    return list(rows.values())


def within(found: Sequence[Line], budget: float) -> tuple[list[Line], list[Line]]:
    """Return the lines no client of which carries more than ``budget`` bytes, the best first; and the others."""
    fits = [line for line in found if max(one.client_bytes for one in line.runs.values()) <= budget]
    sign = 1 if next(iter(found[0].runs.values())).metric == "mae" else -1
    fits.sort(key=lambda line: (line.partition, sign * line.of("quality").mean))
    return fits, [line for line in found if line not in fits]


def budgeted(found: Sequence[Line]) -> list[dict[str, str]]:
    """Return a row for each line: its quality, and what its clients carry."""
    shown = plain if next(iter(found[0].runs.values())).metric == "mae" else percent
    return [
        {
            "partition": line.partition, "method": line.name, "quality": spread(line.of("quality"), shown),
            "the most of a client": size(max(one.client_bytes for one in line.runs.values())),
            "sparsity %": spread(line.of("sparsity"), percent), **_linked(line),
        }
        for line in found
    ]  # fmt: skip


def write(suite: Suite, cells: Sequence[Cell], found: Sequence[Line], out: Path) -> None:
    """Write ``comparison.json``, and ``table.md`` and ``table.tex`` with one table for each partition."""
    lines_ = [dataclasses.asdict(line) | {"name": line.name, "verdict": line.verdict} for line in found]
    kept = [{**dataclasses.asdict(cell), "study": folder_of(out, cell.study).name} for cell in cells]
    facts = {"suite": suite.model_dump(), "cells": kept, "lines": _plain(lines_)}
    checkpoint.write(out / RESULT, json.dumps(facts, indent=1).encode())
    pages: dict[str, list[str]] = {"table.md": [], "table.tex": []}
    for partition in suite.partitions:
        rows = table([line for line in found if line.partition == partition])
        pages["table.md"].append(f"**{partition}**, {len(suite.seeds)} seeds\n\n{markdown(rows)}")
        pages["table.tex"].append(f"% {partition}, {len(suite.seeds)} seeds\n{latex(rows)}")
    for name, parts in pages.items():
        checkpoint.write(out / name, "\n".join(parts).encode())


def saved(out: Path) -> tuple[Suite, list[Cell]]:
    """Return the suite and the cells of a comparison that was written into ``out``.

    Raises:
        CheckpointError: ``out`` holds no finished comparison.
    """
    path = out / RESULT
    if not path.exists():
        raise CheckpointError(f"{out} holds no finished comparison: {path} is missing")
    facts = json.loads(path.read_text("utf-8"))
    cells = [Cell(**{**cell, "study": runs.read_study(out / RUNS / cell["study"])}) for cell in facts["cells"]]
    return Suite.model_validate(facts["suite"]), cells


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it: an infinite half of an interval is null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
