"""The schema of a federation's tables: what sites agree on, by hand and against numpy; and what they must not do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.data.outline import MOST_CATEGORIES, MOST_FEATURES, Feature, Outline, outline
from secateur.data.raw_table import Column, RawTable
from secateur.data.schema import Schema, agree
from secateur.data.shards import open_shards
from secateur.engines import Failure
from secateur.errors import ConfigError, DataError, NobodyTrainedError, WireError
from secateur.federation import agreement, prepare
from secateur.federation.agreement import Site, settle
from secateur.study.study import parse_study
from secateur.wire.codec import context_of, decode, encode
from secateur.wire.message import Expected, Message, Spec

NAN = float("nan")


def numbers(name, *values):
    return Column(name, np.array(values, np.float64))


def words(name, *cells):
    known = sorted({cell for cell in cells if cell})
    return Column(name, np.array([known.index(cell) if cell else -1 for cell in cells], np.int64), tuple(known))


def table(*columns):
    """Return a table of one site; the last column is the target."""
    return RawTable(columns[:-1], columns[-1], ("site",), np.zeros(len(columns[-1].values), np.int64))


def agreed(*tables, **more):
    sites = {who: Site(one, one) for who, one in enumerate(tables)}
    return settle(tuple(sites), lambda asked: ((who, sites[who].answer(request)) for who, request in asked), **more)


# ---- means, scales, categories


def test_two_sites_by_hand():
    one = table(numbers("a", 1, 2, 3), words("sex", "f", "f", "m"), numbers("age", 10, 20, 31.5))
    two = table(numbers("a", 5, NAN, 9, 4), words("sex", "m", "m", "", "f"), numbers("age", 40, 50, 60, 70))
    schema = agreed(one, two).schema
    assert [(f.name, f.kind, f.categories) for f in schema.features] == [
        ("a", "number", ()), ("sex", "category", ("f", "m")),
    ]  # fmt: skip
    # a: 1 + 2 + 3 + 5 + 9 + 4 = 24, over 6 cells; squares about 4: 9 + 4 + 1 + 1 + 25 + 0 = 40
    assert schema.mean == (4.0, 0.0)
    assert schema.scale == (pytest.approx((40 / 6) ** 0.5, rel=1e-12), 1.0)
    assert schema.marked == (True, True)
    assert schema.target_mean == pytest.approx(281.5 / 7, rel=1e-12)
    assert schema.inputs == ("a", "sex=f", "sex=m", "a missing", "sex missing")
    step = (40 / 6) ** 0.5
    assert schema.rows(schema.raw(two)).tolist() == [
        [np.float32(1 / step), 0, 1, 0, 0], [0, 0, 1, 1, 0], [np.float32(5 / step), 0, 0, 0, 1], [0, 1, 0, 0, 0],
    ]  # fmt: skip
    assert (schema.task, schema.outputs) == ("regression", 1)
    spread = np.std([10, 20, 31.5, 40, 50, 60, 70])
    assert np.allclose(schema.targets(one), (np.array([10, 20, 31.5]) - 281.5 / 7) / spread, rtol=1e-6)


@pytest.mark.parametrize(("middle", "spread"), [(0, 1), (1e9, 1), (-3e12, 1e4), (1e-20, 1e-22), (1e30, 1e28)])
def test_means_and_scales_are_numpys_whatever_the_size_of_the_numbers(middle, spread):
    rng = np.random.default_rng(0)
    parts = [rng.normal(middle, spread, 30 + n) for n in range(7)]
    schema = agreed(*(table(Column("a", part), numbers("y", *np.linspace(0, 0.5, len(part)))) for part in parts)).schema
    everything = np.concatenate(parts)
    assert schema.mean[0] == pytest.approx(everything.mean(), rel=1e-12, abs=1e-12 * spread)
    assert schema.scale[0] == pytest.approx(everything.std(), rel=1e-6)
    x = np.concatenate([schema.rows(schema.raw(table(Column("a", p), Column("y", p)))) for p in parts])
    assert np.allclose([x.mean(), x.std()], [0, 1], atol=1e-5)


def test_a_column_of_one_value_is_zero_and_one_of_no_cell_is_left_out():
    same = table(numbers("a", 0.1, 0.1, 0.1), numbers("none", NAN, NAN, NAN), numbers("y", 0.5, 1, 2))
    schema = agreed(same, same, same).schema
    assert schema.scale == (1.0,)
    assert np.allclose(schema.rows(schema.raw(same)), 0)
    assert schema.unused == ("none",)
    assert schema.remarks[0].startswith("column 'none' is left out")
    with pytest.raises(DataError, match="no column can be learnt from: 'none' have no cell"):
        agreed(table(numbers("none", NAN, NAN), numbers("y", 0.5, 1)))


def test_a_word_of_one_row_is_told_to_nobody_and_an_unknown_one_is_all_zero():
    names = [f"person {n}" for n in range(5)]
    one = table(words("name", *names), words("ward", "a", "a", "b", "b", "rare"), numbers("y", *np.arange(5) + 0.5))
    said = outline(one, one).to_json()
    assert "person" not in said
    assert "rare" not in said
    schema = agreed(one, one).schema
    assert schema.unused == ("name",)
    assert schema.features == (Feature("ward", "category", ("a", "b")),)
    assert schema.rows(schema.raw(one)).tolist() == [[1, 0], [1, 0], [0, 1], [0, 1], [0, 0]]
    other = table(words("name", "x"), words("ward", "new"), numbers("y", 1))
    assert schema.rows(schema.raw(other)).tolist() == [[0, 0]]


def test_too_many_words_are_no_categories():
    def ward(first):
        cells = [f"w{n}" for n in range(first, first + 60) for _ in range(2)]
        return table(words("ward", *cells), numbers("a", *range(120)), numbers("y", *np.arange(120) / 7))

    assert agreed(ward(0), ward(0)).schema.features[0].kind == "category"
    assert agreed(ward(0), ward(60)).schema.unused == ("ward",)  # 120 together


def test_classes_are_those_of_all_rows_of_all_sites():
    one = table(numbers("a", 1, 2), numbers("y", 10, 2))
    two = table(numbers("a", 1, 2), numbers("y", 9, 10))
    schema = agreed(one, two).schema
    assert schema.classes == ("2", "9", "10")
    assert schema.targets(one).tolist() == [2, 0]
    assert (schema.task, schema.outputs, schema.target_scale) == ("classification", 3, 1.0)
    ill = table(numbers("a", 1, 2, 3), words("y", "ill", "well", "ill"))
    assert agreed(ill).schema.targets(ill).tolist() == [0, 1, 0]
    with pytest.raises(DataError, match="target 'y' holds 'dead', which is none of the agreed 2 classes"):
        agreed(ill).schema.targets(table(numbers("a", 1), words("y", "dead")))
    with pytest.raises(DataError, match="target 'y' is '1' in every row: there is nothing to learn"):
        agreed(table(numbers("a", 1, 2), numbers("y", 1, 1)))


def test_whole_numbers_are_classes_only_if_all_sites_together_have_few():
    def ages(*values):
        return table(numbers("a", *values), numbers("age", *values))

    assert agreed(ages(*range(10)), ages(*range(5))).schema.task == "classification"
    assert agreed(ages(*range(12)), ages(*range(12, 24))).schema.task == "regression"
    assert agreed(ages(*range(12)), ages(*range(12, 24)), classes=True).schema.outputs == 24
    assert agreed(ages(0, 1), ages(0, 1), classes=False).schema.task == "regression"


def test_words_are_not_learnt_as_numbers():
    sites = {0: Outline((Feature("age"),), Feature("sex", "category", ("f", "m")))}
    with pytest.raises(DataError, match="target 'sex' holds words, such as 'f', and data.task learns numbers"):
        agree(sites, classes=False)


@pytest.mark.parametrize(
    ("name", "unit"), [("age [years]", "years"), ("BP (mmHg) ", "mmHg"), ("age", ""), ("[x]", "x")]
)
def test_the_unit_stands_in_brackets_behind_the_name(name, unit):
    assert agreed(table(numbers("a", 1, 2), numbers(name, 0.5, 1.5))).schema.unit == unit


def test_rows_can_be_undone():
    rng = np.random.default_rng(0)
    cells = [["a", "b", "c", ""][n] for n in rng.integers(0, 4, 50)]
    some = Column("x", np.where(rng.random(50) < 0.2, NAN, rng.normal(1e6, 3, 50)))
    one = table(some, words("w", *cells), numbers("z", *rng.normal(size=50)), numbers("y", *rng.normal(size=50)))
    schema = agreed(one).schema
    raw = schema.raw(one)
    back = schema.undone(schema.rows(raw))
    assert np.allclose(back, raw, atol=1e-4, rtol=1e-7, equal_nan=True)
    assert np.allclose(schema.rows(back), schema.rows(raw), atol=1e-6)


def test_a_schema_comes_back_from_its_text_to_the_bit():
    one = table(numbers('größe, "a"', 0.1, 0.7, 1e-300), words("w", "é", "é", "é"), numbers("y", 1.1, 2.2, 3.3))
    schema = agreed(one).schema
    assert Schema.from_json(schema.to_json()) == schema
    assert Schema.from_json(schema.to_json()).digest == schema.digest
    for wrong in ({"mean": [0.0]}, {"scale": [0.0, 1.0]}, {"target_scale": -1}, {"mean": ["x", 1]}, {"features": 3}):
        with pytest.raises(DataError, match=r"a schema (cannot be read|must have)"):
            Schema.from_json(json.dumps({**json.loads(schema.to_json()), **wrong}))
    with pytest.raises(DataError, match="cannot be read"):
        Schema.from_json(schema.to_json().replace("1.1", "1e999").replace(str(schema.target_mean), "Infinity"))


# ---- agreement


def outlines(*columns, target="y"):
    return Outline(tuple(Feature(name) for name in columns), Feature(target))


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (outlines("a"), "its table lacks column 'b': add it (its cells may be empty)"),
        (outlines("a", "b", "c"), "its table has column 'c', which most sites lack: take it out"),
        (outlines("a", "b", target="z"), "it learns 'z', most sites 'y': name the same target column"),
        (
            Outline((Feature("a"), Feature("b", "text")), Feature("y")),
            "its column 'b' holds words, at most sites numbers: mend its cells",
        ),
        (
            Outline((Feature("a"), Feature("b")), Feature("y", "category", ("no", "yes"))),
            "its target 'y' holds words, at most sites numbers",
        ),
    ],
)
@pytest.mark.parametrize("place", [0, 2])
def test_a_site_that_differs_is_left_out_and_dictates_nothing(odd, why, place):
    sites = [outlines("a", "b"), outlines("a", "b")]
    sites.insert(place, odd)
    schema, left = agree(dict(enumerate(sites)))
    assert [f.name for f in schema.features] == ["a", "b"]
    assert left == {place: why}


def test_the_order_of_columns_is_that_of_a_site_that_fits():
    schema, left = agree({0: outlines("c", "b"), 3: outlines("a", "b"), 5: outlines("b", "a")})
    assert ([f.name for f in schema.features], list(left)) == (["a", "b"], [0])


def test_sites_without_a_majority_are_refused_with_what_each_lacks():
    with pytest.raises(DataError, match="no site's table fits: client 0: its table has column 'b', which most sites"):
        agree({0: outlines("a", "b"), 1: outlines("a", "c")})
    with pytest.raises(DataError, match="no site has described its table"):
        agree({})


def test_a_column_that_is_empty_at_a_site_fits_anything():
    full = table(numbers("a", 1, 2), words("w", "p", "p"), numbers("y", 0.5, 1))
    empty = table(numbers("a", NAN, NAN), numbers("w", NAN, NAN), numbers("y", 2, 3))
    found = agreed(empty, full, full)
    assert found.clients == (0, 1, 2)
    assert found.schema.rows(found.schema.raw(empty)).tolist() == [[0, 0, 1, 1]] * 2


def refusing(one, changed):
    """Return the agreement of three sites whose first one's replies are changed."""
    sites = {who: Site(one, one) for who in range(3)}

    def carry(asked):
        for who, request in asked:
            reply = sites[who].answer(request)
            yield who, changed(request, reply) if who == 0 else reply

    return settle((0, 1, 2), carry)


