"""Tables as people save them: read as the csv module and a conversion by hand read them, or refused in one line."""

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
        wards = draw.choice([["north", "south"], ["müde", "x y", "1. Stock"], ["has, comma", "semi;colon", 'q"uote']])
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
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=made.delimiter))[int(made.header) :]
        found += [(number, [cell.strip() for cell in row]) for row in rows if row]
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
    cell(1, "-4e38", "too large"), cell(0, "12 kg", "is a word"), cell(1, "abc", "is a word"),
    cell(0, "<5", "is a word"), cell(3, "maybe", "is a word"), cell(3, "3", "is a number"),
    cell(4, "", "is empty"), cell(4, "NA", "is empty"),
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


# ---- one thing at a time


def table_of(tmp_path, text, options=None, *, name="t.csv", encoding="utf-8"):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return read(str(tmp_path / name), TableOptions(**{"target": "sick", **(options or {})}))


def values(table):
    return {column.name: column.values.tolist() for column in table.features}


PLAIN = "sick,age,bmi\n0,40,20\n1,41,21\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_at_the_beginning_is_no_part_of_a_name(encoding, tmp_path):
    table = table_of(tmp_path, PLAIN, encoding=encoding)
    assert (table.target.name, values(table)) == ("sick", {"age": [40, 41], "bmi": [20, 21]})


def test_western_letters_that_are_no_utf8_are_read_with_a_remark(tmp_path):
    table = table_of(tmp_path, "sick,größe\n0,1\n1,2\n".encode("cp1252"))
    assert table.features[0].name == "größe"
    assert "is not UTF-8 (line 1): read as Windows-1252" in table.remarks[0]
    with pytest.raises(DataError, match=r"t.csv, line 2: neither UTF-8 nor Windows-1252"):
        table_of(tmp_path, b"sick,a\n0,\x81\n1,2\n")


def test_excels_own_first_line_and_its_decimal_commas(tmp_path):
    table = table_of(tmp_path, "sep=;\r\nsick;bmi\r\n0;20,5\r\n1;-,25\r\n")
    assert values(table) == {"bmi": [20.5, -0.25]}
    with pytest.raises(DataError, match=r"t.csv, row 4, column 'bmi': '' is empty|row 3, column 'sick' is empty"):
        table_of(tmp_path, "sep=;\r\nsick;bmi\r\n;20,5\r\n1;3\r\n")


def test_a_decimal_comma_in_quotes_needs_to_be_said(tmp_path):
    text = 'sick,bmi\n0,"1,234"\n1,"2,5"\n'
    with pytest.raises(DataError, match=r"row 2, column 'bmi': '1,234' can be read in two ways.*data.options.decimal"):
        table_of(tmp_path, text)
    assert values(table_of(tmp_path, text, {"decimal": ","})) == {"bmi": [1.234, 2.5]}
    with pytest.raises(DataError, match=r"row 3, column 'bmi': '2,5' can be read in two ways"):
        table_of(tmp_path, 'sick;bmi\n0;1.5\n1;"2,5"\n')


@pytest.mark.parametrize(
    ("text", "target", "names", "rows"),
    [
        ("2019,2020,sick\n1,2,0\n3,4,1\n", "sick", ["2019", "2020"], 2),
        ("2019;2020;2021\n1;2;0\n3;4;1\n", "2021", ["2019", "2020"], 2),
        ("1,2,3\n7,8,0\n9,8,1\n", "3", ["1", "2"], 2),
        ("63,1,0\n67,0,1\n", "3", ["1", "2"], 2),
        ("63,male,0\n67,female,1\n", "3", ["1", "2"], 2),
        ("?,male,0\n67,female,1\n", "3", ["1", "2"], 2),
        ("age,sex,sick\n67,female,1\n", "sick", ["age", "sex"], 1),
    ],
)
def test_a_header_is_told_from_a_first_row(text, target, names, rows, tmp_path):
    table = table_of(tmp_path, text, {"target": target})
    assert [column.name for column in table.features] == names
    assert len(table.ids) == rows


def test_a_first_row_that_may_be_either_is_asked_for(tmp_path):
    text = "3,male,0\n4,female,1\n"
    with pytest.raises(DataError, match=r"row 1 may be names or the first row.*data.options.header=yes or =no"):
        table_of(tmp_path, text, {"target": "3"})
    assert len(table_of(tmp_path, text, {"target": "3", "header": "no"}).ids) == 2
    assert table_of(tmp_path, text, {"target": "0", "header": "yes"}).features[1].categories == ("female",)


@pytest.mark.parametrize(
    "name", ["a#b", "a>1", "x:y", "mixed, comma", 'q"uote', "größe (µ)", "two\nlines", "#", "ab#cd>3"]
)
def test_any_character_in_a_name(name, tmp_path):
    out = io.StringIO()
    csv.writer(out).writerows([[name, "site:#1", "b"], [1, "n", 5], [0, "s", 6], [2, "s", 7]])
    (tmp_path / "t#1.csv").write_text(out.getvalue(), "utf-8", newline="")
    options = {"target": name, "site": "site:#1"}
    source = data.load(f"table:{tmp_path / 't#1.csv'}", seed=0, options=options)
    assert source.table.target.name == name
    assert source.table.target.values.tolist() == [1, 0, 2]
    assert (source.table.sites, source.table.ids.tolist()) == (("n", "s"), [0, 1, 1])
    above = data.load(f"table:{tmp_path / 't#1.csv'}", seed=0, options={**options, "target": f"{name}>0.5"})
    assert above.table.target.values.tolist() == [1, 0, 1]


