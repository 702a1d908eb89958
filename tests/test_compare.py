"""Comparisons: statistics by hand, grids, controls, a kill at any moment."""

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import model_of
from secateur import checkpoint, compare, outcomes, page, standings
from secateur import run as runs
from secateur.errors import ConfigError
from secateur.report import standing
from secateur.report.links import Link, Links, per_client, predicted
from secateur.report.statistics import Interval, at, front, interval, paired, reach
from secateur.suite import Suite, cells, chosen, load, names
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
    assert Interval(1.0, 0.5, 3).above
    assert not Interval(1.0, 1.5, 3).above
    assert Interval(-1.0, 0.5, 3).below


def test_differences_are_taken_seed_by_seed():
    found = paired({0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.0, 3: 7.0})
    assert (found.mean, found.count) == (0.75, 2)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_what_was_reached_when():
    curve = [(10.0, 0.3), (20.0, 0.6), (30.0, 0.5), (40.0, 0.8)]
    assert (at(curve, 35), at(curve, 20), at(curve, 5)) == (0.5, 0.6, None)
    assert (reach(curve, 0.55), reach(curve, 0.7), reach(curve, 0.9)) == (20.0, 40.0, None)
    assert reach(curve, 0.35, least=True) == 10.0


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_the_front_is_what_nothing_beats(points):
    best = front(points)
    for name, (cost, quality) in points.items():
        beaten = any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points.values())
        assert (name in best) == (not beaten)
    assert [points[name] for name in best] == sorted(points[name] for name in best)


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
    assert names() == ["brain-age", "cifar", "fashion", "hospitals", "quick", "shakespeare"]
    for name in names():
        suite = load(name)
        assert suite.title
        assert len(suite.seeds) >= 3
        data = None if suite.source in {"digits", "communities"} else "PLACE"
        if data:
            with pytest.raises(ConfigError, match="say where that is with --data"):
                cells(suite)
        assert cells(suite, data)
    quick = load("quick")
    assert len(quick.variants) >= 6


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"variants": {}}, "variants: dictionary should have at least 1 item"),
        ({"seeds": ["one"]}, "seeds.0: input should be a valid integer"),
        ({"colour": 1}, "colour: extra inputs are not permitted"),
        ({"link": "fast"}, "link 'fast': write it as 10Mbit/s,50ms"),
        ({"controls": ["placebo"]}, "controls.0: input should be 'dense', 'random', 'shuffled' or 'narrow'"),
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
        compare.play(suite, tmp_path / "out")
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
    found = compare.play(tiny(), out, jobs=2, told=lambda *counts: told.append(counts))
    return tiny(), found, out, told


def test_every_cell_has_run_with_its_controls(compared):
    _, found, out, told = compared
    by_control = {
        c: [cell for cell in found if cell.control == c] for c in ("", "dense", "random", "shuffled", "narrow")
    }
    assert {name: len(group) for name, group in by_control.items()} == dict.fromkeys(by_control, 4)
    assert all((compare.folder_of(out, cell.study) / runs.SUMMARY).exists() for cell in found)
    assert told[-1][0] == told[-1][1] == len({compare.folder_of(out, cell.study) for cell in found})
    assert told[-1][2] == told[-1][3] == 2 * told[-1][0]
    # what is equal is shared: the random control of a random mask of the same sparsity is the very run
    for cell in by_control["random"]:
        own = next(c for c in by_control[""] if (c.variant, c.seed) == (cell.variant, cell.seed))
        same_run = compare.folder_of(out, own.study) == compare.folder_of(out, cell.study)
        assert same_run == (cell.variant == "random 50 %")