def edited(request, reply, step, **more):
    """Return a reply with other tensors or scalars, if it answers a request of this step."""
    asked = decode(request, Expected({})).scalars
    if asked["step"] != step:
        return reply
    tensors = {}
    if step != "columns":
        size = len(json.loads(agreement._text(asked))["features"]) + 1
        specs = {name: Spec((size,)) for name in ("high", "low", "size")} | {"filled": Spec((size,), torch.int64)}
        tensors = dict(decode(reply, Expected(specs)).tensors)
    scalars = {"seconds": 0.1, **({"samples": 2} if tensors else {"text0": "{}"})}
    tensors |= {n: tensors[n] * 0 + v for n, v in more.items() if n in tensors}
    scalars |= {n: v for n, v in more.items() if n not in tensors}
    scalars = {n: v for n, v in scalars.items() if v is not None}
    return encode(Message(tensors, None, scalars), context=context_of(request))


@pytest.mark.parametrize(
    ("step", "lie", "told"),
    [
        ("sums", {"samples": 2**41}, "scalar 'samples' is"),
        ("sums", {"samples": 0}, "scalar 'samples' is 0"),
        ("sums", {"filled": 3}, "the cells counted are 3 to 3"),
        ("sums", {"filled": -1}, "the cells counted are -1 to -1"),
        ("sums", {"high": NAN}, "NaN or infinity"),
        ("sums", {"seconds": NAN}, "scalar 'seconds' is missing or no time"),
        ("columns", {"seconds": None}, "scalar 'seconds' is missing or no time"),
        ("columns", {"text0": "[" * 9000}, "the outline of a table cannot be read"),
        ("columns", {"text0": None, "text1": "{}"}, "the pieces of a text do not follow each other"),
        ("columns", {"text0": outlines("a", "a").to_json()}, "'a' comes twice"),
        ("columns", {"text0": outlines("a" * 201).to_json()}, "cannot be read"),
        ("columns", {"text0": Outline((), Feature("y", "number", tuple("x" * 101))).to_json()}, "cannot be read"),
    ],
)  # fmt: skip
def test_a_lie_costs_its_sender_the_agreement_and_nobody_else(step, lie, told):
    one = table(numbers("a", 1, 4), numbers("y", 0.5, 1.5))
    found = refusing(one, lambda request, reply: edited(request, reply, step, **lie))
    assert found.clients == (1, 2)
    (left,) = [entry for row in found.rows for entry in row["left_out"]]
    assert left["client"] == 0
    assert told in left["reason"]
    assert found.schema.mean == (2.5,)


