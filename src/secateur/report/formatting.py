"""Numbers as text, and tables of text for a terminal, as Markdown and as LaTeX."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from secateur.report.statistics import Interval

Cells = Mapping[str, str]


def spread(value: Interval | None, shown: Callable[[float], str], missing: str = "not reached") -> str:
    """Return ``mean ± half`` of a 95 % interval; the mean alone where there is one value or no spread."""
    if value is None:
        return missing
    if not math.isfinite(value.half) or value.half == 0:
        return shown(value.mean)
    return f"{shown(value.mean)} ± {shown(value.half)}"


def size(count: float) -> str:
    """Return a number of bytes in decimal units: 1234567 -> ``1.23 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def amount(count: float) -> str:
    """Return a count with a decimal prefix: 7120000 -> ``7.12 M``."""
    for unit in ("", " k", " M", " G"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} T"


def percent(value: float) -> str:
    """Return a fraction as a percentage with one decimal."""
    return f"{100 * value:.1f}"


def plain(value: float) -> str:
    """Return a number with two decimals."""
    return f"{value:.2f}"


def seconds(value: float) -> str:
    """Return seconds with three significant digits."""
    return f"{value:.3g} s"


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