def test_controls_match_what_they_control(compared):
    suite, found, out, _ = compared
    for seed in suite.seeds:
        at_ = {(c.variant, c.control): compare.folder_of(out, c.study) for c in found if c.seed == seed}

        def weights(folder):
            return {n: t for n, t in model_of(folder).items() if n.startswith("mask/") and n.endswith("weight")}

        def final(folder):
            return json.loads((folder / runs.SUMMARY).read_text())["final"]

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
    made = standings.lines(suite, found, out)
    assert [line.name for line in made[:2]] == ["FedAvg", "FedAvg, server momentum"]
    by_name = {line.name: line for line in made}
    for variant, dense in (("random 50 %", "FedAvg"), ("channels", "FedAvg, server momentum")):
        line = by_name[variant]
        assert set(line.apart) == {"dense", "random", "shuffled", "narrow"}
        differences = [line.runs[s].quality - by_name[dense].runs[s].quality for s in suite.seeds]
        assert line.apart["dense"] == interval(differences)
        assert "no better than" in line.verdict or all(line.apart[c].above for c in ("random", "shuffled", "narrow"))
        assert by_name[f"{variant}: narrow"].apart == {}
    assert by_name["random 50 %"].apart["random"].mean == 0
    cheapest = min(one.bytes for line in made for one in line.runs.values())
    for line in made:
        reached = [at(one.carried, cheapest) for one in line.runs.values()]
        assert line.equal_bytes == (None if None in reached else interval(reached))
    assert any(line.front for line in made)


def test_outcomes_are_read_from_the_records(compared):
    _, found, out, _ = compared
    folder = compare.folder_of(out, found[0].study)
    one = outcomes.outcome(folder)
    rows = [json.loads(line) for line in (folder / runs.ROUNDS).read_text().splitlines()]
    assert one.bytes == sum(r["bytes_down"] + r["bytes_up"] for r in rows)
    assert one.rounds == [(r["round"], r["accuracy"]) for r in rows]
    weights, mask, _ = checkpoint.shipped(folder)
    assert one.size == len(codec.encode(Message(weights, mask)))
    kept = sum(int(m.sum()) for m in mask.values()) + sum(t.numel() for n, t in weights.items() if n not in mask)
    assert 0 < one.size < 4 * kept + sum(m.numel() for m in mask.values())  # float32 of what is kept, and the mask
    carried = list(itertools.accumulate(r["bytes_down"] + r["bytes_up"] for r in rows))
    assert one.carried == [(c, r["accuracy"]) for c, r in zip(carried, rows, strict=True)]
    assert one.quality == json.loads((folder / runs.SUMMARY).read_text())["final"]["accuracy"]


def test_tables_are_written_and_say_the_same(compared):
    suite, found, out, _ = compared
    made = standings.lines(suite, found, out)
    standings.write(suite, found, made, out)
    facts = json.loads((out / standings.RESULT).read_text())
    assert [line["name"] for line in facts["lines"]] == [line.name for line in made]
    assert standings.saved(out) == (suite, found)
    rows = standings.table(made)
    text = (out / "table.md").read_text()
    assert text.startswith("**iid**, 2 seeds\n\n| method | accuracy % |")
    for row in rows:
        assert f"| {' | '.join(row.values())} |" in text
    latex = (out / "table.tex").read_text()
    assert r"accuracy \%" in latex
    assert latex.count(r"\\") == len(rows) + 1


def test_spreads_are_written_where_there_are_some():
    assert standing.spread(Interval(0.5, 0.012, 3), standing.percent) == "50.0 ± 1.2"
    assert standing.spread(Interval(0.5, math.inf, 1), standing.percent) == "50.0"
    assert standing.spread(None, standing.percent) == "not reached"
    row = {"method": "a_b & c", "x %": "1 ± 2"}
    assert standing.latex([row]).splitlines()[2:5] == [r"method & x \% \\", r"\midrule", r"a\_b \& c & 1 $\pm$ 2 \\"]
    assert standing.markdown([row]).splitlines()[-1] == "| a_b & c | 1 ± 2 |"


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


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
    folders = {compare.folder_of(out, cell.study) for cell in found}
    assert {p.parent for p in out.glob("runs/*/summary.json")} == folders

    def told(place):
        lines = standings.lines(suite, found, place)
        return [(line.name, [(s, one.quality, one.bytes, one.sparsity, one.macs) for s, one in line.runs.items()])
                for line in lines]  # fmt: skip

    assert told(out) == told(whole)
    for cell in found:
        one, other = (compare.folder_of(place, cell.study) for place in (out, whole))
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_failing_run_is_named(tmp_path):
    suite = tiny(variants={"two": {"method": "fedconv"}}, controls=[])
    with pytest.raises(ConfigError, match=r"two, iid, seed 0 \(.*fedconv trains at the server"):
        compare.play(suite, tmp_path / "out", jobs=1)


