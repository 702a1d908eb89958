"""The benchmarks: small versions of each, end to end; the README's example."""

import importlib.util
import itertools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from secateur import cli, methods
from secateur.comparison import grid
from secateur.comparison.suite import Suite, cells, load, names
from secateur.errors import CheckpointError
from secateur.federation.folder import ROUNDS, SUMMARY
from secateur.report import results_page, tables
from secateur.report.formatting import amount, size
from secateur.report.gather import comparison_lines
from secateur.study.study import parse_study
from secateur.wire.message import Message

ROOT = Path(__file__).parents[1]


def script(name, monkeypatch):
    """Return a benchmark as a module; one may import another, as scripts of one folder do."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_slim_rows_say_what_was_cut_and_agree_with_the_masked_model(monkeypatch):
    slim = script("slim", monkeypatch)
    for name, kind, multiple in (("mlp", "mlp", 1), ("chartransformer", "transformer", 1), ("twocnn", "conv", 8)):
        row = slim.measure(name, 0.5, multiple, 1)
        assert (row["model"], row["kind"], row["channel_sparsity"]) == (name, kind, 0.5)
        assert row["apart"] < 1e-5
        assert 0.2 < row["macs_ratio"] < 0.6
        assert row["time_ratio"] > 0
        assert f"| {name}" in slim.table([row])
    macs = {m: slim.measure("twocnn", 0.7, m, 1)["macs_ratio"] for m in (1, 8)}
    assert macs[1] < macs[8]  # kept units rounded up


def test_registered_clients_are_counted_on_files_that_are_there(monkeypatch, tmp_path):
    registered = script("registered", monkeypatch)
    monkeypatch.setattr(registered, "COHORT", 4)
    (tmp_path / "shards").mkdir()
    registered.rows(40, tmp_path / "shards")
    row = registered.rounds("subfedavg", 40, 2, tmp_path / "shards", tmp_path / "run")
    assert row["checkpoint"] == (tmp_path / "run" / "checkpoint.safetensors").stat().st_size
    assert 0 < row["store"] < row["file"]
    assert row["seconds"] > row["server"] / 2 > 0
    lines = registered.table([row, {**row, "clients": 80, "checkpoint": 3 * row["checkpoint"]}]).splitlines()
    assert lines[2].startswith("| subfedavg | 40 |")
    assert "| 200 % |" in lines[4]


SUITES = [*names(), *(str(path) for path in sorted((ROOT / "benchmarks").rglob("*.toml")))]


@pytest.mark.parametrize("name", SUITES, ids=lambda name: Path(name).stem)
def test_every_suite_is_sound(name):
    suite = load(name)
    assert suite.title
    once = suite.adjusted(1, partitions=suite.partitions[:1])  # others differ in nothing that could be wrong
    for cell in cells(once, None if suite.source in {"digits", "communities"} else "PLACE"):
        assert cell.study.build_method()
        share = re.search(r"(\d+) %$", cell.variant)
        if share and not cell.control:  # tables by sparsity go by the name
            asked = {path: value for path, value in cell.study.options.items()
                     if path in {"sparsity", "target", "schedule.sparsity"}}  # fmt: skip
            assert list(asked.values()) == [int(share[1]) / 100], cell.variant


def test_no_suite_is_lost():
    stems = {Path(name).stem for name in SUITES}
    assert stems >= {"fashion-long", "fashion-cnn", "masks", "structure", "structure-cifar", "values"}
    assert stems >= {"feddst", "fedtiny", "frl", "hidenseek", "lotteryfl", "prunefl"}


@pytest.mark.parametrize("name", ["fashion", str(ROOT / "benchmarks" / "suites" / "fashion-cnn.toml")])
def test_the_suites_of_all_methods_have_all_methods(name):
    suite = load(name)
    made = {cell.study.method for cell in cells(suite.adjusted(1, partitions=suite.partitions[:1]), "PLACE")}
    # narrow is a control, if it is no variant; the other two answer hostile clients
    assert made | {"narrow", "bristle", "rffl"} == set(methods.names())
    assert "narrow" in made or "narrow" in suite.controls


def test_weights_are_trained_alike_in_the_suite_of_all_methods():
    """A variant may say otherwise, as Complement Sparsification's published code does; then its name says so."""
    suite = load("fashion")
    for variant, settings in suite.variants.items():
        own = {path for path in settings if path.startswith("training.")}
        assert not own or "Adam" in variant
        assert "AutoFLIP" in variant or "aggregator" not in settings


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Return the suite and the folder of a finished comparison: masks, scores, a personal method, narrower models."""
    suite = Suite.model_validate({
        "title": "Tiny", "source": "digits", "seeds": [0, 1], "partitions": ["iid"],
        "common": {"data.clients": 4, "participation": 0.5, "rounds": 2, "model.name": "smallcnn",
                   "training.epochs": 1, "training.batch_size": 64, "data.test_fraction": 0.5},
        "variants": {"half": {"method": "random", "schedule.sparsity": 0.5}, "scores": {"method": "salientgrads"},
                     "thresholds": {"method": "spafl"}, "widths": {"method": "heterofl"}},
        "controls": ["dense", "narrow"],
    })  # fmt: skip
    out = tmp_path_factory.mktemp("compared") / "tiny"
    found = grid.run_suite(suite, out, jobs=1)
    tables.write(suite, found, comparison_lines(suite, found, out), out)
    return suite, found, out


def records(found, out, variant, control=""):
    """Return the records of each seed of a variant."""
    return [
        [json.loads(line) for line in (grid.folder_of(out, cell.study) / ROUNDS).read_text().splitlines()]
        for cell in found
        if (cell.variant, cell.control) == (variant, control)
    ]


def table_of(text, heading):
    """Return a Markdown table below a heading: its rows as dictionaries, by the first cell."""
    below = text.partition(f"{heading}\n")[2].splitlines()
    table = itertools.dropwhile(lambda line: not line.startswith("|"), below)
    lines = itertools.takewhile(lambda line: line.startswith("|"), table)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].removeprefix("* "): dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_the_complete_tables_of_a_comparison_are_a_page(compared, tmp_path, monkeypatch, capsys):
    _, found, out = compared
    monkeypatch.setattr(sys, "argv", ["secateur", "report", str(out), "--markdown", str(tmp_path / "results")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "results/tiny.md" in capsys.readouterr().out.replace("\n", "")
    text = (tmp_path / "results" / "tiny.md").read_text()
    assert text.startswith("# Tiny\n\nSeeds 0, 1; 2 rounds. ")
    assert "95 % interval" in text
    assert "test rows" in text
    quality = table_of(text, "### Quality, every line")
    accuracy = [json.loads(path.read_text())["final"]["accuracy"] for path in out.glob("runs/random-*/summary.json")]
    assert len(accuracy) == 2
    half = 12.7062 * abs(accuracy[0] - accuracy[1]) / 2  # t of one degree; s / sqrt 2 of two values is half their gap
    assert quality["half"]["accuracy %"] == f"{50 * sum(accuracy):.1f} ± {100 * half:.1f}"
    assert quality["half"]["to narrow"]
    assert "half: narrow" in quality
    costs = table_of(text, "### Bytes and training MACs by direction and phase")
    rows = records(found, out, "scores")
    down = [sum(row["bytes_down"] for row in seed) for seed in rows]
    assert costs["scores"]["bytes down"].split(" ± ")[0] == size(sum(down) / 2)
    besides = [sum(row["bytes_down"] + row["bytes_up"] for row in seed if row["phase"] != "train") for seed in rows]
    assert min(besides) > 0
    assert costs["scores"]["of these not in rounds"].split(" ± ")[0] == size(sum(besides) / 2)
    assert costs["half"]["of these not in rounds"] == "0 B"
    computed = [sum(row["train_macs"] for row in seed if row["phase"] != "train") for seed in rows]
    assert costs["scores"]["+ not in rounds"].split(" ± ")[0] == amount(sum(computed) / 2)
    assert [line for line in text.splitlines() if line.startswith("| widths | 1/2 |")]


def test_a_page_of_tables_holds_the_suite_that_makes_it_again(compared, tmp_path):
    suite, _, out = compared
    text = results_page.write(out, tmp_path).read_text()
    assert "secateur compare tiny.toml --out runs/tiny" in text
    (told,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "tiny.toml").write_text(told)
    assert load(str(tmp_path / "tiny.toml")) == suite


@pytest.mark.parametrize("name", SUITES, ids=lambda name: Path(name).stem)
def test_every_suite_survives_being_told(name, tmp_path):
    (tmp_path / "told.toml").write_text(results_page.toml(load(name)))
    assert load(str(tmp_path / "told.toml")) == load(name)


def test_a_suite_of_the_box_is_named_and_not_told(compared):
    _, found, _ = compared
    assert "secateur compare quick --out runs/x" in results_page.caption("x", "quick", load("quick"), found)


def test_tables_are_made_of_finished_comparisons_alone(tmp_path):
    with pytest.raises(CheckpointError, match="holds no finished comparison"):
        results_page.write(tmp_path, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_the_page_of_methods_is_made_of_a_comparison(compared, monkeypatch):
    _, found, out = compared
    text = script("method_page", monkeypatch).page(out)
    costs = {line.split(" | ")[0]: line.split(" | ") for line in text.splitlines() if line.startswith("| `")}
    assert "from the comparison *Tiny* (2 seeds;" in text
    asked = next(line for line in text.splitlines() if line.startswith("| `salientgrads` | s"))
    assert "score: 4 requests" in asked
    dense = next(line for line in text.splitlines() if line.startswith("| `fedavg` | FedAvg")).split(" | ")
    assert dense[6:8] == ["100", "100"]
    spafl = next(line for line in text.splitlines() if line.startswith("| `spafl` | t")).split(" | ")
    assert float(spafl[4].partition(" + ")[0]) < 1  # thresholds alone
    assert "kB" in spafl[-1]  # its weights stay at the client
    assert costs["| `spafl`"][2] == "ships none"  # what its clients have is in the column of their own rows
    local = [json.loads((grid.folder_of(out, cell.study) / SUMMARY).read_text())["final"]["local"]
             for cell in found if cell.variant == "thresholds" and not cell.control]  # fmt: skip
    mean = sum(sum(seed) / len(seed) for seed in local) / 2
    assert costs["| `spafl`"][3].split(" ± ")[0] == f"{100 * mean:.1f}"
    assert costs["| `fedsparsify`"][2:4] == ["not run", "not run"]
    for name in methods.names():
        assert text.count(f"| `{name}` |") == (2 if name in costs_of(found) else 1)


def costs_of(found):
    return {cell.study.method for cell in found if cell.control in {"", "dense"}}


def test_the_page_of_methods_shows_claims_and_recommended_training(monkeypatch):
    page = script("method_page", monkeypatch)
    assert page.claims("fedsparsify").startswith("Reproduced in part: ")
    text = "Reference: x.\nNot reproduced: a\nb.\nNot shown: c.\n\nAfter."
    monkeypatch.setattr(page, "words", lambda name: text)
    assert page.claims("any") == "Not reproduced: a b. Not shown: c."
    assert page.reference("any") == ""
    monkeypatch.setattr(page, "words", lambda name: "One.\n\n" + text)
    assert page.reference("any") == "x."
    learns = parse_study({"method": "fedpm"})
    monkeypatch.setattr(type(learns.build_method()), "recommended", {"optimiser": "adam", "lr": 0.05})
    assert page.trained(page.Measured("FedPM", parse_study({"method": "fedpm"}), [], [])) == "optimiser adam, lr 0.05"
    assert page.trained(page.Measured("FedAvg", parse_study({"method": "fedavg"}), [], [])) == "as weights"


def test_a_table_needs_its_place_in_the_page(monkeypatch, tmp_path):
    pages, page = script("pages", monkeypatch), tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(SystemExit, match="no place for 'wire'"):
        pages.insert(page, "wire", "| x |\n")
    assert page.read_text() == "nothing here"


def test_links_are_shown_by_their_medians_and_need_root(monkeypatch):
    pytest.importorskip("flwr", reason="Flower is not installed")
    pytest.importorskip("cryptography")
    links = script("links", monkeypatch)
    row = {"rate": "1/1", "run": "dense FedAvg", "round_s": 10.0, "first_s": 30.0, "interface": 220, "ledger": 200}
    row["curve"] = [[9.0, 0.5], [19.0, 0.9], [29.0, 0.8]]
    rows = [{**row, "repetition": k, "round_s": s, "predicted_round_s": 9.5} for k, s in enumerate((10.0, 12.0, 11.0))]
    rows.append({**row, "run": "late", "curve": [[8.0, None], [16.0, 0.89]]})
    rows.append({k: v for k, v in row.items() if k != "ledger"} | {"run": links.FLOWERS, "rate": "10/10"})
    told = [[cell.strip() for cell in line.split("|")[1:-1]] for line in links.render(rows).splitlines()]
    dense = ["11.0 (10.0 to 12.0)", "9.5 (9.5 to 9.5)", "1.10 (1.10 to 1.10)", "30 (30 to 30)", "19 (19 to 19)", ""]
    assert told[2] == ["1/1", "dense FedAvg", *dense]
    assert told[3] == ["1/1", "late", "10.0", "", "1.10", "30", "not reached", ""]
    # in as many rounds as our dense one took: two of 10 s
    assert told[4] == ["10/10", "Flower's FedAvg", "10.0", "", "", "30", "20", ""]
    monkeypatch.setattr(links.os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match=r"need root and iproute2 \(apt-get install iproute2\)"):
        links.Namespaces("10/2")


def test_short_fuzzing_finds_nothing(monkeypatch):
    counts = script("fuzz_wire", monkeypatch).fuzz(4000, seed=2)
    assert sum(counts.values()) == 4000
    assert min(counts["refused"], counts["decoded"]) > 100


def test_the_fuzzer_finds_what_it_looks_for(monkeypatch, capsys):
    fuzz_wire = script("fuzz_wire", monkeypatch)
    monkeypatch.setattr(fuzz_wire, "decode", lambda _data, _expected: {}["a defect"])
    with pytest.raises(SystemExit):
        fuzz_wire.fuzz(10, seed=0)
    assert "KeyError" in capsys.readouterr().err


def test_short_fuzzing_of_what_is_said_finds_nothing(monkeypatch):
    pytest.importorskip("flwr", reason="Flower is not installed")
    counts = script("fuzz_said", monkeypatch).fuzz(400, seed=3)
    assert sum(counts.values()) == 400
    for name in ("greeting", "failure", "policy", "settings"):
        assert min(counts[f"{name} read"], counts[f"{name} refused"]) > 1, name


@pytest.mark.parametrize("reader", ["read", "site_of", "settings_of"])
def test_that_fuzzer_finds_what_it_looks_for(reader, monkeypatch, capsys):
    pytest.importorskip("flwr", reason="Flower is not installed")
    fuzz_said = script("fuzz_said", monkeypatch)
    monkeypatch.setattr(fuzz_said, reader, lambda *_: {}["a defect"])
    with pytest.raises(SystemExit):
        fuzz_said.fuzz(10, seed=0)
    assert "KeyError" in capsys.readouterr().err


def test_peers_of_the_wire_take_what_their_formats_say(monkeypatch):
    wire = script("wire", monkeypatch)
    mask = torch.zeros(4, 300, dtype=torch.bool)
    mask[0, 0] = mask[0, 299] = mask[2, 5] = True
    message = Message({"w": torch.where(mask, 1.5, 0.0), "b": torch.ones(2)}, {"w": mask})
    sizes = {name: len(peer(wire.arrays(message))) for name, peer in wire.PEERS.items()}
    assert sizes["dense"] == 4 * 1202
    assert sizes["bitmap"] == 150 + 12 + 1 + 8
    assert sizes["csr"] == 5 * 4 + 3 * 4 + 12 + (3 * 4 + 2 * 4 + 8)  # a bias is a column
    assert sizes["gaps"] == (1 + 2 + 2) + 12 + 2 + 8
    assert sizes["zstd"] < 100
    values, masks = wire.bounds(message)
    assert values == 20
    assert masks == pytest.approx(-(3 * math.log2(3 / 1200) + 1197 * math.log2(1197 / 1200)) / 8)


def drawn(density):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(100, 100, generator=generator) < density
    return Message({"w": torch.where(mask, torch.randn(100, 100, generator=generator), 0.0)}, {"w": mask})


def test_the_wire_benchmark_trains_measures_and_renders(monkeypatch, tmp_path, capsys):
    wire = script("wire", monkeypatch)
    monkeypatch.setattr(wire, "QUICK", ("TwoCNN, FedSparsify 90 %",))
    monkeypatch.setattr(wire, "gaussian", drawn)
    rows = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["wire.py", "--quick", "--jobs", "1", "--out", str(tmp_path), "--json", str(rows)])
    wire.main()
    trained = json.loads(rows.read_text())[0]
    assert trained["case"] == "TwoCNN, FedSparsify 90 %"
    assert trained["ratio_to_bound_fresh"] <= 1.02
    assert trained["ratio_to_bound_known"] <= 1.01
    assert 1 <= trained["unpacked_fresh"] <= 1.02
    assert trained["bytes_fresh"] < min(trained[peer] for peer in wire.PEERS)
    assert min(trained["encode_mb_s"], trained["decode_mb_s"]) > 0
    page = tmp_path / "page.md"
    page.write_text("<!-- begin wire --><!-- end wire -->")
    monkeypatch.setattr(sys, "argv", ["wire.py", "--render", str(page), str(rows)])
    wire.main()
    assert "| TwoCNN, FedSparsify 90 % |" in page.read_text()
    capsys.readouterr()


def test_contestants_of_the_simulation_run_and_are_tabled(monkeypatch):
    simulate = script("simulate", monkeypatch)
    case = simulate.Case("mlp", (1, 4, 4), 6, 3, 5, batch=2, rounds=4, options=(("hidden", (4,)),))
    floor = simulate.run("floor", case)
    alone, stacked = (simulate.run("secateur", case, f"compute.together={n}") for n in (1, 3))
    for one in (floor, alone, stacked):
        assert 0 < one["spread"][0] <= one["seconds"] <= one["spread"][1]
        assert one["start"] > 0
        assert one["worker"] > 50e6
    assert alone["bytes"] == pytest.approx(stacked["bytes"], rel=0.1)
    assert 0 <= simulate._deviation(alone["model"], stacked["model"]) < 1e-3
    told = simulate.play("profile", case)["told"]
    assert 0 < sum(told[part] for part in simulate.PARTS) < told["whole"]
    row = {"table": "profile", "case": "tiny", **told}
    shown = simulate.table("profile", [row]).splitlines()
    assert [line.count("|") for line in shown] == [2 + 1 + len(simulate.PARTS)] * 3 == [8] * 3
    assert sum(int(cell.strip(" %")) for cell in shown[2].split("|")[2:-1]) == pytest.approx(100, abs=4)


def test_a_round_cannot_do_without_its_products_and_weights(monkeypatch):
    """16-4-10, 118 weights, 3 clients of 5 rows in batches of 2: 15 rows, 9 steps."""
    simulate = script("simulate", monkeypatch)
    case = simulate.Case("mlp", (1, 4, 4), 6, 3, 5, batch=2, options=(("hidden", (4,)),))
    assert case.work() == (2 * 15 * (2 * 64 + 3 * 40), 4 * 9 * (6 * 118 - 64))
    (row,) = simulate.ceilings({"tiny": case}, 1)
    assert row["by_operations"] * row["flops"] == pytest.approx(7440)
    assert row["by_bytes"] * row["bandwidth"] == pytest.approx(23184)
    assert 1e9 < row["flops"] < 1e13
    assert 1e8 < row["bandwidth"] < 1e12
    assert row["by_operations"] < row["floor"] < row["secateur"]


def test_peak_memory_counts_the_children_of_a_process(monkeypatch):
    simulate = script("simulate", monkeypatch)
    child = "x = bytearray(150 * 2**20); import time; time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    root, worker = simulate.watch(simulate.subprocess.Popen([sys.executable, "-c", parent]), every=0.05)
    assert 1e6 < root < 100e6 < 150 * 2**20 < worker < 250e6


def test_a_device_is_measured_beside_a_plain_loop(monkeypatch):
    gpu = script("gpu", monkeypatch)
    monkeypatch.setattr(gpu, "ceilings", lambda _device: (1e9, 1e9))
    case = gpu.Case("mlp", (1, 4, 4), 3, 3, 4, batch=2, rounds=3, options=(("hidden", (4,)),))
    rows = list(gpu.measure(gpu.Device.found(), {"tiny": case}, 60))
    assert [row["contestant"] for row in rows[1:]] == ["loop", "vmap", *gpu.METHODS]
    assert [row["bytes"] for row in rows[1:]] == ["none", "none", *["encoded", "computed"] * 2, "encoded"]
    assert all(row["least"] == pytest.approx(row["share"] * row["seconds"]) for row in rows[1:])
    late = list(gpu.measure(gpu.Device.found(), {"tiny": case}, -1))
    assert all("were over" in row["left_out"] for row in late[1:])
    shown = gpu.table([*rows, *late[1:]]).splitlines()
    assert [line.count("|") for line in shown[2:]] == [8] * (2 + 14)
