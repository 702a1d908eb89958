"""Crossed suites, and what their comparison shows of attacks."""

import json
from dataclasses import dataclass

import pytest
import tomli_w

from secateur.comparison import grid
from secateur.comparison.crossing import crossed
from secateur.comparison.grid import folder_of, run_suite
from secateur.comparison.suite import Suite, cells, load
from secateur.errors import ConfigError
from secateur.federation.folder import FAILURE, ROUNDS, SUMMARY
from secateur.report import hostile, page, tables
from secateur.report.gather import attacks, comparison_lines, gather
from secateur.report.results_page import write

TINY = {
    "title": "Tiny", "source": "digits", "seeds": [0, 1], "partitions": ["iid"], "controls": [],
    "common": {"data.clients": 4, "participation": 1, "rounds": 2, "model.name": "mlp", "model.options.hidden": "[8]"},
    "variants": {"FedAvg": {"method": "fedavg"}, "random 50 %": {"method": "random", "schedule.sparsity": 0.5}},
    "axes": {
        "rule": {"mean": {}, "momentum": {"aggregator": "server_momentum"}},
        "attack": {"none": {}, "25 % NaN": {"attack": "nan:0.25"}, "25 % huge": {"attack": "huge:0.25"}},
    },
    "crosses": [
        {"variant": ["FedAvg"], "attack": ["none", "25 % NaN"]},
        {"rule": ["mean"], "attack": ["none", "25 % huge"]},
    ],
}  # fmt: skip


def tiny(**changes):
    return Suite.model_validate(crossed({**TINY, **changes}))


