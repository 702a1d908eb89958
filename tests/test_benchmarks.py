"""The results benchmark: a small suite end to end, resumed, and rendered into a page; the README's example."""

import gzip
import importlib.util
import json
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_the_command_needs_a_suite(results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["results.py", "fashion"])
    with pytest.raises(SystemExit):
        results.main()
    assert "--data and --out" in capsys.readouterr().err


def test_the_python_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    quick = example.replace("rounds=40", "rounds=2").replace("workers=2", "workers=0")
    assert quick != example
    exec(compile(quick, "README.md", "exec"), {"__name__": "readme"})
    accuracy, up = capsys.readouterr().out.split()
    assert 0 <= float(accuracy) <= 1
    assert int(up) > 0
