"""The benchmarks: small versions of each, end to end; the README's example."""

import gzip
import importlib.util
import json
import math
import re
import struct
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur import compare, methods, standings
from secateur import run as runs
from secateur.config import Runtime, study
from secateur.suite import Suite
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


@pytest.fixture
def results(monkeypatch):
    return script("results", monkeypatch)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write a Fashion-MNIST of 1,000 images in the idx layout."""
    folder = tmp_path_factory.mktemp("idx")
    rng = np.random.default_rng(0)
    for part, n in (("train", 1000), ("t10k", 100)):
        for kind, array in (("images-idx3", rng.integers(0, 255, (n, 28, 28))), ("labels-idx1", np.arange(n) % 10)):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))
    return folder


def test_a_quick_suite_runs_resumes_and_renders(results, images, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["results.py", *map(str, arguments)])
        results.main()

    rows = tmp_path / "rows.json"
    command = ("fashion", "--data", images, "--out", tmp_path / "out", "--json", rows, "--workers", 0, "--quick")
    run(*command)
    first = json.loads(rows.read_text())
    assert len(first) == 18
    assert {row["partition"] for row in first} == {"dirichlet:0.5", "pathological:2"}
    assert all(row["rounds"] == 3 for row in first)
    explored = [row for row in first if row["bytes_explore"]]
    assert {row["variant"] for row in explored} == {"AutoFLIP T_p 0.3", "AutoFLIP T_p 0.5"}
    run(*command)
    assert json.loads(rows.read_text()) == first  # nothing was run twice: even the measured seconds are the same
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin fashion -->\nold\n<!-- end fashion -->\nafter\n")
    run("--render", page, rows)
    text = page.read_text()
    assert text.startswith("before\n<!-- begin fashion -->\n**dirichlet:0.5**")
    assert text.endswith("<!-- end fashion -->\nafter\n")
    assert "old" not in text
    assert text.count("| FedSparsify 95 % |") == 2
    capsys.readouterr()


def test_render_shows_mean_and_spread(results):
    base = dict.fromkeys(
        ["accuracy_final", "accuracy_lowest_tenth", "sparsity", "bytes", "bytes_explore", "macs", "macs_physical"], 0.5
    )
    base |= {"train_macs": 1, "train_macs_explore": 0, "rounds": 3, "partition": "iid", "variant": "x", "suite": "s"}
    rows = [{**base, "seed": s, "accuracy_last10": a} for s, a in enumerate((0.80, 0.82, 0.84))]
    assert "| x | 82.0 ± 2.0 |" in results.render(rows)
    assert "| x | 80.0 |" in results.render(rows[:1])
    assert results.render(rows, ["accuracy_last10", "sparsity"]).endswith("| x | 82.0 ± 2.0 | 50.0 |\n")


def test_widths_have_a_table_of_their_own(results):
    row = {
        "accuracy_final": 0.8,
        "macs_physical": 100,
        "sparsity": 0.0,
        "rounds": 3,
        "partition": "iid",
        "variant": "x",
    }
    rows = [{**row, "seed": s, "widths": {"1/2": [0.7 + s / 10, 30]}} for s in (0, 1)]
    text = results.render(rows, ["sparsity"])
    assert "| 1 | 80.0 | 100 |" in text
    assert "| 1/2 | 75.0 ± 7.1 | 30 |" in text


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


def test_accuracy_at_equal_upload(results):
    """The least upload is 100; the other variant has its accuracy after 90 then, and after 180 at twice that."""
    one = {"seed": 0, "variant": "a", "uploads": [[50, 0.3], [100, 0.5]]}
    two = {"seed": 0, "variant": "b", "uploads": [[90, 0.2], [180, 0.4], [270, 0.6]]}
    found = results.at_upload([one, two])
    assert [(r["accuracy_equal_upload"], r["accuracy_twice_upload"]) for r in found] == [(0.5, 0.5), (0.2, 0.4)]


def test_the_settings_of_papers_are_studies(results):
    names = sorted(path.stem for path in (ROOT / "benchmarks" / "papers").glob("*.toml"))
    assert names == ["feddst", "fedtiny", "frl", "hidenseek", "lotteryfl", "prunefl"]
    for name in names:
        suite = tomllib.loads((ROOT / "benchmarks" / "papers" / f"{name}.toml").read_text())
        assert set(suite["paper"]) == {"claim", "setting", "cut"}
        assert set(suite["columns"]) <= {*results.COLUMNS, *results.MORE}
        for _, _, _, values in results.cases(suite, "FOLDER", quick=False):
            assert study(values).build_method()
    assert results.about({"claim": "a", "cut": "b"}) == "- *claim*: a\n- *cut*: b\n\n"


def test_the_suite_of_all_methods_has_all_methods(results):
    suite = tomllib.loads((ROOT / "benchmarks" / "densities.toml").read_text())
    made = [study(values) for _, _, seed, values in results.cases(suite, "FOLDER", quick=False) if seed == 0]
    assert {one.method for one in made} == set(methods.names())
    assert set(suite["columns"]) <= {*results.COLUMNS, *results.MORE}


def test_the_page_of_methods_is_made_of_runs(results, images, tmp_path, monkeypatch, capsys):
    page = script("method_page", monkeypatch)
    rows = []
    for method in ("fedavg", "salientgrads", "spafl"):
        made = study({
            "method": method, "rounds": 2, "participation": 0.5, "training": {"epochs": 1},
            "model": {"name": "smallcnn"}, "data": {"source": f"idx:{images}", "clients": 4, "partition": "iid"},
        })  # fmt: skip
        with runs.federation(made) as shards:
            summary = runs.start(made, Runtime(workers=0), tmp_path / method, shards=shards)
        rows.append({"variant": method, "seed": 0, "suite": "s", **results.figures(tmp_path / method, summary)})
    text = page.page(rows)
    assert "| `fedavg` | fedavg | nothing | 8" in text
    asked = next(line for line in text.splitlines() if line.startswith("| `salientgrads` | s"))
    assert "score: 4 requests" in asked
    spafl = next(line for line in text.splitlines() if line.startswith("| `spafl` | s")).split(" | ")
    assert float(spafl[3].partition(" + ")[0]) < 1  # thresholds alone
    assert "kB" in spafl[-1]  # its weights stay at the client
    for name in methods.names():
        assert text.count(f"| `{name}` |") == (2 if name in {"fedavg", "salientgrads", "spafl"} else 1)
    capsys.readouterr()


def test_a_table_needs_its_place_in_the_page(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(SystemExit, match="no place for 'wire'"):
        results.insert(page, "wire", "| x |\n")
    assert page.read_text() == "nothing here"


def test_the_command_needs_a_suite(results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["results.py", "fashion"])
    with pytest.raises(SystemExit):
        results.main()
    assert "--data and --out" in capsys.readouterr().err


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
    monkeypatch.setattr(
        sys, "argv", ["wire.py", "--quick", "--workers", "0", "--out", str(tmp_path), "--json", str(rows)]
    )
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


def test_the_python_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    quick = example.replace("rounds=40", "rounds=2").replace("workers=2", "workers=0")
    assert quick != example
    exec(compile(quick, "README.md", "exec"), {"__name__": "readme"})
    accuracy, up = capsys.readouterr().out.split()
    assert 0 <= float(accuracy) <= 1
    assert int(up) > 0


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


def test_a_page_takes_the_tables_of_a_comparison(results, tmp_path, monkeypatch):
    suite = Suite.model_validate({
        "source": "digits", "seeds": [0, 1], "partitions": ["iid"],
        "common": {"data.clients": 3, "participation": 1.0, "rounds": 2, "model.name": "mlp", "training.epochs": 1},
        "variants": {"half": {"method": "random", "schedule.sparsity": 0.5}}, "controls": ["dense", "narrow"],
    })  # fmt: skip
    out, page = tmp_path / "tiny", tmp_path / "page.md"
    cells = compare.play(suite, out, jobs=1)
    standings.write(suite, cells, standings.lines(suite, cells, out), out)
    page.write_text("before\n<!-- begin tiny -->\nold\n<!-- end tiny -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["results.py", "--render", str(page), str(out)])
    results.main()
    before, *lines, after = page.read_text().splitlines()
    assert (before, after) == ("before", "after")
    assert "old" not in lines
    assert "**iid**, 2 seed(s), 2 rounds" in lines
    rows = {cells[1].strip(): cells for cells in (line.split("|") for line in lines if line.startswith("|"))}
    assert {name.removeprefix("* ") for name in rows} == {"method", "---", "FedAvg", "half"}
    half = rows.get("half") or rows["* half"]
    accuracy = [
        json.loads((path / "summary.json").read_text())["final"]["accuracy"] for path in out.glob("runs/random-*")
    ]
    assert half[2].split("±")[0].strip() == f"{100 * sum(accuracy) / len(accuracy):.1f}"
    assert half[rows["method"].index(" to narrow ")].strip()