# ---- links


def row(each, seconds):
    return {"each": each, "each_seconds": seconds}


def test_a_round_takes_as_long_as_its_slowest_client():
    links = Links.parse("8Mbit/s,100ms")
    rows = [row([[0, 1_000_000, 500_000], [3, 2_000_000, 0]], [[0, 1.0]]), row([], [])]
    # client 0: 0.2 + 1 + 1 + 0.5; client 3 sent nothing back: 0.2 + 2
    assert predicted(rows, links, 10) == pytest.approx([2.7, 0.0])
    assert per_client([*rows, rows[0]]) == {0: 3_000_000, 3: 4_000_000}


def test_links_by_kind():
    kinds = Links.parse("0.75:20/5Mbit/s,10ms; 0.25:1MB/s").kinds
    assert kinds == (Link(20e6, 5e6, 0.01, 0.75), Link(8e6, 8e6, 0.0, 0.25))
    links = Links(kinds)
    assert [links.of(k, 4) is kinds[0] for k in range(4)] == [True, True, True, False]
    for wrong in ("fast", "10Mbit", "0.5:1Mbit/s", "0Mbit/s", "0.5:1Mbit/s;0.6:1Mbit/s", "10Mbit/s,5s"):
        with pytest.raises(ConfigError, match="link"):
            Links.parse(wrong)


def test_predictions_stand_beside_what_was_measured(compared):
    suite, found, out, _ = compared
    fast, slow = (standings.lines(suite, found, out, Links.parse(text)) for text in ("1Gbit/s", "100kbit/s,50ms"))
    for one, other in zip(fast, slow, strict=True):
        for seed in one.runs:
            assert other.runs[seed].linked[-1][0] > one.runs[seed].linked[-1][0]
            assert [q for _, q in one.runs[seed].linked] == [q for _, q in one.runs[seed].carried]
    rows = standings.table(slow)
    assert all(" s" in row_["seconds on the link (a model)"] and " s" in row_["wall seconds"] for row_ in rows)
    assert "seconds on the link (a model)" not in standings.table(standings.lines(suite, found, out))[0]


def test_a_suite_may_name_its_links(compared, tmp_path):
    suite, found, out, _ = compared
    named = suite.model_copy(update={"link": "0.5:1Mbit/s,50ms; 0.5:8Mbit/s"})
    standings.write(named, found, standings.lines(named, found, out, named.links), out)
    for asked in (None, Links.parse("1kbit/s")):
        _, lines, _, _ = page.gathered([out], asked)
        expected = standings.lines(suite, found, out, asked or Links.parse("0.5:1Mbit/s,50ms;0.5:8Mbit/s"))
        assert [line.runs for line in lines] == [line.runs for line in expected]
        assert all("seconds on the link (a model)" in row for row in standings.table(lines))


def test_a_budget_is_kept_by_every_client_of_every_seed(compared):
    suite, found, out, _ = compared
    made = standings.lines(suite, found, out)
    carried = sorted({max(one.client_bytes for one in line.runs.values()) for line in made})
    fits, over = standings.within(made, carried[1])
    assert {line.name for line in fits} | {line.name for line in over} == {line.name for line in made}
    assert all(max(one.client_bytes for one in line.runs.values()) <= carried[1] for line in fits)
    qualities = [line.of("quality").mean for line in fits]
    assert qualities == sorted(qualities, reverse=True)
    assert len(standings.budgeted(fits)) == len(fits)
    folder = compare.folder_of(out, found[0].study)
    rows = [json.loads(line) for line in (folder / runs.ROUNDS).read_text().splitlines()]
    assert sum(per_client(rows).values()) == sum(r["bytes_down"] + r["bytes_up"] for r in rows)
