"""Comparisons: statistics by hand, grids, controls, a kill at any moment."""

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from helpers import model_of
from secateur import cli, methods
from secateur.bandwidth import Bandwidth, Link, Spent, bytes_per_client, fixed_of, predict
from secateur.cli.report import _network
from secateur.comparison import grid
from secateur.comparison.suite import Suite, cells, chosen, load, names
from secateur.errors import ConfigError, NoResultError
from secateur.federation import checkpoint
from secateur.federation.folder import ROUNDS, SUMMARY
from secateur.learning.metrics import ACCURACY, MAE
from secateur.report import formatting, outcomes, page, tables
from secateur.report.gather import RESULT, comparison_lines, gather, read_comparison
from secateur.report.headline import on_link
from secateur.report.outcomes import Outcome, outcome
from secateur.report.statistics import (
    Interval,
    cost_to_reach,
    front,
    holm,
    interval,
    p_equivalent,
    p_greater,
    paired,
    quality_within,
    significant,
)
from secateur.report.verdicts import Group, compare_groups
from secateur.wire import codec
from secateur.wire.message import Message

SECATEUR = Path(sys.executable).with_name("secateur")

# ---- statistics


def test_intervals_are_students():
    found = interval([2.0, 4.0, 9.0])
    assert found.mean == 5.0
    assert found.half == pytest.approx(4.302653 * math.sqrt(13.0) / math.sqrt(3))  # t of 2 degrees; variance 13
    assert interval([3.0]) == Interval(3.0, math.inf, 1)
    assert interval([1.0, 1.0]).half == 0
    assert found.error == pytest.approx(math.sqrt(13.0 / 3))
    assert interval([3.0]).error == math.inf


def test_one_sided_p_values_are_students():
    """Of 1, 2, 3 the standard error is 1 / sqrt(3), so that t = 2 sqrt(3) with 2 degrees of freedom.

    There P(T > t) = (1 - t / sqrt(2 + t^2)) / 2, which is (1 - sqrt(12 / 14)) / 2 = 0.03709.
    """
    found = interval([1.0, 2.0, 3.0])
    assert p_greater(found) == pytest.approx((1 - math.sqrt(12 / 14)) / 2)
    # above 1: t = sqrt(3); P = (1 - sqrt(3 / 5)) / 2
    assert p_greater(found, 1.0) == pytest.approx((1 - math.sqrt(3 / 5)) / 2)
    assert p_greater(found, 2.0) == pytest.approx(0.5)
    assert (p_greater(interval([5.0])), p_greater(interval([1.0, 1.0])), p_greater(interval([0.0, 0.0]))) == (
        1.0,
        0.0,
        1.0,
    )


@given(
    st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=2, max_size=6), st.sampled_from([0.0, 0.01, -0.2])
)
def test_p_values_agree_with_scipys_own_tests(values, bound):
    if len(set(values)) == 1:
        return
    found = interval(values)
    assert p_greater(found, bound) == pytest.approx(stats.ttest_1samp(values, bound, alternative="greater").pvalue)
    above = stats.ttest_1samp(values, -0.3, alternative="greater").pvalue
    below = stats.ttest_1samp(values, 0.3, alternative="less").pvalue
    assert p_equivalent(found, 0.3) == pytest.approx(max(above, below))


def test_holm_by_hand():
    """Four of them: 0.01 x 4 = 0.04; 0.015 x 3 = 0.045; 0.03 x 2 = 0.06; 0.04 x 1 = 0.04, lifted to 0.06."""
    given_ = {"c": 0.03, "a": 0.01, "d": 0.04, "b": 0.015}
    assert holm(given_) == pytest.approx({"a": 0.04, "b": 0.045, "c": 0.06, "d": 0.06})
    assert significant(given_) == {"a", "b"}
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert significant({}) == set()


def test_few_of_many_differences_without_any_effect_are_shown():
    """486 differences of noise over three seeds: a test of each finds a dozen or more, Holm's in 5 % of tables one."""
    draw, raw, tables = random.Random(7), 0, 0
    for _ in range(40):
        chances = {n: p_greater(interval([draw.gauss(0, 1) for _ in range(3)])) for n in range(486)}
        raw += sum(chance < 0.025 for chance in chances.values())
        tables += bool(significant(chances))
    assert 9 < raw / 40 < 16  # 0.025 x 486 = 12.2 are expected
    assert tables <= 6  # 2 are expected of 40


def test_differences_are_taken_seed_by_seed():
    found = paired({0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.0, 3: 7.0})
    assert (found.mean, found.count) == (0.75, 2)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_what_was_reached_when():
    curve = [(10.0, 0.3), (20.0, 0.6), (30.0, 0.5), (40.0, 0.8)]
    assert (quality_within(curve, 35), quality_within(curve, 20), quality_within(curve, 5)) == (0.5, 0.6, None)
    assert (cost_to_reach(curve, 0.55), cost_to_reach(curve, 0.7), cost_to_reach(curve, 0.9)) == (20.0, 40.0, None)
    assert cost_to_reach(curve, 0.35, lower_is_better=True) == 10.0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8), st.booleans())
def test_the_front_is_what_nothing_beats(points, least):
    best = front(points, lambda point: point[0], lambda point: point[1], lower_is_better=least)
    for cost, quality in points:
        beaten = any(c <= cost and (q <= quality if least else q >= quality) and (c, q) != (cost, quality)
                     for c, q in points)  # fmt: skip
        assert ((cost, quality) in best) == (not beaten)
    assert [cost for cost, _ in best] == sorted(cost for cost, _ in best)
    assert len(best) == sum(point in best for point in points)


