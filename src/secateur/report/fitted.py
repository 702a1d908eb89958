"""Tables that fit a terminal: words and figures stay whole; what has no room is left out, or stands below."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from secateur.report.formatting import Cells

_LABEL = 16  # the least width of a column of words, if its words leave it that
_SIDES = 3  # what a column takes beside its text: a line and a space at each side


@dataclass(frozen=True)
class Fitted:
    """A table for a terminal of any width.

    Attributes:
        title: its heading.
        rows: its rows, which all have the same columns; the first column names a row.
        drop: the columns that may be left out, the first to go first; a line below the table says which were.
        words: the columns whose cells are sentences, and may be broken between words; other cells are figures.
        ends: the names of rows with a line below them.
        caption: what stands below the table.
    """

    title: str
    rows: Sequence[Cells]
    drop: Sequence[str] = ()
    words: Collection[str] = ()
    ends: Collection[str] = ()
    caption: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table with as many columns as fit, or its rows as blocks if even the fewest do not."""
        gone: list[str] = []
        columns = list(self.rows[0])
        while (widths := self._widths(columns, options.max_width)) is None:
            droppable = [name for name in self.drop if name in columns]
            if not droppable:
                yield from self._stacked()
                break
            columns.remove(droppable[0])
            gone.append(droppable[0])
        else:
            yield self._table(columns, widths)
        if self.caption:
            yield Text(self.caption)
        if gone and widths is not None:
            yield Text(f"No room for: {', '.join(gone)}", style="dim")

    def _breakable(self, name: str, place: int) -> bool:
        return not place or name in self.words

    def _widths(self, columns: Sequence[str], room: int) -> list[int] | None:
        """Return the width of each column; None: they do not fit."""
        least, most = [], []
        for place, name in enumerate(columns):
            cells = [row[name] for row in self.rows]
            broken = [
                word for text in (name, *(cells if self._breakable(name, place) else ())) for word in text.split()
            ]
            wide = max(map(cell_len, [name, *cells]))
            narrow = max(map(cell_len, [*broken, *([] if self._breakable(name, place) else cells), ""]))
            least.append(max(narrow, min(_LABEL, wide)) if self._breakable(name, place) else narrow)
            most.append(wide)
        spare = room - sum(least) - _SIDES * len(columns) - 1
        if spare < 0:
            return None
        widths: list[int] = []
        for narrow, wide in zip(
            reversed(least), reversed(most), strict=True
        ):  # headings of figures first: they are short
            more = min(spare, wide - narrow)
            spare -= more
            widths.insert(0, narrow + more)
        return widths

    def _table(self, columns: Sequence[str], widths: Sequence[int]) -> Table:
        table = Table(title=self.title)
        for place, (name, width) in enumerate(zip(columns, widths, strict=True)):
            left = self._breakable(name, place)
            table.add_column(Text(name), justify="left" if left else "right", overflow="fold", width=width)
        for row in self.rows:
            table.add_row(*(Text(row[name]) for name in columns), end_section=row[columns[0]] in self.ends)
        return table

    def _stacked(self) -> RenderResult:
        label, *others = self.rows[0]
        yield Text(self.title, style="italic")
        for row in self.rows:
            yield Text(row[label], style="bold")
            for name in others:
                if row[name]:
                    yield Text(f"  {name}: {row[name]}", overflow="fold")
