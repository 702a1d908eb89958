"""The catalogue of methods, slots, data and models, printed in a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.console import Console
from rich.table import Table


class Listed(Protocol):
    """An entry of the catalogue."""

    @property
    def name(self) -> str:
        """The name to type."""

    @property
    def summary(self) -> str:
        """One line on it."""

    @property
    def reference(self) -> str:
        """Its paper."""


def to_markdown(kinds: Mapping[str, Sequence[Listed]]) -> str:
    """Return one Markdown table for each kind."""
    parts = []
    for kind, entries in kinds.items():
        rows = [f"| `{e.name}` | {e.summary} | {e.reference} |" for e in entries]
        parts.append(f"## {kind.capitalize()}\n\n| name | what it is | reference |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def show(kinds: Mapping[str, Sequence[Listed]], console: Console, *, markdown: bool) -> None:
    """Print the catalogue."""
    if markdown:
        console.file.write(to_markdown(kinds))
        return
    for kind, entries in kinds.items():
        table = Table(title=kind, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for column in ("name", "what it is", "reference"):
            table.add_column(column, overflow="fold")
        for entry in entries:
            table.add_row(entry.name, entry.summary, entry.reference)
        console.print(table, "")