# ---- suites


def tiny(**changes):
    values = {
        "source": "digits", "seeds": [0, 1], "partitions": ["iid"],
        "common": {"data.clients": 3, "participation": 1.0, "rounds": 2, "model.name": "mlp",
                   "model.options.hidden": "[12, 8]", "training.epochs": 1, "training.batch_size": 64},
        "variants": {"random 50 %": {"method": "random", "schedule.sparsity": 0.5},
                     "channels": {"method": "oneshot", "granularity": "channel", "schedule.at": 1,
                                  "schedule.sparsity": 0.5, "aggregator": "server_momentum"}},
    }  # fmt: skip
    return Suite.model_validate(values | changes)


def test_the_suites_in_the_box_are_sound():
    assert names() == ["brain-age", "cifar", "fashion", "hospitals", "hostile", "quick", "shakespeare"]
    for name in names():
        suite = load(name)
        assert suite.title
        assert len(suite.seeds) >= 3
        data = None if suite.source in {"digits", "communities"} else "PLACE"
        if data:
            with pytest.raises(ConfigError, match="say where that is with --data"):
                cells(suite)
        assert suite.places or cells(suite, data)  # a crossed suite has many: tests/test_hostile.py makes some of each
    quick = load("quick")
    assert len(quick.variants) >= 6


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"variants": {}}, "variants: dictionary should have at least 1 item"),
        ({"seeds": ["one"]}, "seeds.0: input should be a valid integer"),
        ({"colour": 1}, "colour: extra inputs are not permitted"),
        ({"link": "fast"}, "link 'fast': write it as 10Mbit/s,50ms"),
        ({"controls": ["placebo"]}, "controls.0: input should be 'dense', 'random', 'ramped', 'shuffled' or 'narrow'"),
    ],
)
def test_a_wrong_suite_is_one_line(change, told, tmp_path):
    import tomli_w

    (tmp_path / "mine.toml").write_text(tomli_w.dumps(tiny().model_dump() | change))
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        load(str(tmp_path / "mine.toml"))


def test_a_wrong_variant_is_named_before_anything_runs(tmp_path):
    suite = tiny(variants={"good": {"method": "fedavg"}, "bad": {"method": "fedsparsify", "schedule.sparsty": 0.5}})
    with pytest.raises(ConfigError, match=r"variant 'bad': .*did you mean 'schedule.sparsity'"):
        grid.run_suite(suite, tmp_path / "out")
    assert not (tmp_path / "out" / "runs").exists()
    with pytest.raises(ConfigError, match=r"did you mean 'quick'"):
        load("quik")
    with pytest.raises(ConfigError, match="--seeds = 0 must be at least 1"):
        tiny().adjusted(seeds=0)


def test_a_suite_is_adjusted():
    suite = tiny(seeds=[4, 7]).adjusted(3, 5, ["natural"], ["training.lr=0.5", "rounds=6"])
    assert (suite.seeds, suite.partitions) == ([4, 7, 8], ["natural"])
    assert suite.common == tiny().common | {"rounds": "6", "training.lr": "0.5"}
    assert tiny(seeds=[4, 7]).adjusted(1).seeds == [4]
    own = tiny(variants={"slow": {"method": "fedavg", "training.lr": 0.01}}).adjusted(settings=["training.lr=0.5"])
    assert cells(own)[0].study.training.lr == 0.01  # what a variant says of itself stands
    with pytest.raises(ConfigError, match="--set 'rounds': write it as path=value"):
        tiny().adjusted(settings=["rounds"])


def test_methods_and_settings_on_the_command_line_are_a_suite():
    words = ["fedsparsify:schedule.sparsity=0.8", "fedsparsify:schedule.sparsity=0.9", "prunefl:every=5,sparsity=0.8",
             "fedavg"]  # fmt: skip
    suite, data = chosen(words, "communities")
    assert data is None
    assert suite.variants == {
        "fedsparsify 80 %": {"method": "fedsparsify", "schedule.sparsity": "0.8"},
        "fedsparsify 90 %": {"method": "fedsparsify", "schedule.sparsity": "0.9"},
        "prunefl, every=5 80 %": {"method": "prunefl", "every": "5", "sparsity": "0.8"},
        "fedavg": {"method": "fedavg"},
    }
    assert suite.source == "communities"
    assert {cell.study.options.get("schedule.sparsity") for cell in cells(suite)} >= {0.8, 0.9}
    assert chosen(["quick"], None) == (load("quick"), None)
    assert chosen(["fashion"], "PLACE") == (load("fashion"), "PLACE")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["quik"], "unknown suite or method 'quik': did you mean 'quick'?"),
        (["fedavg", "autoflp"], "unknown suite or method 'autoflp': did you mean 'autoflip'?"),
        (["quick", "fedavg"], "quick: a suite is compared by itself"),
        (["fedavg", "fedavg"], "'fedavg' is compared twice"),
        (["prunefl:sparsity"], "prunefl:sparsity 'sparsity': write it as path=value"),
    ],
)
def test_wrong_words_are_one_line(words, told):
    with pytest.raises(ConfigError) as caught:
        chosen(words)
    assert told in str(caught.value)


# ---- a comparison


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out, told = tmp_path_factory.mktemp("compared"), []
    found = grid.run_suite(tiny(), out, jobs=2, report=lambda *counts: told.append(counts))
    return tiny(), found, out, told


