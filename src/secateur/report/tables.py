"""Standings: what the runs of a comparison ended with, each method beside its controls, over seeds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.bandwidth import Links
from secateur.compare.grid import RUNS, folder_of
from secateur.compare.suite import Cell, Suite, dense_name, personal
from secateur.errors import CheckpointError
from secateur.federation import checkpoint
from secateur.federation import run as runs
from secateur.report.formats import latex, markdown, percent, plain, seconds, spread
from secateur.report.outcomes import outcome
from secateur.report.statistics import LEVEL, Interval, interval
from secateur.report.terminal import amount, size
from secateur.report.verdicts import AS_IT_IS, DENSE, LETTERS, MARGIN, OWN, SERVER, Group, Line, compared, is_error

RESULT = "comparison.json"
_FEW = (
    "method", "to dense", "to random", "to ramped", "to shuffled", "to narrow", "bytes", "client seconds",
)  # fmt: skip
"""The columns that a terminal has room for, beside the score, which stands second."""


def lines(suite: Suite, cells: Sequence[Cell], out: Path, links: Links | None = None) -> list[Line]:
    """Return the lines of a finished comparison, partition by partition, each variant before its controls."""
    made: list[Line] = []
    for partition in suite.partitions:
        here = [cell for cell in cells if cell.partition == partition]
        names = _dense_names(suite, here)
        dense = {cell.variant: names[_key(cell)] for cell in here if cell.control == DENSE}
        own = {cell.variant for cell in here if not cell.control and personal(cell.study)}
        groups: dict[tuple[str, str], Group] = {}
        for cell in here:
            name = dense[cell.variant] if cell.control == DENSE else cell.variant
            fresh = Group(name, cell.control, {}, dense.get(cell.variant, ""),
                          personal=cell.variant in own and cell.control != DENSE,
                          central=not cell.study.build_method().personal)  # fmt: skip
            group = groups.setdefault((name, cell.control), fresh)
            group.runs[cell.seed] = outcome(folder_of(out, cell.study), links)
        order = [*sorted(set(names.values()), key=lambda name: name != "FedAvg"), *suite.variants]
        ordered = sorted(groups.values(), key=lambda g: (g.control != DENSE, order.index(g.variant), g.control != ""))
        made += compared(partition, ordered, target=suite.target, margin=suite.margin)
    return made


def _key(cell: Cell) -> str:
    return cell.study.model_copy(update={"seed": 0}).hash()


def _dense_names(suite: Suite, cells: Sequence[Cell]) -> dict[str, str]:
    """Return what each dense twin is called, by the hash of its study: what differs is never one line."""
    names: dict[str, str] = {}
    for cell in cells:
        if cell.control == DENSE and (key := _key(cell)) not in names:
            name = dense_name(suite, cell.study)
            names[key] = f"{name}, {key}" if name in names.values() else name
    return names


# ---- tables


@dataclass(frozen=True)
class Table:
    """A table of one partition and one kind of test rows.

    Attributes:
        title: what it is apart from the partition; empty: the whole.
        note: what its figures mean.
        rows: of text, all with the same columns.
        lines: the lines, where each row is one.
    """

    title: str
    note: str
    rows: Sequence[Mapping[str, str]]
    lines: Sequence[Line] = ()


def parts(found: Sequence[Line]) -> dict[str, list[Line]]:
    """Return the lines by place: what may be compared in one column."""
    return {place: [ln for ln in found if ln.place == place] for place in dict.fromkeys(ln.place for ln in found)}


def note(here: Sequence[Line]) -> str:
    """Return what the figures of one place mean, for the line above its table."""
    seeds, error = max(len(line.runs) for line in here), is_error(here)
    where = "the shipped model on the test rows of the server"
    if here[0].rows == OWN:
        where = "mean over clients of each one's own test rows, with the model that it uses itself"
    told = f"Quality: {where}. Nothing is learnt from these rows or chosen by them: targets look at validation rows."
    if seeds < 2:
        return f"{told} One seed: no verdict."
    told += (
        f" ±: half the 95 % interval (Student's t) over {seeds} seeds; differences are paired by seed, above 0 better."
    )
    asked = sum(len(line.apart.keys() - {DENSE}) for line in here)
    if not asked:
        return told
    margin = here[0].margin
    usual = f"{100 * (margin or MARGIN):g} points" if not error else f"{margin:g}" if margin else "5 %"
    return (
        f"{told} Better: shown by one-sided paired t tests at {100 * LEVEL:g} %, the {asked} of this table corrected "
        f"together by Holm. Level: shown to differ by less than {usual}, by two one-sided tests, corrected likewise. "
        "What is not shown may still be so."
    )


def table(found: Sequence[Line]) -> list[dict[str, str]]:
    """Return a row of text for each line of one place, all with the same columns."""
    return _server_rows(found) if found[0].rows == SERVER else _own_rows(found)


def _server_rows(found: Sequence[Line]) -> list[dict[str, str]]:
    named, shown_ = _metric(found)
    return [
        {
            "method": ("* " if line.front else "") + line.name,
            named: spread(line.score, shown_),
            "own rows": spread(line.of("local"), shown_),
            "lowest tenth": spread(line.of("lowest"), shown_),
            **_apart(line, found, shown_),
            "sparsity %": spread(line.of("sparsity"), percent),
            "bytes": spread(line.of("bytes"), size),
            "client seconds": spread(line.of("seconds"), seconds),
            **_linked(line),
            "MACs": spread(line.of("macs"), amount),
            "MACs, units removed": spread(line.of("macs_physical"), amount),
            "shipped bytes": spread(line.of("size"), size),
            "to dense at equal bytes": _told(line.equal, "bytes", shown_, "no score by then"),
            "to dense at equal seconds": _told(line.equal, "seconds", shown_, "no score by then"),
            "bytes to dense": _told(line.needed, "bytes", size),
            "seconds to dense": _told(line.needed, "seconds", seconds),
            "bytes to target": _told(line.to_target, "bytes", size),
            "seconds to target": _told(line.to_target, "seconds", seconds),
        }
        for line in found
    ]


def _own_rows(found: Sequence[Line]) -> list[dict[str, str]]:
    named, shown_ = _metric(found)
    return [
        {
            "method": ("* " if line.front else "") + line.name,
            named: spread(line.score, shown_),
            "lowest tenth": spread(line.of("lowest"), shown_),
            **_apart(line, found, shown_),
            "sparsity of clients' models %": spread(line.of("local_sparsity"), percent),
            "bytes": spread(line.of("bytes"), size),
            "client seconds": spread(line.of("seconds"), seconds),
            **_linked(line),
        }
        for line in found
    ]


def _metric(found: Sequence[Line]) -> tuple[str, Callable[[float], str]]:
    """Return the name of the column of scores, and how they are written."""
    where, metric = " on own rows" if found[0].rows == OWN else "", found[0].metric
    return (f"{metric.shown}{where} %", percent) if metric.share else (f"{metric.shown}{where}", plain)


def _apart(line: Line, found: Sequence[Line], shown_: Callable[[float], str]) -> dict[str, str]:
    known = dict.fromkeys(name for other in found for name in other.apart)
    told = {f"to {name}": spread(line.apart[name], shown_) if name in line.apart else "" for name in known}
    return {**told, "verdict": line.verdict}


def _told(
    of: Mapping[str, Interval | None], axis: str, shown_: Callable[[float], str], missing: str = "not reached"
) -> str:
    """Return a figure of an axis; nothing where it was not asked for."""
    return spread(of[axis], shown_, missing) if axis in of else ""


def _linked(line: Line) -> dict[str, str]:
    """Return what a link model predicts beside what was measured, where there is one."""
    ends = [one.linked[-1][0] for one in line.runs.values() if one.linked]
    if not ends:
        return {}
    return {
        "seconds on the link (a model)": spread(interval(ends), seconds),
        "wall seconds": spread(line.of("wall"), seconds),
    }


def brief(found: Sequence[Line], partition: str, rows: str = SERVER) -> list[dict[str, str]]:
    """Return a partition's rows of ``table``, few columns of them; controls but FedAvg left out."""
    here = _told_lines(found, partition, rows)
    if not here:
        return []
    columns = (*_FEW[:1], _metric(here)[0], *_FEW[1:])
    return [{name: row[name] for name in columns if name in row} for row in table(here)]