def test_an_outline_is_bounded():
    wide = Outline(tuple(Feature(str(n)) for n in range(MOST_FEATURES + 1)), Feature("y"))
    with pytest.raises(DataError, match="cannot be read"):
        Outline.from_json(wide.to_json())
    column = numbers("a" * 300, 1)
    with pytest.raises(DataError, match=r"its name has 300 characters; 200 at most"):
        outline(table(column, numbers("y", 1)), table(column, numbers("y", 1)))
    cells = words("y", *(f"w{n}" for n in range(MOST_CATEGORIES + 1)))
    with pytest.raises(DataError, match="101 classes of words; 100"):
        outline(table(Column("a", np.arange(101.0)), cells), table(Column("a", np.arange(101.0)), cells))


def test_a_site_refuses_what_is_no_ask_of_the_agreement():
    one = table(numbers("a", 1, 4), numbers("y", 0.5, 1.5))
    with pytest.raises(WireError, match="is for 'steal'"):
        Site(one, one).answer(encode(Message({}, None, {"step": "steal"})))
    with pytest.raises(DataError, match="a schema cannot be read"):
        Site(one, one).answer(encode(Message({}, None, {"step": "sums", "text0": "{}"})))
    with pytest.raises(WireError):
        Site(one, one).answer(b"junk")
    other = agreed(table(numbers("b", 1, 4), numbers("y", 0.5, 1.5))).schema
    with pytest.raises(DataError, match="lacks column 'b'"):
        Site(one, one).answer(encode(Message({}, None, {"step": "sums", "text0": other.to_json()})))
    huge = table(numbers("a", 3e38, 3e38), numbers("y", 0.5, 1.5))
    with pytest.raises(DataError, match=r"add up to 6e\+38, which cannot be sent"):
        agreed(huge)


