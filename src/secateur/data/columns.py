"""What the cells of a column are: numbers, truth values, dates or categories; never two of them in silence."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np

from secateur.data.delimited import MISSING, NUMBER
from secateur.data.raw_table import Column
from secateur.data.table_options import TableOptions
from secateur.errors import DataError, need

_FORMS = {
    "truth": r"(?i)^(true|false)$",
    "infinite": r"(?i)^[+-]?inf(inity)?$",
    "day": r"^\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?$",
    "local": r"^(\d{1,2}[./-]\d{1,2}[./-](\d{4}|\d{2})|\d{4}[./]\d{1,2}[./]\d{1,2})( \d{1,2}:\d\d.*)?$",
    "unit": r"^[<>=~≤≥]*\s*[+-]?\d+([.,]\d+)?\s*[%°a-zA-Zµ/²³]*$",
}
_NONE = ("None", "none")  # as Python writes a missing number; a category among words
_LARGEST = float(np.finfo(np.float32).max)
_SHOWN = 40
_FEW = 20  # as many different words with numbers in them can be categories, such as 1st and 2nd

Where = Callable[[int], str]


def text_column(name: str, cells: Any, where: Where, options: TableOptions) -> tuple[Column, tuple[str, ...]]:
    """Return a column of text as numbers or categories, and a remark if something else could have been meant.

    Args:
        name: of the column.
        cells: an Arrow array of text.
        where: the place of a row, for messages.
        options: what the user says of the table.

    Raises:
        DataError: a cell is infinite or too large, or cells are of several kinds; the text names file, row and column.
    """
    compute, arrow = need("pyarrow.compute", extra="tables"), need("pyarrow", extra="tables")
    missing = _mask(compute.is_in(cells, arrow.array([*MISSING, *options.missing])))
    if name in options.categories:
        return _categories(name, cells, missing), ()
    kinds = _kinds(cells, missing)
    if (kinds["number"] | kinds["truth"]).any():
        missing |= _mask(compute.is_in(cells, arrow.array(_NONE)))
    present = ~missing
    whole = {kind: bool(present.any()) and bool(found[present].all()) for kind, found in kinds.items()}
    at = _place(cells, name, where)
    if whole["truth"]:
        truth = compute.equal(compute.utf8_lower(cells), "true")
        return Column(name, np.where(missing, np.nan, _mask(truth).astype(float))), ()
    if whole["day"]:
        return Column(name, _days(cells, present, at)), (f"column {name!r} holds dates: read as days since 1970-01-01",)
    if not (whole["number"] or missing.all()):
        _refuse_mixtures(kinds, present, at, cells)
        return _categories(name, cells, missing), ()
    text = compute.if_else(arrow.array(missing), None, compute.replace_substring_regex(cells, r"^\+", ""))
    return number_column(name, compute.cast(text, arrow.float64()), where, written=True), ()


def number_column(name: str, cells: Any, where: Where, *, written: bool = False) -> Column:
    """Return a column of numbers, null where they are missing.

    Args:
        name: of the column.
        cells: an Arrow array of numbers.
        where: the place of a row, for messages.
        written: whether they were text, in which an infinite number was one too large to be read.

    Raises:
        DataError: a number is infinite, or too large for single precision.
    """
    values = cells.to_numpy(zero_copy_only=False).astype(np.float64)
    large = np.flatnonzero(np.abs(values) > _LARGEST)
    if len(large):
        value = values[large[0]]
        wrong = "not finite" if np.isinf(value) and not written else f"too large, models take {_LARGEST:.1e} at most"
        raise DataError(
            f"{where(int(large[0]))}, column {name!r}: {value} is {wrong}; correct the cell or leave it empty"
        )
    return Column(name, values)


def _kinds(cells: Any, missing: np.ndarray) -> dict[str, np.ndarray]:
    """Return which cells have which form; none has another than numbers if all that are not missing are numbers."""
    compute = need("pyarrow.compute", extra="tables")
    numbers = _mask(compute.match_substring_regex(cells, NUMBER)) & ~missing
    if (numbers | missing).all():
        return {"number": numbers} | dict.fromkeys(_FORMS, np.zeros(len(missing), np.bool_))
    forms = {kind: _mask(compute.match_substring_regex(cells, form)) & ~missing for kind, form in _FORMS.items()}
    return {"number": numbers, **forms}


def as_text(cells: Any) -> Any:
    """Return cells as text, "" where they are missing; 3.0 is "3"."""
    arrow, compute = need("pyarrow", extra="tables"), need("pyarrow.compute", extra="tables")
    return compute.fill_null(compute.cast(cells, arrow.string()), "")


def _mask(found: Any) -> np.ndarray:
    mask: np.ndarray = found.to_numpy(zero_copy_only=False).astype(np.bool_)
    return mask


def _place(cells: Any, name: str, where: Where) -> Where:
    def shown(row: int) -> str:
        text = cells[row].as_py()
        return f"{where(row)}, column {name!r}: {text[:_SHOWN] + ('...' if len(text) > _SHOWN else '')!r}"

    return shown


def _categories(name: str, cells: Any, missing: np.ndarray) -> Column:
    if missing.all():
        return Column(name, np.full(len(missing), np.nan))
    words, places = _distinct(cells)
    used = np.unique(places[~missing])
    found = sorted(words[place] for place in used)
    codes = {word: code for code, word in enumerate(found)}
    code_of = np.array([codes.get(word, -1) for word in words], np.int64)
    return Column(name, np.where(missing, -1, code_of[places]), tuple(found))


def _distinct(cells: Any) -> tuple[list[str], np.ndarray]:
    """Return the different texts, and the place of each cell's among them."""
    encoded = cells.dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()


