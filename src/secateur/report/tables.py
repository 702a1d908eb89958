"""Tables of a comparison: quality and cost of each method and its controls, over seeds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.bandwidth import Spent
from secateur.comparison.grid import folder_of
from secateur.comparison.suite import Cell, Suite
from secateur.federation import checkpoint
from secateur.federation.records import told_of_bytes
from secateur.report.formatting import amount, latex, markdown, percent, plain, seconds, size, spread
from secateur.report.gather import RESULT
from secateur.report.statistics import SIGNIFICANCE, Interval, interval
from secateur.report.verdicts import AS_IT_IS, DENSE, LETTERS, MARGIN, OWN, SERVER, Line, is_error

FEW = (
    "method", "to dense", "to random", "to ramped", "to shuffled", "to narrow", "bytes", "client seconds",
)  # fmt: skip
"""The columns that a terminal has room for, beside the score, which stands second."""

FURTHER = frozenset({
    "own rows", "lowest tenth", "to dense at equal bytes", "to dense at equal seconds", "bytes to dense",
    "seconds to dense", "bytes to target", "seconds to target", "MACs, units removed",
})  # fmt: skip
"""The columns of the complete table that the page shows when it is asked for all."""


@dataclass(frozen=True)
class Table:
    """A table of one partition and one kind of test rows.

    Attributes:
        title: the heading under that of the place; empty for the complete table.
        note: the explanation of its figures.
        rows: cells of text by column; all rows have the same columns.
        lines: the line of each row, in a table with one row a line.
    """

    title: str
    note: str
    rows: Sequence[Mapping[str, str]]
    lines: Sequence[Line] = ()


def by_place(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Return the lines by place; lines of one place may be compared in one column."""
    return {place: [ln for ln in lines if ln.place == place] for place in dict.fromkeys(ln.place for ln in lines)}


def note(here: Sequence[Line]) -> str:
    """Return the sentences that explain the figures of one place."""
    seeds, error = max(len(line.runs) for line in here), is_error(here)
    where = "the shipped model on the test rows of the server"
    if here[0].rows == OWN:
        where = "mean over clients of each one's own test rows, with the model that it uses itself"
    text = f"Quality: {where}. Nothing is learnt from these rows or chosen by them: targets look at validation rows."
    text += "".join(f" {told.capitalize()}." for told in told_of_bytes(next(iter(here[0].runs.values())).count))
    if seeds < 2:
        return f"{text} One seed: no verdict."
    text += (
        f" ±: half the 95 % interval (Student's t) over {seeds} seeds; differences are paired by seed, above 0 better."
    )
    tests = sum(len(line.differences.keys() - {DENSE}) for line in here)
    if not tests:
        return text
    margin = here[0].margin
    usual = f"{100 * (margin or MARGIN):g} points" if not error else f"{margin:g}" if margin else "5 %"
    return (
        f"{text} Better: shown by one-sided paired t tests at {100 * SIGNIFICANCE:g} %, the {tests} of this table "
        f"corrected together by Holm. Level: shown to differ by less than {usual}, by two one-sided tests, corrected "
        "likewise. What is not shown may still be so."
    )


def table(lines: Sequence[Line]) -> list[dict[str, str]]:
    """Return the complete table of one place: a row of text for each line, all with the same columns."""
    return _server_rows(lines) if lines[0].rows == SERVER else _own_rows(lines)


def _server_rows(lines: Sequence[Line]) -> list[dict[str, str]]:
    named, shown_ = _metric(lines)
    return [
        {
            "method": ("* " if line.front else "") + line.name,
            named: spread(line.score, shown_),
            "own rows": spread(line.of("local"), shown_),
            "lowest tenth": spread(line.of("lowest"), shown_),
            **_differences(line, lines, shown_),
            "sparsity %": spread(line.of("sparsity"), percent),
            "bytes": spread(line.of("bytes"), size),
            "client seconds": spread(line.of("seconds"), seconds),
            **_link_seconds(line),
            "MACs": spread(line.of("macs"), amount),
            "MACs, units removed": spread(line.of("macs_physical"), amount),
            "shipped bytes": spread(line.of("size"), size),
            "to dense at equal bytes": _by_axis(line.equal, "bytes", shown_, "no score by then"),
            "to dense at equal seconds": _by_axis(line.equal, "seconds", shown_, "no score by then"),
            "bytes to dense": _by_axis(line.needed, "bytes", size),
            "seconds to dense": _by_axis(line.needed, "seconds", seconds),
            "bytes to target": _by_axis(line.to_target, "bytes", size),
            "seconds to target": _by_axis(line.to_target, "seconds", seconds),
        }
        for line in lines
    ]