def test_bytes_of_the_agreement_are_those_that_were_carried():
    one = table(numbers("a", 1, 4), numbers("y", 0.5, 1.5))
    sites, seen = {who: Site(one, one) for who in range(3)}, []

    def carry(asked):
        for who, request in asked:
            if who == 1:
                yield who, Failure(who, "no node is connected", sent=False)
                continue
            reply = sites[who].answer(request)
            seen.append((len(request), len(reply)))
            yield who, reply

    told = []
    found = settle((0, 1, 2), carry, notify=lambda who, why: told.append((who, why)))
    assert told == [(1, "no node is connected")]
    assert [row["phase"] for row in found.rows] == ["schema"] * 4
    assert sum(row["bytes_down"] for row in found.rows) == sum(down for down, _ in seen)
    assert sum(row["bytes_up"] for row in found.rows) == sum(up for _, up in seen)
    assert found.rows[0]["each"] == [[0, *seen[0]], [2, *seen[1]]]
    with pytest.raises(NobodyTrainedError, match="phase 'schema'.*no node is connected"):
        settle((1,), carry)


# ---- studies


def write(path, sites=("north", "south", "west"), rows=20):
    lines = [f"{n},{n % 4},{site},{n / 7}" for site in sites for n in range(rows - sites.index(site))]
    path.write_text("a,b,site,age\n" + "\n".join(lines) + "\n")
    return path


