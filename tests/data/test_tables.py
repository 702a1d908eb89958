"""Tables as people save them: read as Python's csv module and a conversion by hand read them, or refused in one line."""

import csv
import gzip
import io
import math
import random
import re

import numpy as np
import pytest

from secateur import data
from secateur.data.formats.table import place_of, read
from secateur.data.table_options import TableOptions
from secateur.errors import DataError


# ---- a generator of tables with faults


class Made:
    """A folder of one or two files, what they hold, and which of their faults may be named."""

    def __init__(self, seed):
        self.draw = draw = random.Random(seed)
        self.delimiter = draw.choice(",;\t|")
        self.decimal = draw.choice(",.") if self.delimiter != "," else "."
        self.encoding = draw.choice(["utf-8", "utf-8-sig", "utf-16", "cp1252"])
        self.newline = draw.choice(["\n", "\r\n", "\r"])
        self.header = draw.random() < 0.85
        self.names = ["age", draw.choice(["größe", "a#b>c", "2019", "lab (mg/l)"]), "ward", "flag", "sick"]
        self.files = {name: self._rows(draw.randint(25, 40)) for name in ("a.csv", "b.csv")[: draw.choice([1, 2])]}
        self.heads = {}
        self.sayings = []  # (file, pattern) of what may be said; none: it is read
        self.packed = draw.random() < 0.2

    def _rows(self, count):
        draw = self.draw
        wards = draw.choice([["north", "south"], ["müde", "x y", "1. Stock"], ["has, comma", "semi;colon", "q\"uote"]])
        rows = []
        for n in range(count):
            age = "" if draw.random() < 0.1 else self._number(draw.uniform(-90, 90))
            lab = draw.choice(["NA", "?", "nan"]) if draw.random() < 0.1 else self._number(draw.choice([1e-7, 3e5, 12]))
            ward = wards[n % len(wards)] if draw.random() > 0.1 else ""
            rows.append([age, lab, ward, draw.choice(["True", "FALSE", "true"]), str(n % 2)])
        rows[0][:2], rows[0][2] = [self._number(1.5), self._number(2.25)], wards[0]
        return rows

    def _number(self, value):
        text = self.draw.choice([f"{value:.3f}", f"{value!r}", f"{value:.4e}"])
        return text.replace(".", self.decimal)

    @property
    def first(self):
        return 2 if self.header else 1

    def shown(self, column):
        return self.names[column] if self.header else str(column + 1)

    def spot(self):
        """Return a file, and a row that is not its first."""
        file = self.draw.choice([file for file, rows in self.files.items() if len(rows) > 1])
        return file, self.draw.choice([n for n, row in enumerate(self.files[file]) if n and len(row) == 5])

    def write(self, folder):
        for name, rows in self.files.items():
            out = io.StringIO()
            writer = csv.writer(out, delimiter=self.delimiter, lineterminator=self.newline)
            for row in ([self.heads.get(name, self.names)] if self.header else []) + rows:
                if row == ["BLANK"]:
                    out.write(self.newline)
                elif row[0] == "RAW":
                    out.write(row[1] + self.newline)
                else:
                    writer.writerow(row)
            raw = out.getvalue().encode(self.encoding)
            (folder / name).write_bytes(gzip.compress(raw) if self.packed else raw)


def by_hand(folder, made):
    """Return the rows of all files by the csv module, blank ones left out, with the number of the file."""
    found = []
    for number, name in enumerate(sorted(made.files)):
        raw = (folder / name).read_bytes()
        text = (gzip.decompress(raw) if made.packed else raw).decode(made.encoding)
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=made.delimiter))
        for row in rows[1:] if made.header else rows:
            if row:
                found.append((number, [cell.strip() for cell in row]))
    return found


def converted(cell, decimal):
    return math.nan if cell in {"", "NA", "?", "nan"} else float(cell.replace(decimal, "."))


# ways of writing: all of them are read


def blank_lines(made):
    file, row = made.spot()
    made.files[file].insert(row, ["BLANK"])


def spaces(made):
    for rows in made.files.values():
        rows[0] = [f" {cell} " for cell in rows[0]]


def line_end_in_a_cell(made):
    file, row = made.spot()
    made.files[file][row][2] = f"two{made.newline}lines"


def empty_column(made):
    for rows in made.files.values():
        for row in rows[1:]:
            row[1:2] = [""] * (len(row) == 5)


def plain(made):
    del made


# faults: each is said with its place


def cell(column, text, words):
    def fault(made):
        file, row = made.spot()
        made.files[file][row] = [*made.files[file][row]]
        made.files[file][row][column] = text
        at = made.first + row
        made.sayings.append(rf"{file}, row {at}( \(line \d+\))?, column {re.escape(repr(made.shown(column)))}.*{words}")

    fault.__name__ = f"{text!r} in column {column}"
    return fault


