"""Runs on arrays whose targets are numbers: scaled by the federation, scored and predicted in their own unit."""

import numpy as np
import pytest
import torch

import secateur
from helpers import INLINE, play, rows_of
from secateur.data import Source
from secateur.data.shards import open_shards, split
from secateur.data.targets import standardised
from secateur.errors import DataError
from secateur.export.export import export
from secateur.federation import prepare
from secateur.study.study import parse_study


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    """Return the file of arrays whose targets lie far from 0, and a run on them."""
    folder = tmp_path_factory.mktemp("far")
    x = np.random.default_rng(0).normal(size=(240, 4)).astype(np.float32)
    y = 5000 + 200 * (x @ np.array([1.0, -1.0, 0.5, 0.0])).astype(np.float32)
    np.savez(folder / "far.npz", x_train=x[:200], y_train=y[:200], x_test=x[200:], y_test=y[200:])
    study = parse_study({
        "method": "fedsparsify", "rounds": 10, "participation": 1.0, "training": {"lr": 0.05},
        "data": {"source": f"arrays:{folder / 'far.npz'}", "clients": 4, "partition": "iid"},
        "model": {"name": "mlp", "options": {"hidden": (16,)}},
        "options": {"schedule.sparsity": 0.3, "schedule.start": 0},
    })  # fmt: skip
    with prepare.federation(study) as shards:
        summary = play(study, folder / "run", shards, runtime=INLINE)
    return folder, study, summary


def test_numbers_far_from_zero_are_learnt_and_errors_are_in_their_unit(far):
    folder, study, summary = far
    held = np.load(folder / "far.npz")
    spread = np.abs(held["y_test"] - held["y_train"].mean()).mean()
    assert summary["final"]["mae"] < 0.5 * spread
    predicted = secateur.load(folder / "run")(torch.from_numpy(held["x_test"])).detach().numpy()[:, 0]
    assert np.isclose(np.abs(predicted - held["y_test"]).mean(), summary["final"]["mae"], rtol=1e-4)
    assert rows_of(folder / "run")[-1]["left_out"] == []
    assert study.data.target == ""


@pytest.mark.parametrize("to", ["onnx", "safetensors"])
def test_an_export_predicts_in_the_targets_unit(to, far, tmp_path):
    if to == "onnx":
        runtime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
        pytest.importorskip("onnxscript", reason="the extra export is not installed")
    folder, _, summary = far
    export(folder / "run", to, tmp_path)  # compares predictions of the file with the masked model's
    if to == "onnx":
        held = np.load(folder / "far.npz")
        session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"input": held["x_test"]})
        assert np.isclose(np.abs(found[:, 0] - held["y_test"]).mean(), summary["final"]["mae"], rtol=1e-4)


def test_the_mean_and_scale_are_those_of_all_clients_training_rows(far, tmp_path):
    folder, study, _ = far
    held = np.load(folder / "far.npz")
    shards = open_shards(prepare.simulated(study, tmp_path))
    mine = np.concatenate([shards.train(k)[1].numpy() for k in range(4)]).astype(np.float64)
    assert abs(mine.mean()) < 1e-6
    assert np.isclose(mine.std(), 1)
    whole = np.concatenate([mine, *(part(k)[1].numpy() for k in range(4) for part in (shards.test, shards.validation))])
    own = whole * shards.target_scale + shards.meta.target_mean
    assert np.allclose(np.sort(own), np.sort(held["y_train"]), rtol=1e-5)
    tested = shards.server_test()[1].numpy() * shards.target_scale + shards.meta.target_mean
    assert np.allclose(tested, held["y_test"], rtol=1e-5)


def test_what_a_loader_scaled_itself_and_classes_stay():
    x, y = np.zeros((12, 2), np.float32), np.arange(12, dtype=np.float32)
    parts = split([np.arange(12)], test_fraction=0.25, validation_fraction=0, seed=0)["train"][0]
    values = Source("mine", x, y, x, y, None, 1, "tabular", 1.0, "regression")
    scaled = standardised(values, parts)
    assert np.isclose(scaled.target_mean, y[parts].mean())
    assert np.isclose(scaled.target_scale, y[parts].std())
    assert np.allclose(scaled.y_test * scaled.target_scale + scaled.target_mean, y, atol=1e-5)
    said = Source("mine", x, y, x, y, None, 1, "tabular", 1.0, "regression", target_scale=3.0)
    classes = Source("mine", x, y.astype(np.int64), x, y.astype(np.int64), None, 12, "tabular", 1.0)
    assert standardised(said, parts) is said
    assert standardised(classes, parts) is classes
    one = Source("mine", x, np.full(12, 0.1, np.float32), x, y, None, 1, "tabular", 1.0, "regression")
    with pytest.raises(DataError, match="the target is 0.1 in every training row"):
        standardised(one, parts)