def _told_lines(found: Sequence[Line], partition: str, rows: str) -> list[Line]:
    here = [line for line in found if (line.partition, line.rows) == (partition, rows)]
    return [line for line in here if line.control in {"", DENSE}]


def by_sparsity(
    found: Sequence[Line], partition: str, figure: str = "quality", rows: str = SERVER
) -> list[dict[str, str]]:
    """Return a row for each family of variants, a column for each sparsity they ask for; empty where none differ in it.

    After a quality stand the letters of the controls that it is shown to be better than; see ``LETTERS``.
    """
    here = _told_lines(found, partition, rows)
    columns = sorted({line.asked for line in here}, key=lambda asked: float(asked.split()[0]) if "%" in asked else -1)
    if len(columns) < 2 + (AS_IT_IS in columns):
        return []
    shown_ = size if figure == "bytes" else _metric(here)[1]
    made = {line.family: {"method": line.family} | dict.fromkeys(columns, "") for line in here}
    for line in here:
        letters = "".join(letter for name, letter in LETTERS.items() if name in line.better)
        marks = f" {letters}" if letters and figure == "quality" else ""
        made[line.family][line.asked] = spread(line.score if figure == "quality" else line.of(figure), shown_) + marks
    return list(made.values())


GRIDS = (
    (
        "quality",
        "By sparsity",
        "Letters: better than its random (r), ramped (p), layer-shuffled (s), narrow (n) control.",
    ),
    ("local", "On clients' own rows, by sparsity", "With the models that clients themselves use."),
    ("bytes", "Bytes, by sparsity", "Both ways, all phases."),
)


