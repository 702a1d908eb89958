"""A comparison as one Markdown page: its complete tables, what was run, and the commands that run it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.comparison.suite import Cell, Suite, load, names
from secateur.federation import checkpoint
from secateur.report import hostile
from secateur.report.formatting import amount, markdown, percent, plain, seconds, size, spread
from secateur.report.gather import comparison_lines, read_comparison
from secateur.report.outcomes import Outcome
from secateur.report.statistics import interval
from secateur.report.tables import by_place, note, tables
from secateur.report.verdicts import DENSE, SERVER, Line

_COSTS: dict[str, Callable[[Outcome], tuple[float, Callable[[float], str]]]] = {
    "bytes down": lambda one: (sum(phase.bytes_down for phase in one.phases.values()), size),
    "bytes up": lambda one: (sum(phase.bytes_up for phase in one.phases.values()), size),
    "of these not in rounds": lambda one: (
        one.spent("bytes_down", train=False) + one.spent("bytes_up", train=False), size),
    "client seconds not in rounds": lambda one: (one.spent("seconds", train=False), seconds),
    "training MACs": lambda one: (one.spent("macs", train=True), amount),
    "training MACs, units removed": lambda one: (one.spent("macs_physical", train=True), amount),
    "+ not in rounds": lambda one: (one.spent("macs", train=False), amount),
    "+ server": lambda one: (one.server_macs, amount),
}  # fmt: skip
_TAIL = "sparsity"  # the first column after those of quality


def write(out: Path, folder: Path) -> Path:
    """Write the page of the comparison in ``out`` as ``folder/NAME.md``, NAME being that of ``out``; return the file.

    Raises:
        CheckpointError: ``out`` holds no finished comparison.
    """
    suite, cells = read_comparison(out)
    name = out.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    if hostile.shows(suite):
        shown = crossed_page(name, suite, cells, out)
    else:
        shown = page(name, suite, cells, comparison_lines(suite, cells, out, suite.bandwidth))
    checkpoint.write(folder / f"{name}.md", shown.encode())
    return folder / f"{name}.md"


def crossed_page(name: str, suite: Suite, cells: Sequence[Cell], out: Path) -> str:
    """Return the page of a suite of rules and attacks as text; it says how many runs are not in ``out`` yet."""
    own = next((box for box in names() if load(box) == suite), "")
    return "\n\n".join(
        [
            f"# {suite.title or name}",
            caption(name, own, suite, cells),
            hostile.text(hostile.standings(suite, cells, out)),
        ]
    )


def page(name: str, suite: Suite, cells: Sequence[Cell], lines: Sequence[Line]) -> str:
    """Return the page as text: a caption, the tables of each place, and the suite if it is not one of the package."""
    own = next((box for box in names() if load(box) == suite), "")
    parts = [f"# {suite.title or name}", caption(name, own, suite, cells)]
    for place, here in by_place(lines).items():
        parts += [f"## {place}", note(here), *sections(here)]
    if not own:
        parts += ["## The suite", f"What stands in `{name}.toml`:", f"```toml\n{toml(suite)}```"]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def caption(name: str, own: str, suite: Suite, cells: Sequence[Cell]) -> str:
    """Return the caption: seeds, rounds, and the commands that make the page."""
    rounds = "/".join(str(count) for count in sorted({cell.study.rounds for cell in cells}))
    data = " --data path/to/data" if cells[0].study.data.source != suite.source else ""
    return (
        f"Seeds {', '.join(map(str, suite.seeds))}; {rounds} rounds. Everything is measured after the last round. "
        "Bytes are those of all phases, both ways, as carried.\n\n"
        f"```\nsecateur compare {own or f'{name}.toml'}{data} --out runs/{name}\n"
        f"secateur report runs/{name} --markdown docs/results\n```"
    )


def sections(here: Sequence[Line]) -> list[str]:
    """Return the tables of one place with their headings: by sparsity, quality, cost, phases, narrower models."""
    parts, common = [], note(here)
    for one in tables(here):
        words = " ".join(one.note.replace(common, "").split())
        if one.title:
            parts += [f"### {one.title}", words, markdown(one.rows)]
            continue
        head = list(one.rows[0])
        cut = next(number for number, column in enumerate(head) if column.startswith(_TAIL))
        parts += ["### Quality, every line", f"A star: {words.removeprefix('* ')}", _columns(one.rows, head[:cut])]
        parts += ["### Size and cost, every line", _columns(one.rows, [head[0], *head[cut:]])]
    once = [
        line for line in here if line.rows == SERVER or not line.central
    ]  # the others stand among the server's rows
    if rows := costs(once):
        parts += ["### Bytes and training MACs by direction and phase", markdown(rows)]
    if rows := widths(once):
        parts += ["### Narrower models that the shipped one holds", markdown(rows)]
    return parts


def _columns(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> str:
    return markdown([{column: row[column] for column in columns} for row in rows])


def costs(lines: Sequence[Line]) -> list[dict[str, str]]:
    """Return a row for each variant and dense FedAvg: bytes and MACs, in training rounds and in other phases."""
    rows = []
    for line in lines:
        if line.control in {"", DENSE}:
            row = {"method": line.name}
            for title, of in _COSTS.items():
                values = [of(one) for one in line.runs.values()]
                row[title] = spread(interval([value for value, _ in values]), values[0][1])
            rows.append(row)
    return rows


def widths(lines: Sequence[Line]) -> list[dict[str, str]]:
    """Return a row for each narrower model that a variant's shipped model holds."""
    rows = []
    for line in lines:
        runs = list(line.runs.values())
        shown = percent if runs[0].metric.share else plain
        for width, (_, macs) in runs[0].widths.items():
            of = interval([one.widths[width][0] for one in runs])
            rows.append(
                {"method": line.name, "width": width, runs[0].metric.name: spread(of, shown), "MACs": amount(macs)}
            )
    return rows


def toml(suite: Suite) -> str:
    """Return a suite as TOML, one variant a line.

    >>> suite = Suite(source="digits", partitions=["iid"], variants={"a 5 %": {"method": "random"}})
    >>> print(toml(suite).splitlines()[-1])
    "a 5 %" = { "method" = "random" }
    """
    said = suite.model_dump(exclude_defaults=True, exclude={"common", "variants", "places"})
    lines_ = [f"{key} = {_value(value)}" for key, value in said.items()]
    lines_ += ["", "[common]", *(f"{_value(path)} = {_value(value)}" for path, value in suite.common.items())]
    lines_ += ["", "[variants]", *_tables(suite.variants)]
    if suite.places:
        lines_ += ["", "[places]", *_tables(suite.places)]
    return "\n".join(lines_) + "\n"


def _tables(named: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each of some tables by name."""
    for name, settings in named.items():
        inner = ", ".join(f"{_value(path)} = {_value(value)}" for path, value in settings.items())
        yield f"{_value(name)} = {{ {inner} }}"


def _value(value: object) -> str:
    """Return a string, number, boolean or list as text that is both TOML and JSON."""
    return json.dumps(value, ensure_ascii=False)
