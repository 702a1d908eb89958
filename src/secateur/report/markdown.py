"""Tables: a comparison's complete tables as one Markdown page, with what was run and how to run it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from secateur.compare.suite import Cell, Suite, load, names
from secateur.federation import checkpoint
from secateur.report.formats import markdown, percent, plain, seconds, spread
from secateur.report.outcomes import Outcome
from secateur.report.statistics import interval
from secateur.report.tables import lines, note, parts, saved
from secateur.report.tables import tables as tables_of
from secateur.report.terminal import amount, size
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
_TAIL = "sparsity"  # with it begin the columns that tell what quality costs


def write(out: Path, folder: Path) -> Path:
    """Write the tables of the comparison in ``out`` as ``folder/NAME.md``, by the name of ``out``; return that file.

    Raises:
        CheckpointError: ``out`` holds no finished comparison.
    """
    suite, cells = saved(out)
    name = out.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(folder / f"{name}.md", page(name, suite, cells, lines(suite, cells, out, suite.links)).encode())
    return folder / f"{name}.md"


def page(name: str, suite: Suite, cells: Sequence[Cell], found: Sequence[Line]) -> str:
    """Return the page: a caption that says how to read it, the tables of each partition, the suite."""
    own = next((box for box in names() if load(box) == suite), "")
    told = [f"# {suite.title or name}", caption(name, own, suite, cells)]
    for place, here in parts(found).items():
        told += [f"## {place}", note(here), *tables(here)]
    if not own:
        told += ["## The suite", f"What stands in `{name}.toml`:", f"```toml\n{toml(suite)}```"]
    return "\n\n".join(part.rstrip("\n") for part in told) + "\n"


def caption(name: str, own: str, suite: Suite, cells: Sequence[Cell]) -> str:
    """Return what a reader has to know: seeds, what ± is, on which rows, by which commands."""
    rounds = "/".join(str(count) for count in sorted({cell.study.rounds for cell in cells}))
    data = " --data path/to/data" if cells[0].study.data.source != suite.source else ""
    return (
        f"Seeds {', '.join(map(str, suite.seeds))}; {rounds} rounds. Everything is measured after the last round. "
        "Bytes are those of all phases, both ways, as carried.\n\n"
        f"```\nsecateur compare {own or f'{name}.toml'}{data} --out runs/{name}\n"
        f"secateur report runs/{name} --markdown docs/results\n```"
    )


def tables(here: Sequence[Line]) -> list[str]:
    """Return the tables of one place under their headings: by sparsity, of quality, of costs, of narrower models."""
    told, meant = [], note(here)
    for one in tables_of(here):
        words = " ".join(one.note.replace(meant, "").split())
        if one.title:
            told += [f"### {one.title}", words, markdown(one.rows)]
            continue
        head = list(one.rows[0])
        cut = next(number for number, column in enumerate(head) if column.startswith(_TAIL))
        told += ["### Quality, every line", f"A star: {words.removeprefix('* ')}", _columns(one.rows, head[:cut])]
        told += ["### Size and cost, every line", _columns(one.rows, [head[0], *head[cut:]])]
    once = [line for line in here if line.rows == SERVER or not line.central]  # others are told among the server's rows
    if rows := costs(once):
        told += ["### Bytes and training MACs by direction and phase", markdown(rows)]
    if rows := widths(once):
        told += ["### Narrower models that the shipped one holds", markdown(rows)]
    return told


def _columns(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> str:
    return markdown([{column: row[column] for column in columns} for row in rows])


def costs(found: Sequence[Line]) -> list[dict[str, str]]:
    """Return a row for each variant and its FedAvg: what was carried and computed in rounds, and besides."""
    rows = []
    for line in found:
        if line.control in {"", DENSE}:
            row = {"method": line.name}
            for title, of in _COSTS.items():
                told = [of(one) for one in line.runs.values()]
                row[title] = spread(interval([value for value, _ in told]), told[0][1])
            rows.append(row)
    return rows


def widths(found: Sequence[Line]) -> list[dict[str, str]]:
    """Return a row for each narrower model that a variant's shipped one holds."""
    rows = []
    for line in found:
        runs = list(line.runs.values())
        shown = percent if runs[0].metric.share else plain
        for width, (_, macs) in runs[0].widths.items():
            of = interval([one.widths[width][0] for one in runs])
            rows.append(
                {"method": line.name, "width": width, runs[0].metric.name: spread(of, shown), "MACs": amount(macs)}
            )
    return rows


def toml(suite: Suite) -> str:
    """Return a suite as its file says it, a variant on each line.

    >>> suite = Suite(source="digits", partitions=["iid"], variants={"a 5 %": {"method": "random"}})
    >>> print(toml(suite).splitlines()[-1])
    "a 5 %" = { "method" = "random" }
    """
    said = suite.model_dump(exclude_defaults=True, exclude={"common", "variants"})
    lines_ = [f"{key} = {_value(value)}" for key, value in said.items()]
    lines_ += ["", "[common]", *(f"{_value(path)} = {_value(value)}" for path, value in suite.common.items())]
    lines_ += ["", "[variants]"]
    for name, settings in suite.variants.items():
        inner = ", ".join(f"{_value(path)} = {_value(value)}" for path, value in settings.items())
        lines_.append(f"{_value(name)} = {{ {inner} }}")
    return "\n".join(lines_) + "\n"


def _value(value: object) -> str:
    """Return a text, number, truth or list of them as TOML and JSON alike write it."""
    return json.dumps(value, ensure_ascii=False)