def tables(here: Sequence[Line]) -> list[Table]:
    """Return the tables of one place: by sparsity, where variants differ in it; then the whole."""
    partition, rows = here[0].partition, here[0].rows
    shown = [(title, words, by_sparsity(here, partition, figure, rows))
             for figure, title, words in GRIDS if figure != "local" or rows == SERVER]  # fmt: skip
    grids = [Table(title, f"{words} {note(here)}", grid) for title, words, grid in shown if grid]
    whole = f"* on the front of quality for bytes. {note(here)}{_aims(here)}"
    return [*grids, Table("", whole, table(here), here)]


def _aims(here: Sequence[Line]) -> str:
    """Return what the columns of costs mean, where there are any."""
    if not any(line.equal for line in here):
        return ""
    return (
        " Dense at equal bytes or seconds: when both had spent what the one that spent less spends in all. Bytes and "
        "seconds to dense: until it reached what the FedAvg beside it ends with."
    )


def within(found: Sequence[Line], budget: float) -> tuple[list[Line], list[Line]]:
    """Return the lines no client of which carries more than ``budget`` bytes, the best first; and the others.

    Lines that are scored on the server's rows are not repeated among those on clients' own.
    """
    once = {(line.partition, line.name): line for line in reversed(found)}
    every = [line for line in found if once[line.partition, line.name] is line]
    fits = [line for line in every if max(one.client_bytes for one in line.runs.values()) <= budget]
    sign = 1 if is_error(every) else -1
    fits.sort(key=lambda line: (line.place, sign * line.score.mean))
    return fits, [line for line in every if line not in fits]


def budgeted(found: Sequence[Line]) -> list[dict[str, str]]:
    """Return a row for each line: its quality, and what its clients carry."""
    shown_ = _metric(found)[1]
    return [
        {
            "partition": line.place, "method": line.name, "quality": spread(line.score, shown_),
            "the most of a client": size(max(one.client_bytes for one in line.runs.values())),
            "sparsity %": spread(line.of("sparsity"), percent), **_linked(line),
        }
        for line in found
    ]  # fmt: skip


def write(suite: Suite, cells: Sequence[Cell], found: Sequence[Line], out: Path) -> None:
    """Write ``comparison.json``, and ``table.md`` and ``table.tex`` with one table for each place."""
    lines_ = [dataclasses.asdict(line) | {"name": line.name, "verdict": line.verdict} for line in found]
    kept = [{**dataclasses.asdict(cell), "study": folder_of(out, cell.study).name} for cell in cells]
    facts = {"suite": suite.model_dump(), "cells": kept, "lines": _plain(lines_)}
    checkpoint.write(out / RESULT, json.dumps(facts, indent=1).encode())
    pages: dict[str, list[str]] = {"table.md": [], "table.tex": []}
    for place, here in parts(found).items():
        whole = tables(here)[-1]
        pages["table.md"].append(f"**{place}**, {len(suite.seeds)} seeds\n\n{whole.note}\n\n{markdown(whole.rows)}")
        pages["table.tex"].append(f"% {place}, {len(suite.seeds)} seeds\n% {whole.note}\n{latex(whole.rows)}")
    for name, texts in pages.items():
        checkpoint.write(out / name, "\n".join(texts).encode())


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
    if isinstance(value, frozenset):
        return sorted(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