def _days(cells: Any, present: np.ndarray, at: Where) -> np.ndarray:
    texts, places = _distinct(cells)
    days = np.full(len(texts), np.nan)
    for place in np.unique(places[present]):
        try:
            days[place] = date.fromisoformat(texts[place][:10]).toordinal() - date(1970, 1, 1).toordinal()
        except ValueError as broken:
            row = int(np.flatnonzero(places == place)[0])
            raise DataError(f"{at(row)} is no date ({broken}); correct the cell or leave it empty") from broken
    return np.where(present, days[places], np.nan)


def _refuse_mixtures(kinds: dict[str, np.ndarray], present: np.ndarray, at: Where, cells: Any) -> None:
    """Refuse cells that are neither all of one kind nor all words; the cell named is of the rarer kind.

    Raises:
        DataError: there are such cells.
    """
    if kinds["infinite"].any() and (kinds["number"].any() or kinds["infinite"][present].all()):
        row = int(np.flatnonzero(kinds["infinite"])[0])
        raise DataError(f"{at(row)} is not finite; correct the cell or leave it empty")
    if kinds["local"].any():
        row = int(np.flatnonzero(kinds["local"])[0])
        raise DataError(
            f"{at(row)} can be read as several dates; write dates as 2026-12-31, or leave the column out with "
            "data.options.drop"
        )
    values = kinds["number"] | kinds["truth"] | kinds["day"]
    if not values.any():
        if kinds["unit"][present].all() and len(set(cells.filter(kinds["unit"]).to_pylist())) > _FEW:
            raise DataError(
                f"{at(int(np.flatnonzero(present)[0]))} is a number with a sign or unit, as all cells of its column; "
                "write numbers alone, or name the column in data.options.categories"
            )
        return
    words = present & ~values
    several = max(("number", "truth", "day"), key=lambda kind: int(kinds[kind].sum()))
    few = present & ~kinds[several]
    few = few if few.sum() <= kinds[several].sum() else kinds[several]
    row = int(np.flatnonzero(few)[0])
    other = "a word" if words[row] else "a number" if kinds["number"][row] else "of another kind"
    advice = "data.options.categories if its cells are categories, data.options.drop to leave it out"
    marker = cells[row].as_py()
    missing = f", data.options.missing={marker}" if words[row] and re.match(r"^[\w.*/#-]{1,12}$", marker) else ""
    raise DataError(
        f"{at(row)} is {other}, and {int((present & ~few).sum())} other cells of the column are not; correct it, or "
        f"name the column in {advice}{missing + ' if it means that the value is missing' if missing else ''}"
    )