def test_there_are_as_many_clients_as_sites_and_who_is_dropped_is_named(tmp_path):
    pytest.importorskip("pyarrow", reason="the extra tables is not installed")
    source = f"table:{write(tmp_path / 't.csv')}#age#site"
    study = parse_study({"data": {"source": source}})
    assert (study.data.partition, study.data.clients, study.model.name) == ("natural", 0, "mlp")
    assert parse_study({"data": {"source": source, "partition": "iid"}}).data.clients == 20
    shards = open_shards(prepare.simulated(study, tmp_path / "cache"))
    assert shards.clients == 3
    assert shards.meta.remarks == ()
    fewer = parse_study({"data": {"source": source, "clients": 2}})
    shards = open_shards(prepare.simulated(fewer, tmp_path / "cache"))
    assert shards.meta.remarks == ("data.clients = 2 leaves out the smallest sites: west",)
    with pytest.raises(ConfigError, match=r"data\.clients = 0 must be at least 1, unless data\.partition = natural"):
        parse_study({"data": {"clients": 0, "partition": "iid"}})
    with pytest.raises(DataError, match="set data.test_fraction above 0"):
        prepare.simulated(parse_study({"data": {"source": source, "test_fraction": 0}}), tmp_path / "cache")
    one = f"table:{write(tmp_path / 'one.csv', sites=('north',))}#age#site"
    with pytest.raises(DataError, match="name the column of sites"):
        prepare.simulated(parse_study({"data": {"source": one}}), tmp_path / "cache")


def test_means_are_over_training_rows_alone_and_the_test_rows_are_the_clients(tmp_path):
    pytest.importorskip("pyarrow", reason="the extra tables is not installed")
    source = f"table:{write(tmp_path / 't.csv')}#age#site"
    shards = open_shards(prepare.simulated(parse_study({"data": {"source": source}}), tmp_path / "cache"))
    train = np.concatenate([shards.train(k)[0] for k in range(3)])
    held = np.concatenate([shards.test(k)[0] for k in range(3)])
    assert np.allclose([train.mean(0), train.std(0)], [[0, 0], [1, 1]], atol=1e-6)
    assert np.array_equal(held, shards.server_test()[0])
    assert abs(held.mean(0)).max() > 1e-3
    schema = shards.schema
    ages = np.concatenate([shards.train(k)[1] for k in range(3)]) * schema.target_scale + schema.target_mean
    assert set(np.round(ages * 7).astype(int).tolist()) <= set(range(20))
    assert Path(shards._folder / "schema.json").read_text("utf-8") == schema.to_json()


def test_methods_are_compared_on_a_tables_own_partition():
    from secateur.comparison.suite import chosen

    assert chosen(["fedavg"], "table:x.csv#y#site")[0].partitions == ["natural"]
    assert chosen(["fedavg"], "digits")[0].partitions == ["pathological:2"]