def test_a_cross_is_the_product_of_its_values_and_made_once():
    suite = tiny()
    assert list(suite.variants) == [
        "FedAvg, mean, none", "FedAvg, mean, 25 % NaN", "FedAvg, momentum, none", "FedAvg, momentum, 25 % NaN",
        "FedAvg, mean, 25 % huge", "random 50 %, mean, none", "random 50 %, mean, 25 % huge",
    ]  # fmt: skip
    assert suite.variants["FedAvg, momentum, 25 % NaN"] == {
        "method": "fedavg", "aggregator": "server_momentum", "attack": "nan:0.25",
    }  # fmt: skip
    assert suite.places["random 50 %, mean, none"] == {"variant": "random 50 %", "rule": "mean", "attack": "none"}
    assert len(cells(suite)) == 7 * 2
    assert Suite.model_validate(suite.model_dump()) == suite
    assert crossed({"source": "digits"}) == {"source": "digits"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"crosses": [{"rules": ["mean"]}]}, "unknown axis of the suite 'rules': did you mean 'rule'?"),
        ({"crosses": [{"rule": ["men"]}]}, "unknown value of axis 'rule' 'men': did you mean 'mean'?"),
        ({"crosses": []}, "at least one"),
        ({"axes": None}, "has .variants., .axes.NAME. and at least one"),
        ({"axes": {"rule": {"mean": {"method": "random"}}, "attack": {"none": {}}}, "crosses": [{}]},
         "rule 'mean' sets method = 'random', and another axis sets 'fedavg'"),
    ],
)  # fmt: skip
def test_a_wrong_cross_is_one_line(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        tiny(**changes)


def test_a_suite_in_a_file_is_crossed(tmp_path):
    (tmp_path / "own.toml").write_text(tomli_w.dumps(TINY))
    assert load(str(tmp_path / "own.toml")) == tiny()
    box = load("hostile")
    of = {place["variant"] for place in box.places.values()}
    assert {"FedAvg", "FedSparsify 90 %", "FedSparsify-Local 90 %", "AutoFLIP", "FRL"} < of
    assert hostile.shows(box)
    assert not hostile.shows(load("quick"))
    seen, few = set(), {}  # each rule, and each attack, of each method once: every study of it is a right one
    for name, place in box.places.items():
        pairs = {(place["variant"], place["rule"]), (place["variant"], place["attack"])}
        few |= {name: box.variants[name]} if pairs - seen else {}
        seen |= pairs
    assert cells(box.model_copy(update={"variants": few, "seeds": [0]}), data="/somewhere")


@dataclass
class Fake:
    """Writes run folders by hand."""

    out: object
    suite: Suite

    def __post_init__(self):
        self.cells = cells(self.suite)

    def put(self, variant, seed, *, accuracy=None, attackers=(), left_out=(), suspected=()):
        cell = next(c for c in self.cells if (c.variant, c.seed) == (variant, seed))
        folder = folder_of(self.out, cell.study)
        folder.mkdir(parents=True)
        row = {
            "phase": "train", "clients": [0, 1, 2, 3], "left_out": [{"client": k, "reason": "x"} for k in left_out],
            "suspected": [{"client": k, "reason": "x"} for k in suspected],
        }  # fmt: skip
        row |= {"attackers": list(attackers)} if attackers else {}
        (folder / ROUNDS).write_text(json.dumps(row) + "\n" + json.dumps({**row, "left_out": []}) + "\n")
        if accuracy is None:
            (folder / FAILURE).write_text(json.dumps({"failed": "diverged"}))
        else:
            (folder / SUMMARY).write_text(json.dumps({"final": {"accuracy": accuracy}}))


@pytest.fixture
def found(tmp_path):
    suite = tiny()
    fake = Fake(tmp_path, suite)
    for seed, clean, attacked in ((0, 0.8, 0.7), (1, 0.9, 0.85)):
        fake.put("FedAvg, mean, none", seed, accuracy=clean, suspected=[2])
        fake.put("FedAvg, mean, 25 % NaN", seed, accuracy=attacked, attackers=[1], left_out=[1], suspected=[1, 3])
    fake.put("FedAvg, momentum, none", 0, accuracy=0.8)
    fake.put("FedAvg, momentum, none", 1, accuracy=0.9)
    fake.put("FedAvg, momentum, 25 % NaN", 0, accuracy=0.8, attackers=[1])
    fake.put("FedAvg, momentum, 25 % NaN", 1, accuracy=0.88, attackers=[1])
    fake.put("FedAvg, mean, 25 % huge", 0, attackers=[1])
    fake.put("FedAvg, mean, 25 % huge", 1, accuracy=0.1, attackers=[1])
    return hostile.standings(suite, fake.cells, tmp_path)


def test_who_was_named_is_counted_by_hand(found):
    """Two seeds, two records each: 4 requests to the attacker, 12 to others; refused in the first record alone."""
    nan = found[1]
    assert (nan.hostile, nan.honest) == (hostile.Named(4, 2, 4), hostile.Named(12, 0, 4))
    assert (found[0].hostile, found[0].honest) == (hostile.Named(), hostile.Named(16, 0, 4))
    (mean, momentum) = hostile.by_rule([one for one in found if one.place["variant"] == "FedAvg"])
    assert mean == {
        "rule": "mean", "attackers refused": "25.0", "attackers suspected": "50.0", "honest refused": "0.0",
        "honest suspected": "16.7", "honest suspected, no attack": "25.0",
    }  # fmt: skip
    assert momentum["attackers refused"] == "0.0"


def test_points_are_lost_seed_by_seed_and_a_run_without_result_has_lost_all(found):
    points = hostile.losses(found)
    assert points["FedAvg", "mean", "25 % NaN"] == pytest.approx(7.5)  # 10 and 5
    assert points["FedAvg", "momentum", "25 % NaN"] == pytest.approx(1.0)  # 0 and 2
    assert points["FedAvg", "mean", "25 % huge"] == pytest.approx(80.0)  # all of 80, and 90 less 10
    assert ("random 50 %", "mean", "none") not in points
    said = hostile.sentences(found)
    least = "FedAvg, 25 % attackers: of 2 rules momentum has the least worst case over 1 attacks: NaN costs 1.0 points."
    assert said[0] == least
    assert "refused in 0 of 68 requests" in said[-2]
    assert said[-1] == "10 of 14 runs have been made; the others are not shown."


def test_the_table_and_the_map_show_what_there_is(found):
    title, _, rows = hostile.sections(found)[0]
    assert title == "FedAvg, 25 % attackers"
    assert list(rows[0]) == ["rule", "none", "NaN", "huge"]
    assert len(hostile.sections(found)) == 2  # nothing of the other variant was run
    assert rows[0]["huge"] == "ended, 1 of 2"
    assert rows[0]["NaN"].startswith("77.5 ± ")
    assert rows[1]["huge"] == ""
    figure = hostile.heat(found)
    (trace,) = figure["views"][0]["data"]
    assert trace["y"] == ["mean", "momentum"]
    assert trace["z"][1][trace["x"].index("25 % NaN")] == pytest.approx(1.0)
    assert "not run" not in hostile.text(found)


def test_a_crossed_suite_is_run_and_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "_AHEAD", 1)  # runs are given to the processes one after the other
    suite = tiny(crosses=[{"variant": ["FedAvg"], "rule": ["mean"], "attack": ["none", "25 % NaN"]}], seeds=[0])
    ran = run_suite(suite, tmp_path / "tiny", jobs=2)
    lines = comparison_lines(suite, ran, tmp_path / "tiny")
    tables.write(suite, ran, lines, tmp_path / "tiny")
    text = write(tmp_path / "tiny", tmp_path / "docs").read_text()
    assert "## FedAvg, 25 % attackers" in text
    assert "| mean |" in text
    assert "refused in 0 of 14 requests" in text  # honest clients: two rounds of four, and two of three
    title, lines, subjects, _ = gather([tmp_path / "tiny"])
    assert [subject.name for subject in subjects] == ["FedAvg, mean, none, iid, seed 0"]
    facts = page.read(
        page.write(title, lines, subjects, tmp_path / "page", attacks=attacks([tmp_path / "tiny"])).parent / "data.js"
    )
    (part,) = facts["parts"]
    assert [figure["id"] for figure in part["figures"]] == ["attacks"]
    assert part["tables"][0]["columns"] == ["rule", "none", "NaN"]
    assert part["headline"]["sentences"][-1].startswith("Honest clients were refused in 0 of 14 requests")
    assert attacks([tmp_path]) == []
    row = hostile.by_rule(hostile.standings(suite, ran, tmp_path / "tiny"))[0]
    assert row["attackers refused"] == "100.0"
