"""Files of separated values as columns of text: encoding, delimiter and header are found out, and no row is lost."""

from __future__ import annotations

import codecs
import csv
import gzip
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from secateur.data.table_options import TableOptions
from secateur.errors import DataError, need

NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
MISSING = ("", "?", ".", "NA", "N/A", "n/a", "NaN", "nan", "NAN", "null", "NULL", "#N/A", "#NA", "<NA>")
"""Cells that mean a missing value."""

_DELIMITERS = ("\t", ";", "|", ",")
_SAMPLE, _RECORDS = 2**16, 50
_COMMA = r"^[+-]?(\d+,\d*|,\d+)([eE][+-]?\d+)?$"
_POINT = r"^[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?$"
_GROUPED = (
    r"^[+-]?\d{1,3}((,\d{3})+\.\d+|(,\d{3}){2,}|(\.\d{3})+,\d+|(\.\d{3}){2,}|([ '\x{A0}\x{202F}]\d{3})+([.,]\d+)?)$"
)
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_OTHERS = ((b"PK\x03\x04", "an Excel workbook or a zip file"), (b"\xd0\xcf\x11\xe0", "an Excel workbook"))


@dataclass(frozen=True)
class Cells:
    """The columns of one file.

    Attributes:
        file: its path, for messages.
        columns: an Arrow array by name, all of one length: text without blanks around it, "" where there is none; or
            numbers, float64, null where they are missing.
        rows: the number of each row as a spreadsheet shows it; the first row of the file is 1.
        lines: the line of the file in which each row begins; others than ``rows`` if cells hold line ends.
        remarks: what was found out and could have been meant otherwise.
        dropped: which of data.options.drop it has.
    """

    file: str
    columns: dict[str, Any]
    rows: np.ndarray
    lines: np.ndarray
    remarks: tuple[str, ...] = ()
    dropped: frozenset[str] = frozenset()

    def where(self, row: int) -> str:
        """Return the place of a row for a message."""
        number, line = self.rows[row], self.lines[row]
        return f"{self.file}, row {number}" + (f" (line {line})" if line != number else "")


def read_delimited(path: Path, options: TableOptions) -> Cells:
    """Return the columns of a file of separated values, gzipped or not, without rows in which every cell is empty.

    Raises:
        DataError: it cannot be read, or its rows cannot be told apart in one way; the text names file, row and column.
        MissingExtraError: there is no pyarrow.
    """
    file = str(path)
    text, remarks = _text(path)
    announced = re.match(r"sep=(.)\r?\n", text)  # Excel's own first line
    skipped = 1 if announced else 0
    text = text[announced.end() :] if announced else text
    if not text.strip():
        raise DataError(f"{file} is empty: a table has a row of names, and a row for each person or thing")
    delimiter = options.delimiter or (announced[1] if announced else _delimiter(text))
    columns, lines = _records(file, text, delimiter, skipped)
    filled = _filled(columns)
    if not filled.true_count:
        raise DataError(f"{file} has empty cells only")
    columns = [column.filter(filled) for column in columns]
    numbers, starts = (
        found[filled.to_numpy(zero_copy_only=False)] for found in (np.arange(1, len(lines) + 1) + skipped, lines)
    )
    first = [column[0].as_py() for column in columns]
    header = _has_header(file, first, options)
    names = first if header else [str(n) for n in range(1, len(first) + 1)]
    body = [column.slice(1) if header else column for column in columns]
    kept, more = _named(file, names, body, options)
    dropped = frozenset({*names, *(str(n) for n in range(1, len(names) + 1))} & set(options.drop))
    cells = Cells(file, kept, numbers[int(header) :], starts[int(header) :], (*remarks, *more), dropped)
    if not len(cells.rows):
        raise DataError(f"{file} has a row of names and no row below it: a table has a row for each person or thing")
    return _with_points(cells, delimiter, options)