def test_every_cell_has_run_with_its_controls(compared):
    _, found, out, told = compared
    by_control = {
        c: [cell for cell in found if cell.control == c]
        for c in ("", "dense", "random", "ramped", "shuffled", "narrow")
    }
    assert {name: len(of) for name, of in by_control.items()} == dict.fromkeys(by_control, 4) | {"ramped": 2}
    assert all((grid.folder_of(out, cell.study) / SUMMARY).exists() for cell in found)
    assert told[-1][0] == told[-1][1] == len({grid.folder_of(out, cell.study) for cell in found})
    assert told[-1][2] == told[-1][3] == 2 * told[-1][0]
    # what is equal is shared: the random control of a random mask of the same sparsity is the very run
    for cell in by_control["random"]:
        own = next(c for c in by_control[""] if (c.variant, c.seed) == (cell.variant, cell.seed))
        same_run = grid.folder_of(out, own.study) == grid.folder_of(out, cell.study)
        assert same_run == (cell.variant == "random 50 %")


def test_controls_match_what_they_control(compared):
    suite, found, out, _ = compared
    for seed in suite.seeds:
        at_ = {(c.variant, c.control): grid.folder_of(out, c.study) for c in found if c.seed == seed}

        def weights(folder):
            return {n: t for n, t in model_of(folder).items() if n.startswith("mask/") and n.endswith("weight")}

        def final(folder):
            return json.loads((folder / SUMMARY).read_text())["final"]

        for variant in suite.variants:
            own = weights(at_[variant, ""])
            kept = sum(int(m.sum()) for m in own.values())
            shuffled, drawn = weights(at_[variant, "shuffled"]), weights(at_[variant, "random"])
            assert {n: int(m.sum()) for n, m in shuffled.items()} == {n: int(m.sum()) for n, m in own.items()}
            # random scores are fixed by the seed: as many of them in each layer are the very same weights
            assert all(torch.equal(shuffled[n], m) for n, m in own.items()) == (variant == "random 50 %")
            assert sum(int(m.sum()) for m in drawn.values()) == kept
            narrow, surviving = final(at_[variant, "narrow"])["macs_physical"], final(at_[variant, ""])["macs"]
            assert narrow == pytest.approx(surviving, rel=0.1)


def test_lines_set_each_variant_beside_its_own_fedavg(compared):
    suite, found, out, _ = compared
    made = comparison_lines(suite, found, out)
    assert [line.name for line in made[:2]] == ["FedAvg", "FedAvg, server momentum"]
    by_name = {line.name: line for line in made}
    for variant, dense, known in (
        ("random 50 %", "FedAvg", set()),
        ("channels", "FedAvg, server momentum", {"ramped"}),
    ):
        line = by_name[variant]
        assert set(line.differences) == {"dense", "random", "shuffled", "narrow"} | known
        differences = [line.runs[s].quality - by_name[dense].runs[s].quality for s in suite.seeds]
        assert line.differences["dense"] == interval(differences)
        assert by_name[f"{variant}: narrow"].differences == {}
        for seed, one in line.runs.items():
            other = by_name[dense].runs[seed]
            assert line.needed["bytes"] is None or cost_to_reach(one.by_bytes, other.quality)
    assert by_name["random 50 %"].differences["random"].mean == 0
    assert by_name["random 50 %"].better == frozenset()  # of two seeds
    assert "level with random" in by_name["random 50 %"].verdict  # it is the same run
    assert any(line.front for line in made)


def test_a_second_fedavg_has_a_line_of_its_own_and_changes_no_figure_of_another(compared, tmp_path):
    """Two variants differ in the learning rate: each has its own FedAvg, and changes no other's figures."""
    suite, found, whole, _ = compared
    slow = {"method": "random", "schedule.sparsity": 0.5, "training.lr": 1e-6}
    more = tiny(variants={"slow": slow, **suite.variants}, controls=["dense", "random"])
    shutil.copytree(whole, tmp_path / "more")  # what is equal has been run
    cells_ = grid.run_suite(more, tmp_path / "more", jobs=2)
    by_name = {line.name: line for line in comparison_lines(more, cells_, tmp_path / "more")}
    before = {line.name: line for line in comparison_lines(suite, found, whole)}
    assert {"FedAvg", "FedAvg, server momentum", "FedAvg, lr 1e-06", "slow"} < set(by_name)
    assert next(iter(by_name)) == "FedAvg"
    changes = {"front": True, "better": frozenset(), "level": frozenset(), "differences": {}}
    for name in ("FedAvg", "FedAvg, server momentum", *suite.variants):
        one, other = by_name[name], before[name]
        # by what they say: a value that is no number is not equal to itself
        assert repr(replace(one, **changes)) == repr(replace(other, **changes)), name
        assert all(one.differences[control] == other.differences[control] for control in one.differences)
    slow_dense = by_name["FedAvg, lr 1e-06"]
    assert by_name["slow"].differences["dense"].mean == pytest.approx(
        by_name["slow"].of("quality").mean - slow_dense.of("quality").mean
    )
    assert abs(by_name["slow"].differences["dense"].mean) < 0.1  # neither of them learns
    trained = {c.control: c.study.training.lr for c in cells_ if c.variant == "slow"}
    assert trained == {"": 1e-6, "dense": 1e-6, "random": 1e-6}  # who learns weights is compared under one training
    assert {c.study.training.lr for c in cells_ if c.variant in suite.variants} == {0.1}