def test_the_short_form_ends_at_the_longest_path_there_is(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a#b").mkdir()
    path, options = place_of(f"{tmp_path}/a#b#c#d", TableOptions())
    assert (path.name, options.target, options.site) == ("a#b", "c", "d")
    assert place_of(f"{tmp_path}/a#c", TableOptions(site="e"))[1] == TableOptions(target="c", site="e")
    for argument, options, words in [
        ("a#c#d#e", {}, "write table:FILE#TARGET#SITE"), ("a#c", {"target": "c"}, "write table:FILE#TARGET#SITE"),
        ("a", {}, "name the column to learn"), ("none#c", {}, "there is no such file or folder"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=words):
            place_of(f"{tmp_path}/{argument}", TableOptions(**options))


def test_kinds_of_columns(tmp_path):
    rows = [
        [n % 2, "TRUE" if n % 3 else "false", f"1970-01-{n + 1:02}", "None" if n % 2 else "mild", n % 3, "", f"p{n}"]
        for n in range(28)
    ]
    names = "sick,yes,day,grade,code,nothing,id\n"
    table = table_of(
        tmp_path, names + "".join(",".join(map(str, row)) + "\n" for row in rows), {"categories": ("code",)}
    )
    columns = {column.name: column for column in table.features}
    assert columns["yes"].values.tolist() == [float(n % 3 > 0) for n in range(28)]
    assert columns["day"].values.tolist() == list(range(28))
    assert (columns["grade"].categories, columns["grade"].values[:2].tolist()) == (("None", "mild"), [1, 0])
    assert (columns["code"].categories, columns["code"].values[:4].tolist()) == (("0", "1", "2"), [0, 1, 2, 0])
    assert columns["nothing"].missing.all()
    assert len(columns["id"].categories) == 28
    assert table.remarks == ("column 'day' holds dates: read as days since 1970-01-01",)
    with pytest.raises(DataError, match=r"row 2, column 'day': '2021-02-30' is no date"):
        table_of(tmp_path, "sick,day\n0,2021-02-30\n1,2021-03-01\n")


def test_what_an_option_mends(tmp_path):
    text = "sick,age,lab\n0,40,-9\n1,41,5\n0,unknown,6\n"
    with pytest.raises(DataError, match=r"row 4, column 'age': 'unknown' is a word.*data.options.missing=unknown"):
        table_of(tmp_path, text)
    table = table_of(tmp_path, text, {"missing": ("unknown", "-9")})
    assert [np.isnan(column.values).tolist() for column in table.features] == [
        [False, False, True],
        [True, False, False],
    ]
    assert values(table_of(tmp_path, text, {"drop": ("age",)})) == {"lab": [-9, 5, 6]}
    assert values(table_of(tmp_path, text, {"drop": ("2",)})) == {"lab": [-9, 5, 6]}
    assert table_of(tmp_path, text, {"categories": ("age",)}).features[0].categories == ("40", "41", "unknown")
    assert values(table_of(tmp_path, "sick~a\n0~1\n1~2\n", {"delimiter": "~"})) == {"a": [1, 2]}
    with pytest.raises(DataError, match="delimiter = '::' must be one character"):
        TableOptions(delimiter="::")


def test_a_column_of_row_numbers_is_left_out_with_a_remark(tmp_path):
    for first in (0, 1):
        table = table_of(tmp_path, "".join(['"",sick,age\n', *(f"{n + first},{n % 2},{n + 40}\n" for n in range(5))]))
        assert list(values(table)) == ["age"]
        assert "column 1 has no name and counts the rows: left out" in table.remarks[0]
    assert list(values(table_of(tmp_path, "sick,age,\n0,1,\n1,2,\n"))) == ["age"]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "is empty"), (b"\n\n", "is empty"), (b",,\n,,\n", "has empty cells only"), (b"\xef\xbb\xbf", "is empty"),
        (b"PK\x03\x04rest", "an Excel workbook or a zip file: save the sheet as CSV"),
        (b"s\0i\0c\0k\0,\0a\0\n\0", "line 1: a null character; if the file is UTF-16"),
        (b"\xff\xfes", "begins as utf-16, and is none from byte"),
        (b"\x1f\x8b\x08\0rest", "cannot read the table"), (b"sick\n1\n0\n", "has no column beside 'sick'"),
        (b"sick,a\n", "a row of names and no row below it"),
        (b"sick,a\n0,1\n1,-inf\n", r"row 3, column 'a': '-inf' is not finite"),
        (b"sick,a\n0,1 234\n1,2\n", r"row 2, column 'a': '1 234' can be read in two ways"),
        (b"sick;a\n0;1'234,5\n1;2\n", r"row 2, column 'a': \"1'234,5\" can be read in two ways"),
        (b"sick,a\n0,2020/1/2\n1,2020/1/3\n", r"row 2, column 'a': '2020/1/2' can be read as several dates"),
        (b"sick,a\n0,1.2.2020 14:30\n1,\n", r"row 2, column 'a': '1.2.2020 14:30' can be read as several dates"),
        (b"sick,a\n" + b"".join(b"%d,%d kg\n" % (n % 2, n) for n in range(30)), r"column 'a': '0 kg' is a number"),
        (b"sick,a\n0,\n\n1,x y z\n1,4\n3,4\n", r"row 4, column 'a': 'x y z' is a word"),
    ],
)  # fmt: skip
def test_files_that_hold_no_table(raw, words, tmp_path):
    with pytest.raises(DataError, match=f"t.csv.*{words}|{words}") as refused:
        table_of(tmp_path, raw)
    assert "\n" not in str(refused.value)