def _own_rows(lines: Sequence[Line]) -> list[dict[str, str]]:
    named, shown_ = _metric(lines)
    return [
        {
            "method": ("* " if line.front else "") + line.name,
            named: spread(line.score, shown_),
            "lowest tenth": spread(line.of("lowest"), shown_),
            **_differences(line, lines, shown_),
            "sparsity of clients' models %": spread(line.of("local_sparsity"), percent),
            "bytes": spread(line.of("bytes"), size),
            "client seconds": spread(line.of("seconds"), seconds),
            **_link_seconds(line),
        }
        for line in lines
    ]


def _metric(lines: Sequence[Line]) -> tuple[str, Callable[[float], str]]:
    """Return the name of the column of scores, and the function that writes a score."""
    where, metric = " on own rows" if lines[0].rows == OWN else "", lines[0].metric
    return (f"{metric.shown}{where} %", percent) if metric.share else (f"{metric.shown}{where}", plain)


def _differences(line: Line, lines: Sequence[Line], shown_: Callable[[float], str]) -> dict[str, str]:
    """Return a line's differences to its controls and its verdict, with a column for each control of any line."""
    known = dict.fromkeys(name for other in lines for name in other.differences)
    cells = {f"to {name}": spread(line.differences[name], shown_) if name in line.differences else "" for name in known}
    return {**cells, "verdict": line.verdict}


def _by_axis(
    of: Mapping[str, Interval | None], axis: str, shown_: Callable[[float], str], missing: str = "not reached"
) -> str:
    """Return the interval of one axis as text; empty where the line has none."""
    return spread(of[axis], shown_, missing) if axis in of else ""


def _link_seconds(line: Line) -> dict[str, str]:
    """Return predicted seconds on a network, what they go to, and measured wall seconds; nothing without a network.

    Half of the bytes would save half of what the link takes, at most.
    """
    spent = [one.on_link for one in line.runs.values() if one.on_link is not None]
    if not spent:
        return {}
    whole = sum(spent, start=Spent())
    parts = [part / (whole.seconds or 1.0) for part in (whole.link, whole.fixed, whole.work)]
    return {
        "seconds on the link (a model)": spread(interval([one.seconds for one in spent]), seconds),
        "of them link, fixed, training %": ", ".join(f"{100 * part:.0f}" for part in parts),
        "half the bytes save %": f"{50 * parts[0]:.0f}",
        "bytes that take a tenth of an exchange": size(max(one.unseen for one in line.runs.values())),
        "wall seconds": spread(line.of("wall_seconds"), seconds),
    }


def brief(
    lines: Sequence[Line], partition: str, columns: Sequence[str] = FEW, rows: str = SERVER
) -> list[dict[str, str]]:
    """Return the rows of ``table`` for the variants and FedAvg of one partition: scores, and these columns."""
    here = _main_lines(lines, partition, rows)
    if not here:
        return []
    columns = (*columns[:1], _metric(here)[0], *columns[1:])
    return [{name: row[name] for name in columns if name in row} for row in table(here)]


def _main_lines(lines: Sequence[Line], partition: str, rows: str) -> list[Line]:
    here = [line for line in lines if (line.partition, line.rows) == (partition, rows)]
    return [line for line in here if line.control in {"", DENSE}]


