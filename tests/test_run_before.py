"""Folders that an earlier version wrote: still reported, compared and exported; what was unfinished is not resumed.

``data/run_before.zip`` was written by the version before replies became reductions, with these commands:

    secateur run fedsparsify --model mlp --set model.hidden=[8] --clients 3 --rounds 2 --set participation=1 --out run
    secateur compare fedsparsify:schedule.sparsity=0.5 --data digits --rounds 2 --seeds 1 --set model.name=mlp
        --set model.hidden=[8] --set data.clients=3 --set participation=1 --out comparison

``unfinished`` is the first run again, stopped after its first round. Pages, clients' rows and locks are left out.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

import secateur
from helpers import INLINE
from secateur.data.shards import open_shards
from secateur.errors import CheckpointError
from secateur.export.export import export
from secateur.federation import prepare, server
from secateur.federation.folder import read_study
from secateur.report import page, tables
from secateur.report.gather import comparison_lines, gather, read_comparison
from secateur.report.outcomes import outcome

ZIP = Path(__file__).parent / "data" / "run_before.zip"


@pytest.fixture
def before(tmp_path):
    with zipfile.ZipFile(ZIP) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def records(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text("utf-8").splitlines()]


def summary(folder):
    return json.loads((folder / "summary.json").read_text("utf-8"))


@pytest.mark.parametrize("name", ["run", "run/dense"])
def test_a_run_is_read_with_its_figures_and_under_its_name(name, before):
    folder = before / name
    found, rows, final = outcome(folder), records(folder), summary(folder)["final"]
    assert read_study(folder).hash() == summary(folder)["study"]
    assert found.quality == final["accuracy"]
    assert found.bytes == sum(row["bytes_down"] + row["bytes_up"] for row in rows)
    assert [quality for _, quality in found.by_round] == [row["accuracy"] for row in rows]
    assert (found.macs, found.parameters) == (final["macs"], final["parameters_physical"])


def test_runs_are_set_side_by_side_on_a_page(before, tmp_path):
    pytest.importorskip("plotly")
    folders = [before / "run", before / "unfinished"]
    title, lines, subjects, ended = gather(folders)
    assert not ended
    assert {line.name.split()[0] for line in lines} == {"FedAvg", "fedsparsify"}
    index = page.write(title, lines, subjects, tmp_path / "page")
    shown = page.read(index.parent / "data.js")
    assert [run["name"] for run in shown["runs"]] == ["run", "unfinished"]


def test_a_comparison_has_the_figures_of_its_table_of_before(before):
    out = before / "comparison"
    suite, cells = read_comparison(out)
    found = comparison_lines(suite, cells, out, None)
    header, _, *rows = [
        [cell.strip() for cell in line.strip("| \n").split(" |")]
        for line in (out / "table.md").read_text("utf-8").splitlines()
        if line.startswith("|")
    ]
    old = {row[0]: dict(zip(header, row, strict=False)) for row in rows}
    new = {row["method"]: row for row in tables.table(found)}
    assert set(new) == set(old)
    assert len(new) == 6
    for name, row in new.items():
        for column in ("accuracy %", "sparsity %", "bytes", "MACs"):
            assert row[column] == old[name][column], (name, column)
        # counted by writing the model now: packing has become a little tighter since
        now, before_ = (float(text.removesuffix(" kB")) for text in (row["shipped bytes"], old[name]["shipped bytes"]))
        assert 0.9 * before_ < now <= before_


def test_a_model_is_loaded_and_predicts_what_its_weights_say(before):
    folder = before / "run"
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    with prepare.federation(read_study(folder)) as place:
        x, y = (part.numpy().copy() for part in open_shards(place).server_test())
    rows = (x / 16).reshape(len(x), -1).astype(np.float32)
    hidden = np.maximum(rows @ weights["fc1.weight"].T + weights["fc1.bias"], 0)
    outputs = hidden @ weights["fc2.weight"].T + weights["fc2.bias"]
    assert np.mean(outputs.argmax(1) == y) == pytest.approx(summary(folder)["final"]["accuracy"], abs=1e-6)
    with torch.no_grad():
        predicted = secateur.load(folder)(torch.from_numpy(rows).reshape(len(x), *x.shape[1:]))
    np.testing.assert_allclose(predicted.numpy(), outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_model_is_exported(kind, before, tmp_path):
    card = export(before / "run", kind, tmp_path / "export")
    assert (tmp_path / "export" / card.file).exists()
    assert card.checked["differ"] == 0
    assert card.checked["accuracy"] == pytest.approx(summary(before / "run")["final"]["accuracy"], abs=1e-6)


def test_a_finished_run_is_finished(before):
    assert server.resume(before / "run", INLINE, shards=Path("/nowhere")) == summary(before / "run")


def test_an_unfinished_run_is_not_resumed_and_the_reason_is_its_version(before):
    folder = before / "unfinished"
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    with prepare.federation(read_study(folder)) as shards, pytest.raises(CheckpointError, match="version") as refused:
        server.resume(folder, INLINE, shards=shards)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)
    assert all((folder / name).read_bytes() == data for name, data in kept.items() if name.endswith("safetensors"))