def test_what_learns_scores_is_trained_as_it_recommends_and_its_controls_are_not(monkeypatch):
    """Suite's common settings < what the method recommends < what the variant says; twins train weights."""
    find = methods.find("fedpm")
    monkeypatch.setattr(find, "recommended", {"optimiser": "adam", "lr": 0.3})
    common = {**tiny().common, "training.lr": 0.2, "training.momentum": 0.5}
    suite = tiny(common=common, variants={"FedPM": {"method": "fedpm"}, "own": {"method": "fedpm", "training.lr": 0.4}})
    trained = {(c.variant, c.control): c.study.training for c in cells(suite) if c.seed == 0}
    assert {who: (t.optimiser, t.lr, t.momentum, t.epochs) for who, t in trained.items()} == {
        ("FedPM", ""): ("adam", 0.3, 0.5, 1),
        ("FedPM", "dense"): ("sgd", 0.2, 0.5, 1),
        ("own", ""): ("adam", 0.4, 0.5, 1),
        ("own", "dense"): ("sgd", 0.2, 0.5, 1),
    }
    assert len({c.study.hash() for c in cells(suite) if c.seed == 0 and c.control}) == 1


def test_controls_of_what_learns_scores_train_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(methods.find("fedpm"), "recommended", {"optimiser": "adam", "lr": 0.3})
    suite = tiny(seeds=[0], variants={"FedPM": {"method": "fedpm"}}, controls=["dense", "random", "shuffled", "ramped"])
    trained = {c.control: c.study.training for c in grid.run_suite(suite, tmp_path / "out", jobs=1)}
    assert (trained[""].optimiser, trained[""].lr) == ("adam", 0.3)
    assert set(trained) == {"", "dense", "random", "shuffled"}
    assert {(t.optimiser, t.lr) for name, t in trained.items() if name} == {("sgd", 0.1)}