def test_a_row_is_named_as_a_spreadsheet_and_as_an_editor_count_it(tmp_path):
    text = 'sick,note,age\n0,"one\ntwo\nthree",40\n\n1,x,old\n1,x,41\n0,x,42\n'
    with pytest.raises(DataError, match=r"row 4 \(line 6\), column 'age': 'old' is a word"):
        table_of(tmp_path, text)


def test_a_folder_of_sites_in_any_order_of_columns(tmp_path):
    (tmp_path / "north.csv").write_text("age,sick\n40,0\n41,1\n")
    (tmp_path / "south.csv.gz").write_bytes(gzip.compress(b"sick;age\n1;50,5\n"))
    (tmp_path / "notes.md").write_text("no table")
    table = read(f"{tmp_path}#sick", TableOptions())
    assert table.sites == ("north.csv", "south.csv.gz")
    assert (values(table), table.target.values.tolist()) == ({"age": [40, 41, 50.5]}, [0, 1, 1])
    (tmp_path / "south.csv.gz").write_bytes(gzip.compress(b"sick;age\n1;old\n"))
    with pytest.raises(DataError, match=r"south.csv.gz, row 2, column 'age': 'old' is a word"):
        read(f"{tmp_path}#sick", TableOptions())
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(DataError, match="holds no table: a site's file ends in .csv"):
        read(f"{tmp_path}#sick", TableOptions())


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {
        "sick": arrow.array([0, 1, 1]), "age": arrow.array([40.5, None, math.nan]),
        "ok": arrow.array([True, False, None]), "ward": arrow.array(["n", "s", None]).dictionary_encode(),
        "day": arrow.array([0, 1, 2], arrow.date32()), "kind": arrow.array([3, 4, 3]), "site": arrow.array([7, 7, 9]),
    }  # fmt: skip
    path = tmp_path / "t.parquet"
    parquet.write_table(arrow.table(columns), path)
    table = read(f"{path}#sick#site", TableOptions(categories=("kind",)))
    held = {column.name: column for column in table.features}
    assert np.array_equal(held["age"].values, [40.5, math.nan, math.nan], equal_nan=True)
    assert np.array_equal(held["ok"].values, [1, 0, math.nan], equal_nan=True)
    assert (held["ward"].categories, held["ward"].values.tolist()) == (("n", "s"), [0, 1, -1])
    assert (held["kind"].categories, held["day"].values.tolist()) == (("3", "4"), [0, 1, 2])
    assert (table.sites, table.ids.tolist()) == (("7", "9"), [0, 0, 1])
    for change, words in [
        ({"age": arrow.array([1.0, math.inf, 2])}, r"t.parquet, row 2, column 'age': inf is not finite"),
        ({"age": arrow.array([[1], [2], [3]])}, r"column 'age' is of type list.*drop=age"),
        ({"sick": arrow.array([0, None, 1])}, r"row 2, column 'sick' is empty"),
    ]:
        parquet.write_table(arrow.table({**columns, **change}), path)
        with pytest.raises(DataError, match=words):
            read(f"{path}#sick#site", TableOptions())
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="cannot read the table"):
        read(f"{path}#sick#site", TableOptions())


def test_options_of_a_source_are_named_and_checked(tmp_path):
    (tmp_path / "t.csv").write_text(PLAIN)
    spec = f"table:{tmp_path / 't.csv'}"
    for source, options, words in [
        (
            spec,
            {"target": "sick", "delimeter": ";"},
            "unknown option of data table 'delimeter': did you mean 'delimiter'",
        ),
        (spec, {"target": "sick", "decimal": ";"}, "data option decimal = ';'"),
        ("digits", {"target": "sick"}, "data option 'target': data 'digits' takes no options"),
        (spec, {"target": "sik"}, r"has no column 'sik' \(data.target\): did you mean 'sick'\?"),
        (spec, {"target": "sick", "site": "hospital"}, r"has no column 'hospital' \(data.site\)"),
    ]:
        with pytest.raises(DataError, match=words):
            data.load(source, seed=0, options=options)