def _text(path: Path) -> tuple[str, tuple[str, ...]]:
    """Return a file's text, and a remark if its encoding is a guess."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except FileNotFoundError:
        raise DataError(f"cannot read the table {path}: there is no such file") from None
    except (OSError, EOFError, zlib.error) as broken:
        raise DataError(f"cannot read the table {path}: {broken}") from broken
    other = next((kind for mark, kind in _OTHERS if raw.startswith(mark)), None)
    if other:
        raise DataError(f"{path} is {other}: save the sheet as CSV (UTF-8), or unpack the file")
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")
    try:
        text, remarks = raw.decode(encoding), tuple[str, ...]()
    except UnicodeDecodeError as broken:
        if encoding != "utf-8":
            raise DataError(f"{path} begins as {encoding}, and is none from byte {broken.start} on") from broken
        text, remarks = _western(path, raw, broken.start)
    if "\0" in text:
        row = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {row}: a null character; if the file is UTF-16, save it as UTF-8")
    return text, remarks


def _western(path: Path, raw: bytes, start: int) -> tuple[str, tuple[str, ...]]:
    row = raw.count(b"\n", 0, start) + 1
    try:
        return raw.decode("cp1252"), (f"{path} is not UTF-8 (line {row}): read as Windows-1252 (Latin-1)",)
    except UnicodeDecodeError as broken:
        row = raw.count(b"\n", 0, broken.start) + 1
        raise DataError(f"{path}, line {row}: neither UTF-8 nor Windows-1252; save the file as UTF-8") from broken


def _delimiter(text: str) -> str:
    """Return the delimiter that cuts most of the first rows into as many cells as the first one, into two at least."""
    sample = text[:_SAMPLE]
    lines = sample.splitlines(keepends=True)
    lines = lines[:-1] if len(text) > _SAMPLE and len(lines) > 1 else lines
    best, score = ",", 0.0
    for delimiter in _DELIMITERS:
        try:
            reader = csv.reader(lines, delimiter=delimiter)
            counts = [len(record) for record, _ in zip(reader, range(_RECORDS), strict=False) if record]
        except csv.Error:
            continue
        share = counts.count(counts[0]) / len(counts) if counts and counts[0] > 1 else 0.0
        if share > score:
            best, score = delimiter, share
    return best


def _records(file: str, text: str, delimiter: str, skipped: int) -> tuple[list[Any], np.ndarray]:
    """Return the columns of all rows, the header with them, and the line in which each row begins."""
    arrow, reader = need("pyarrow", extra="tables"), need("pyarrow.csv", extra="tables")
    compute = need("pyarrow.compute", extra="tables")
    bad: list[Any] = []

    def note(row: Any) -> str:
        bad.append(row)
        return "skip"

    raw, as_text = text.encode(), {f"f{n}": arrow.string() for n in range(_head(text).count(delimiter) + 1)}
    try:
        found = reader.read_csv(
            arrow.BufferReader(raw),
            read_options=reader.ReadOptions(
                autogenerate_column_names=True, use_threads=False, block_size=min(len(raw) + 1, 2**30)
            ),
            parse_options=reader.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, ignore_empty_lines=False, invalid_row_handler=note
            ),
            convert_options=reader.ConvertOptions(strings_can_be_null=False, column_types=as_text),
        )
    except arrow.ArrowInvalid as broken:
        if not bad:
            raise DataError(f"cannot read the table {file}: {' '.join(str(broken).split())}") from broken
    if bad:
        row = bad[0]
        opened = "; a quotation mark is opened and not closed" if row.text.count('"') % 2 else ""
        raise DataError(
            f"{file}, row {row.number + skipped} has {row.actual_columns} cells, {row.expected_columns} are expected "
            f"as in row {1 + skipped}{opened}: correct the row, or name the delimiter with data.options.delimiter"
        )
    columns = [column.combine_chunks() for column in found.columns]
    _check_quotes(file, text, delimiter, len(found) + skipped)
    ends = np.zeros(len(found), np.int64)
    if '"' in text:
        for column in columns:
            ends += compute.count_substring_regex(column, "\r\n|\n|\r").to_numpy(zero_copy_only=False)
    starts = np.arange(1, len(found) + 1) + skipped + np.concatenate([[0], np.cumsum(ends)[:-1]])
    return [compute.utf8_trim_whitespace(column) for column in columns], starts


def _head(text: str) -> str:
    """Return the first row of a file, which may hold line ends between quotation marks."""
    for end in re.finditer(r"[\r\n]", text):
        if text.count('"', 0, end.start()) % 2 == 0:
            return text[: end.start()]
    return text


def _check_quotes(file: str, text: str, delimiter: str, rows: int) -> None:
    """Refuse a file whose last cell begins with a quotation mark that is never closed: it may have swallowed rows."""
    if text.count('"') % 2:
        try:
            for _ in csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True):
                pass
        except csv.Error as broken:
            if "unexpected end" in str(broken):
                raise DataError(f"{file}, row {rows}: a quotation mark is opened and not closed; close it") from None


def _filled(columns: Sequence[Any]) -> Any:
    """Return for each row whether one of its cells is not empty."""
    compute = need("pyarrow.compute", extra="tables")
    filled = compute.not_equal(columns[0], "")
    for column in columns[1:]:
        filled = compute.or_(filled, compute.not_equal(column, ""))
    return filled


def _has_header(file: str, first: list[str], options: TableOptions) -> bool:
    """Return whether the first row has the columns' names."""
    if options.header:
        return options.header == "yes"
    places = {str(n) for n in range(1, len(first) + 1)}
    named = options.named & (set(first) | places)
    if (named & set(first)) - places:  # something that is asked for is the name of a column, and no number of one
        return True
    numeric = [bool(re.match(NUMBER, cell)) for cell in first]
    if all(number or cell in MISSING for number, cell in zip(numeric, first, strict=True)):
        return first in ([str(n) for n in range(1, len(first) + 1)], [str(n) for n in range(len(first))])
    if not named:
        return True
    if named & set(first):
        raise DataError(
            f"{file}, row 1 may be names or the first row of values: say which with data.options.header=yes or =no"
        )
    return False


