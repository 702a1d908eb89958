"""The table of a comparison: in a terminal, as Markdown, as LaTeX."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from secateur.report.statistics import Interval
from secateur.report.terminal import amount, size

Cells = Mapping[str, str]


def spread(value: Interval | None, shown: Callable[[float], str], missing: str = "not reached") -> str:
    """Return mean and half the 95 % interval; the mean alone where there is one value, or nothing varies."""
    if value is None:
        return missing
    if not math.isfinite(value.half) or value.half == 0:
        return shown(value.mean)
    return f"{shown(value.mean)} ± {shown(value.half)}"


def percent(value: float) -> str:
    """Return a share in per cent with one digit."""
    return f"{100 * value:.1f}"


def plain(value: float) -> str:
    """Return an error with two digits."""
    return f"{value:.2f}"


def seconds(value: float) -> str:
    """Return seconds with three digits."""
    return f"{value:.3g} s"


SHOWN: Mapping[str, Callable[[float], str]] = {
    "sparsity": percent, "bytes": size, "seconds": seconds, "macs": amount, "macs_physical": amount,
}  # fmt: skip


def show(title: str, rows: Sequence[Cells]) -> Table:
    """Return a table for the terminal; ``rows`` all have the same columns."""
    table = Table(title=title)
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if not number else "right", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    return table


def markdown(rows: Sequence[Cells]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *(f"| {' | '.join(row.values())} |" for row in rows)]) + "\n"


def latex(rows: Sequence[Cells]) -> str:
    """Return a LaTeX tabular with booktabs rules."""
    lines = [" & ".join(_escaped(cell) for cell in row) + r" \\" for row in ([*rows[0]], *(r.values() for r in rows))]
    body = "\n".join([lines[0], r"\midrule", *lines[1:]])
    columns = "l" + "r" * (len(rows[0]) - 1)
    return f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"


def _escaped(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    return text.replace("±", r"$\pm$")