def test_scores_without_an_optimiser_of_their_own_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(methods.find("fedpm"), "recommended", {})
    suite = tiny(variants={"FedPM": {"method": "fedpm", "training.epochs": 2}})
    with pytest.raises(ConfigError, match="variant 'FedPM': fedpm is a method without recommended settings") as caught:
        grid.run_suite(suite, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert cells(tiny(variants={"FedPM": {"method": "fedpm", "training.lr": 0.1}}))


def test_a_ramped_control_is_as_sparse_as_its_variant_in_every_round(tmp_path):
    suite = tiny(
        seeds=[0], common={**tiny().common, "rounds": 5}, controls=["ramped", "random"],
        variants={"FedSparsify 80 %": {"method": "fedsparsify", "schedule.sparsity": 0.8},
                  "Local 80 %": {"method": "fedsparsify_local", "schedule.sparsity": 0.8},
                  "one-shot 80 %": {"method": "oneshot", "schedule.sparsity": 0.8, "schedule.at": -2},
                  "at once": {"method": "oneshot", "schedule.sparsity": 0.8, "schedule.at": 0},
                  "AutoFLIP": {"method": "autoflip", "criterion.explore.epochs": 1}},
    )  # fmt: skip
    found = grid.run_suite(suite, tmp_path / "out", jobs=2)
    ramps = {}
    for cell in found:
        text = (grid.folder_of(tmp_path / "out", cell.study) / ROUNDS).read_text()
        ramps[cell.variant, cell.control] = [round(json.loads(r)["sparsity"], 3) for r in text.splitlines()]
    assert {variant for variant, control in ramps if control == "ramped"} == {
        "FedSparsify 80 %", "Local 80 %", "one-shot 80 %",
    }  # fmt: skip
    for name in ("FedSparsify 80 %", "one-shot 80 %"):
        assert ramps[name, "ramped"] == ramps[name, ""]
        assert ramps[name, "ramped"][0] == 0
        assert ramps[name, "random"] == [ramps[name, ""][-1]] * 5
    assert ramps["Local 80 %", "ramped"][-1] == ramps["Local 80 %", ""][-1]  # a vote may keep more than was asked


# ---- personal models


def test_personal_models_stand_in_a_table_of_their_own(tmp_path):
    suite = tiny(
        variants={"DisPFL 50 %": {"method": "dispfl", "target": 0.5, "evaluate_every": 2},
                  "Sub-FedAvg 50 %": {"method": "subfedavg", "target": 0.5, "share": 0.5, "accuracy": 0.0},
                  "FedSparsify 50 %": {"method": "fedsparsify", "schedule.sparsity": 0.5}},
        common={**tiny().common, "data.test_fraction": 0.5},
    )  # fmt: skip
    out = tmp_path / "out"
    found = grid.run_suite(suite, out, jobs=2)
    made = comparison_lines(suite, found, out)
    server, own = tables.by_place(made).items()
    assert (server[0], own[0]) == ("iid", "iid, clients' own rows")
    assert [line.name for line in server[1] if not line.control] == ["FedSparsify 50 %"]
    assert [line.name for line in own[1]] == [
        "FedAvg", "DisPFL 50 %", "DisPFL 50 %: random", "Sub-FedAvg 50 %", "Sub-FedAvg 50 %: random",
        "FedSparsify 50 %",
    ]  # fmt: skip
    by_name = {line.name: line for line in own[1]}
    for variant in ("DisPFL 50 %", "Sub-FedAvg 50 %"):
        line, drawn_ = by_name[variant], by_name[f"{variant}: random"]
        assert set(line.differences) == {"dense", "random"}
        for name, other in (("dense", by_name["FedAvg"]), ("random", drawn_)):
            differences = [line.runs[s].local - other.runs[s].local for s in suite.seeds]
            assert line.differences[name] == interval(differences)
        assert line.of("local_sparsity").mean > 0.4
        assert drawn_.of("sparsity").mean == pytest.approx(line.of("local_sparsity").mean, abs=2e-3)
        assert (line.equal, line.needed, line.to_target) == ({}, {}, {})
    rows = tables.table(own[1])
    assert "accuracy on own rows %" in rows[0]
    assert "accuracy %" not in rows[0]
    assert "own test rows" in tables.note(own[1])
    assert tables.brief(made, "iid", rows="own")[1]["method"].endswith("DisPFL 50 %")
    alone = tiny(variants={"FedSparsify 50 %": suite.variants["FedSparsify 50 %"]}, common=suite.common)
    kept = [cell for cell in found if cell.variant in alone.variants]
    assert repr(comparison_lines(alone, kept, out)) == repr(server[1])  # nothing of it is a personal model's
    tables.write(suite, found, made, out)
    assert "**iid, clients' own rows**" in (out / "table.md").read_text()
    fits, _ = tables.within(made, 1e12)
    assert len({(line.partition, line.name) for line in fits}) == len(fits)


def test_personal_models_without_own_rows_are_one_line(tmp_path):
    suite = tiny(variants={"DisPFL": {"method": "dispfl"}}, common={**tiny().common, "data.test_fraction": 0})
    with pytest.raises(ConfigError, match=r"variant 'DisPFL': dispfl .*data.test_fraction = 0 leaves none"):
        grid.run_suite(suite, tmp_path / "out")


# ---- verdicts


def ended(quality, bytes_=1000, *, before=0.5, metric=ACCURACY, local=0.0, seconds=10.0):
    """Return an outcome with two evaluations: ``before`` at half of what it cost, ``quality`` at the end."""
    curve = ((bytes_ / 2, before), (float(bytes_), quality))
    by_seconds = ((seconds / 2, before), (seconds, quality))
    return Outcome(metric, quality, local or quality, quality, 0.5, bytes_, seconds, 10, 10, 10,
                   ((1.0, before), (2.0, quality)), curve, by_seconds)  # fmt: skip


def group(variant, qualities, control="", **more):
    of = {seed: ended(quality, **more) for seed, quality in enumerate(qualities)}
    return Group(variant, control, of, "FedAvg", personal=False)


def test_a_target_is_judged_on_validation_rows():
    """By test rows .9 is reached at the end; by validation rows at half of the cost, or never."""
    tested = ended(0.95)
    early = replace(tested, validation_by_round=((1.0, 0.92), (2.0, 0.93)), validation=0.93)
    never = replace(tested, validation_by_round=((1.0, 0.5), (2.0, 0.6)), validation=0.6)
    found = {}
    for name, one in (("by test", tested), ("early", early), ("never", never)):
        (line,) = compare_groups("iid", [Group(name, "", {0: one, 1: one})], target=0.9)
        found[name] = line.to_target["bytes"]
    assert (found["by test"].mean, found["early"].mean, found["never"]) == (1000, 500, None)


def test_verdicts_are_corrected_for_how_many_are_asked():
    """Differences .03, .04, .05: t = 4 sqrt(3) = 6.93, and p = (1 - 6.93 / sqrt(50)) / 2 = 0.0101.

    Alone it is shown at 5 %. Of five that are alike 5 x 0.0101 = 0.0505 is not.
    """
    dense = group("FedAvg", [0.8, 0.8, 0.8], "dense")
    few = [group("A", [0.83, 0.84, 0.85]), group("A", [0.8, 0.8, 0.8], "random")]
    others = [each for n in range(4)
              for each in (group(f"B{n}", [0.73, 0.74, 0.75]), group(f"B{n}", [0.7, 0.7, 0.7], "random"))]  # fmt: skip
    line = compare_groups("iid", [dense, *few])[1]
    assert p_greater(line.differences["random"]) == pytest.approx((1 - math.sqrt(48) / math.sqrt(50)) / 2)
    assert (line.better, line.verdict) == ({"random"}, "")
    crowded = compare_groups("iid", [dense, *few, *others])[1]
    assert crowded.differences == line.differences
    assert (crowded.better, crowded.verdict) == (set(), "not shown to be better than random")


@pytest.mark.parametrize(
    ("qualities", "margin", "told"),
    [
        # differences -.001, 0, .001: standard error .001 / sqrt 3, t = .01 sqrt(3) / .001 = 17.3, p = .0017
        ([0.799, 0.8, 0.801], 0.0, "level with dense, random"),
        # the same within .001: t = sqrt 3, p = .113
        ([0.799, 0.8, 0.801], 0.001, "not shown to be better than random"),
        # -.02, 0, .02: t = .01 sqrt(3) / .02 = .87, p = .24: nothing is shown, and nothing is claimed
        ([0.78, 0.8, 0.82], 0.0, "not shown to be better than random"),
        ([0.78, 0.8, 0.82], 0.2, "level with dense, random"),
    ],
)
def test_level_is_only_what_lies_within_a_margin(qualities, margin, told):
    groups = [group("FedAvg", [0.8] * 3, "dense"), group("A", qualities), group("A", [0.8] * 3, "random")]
    line = compare_groups("iid", groups, margin=margin)[1]
    assert line.verdict == told


def test_the_margin_of_an_error_is_a_share_of_the_others():
    """10.3, 10.4, 10.5 beside 10: within 5 %, which is 0.5, t = 0.1 sqrt(3) / 0.1 and p = .11; within 20 % it is."""

    def line(usual):
        groups = [group("FedAvg", [usual] * 3, "dense", metric=MAE), group("A", [10.3, 10.4, 10.5], metric=MAE)]
        return compare_groups("iid", groups)[1]

    assert line(10.0).differences["dense"].mean == pytest.approx(-0.4)
    assert line(10.0).level == set()
    assert line(10.4).level == {"dense"}  # 0.52 either way: t = 5.2 sqrt 3


def test_one_seed_gives_no_verdict():
    groups = [group("FedAvg", [0.8], "dense"), group("A", [0.9]), group("A", [0.1], "random")]
    made = compare_groups("iid", groups)
    assert (made[1].better, made[1].level, made[1].verdict) == (set(), set(), "")
    assert "One seed: no verdict." in tables.note(made)
    with pytest.raises(ConfigError, match=r"margin = 0.02 asks for a verdict, which one seed cannot give"):
        cells(tiny(seeds=[0], margin=0.02))


def test_cost_is_told_pair_by_pair():
    """A spends 400 and has .7 then; FedAvg, which spends 1000, has .5 from 500 on, and nothing before.

    B spends 3000: when FedAvg had spent its 1000 and had .8, B had nothing yet; it has .5 from 1500 on, .9 at the end.
    C spends 1000 as FedAvg does.
    """
    dense = group("FedAvg", [0.8, 0.8], "dense")
    costly = group("B", [0.9, 0.9], bytes_=3000)
    like = group("C", [0.85, 0.83], seconds=5.0)
    made = {line.name: line for line in compare_groups("iid", [dense, costly, like])}
    assert made["C"].equal["bytes"].mean == pytest.approx(0.04)
    assert made["C"].equal["seconds"].mean == pytest.approx(0.34)  # FedAvg had .5 after 5 of its 10 seconds
    assert made["C"].needed["bytes"].mean == 1000
    assert made["B"].equal["bytes"] is None
    assert made["B"].needed["bytes"].mean == 3000
    assert made["B"].to_target["bytes"].mean == 3000  # 95 % of .8
    assert (made["FedAvg"].equal, made["FedAvg"].to_target["bytes"].mean) == ({}, 1000)
    cheap = group("A", [0.7, 0.7], bytes_=4, before=0.1)
    with_ = {line.name: line for line in compare_groups("iid", [dense, cheap, costly, like])}
    assert with_["A"].equal["bytes"] is None
    assert with_["A"].needed["bytes"] is None
    for name, line in made.items():
        assert (with_[name].equal, with_[name].needed, with_[name].to_target) == (
            line.equal, line.needed, line.to_target,
        )  # fmt: skip
    row = tables.table(list(with_.values()))[1]
    assert (row["to dense at equal bytes"], row["bytes to dense"]) == ("no score by then", "not reached")


def test_outcomes_are_read_from_the_records(compared):
    _, found, out, _ = compared
    folder = grid.folder_of(out, found[0].study)
    one = outcomes.outcome(folder)
    rows = [json.loads(line) for line in (folder / ROUNDS).read_text().splitlines()]
    assert one.bytes == sum(r["bytes_down"] + r["bytes_up"] for r in rows)
    assert one.by_round == [(r["round"], r["accuracy"]) for r in rows]
    weights, mask, _ = checkpoint.shipped(folder)
    assert one.size == len(codec.encode(Message(weights, mask)))
    kept = sum(int(m.sum()) for m in mask.values()) + sum(t.numel() for n, t in weights.items() if n not in mask)
    assert 0 < one.size < 4 * kept + sum(m.numel() for m in mask.values())  # float32 of what is kept, and the mask
    carried = list(itertools.accumulate(r["bytes_down"] + r["bytes_up"] for r in rows))
    assert one.by_bytes == [(c, r["accuracy"]) for c, r in zip(carried, rows, strict=True)]
    assert one.quality == json.loads((folder / SUMMARY).read_text())["final"]["accuracy"]


def test_tables_are_written_and_say_the_same(compared):
    suite, found, out, _ = compared
    made = comparison_lines(suite, found, out)
    tables.write(suite, found, made, out)
    facts = json.loads((out / RESULT).read_text())
    assert [line["name"] for line in facts["lines"]] == [line.name for line in made]
    assert read_comparison(out) == (suite, found)
    rows = tables.table(made)
    text = (out / "table.md").read_text()
    assert text.startswith("**iid**, 2 seeds\n\n* on the Pareto front")
    assert "95 % interval (Student's t) over 2 seeds" in text
    assert "the 7 of this table corrected together by Holm" in text  # 3 and 4 controls but FedAvg
    assert "\n\n| method | accuracy % |" in text
    for row in rows:
        assert f"| {' | '.join(row.values())} |" in text
    latex = (out / "table.tex").read_text()
    assert r"accuracy \%" in latex
    assert latex.count(r"\\") == len(rows) + 1


def test_spreads_are_written_where_there_are_some():
    assert formatting.spread(Interval(0.5, 0.012, 3), formatting.percent) == "50.0 ± 1.2"
    assert formatting.spread(Interval(0.5, math.inf, 1), formatting.percent) == "50.0"
    assert formatting.spread(None, formatting.percent) == "not reached"
    row = {"method": "a_b & c", "x %": "1 ± 2"}
    assert formatting.latex([row]).splitlines()[2:5] == [r"method & x \% \\", r"\midrule", r"a\_b \& c & 1 $\pm$ 2 \\"]
    assert formatting.markdown([row]).splitlines()[-1] == "| a_b & c | 1 ± 2 |"


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.long
def test_a_comparison_killed_at_any_moment_goes_on_and_ends_the_same(compared, tmp_path):
    """Three kills of the parent alone, at random moments; nothing is run twice, nothing is missing."""
    import tomli_w

    suite, found, whole, _ = compared
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(suite.model_dump()))
    out = tmp_path / "out"
    command = [SECATEUR, "compare", str(tmp_path / "mine.toml"), "--out", str(out), "--jobs", "2"]
    draw = random.Random(5)
    for _ in range(3):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(draw.uniform(3.0, 9.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        end = time.monotonic() + 20
        while alive(process.pid) and time.monotonic() < end:
            time.sleep(0.1)
        assert not alive(process.pid)  # its workers do not outlive it
    finished = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/summary.json")}
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    folders = {grid.folder_of(out, cell.study) for cell in found}
    assert {p.parent for p in out.glob("runs/*/summary.json")} == folders

    def told(place):
        lines = comparison_lines(suite, found, place)
        return [(line.name, [(s, one.quality, one.bytes, one.sparsity, one.macs) for s, one in line.runs.items()])
                for line in lines]  # fmt: skip

    assert told(out) == told(whole)
    for cell in found:
        one, other = (grid.folder_of(place, cell.study) for place in (out, whole))
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_failing_run_is_named(tmp_path):
    suite = tiny(variants={"two": {"method": "fedconv"}}, controls=[])
    with pytest.raises(ConfigError, match=r"two, iid, seed 0 \(.*fedconv trains at the server"):
        grid.run_suite(suite, tmp_path / "out", jobs=1)


def test_a_run_without_a_result_is_named_and_in_no_figure(tmp_path, monkeypatch, capsys):
    """One variant diverges: the others are compared all the same, and the end is an error."""
    variants = {"wild": {"method": "oneshot", "training.lr": 1e30}, "random 50 %": tiny().variants["random 50 %"]}
    suite, out = tiny(variants=variants, controls=["dense", "random"]), tmp_path / "out"
    found = grid.run_suite(suite, out, jobs=2)
    assert {(cell.variant, cell.control) for cell in found} == {
        ("wild", ""), ("wild", "dense"), ("random 50 %", ""), ("random 50 %", "dense"), ("random 50 %", "random")
    }  # fmt: skip
    lines = comparison_lines(suite, found, out)
    assert {(line.name, len(line.runs)) for line in lines if line.control in {"", "dense"}} == {
        ("FedAvg", 2), ("random 50 %", 2)
    }  # fmt: skip
    tables.write(suite, found, lines, out)
    _, again, subjects, ended = gather([out])
    assert ended
    assert [line.name for line in again] == [line.name for line in lines]
    failed = {subject.name: subject.failed for subject in subjects if subject.failed}
    assert set(failed) >= {"wild, iid, seed 0", "wild, iid, seed 1"}
    assert all("its loss is" in why for why in failed.values())
    page.write("title", again, subjects, out / "page")
    told = page.read(out / "page" / "data.js")["failed"]
    assert dict(told) == failed
    places = [s.name for s in subjects]
    facts = page.read(out / "page" / "runs" / f"{places.index('wild, iid, seed 0')}.js")
    assert facts["failed"] == failed["wild, iid, seed 0"]
    (tmp_path / "suite.toml").write_text(tomli_w.dumps(suite.model_dump()))
    asked = ["secateur", "compare", str(tmp_path / "suite.toml"), "--out", str(out), "--jobs", "2", "--no-open"]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "runs have no result, and are in no figure: wild, iid, seed 0: no first step" in capsys.readouterr().err
    with pytest.raises(NoResultError, match="no first step"):
        outcome(grid.folder_of(out, found[0].study))


# ---- links


def row(each, seconds):
    return {"each": each, "each_seconds": seconds}


def test_a_round_takes_as_long_as_its_slowest_client():
    bandwidth = Bandwidth.parse("8Mbit/s,100ms")
    rows = [row([[0, 1_000_000, 500_000], [3, 2_000_000, 0]], [[0, 1.0]]), row([], [])]
    # client 0: 0.2 + 1 + 1 + 0.5; client 3 sent nothing back: 0.2 + 2
    assert [spent.seconds for spent in predict(rows, bandwidth, 10)] == pytest.approx([2.7, 0.0])
    assert predict(rows, bandwidth, 10)[0] == Spent(pytest.approx(1.7), 0.0, 1.0)
    assert bytes_per_client([*rows, rows[0]]) == {0: 3_000_000, 3: 4_000_000}
    assert bandwidth.greeting == Spent()


def test_an_exchange_on_flower_has_a_fixed_cost_and_a_protocol():
    bandwidth = Bandwidth.parse("8/4Mbit/s,flower:6.5s")
    scored = row([[0, 1_000_000, 500_000]], [[0, 1.0]]) | {"evaluate_each": [[0, 1_000_000, 100], [1, 100, 100]]}
    # by hand: down 1,080,000 + 12,000 at 1 MB/s; up 540,000 + 25,000 at 0.5 MB/s; the scores: 1.092 and 25,108 up
    (spent,) = predict([scored], bandwidth, 2)
    assert spent == Spent(pytest.approx(1.092 + 1.13 + 1.092 + 0.050216), 13.0, 1.0)
    assert bandwidth.greeting == Spent(pytest.approx(0.012 + 0.05), 6.5)
    assert bytes_per_client([scored]) == {0: 2_500_100, 1: 200}
    # 6.5 + 0.5 s an exchange besides bytes: a tenth of it all is 7 / 9 s, at 1.5 us a byte on the way down and up
    assert bandwidth.unseen(Spent(3.0, 13.0, 1.0), 2) == pytest.approx(7 / 9 / 1.5e-6)


def test_the_fixed_cost_is_calibrated_from_a_runs_records(tmp_path):
    asked = [row([[0, 9, 9]], [[0, 0.5], [1, 0.2]]) | {"seconds": s, "left_out": []} for s in (5.5, 4.5, 9.5)]
    late = row([[0, 9, 9]], [[0, 0.5]]) | {"seconds": 60.0, "left_out": [{"client": 1}]}
    assert fixed_of([*asked, late]) == pytest.approx(5.0)
    with pytest.raises(ConfigError, match="no exchange of that run tells the fixed seconds"):
        fixed_of([late])
    (tmp_path / ROUNDS).write_text("".join(json.dumps(one) + "\n" for one in [*asked, late]))
    network = _network(f"0.5:1Mbit/s; 0.5:10Mbit/s,50ms,flower:{tmp_path}")
    assert [kind.fixed for kind in network.kinds] == [0.0, pytest.approx(5.0)]
    with pytest.raises(ConfigError, match="or a run's folder that tells them"):
        _network("1Mbit/s,flower:nowhere")


def test_links_by_kind():
    kinds = Bandwidth.parse("0.75:20/5Mbit/s,10ms; 0.25:1MB/s").kinds
    assert kinds == (Link(20e6, 5e6, 0.01, 0.75), Link(8e6, 8e6, 0.0, 0.25))
    bandwidth = Bandwidth(kinds)
    assert [bandwidth.of(k, 4) is kinds[0] for k in range(4)] == [True, True, True, False]
    for wrong in (
        "fast", "10Mbit", "0.5:1Mbit/s", "0Mbit/s", "0.5:1Mbit/s;0.6:1Mbit/s", "10Mbit/s,5s", "1Mbit/s,flower",
        "1Mbit/s,flower:s",
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="link"):
            Bandwidth.parse(wrong)


def test_predictions_stand_beside_what_was_measured(compared):
    suite, found, out, _ = compared
    fast, slow = (comparison_lines(suite, found, out, Bandwidth.parse(text)) for text in ("1Gbit/s", "100kbit/s,50ms"))
    for one, other in zip(fast, slow, strict=True):
        for seed in one.runs:
            assert other.runs[seed].by_link[-1][0] > one.runs[seed].by_link[-1][0]
            assert other.runs[seed].on_link.seconds > other.runs[seed].by_link[-1][0]  # scores at the end
            assert [q for _, q in one.runs[seed].by_link] == [q for _, q in one.runs[seed].by_bytes]
    rows = tables.table(slow)
    assert all(" s" in row_["seconds on the link (a model)"] and " s" in row_["wall seconds"] for row_ in rows)
    assert all(sum(map(int, row_["of them link, fixed, training %"].split(","))) in range(98, 103) for row_ in rows)
    assert "seconds on the link (a model)" not in tables.table(comparison_lines(suite, found, out))[0]
    (said,) = on_link(slow)
    assert re.match(r"On this link \(a model\) \d+ % of the seconds of .* go to its bytes, \d+ % to", said)
    assert not on_link(comparison_lines(suite, found, out))


def test_a_suite_may_name_its_links(compared, tmp_path):
    suite, found, out, _ = compared
    named = suite.model_copy(update={"link": "0.5:1Mbit/s,50ms; 0.5:8Mbit/s"})
    tables.write(named, found, comparison_lines(named, found, out, named.bandwidth), out)
    for asked in (None, Bandwidth.parse("1kbit/s")):
        _, lines, _, _ = gather([out], asked)
        expected = comparison_lines(suite, found, out, asked or Bandwidth.parse("0.5:1Mbit/s,50ms;0.5:8Mbit/s"))
        assert [line.runs for line in lines] == [line.runs for line in expected]
        assert all("seconds on the link (a model)" in row for row in tables.table(lines))


def test_a_budget_is_kept_by_every_client_of_every_seed(compared):
    suite, found, out, _ = compared
    made = comparison_lines(suite, found, out)
    carried = sorted({max(one.client_bytes for one in line.runs.values()) for line in made})
    fits, over = tables.within(made, carried[1])
    assert {line.name for line in fits} | {line.name for line in over} == {line.name for line in made}
    assert all(max(one.client_bytes for one in line.runs.values()) <= carried[1] for line in fits)
    qualities = [line.of("quality").mean for line in fits]
    assert qualities == sorted(qualities, reverse=True)
    assert len(tables.budget_table(fits)) == len(fits)
    folder = grid.folder_of(out, found[0].study)
    rows = [json.loads(line) for line in (folder / ROUNDS).read_text().splitlines()]
    assert sum(bytes_per_client(rows).values()) == sum(r["bytes_down"] + r["bytes_up"] for r in rows)