def _named(file: str, names: list[str], body: list[Any], options: TableOptions) -> tuple[dict[str, Any], list[str]]:
    """Return the columns by name without those to drop, and remarks.

    Two kinds of column without a name are left out: an empty one, as a delimiter at the end of rows makes; and one that
    counts the rows, as pandas and R write it.

    Raises:
        DataError: two columns have one name, or one has none.
    """
    found, remarks = dict[str, Any](), list[str]()
    for number, (name, column) in enumerate(zip(names, body, strict=True), start=1):
        dropped = name in options.drop or (str(number) in options.drop and str(number) not in names)
        if dropped or (not name and _empty(column)):
            continue
        leave = f"leave it out with data.options.drop={number}"
        if not name and _counts(column):
            remarks.append(f"{file}: column {number} has no name and counts the rows: left out")
        elif not name:
            raise DataError(f"{file}, row 1: column {number} has no name; give it one, or {leave}")
        elif name in found:
            first = names.index(name) + 1
            raise DataError(
                f"{file}, row 1: columns {first} and {number} are both named {name!r}; rename it, or {leave}"
            )
        else:
            found[name] = column
    return found, remarks


def _empty(column: Any) -> bool:
    return not any(cell for cell in column.to_pylist())


def _counts(column: Any) -> bool:
    cells = column.to_pylist()
    return any(cells == [str(n + first) for n in range(len(cells))] for first in (0, 1))


def _with_points(cells: Cells, delimiter: str, options: TableOptions) -> Cells:
    """Return cells with decimal points: decimal commas are replaced where a file has them.

    Raises:
        DataError: a number can be read in two ways.
    """
    columns = {name: column for name, column in cells.columns.items() if name not in options.categories}
    commas = {name: column for name, column in columns.items() if _holds(column, ",")}
    comma, grouped = _first(commas, _COMMA), _first(columns, _GROUPED)
    point = _first(columns, _POINT) if comma or options.decimal else None
    decimal = options.decimal or ("," if comma and not point and delimiter != "," else ".")
    odd = grouped or (point if decimal == "," else comma)
    if odd:
        name, row, text = odd
        raise DataError(
            f"{cells.where(row)}, column {name!r}: {text!r} can be read in two ways; write numbers without separators "
            "of thousands, and say which sign is decimal with data.options.decimal"
        )
    if decimal == ".":
        return cells
    compute = need("pyarrow.compute", extra="tables")
    mended = {
        name: compute.if_else(
            compute.match_substring_regex(column, _COMMA), compute.replace_substring(column, ",", "."), column
        )
        for name, column in commas.items()
    }
    return replace(cells, columns=cells.columns | mended)


def _holds(column: Any, letter: str) -> bool:
    compute = need("pyarrow.compute", extra="tables")
    return bool(compute.any(compute.match_substring(column, letter)).as_py())


def _first(columns: Mapping[str, Any], pattern: str) -> tuple[str, int, str] | None:
    """Return column, row and text of the first cell, column by column, that a pattern matches."""
    compute = need("pyarrow.compute", extra="tables")
    for name, column in columns.items():
        at = compute.index(compute.match_substring_regex(column, pattern), True).as_py()
        if at >= 0:
            return name, at, column[at].as_py()
    return None