def by_sparsity(
    lines: Sequence[Line], partition: str, figure: str = "quality", rows: str = SERVER
) -> list[dict[str, str]]:
    """Return a row for each family of variants and a column for each sparsity; empty where sparsities do not differ.

    Letters behind a quality name the controls that it is significantly better than; see ``LETTERS``.
    """
    here = _main_lines(lines, partition, rows)
    columns = sorted(
        {line.sparsity_asked for line in here}, key=lambda text: float(text.split()[0]) if "%" in text else -1
    )
    if len(columns) < 2 + (AS_IT_IS in columns):
        return []
    shown_ = size if figure == "bytes" else _metric(here)[1]
    grid = {line.family: {"method": line.family} | dict.fromkeys(columns, "") for line in here}
    for line in here:
        letters = "".join(letter for name, letter in LETTERS.items() if name in line.better)
        marks = f" {letters}" if letters and figure == "quality" else ""
        grid[line.family][line.sparsity_asked] = (
            spread(line.score if figure == "quality" else line.of(figure), shown_) + marks
        )
    return list(grid.values())


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
    """Return the tables of one place: those by sparsity, if variants differ in it; then the complete one."""
    partition, rows = here[0].partition, here[0].rows
    shown = [(title, words, by_sparsity(here, partition, figure, rows))
             for figure, title, words in GRIDS if figure != "local" or rows == SERVER]  # fmt: skip
    grids = [Table(title, f"{words} {note(here)}", grid) for title, words, grid in shown if grid]
    whole = f"* on the Pareto front of quality and bytes. {note(here)}{_cost_note(here)}"
    return [*grids, Table("", whole, table(here), here)]


def _cost_note(here: Sequence[Line]) -> str:
    """Return the sentences that explain the columns of costs; empty where a table has none."""
    if not any(line.equal for line in here):
        return ""
    return (
        " To dense at equal bytes or seconds: the difference at the budget that the cheaper of the two spends in all. "
        "Bytes and seconds to dense: until it reached the final quality of its dense FedAvg."
    )


def within(lines: Sequence[Line], budget: float) -> tuple[list[Line], list[Line]]:
    """Split lines into those whose clients all stay within a budget of bytes, the best first, and the others.

    A line that is scored both on the server's rows and on clients' own is listed once, on the server's.
    """
    first = {(line.partition, line.name): line for line in reversed(lines)}
    every = [line for line in lines if first[line.partition, line.name] is line]
    fits = [line for line in every if max(one.client_bytes for one in line.runs.values()) <= budget]
    sign = 1 if is_error(every) else -1
    fits.sort(key=lambda line: (line.place, sign * line.score.mean))
    return fits, [line for line in every if line not in fits]


def budget_table(lines: Sequence[Line]) -> list[dict[str, str]]:
    """Return a row for each line with its quality and the most bytes that one of its clients carries."""
    shown_ = _metric(lines)[1]
    return [
        {
            "partition": line.place, "method": line.name, "quality": spread(line.score, shown_),
            "most bytes of a client": size(max(one.client_bytes for one in line.runs.values())),
            "sparsity %": spread(line.of("sparsity"), percent), **_link_seconds(line),
        }
        for line in lines
    ]  # fmt: skip


def write(suite: Suite, cells: Sequence[Cell], lines: Sequence[Line], out: Path) -> None:
    """Write ``comparison.json``, ``table.md`` and ``table.tex``; each of the latter has a table for each place."""
    lines_ = [dataclasses.asdict(line) | {"name": line.name, "verdict": line.verdict} for line in lines]
    kept = [{**dataclasses.asdict(cell), "study": folder_of(out, cell.study).name} for cell in cells]
    facts = {"suite": suite.model_dump(), "cells": kept, "lines": _plain(lines_)}
    checkpoint.put(out, RESULT, json.dumps(facts, indent=1).encode())
    pages: dict[str, list[str]] = {"table.md": [], "table.tex": []}
    for place, here in by_place(lines).items():
        whole = tables(here)[-1]
        pages["table.md"].append(f"**{place}**, {len(suite.seeds)} seeds\n\n{whole.note}\n\n{markdown(whole.rows)}")
        pages["table.tex"].append(f"% {place}, {len(suite.seeds)} seeds\n% {whole.note}\n{latex(whole.rows)}")
    for name, texts in pages.items():
        checkpoint.write(out / name, "\n".join(texts).encode())


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold; infinities and NaN become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, frozenset):
        return sorted(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
