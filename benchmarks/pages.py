"""Pages: where a benchmark's table stands in one."""

from __future__ import annotations

from pathlib import Path


def insert(page: Path, name: str, table: str) -> None:
    """Put a table between its markers in a page.

    Raises:
        SystemExit: the page has no such markers.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    head, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} has no place for {name!r}: {begin} and {end} are looked for")
    page.write_text(f"{head}{begin}\n{table}{end}{tail}", encoding="utf-8")