def ragged(made):
    file, row = made.spot()
    made.files[file][row] = made.files[file][row][: made.draw.choice([2, 4])] if made.draw.random() < 0.5 else [
        *made.files[file][row], "more"
    ]  # fmt: skip
    count = len(made.files[file][row])
    made.sayings.append(rf"{file}, row {made.first + row} has {count} cells, 5 are expected")


def open_quote(made):
    file, row = made.spot()
    made.files[file][row] = ["RAW", made.delimiter.join(["1", "2", "x", "true", '"1'])]
    made.sayings.append(rf"{file}, row \d+.*quotation mark is opened and not closed")


def doubled(made):
    made.header, made.names = True, ["age", "age", "ward", "flag", "sick"]
    made.sayings.append(r"a.csv, row 1: columns 1 and 2 are both named 'age'")


def nameless(made):
    made.header, made.names = True, ["age", "", "ward", "flag", "sick"]
    made.sayings.append(r"a.csv, row 1: column 2 has no name")


def empty(made):
    made.files["a.csv"] = []
    made.header = False
    made.sayings.append(r"a.csv is empty")


def names_only(made):
    made.header, made.files["a.csv"] = True, []
    made.sayings.append(r"a.csv has a row of names and no row below it")


def other_columns(made):
    made.header = True
    made.files = {"a.csv": made._rows(9)}
    made.heads["b.csv"], made.files["b.csv"] = ["age", "ward", "sick", "bmi"], [["1", "north", "1", "23"]]
    made.sayings.append(r"b.csv, row 1: of the columns of .*a.csv it lacks .*'flag' and has 'bmi' beside them")


def truncated(made):
    made.packed = True
    made.sayings.append("TRUNCATE")


WAYS = [blank_lines, spaces, line_end_in_a_cell, empty_column, plain, plain]
CELLS = [
    cell(0, "inf", "not finite"), cell(1, "-Infinity", "not finite"), cell(0, "1e999", "too large"),
    cell(1, "-4e38", "too large"), cell(0, "12 kg", "is a word"), cell(1, "abc", "is a word"), cell(0, "<5", "is a word"),
    cell(3, "maybe", "is a word"), cell(3, "3", "is a number"), cell(4, "", "is empty"), cell(4, "NA", "is empty"),
    cell(0, "1.234,5", "two ways"), cell(0, "1,234,567", "two ways"), cell(2, "31/12/2020", "several dates"),
    cell(0, "2020-12-31", "of another kind"), ragged, ragged,
]  # fmt: skip
FILES = [ragged, open_quote, doubled, nameless, empty, names_only, other_columns, truncated]


@pytest.mark.parametrize("seed", range(120))
def test_a_table_with_faults_is_read_as_by_hand_or_refused_in_one_line(seed, tmp_path):
    made = Made(seed)
    for way in made.draw.sample(WAYS, 2):
        way(made)
    for fault in made.draw.sample(CELLS, seed % 3) or made.draw.sample(FILES, seed % 2):
        fault(made)
    try:
        made.write(tmp_path)
    except UnicodeEncodeError:
        pytest.fail("the generator wrote what its encoding cannot hold")
    if "TRUNCATE" in made.sayings:
        made.sayings = ["cannot read the table .*a.csv: Compressed file ended"]
        whole = (tmp_path / "a.csv").read_bytes()
        (tmp_path / "a.csv").write_bytes(whole[: len(whole) // 2])
    options = TableOptions(target="sick" if made.header else "5")
    if made.sayings:
        with pytest.raises(DataError) as refused:
            read(str(tmp_path), options)
        assert "\n" not in str(refused.value)
        assert any(re.search(saying, str(refused.value)) for saying in made.sayings), refused.value
        return
    table = read(str(tmp_path), options)
    rows = by_hand(tmp_path, made)
    assert table.ids.tolist() == [number for number, _ in rows]
    assert table.sites == tuple(sorted(made.files))
    assert table.target.values.tolist() == [float(row[4]) for _, row in rows]
    columns = {column.name: column for column in table.features}
    for at, name in enumerate(made.names[:4]):
        column = columns[name if made.header else str(at + 1)]
        written = [row[at] for _, row in rows]
        if at == 2:
            words = [column.categories[code] if code >= 0 else "" for code in column.values]
            assert words == written
        elif at == 3:
            assert column.values.tolist() == [float(cell.lower() == "true") for cell in written]
        else:
            assert np.array_equal(column.values, [converted(cell, made.decimal) for cell in written], equal_nan=True)
