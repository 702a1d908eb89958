"""Export: files that say what the masked model says, and refusals that leave nothing behind."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import fx, nn
from typer.testing import CliRunner

import secateur
from helpers import play, small, tiny_shards
from secateur import cost
from secateur.cli import app
from secateur.data.shards import make_shards, open_shards
from secateur.data.sources import Source
from secateur.errors import CheckpointError, ConfigError, MissingExtraError, ModelError
from secateur.export import export
from secateur.export.export import read
from secateur.federation import client, prepare
from secateur.federation.folder import read_study
from secateur.study.study import parse_study


def finished(folder, **values):
    """Run a small study on the digits to its end."""
    study = parse_study({
        "rounds": 2, "participation": 0.5, "method": "fedsparsify", "data": {"clients": 4, "partition": "iid"},
        "training": {"epochs": 1, "batch_size": 32, "lr": 0.05}, **values,
    })  # fmt: skip
    with prepare.federation(study) as shards:
        play(study, folder, shards)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    options = {"granularity": "channel", "schedule.sparsity": 0.5, "schedule.start": 0}
    return finished(tmp_path_factory.mktemp("run") / "run", options=options)


def digits(folder):
    """Return the server's test rows as the model takes them."""
    with prepare.federation(read_study(folder)) as shards:
        held = open_shards(shards)
        x, y = client.wrap(held, *held.server_test()).batch(slice(None))
        return x.clone(), y.clone()


def accuracy(outputs, y):
    return float((torch.as_tensor(outputs).argmax(1) == y).double().mean())


def test_load_gives_torchs_own_layers_with_the_accuracy_of_the_run(run):
    model = secateur.load(run)
    assert isinstance(model, fx.GraphModule)
    assert {type(m).__module__.partition(".")[0] for m in model.modules()} == {"torch"}
    x, y = digits(run)
    summary = json.loads((run / "summary.json").read_text())["final"]
    assert accuracy(model(x), y) == pytest.approx(summary["accuracy"])
    assert sum(p.numel() for p in model.parameters()) == summary["parameters_physical"] < summary["parameters_dense"]
    assert torch.allclose(model(x), read(run).masked(x), atol=1e-5)


def test_onnx_runs_elsewhere_with_the_same_predictions(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    card = export.export(run, "onnx", tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    x, y = digits(run)
    outputs = session.run(None, {"input": x.numpy()})[0]
    assert np.allclose(outputs, read(run).masked(x).detach().numpy(), atol=1e-5)
    final = json.loads((run / "summary.json").read_text())["final"]
    assert card.checked["differ"] == 0
    assert card.checked["count"] == len(y)
    assert card.checked["accuracy"] == accuracy(outputs, y) == pytest.approx(final["accuracy"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["card.json", "card.md", "model.onnx"]
    dense, masked, slim = card.figures
    assert slim.file_bytes == (tmp_path / "model.onnx").stat().st_size < dense.file_bytes
    assert slim.parameters == final["parameters_physical"]
    assert masked.nonzero <= masked.parameters == dense.parameters
    assert slim.macs < dense.macs == masked.macs == final["macs_dense"]
    assert masked.macs_surviving == final["macs"]
    assert all(f.seconds > 0 for f in card.figures)
    text = (tmp_path / "card.md").read_text()
    assert "| parameters | 13,706 | 13,706 |" in text
    assert "| `fc2` | it is the model's output |" in text
    kept = next(layer for layer in card.layers if layer.name == "conv2")
    assert (kept.units, kept.kind) == (32, "channel")
    assert 0 < kept.kept < 32


def test_a_torch_export_loads_without_this_package(run, tmp_path):
    export.export(run, "torch", tmp_path)
    x, _ = digits(run)
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import sys; sys.modules['secateur'] = None; import numpy, torch; "
        "m = torch.export.load('model.pt2').module(); "
        "numpy.save('y.npy', m(torch.from_numpy(numpy.load('x.npy'))).detach())"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)
    assert np.allclose(np.load(tmp_path / "y.npy"), read(run).masked(x).detach().numpy(), atol=1e-5)


def test_safetensors_hold_the_slim_weights_and_the_plan(run, tmp_path):
    export.export(run, "safetensors", tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert json.loads(file.metadata()["about"])["plan"] == (run / "plan.json").read_text()
    assert shapes == {n: tuple(t.shape) for n, t in secateur.load(run).state_dict().items()}


def test_executorch_runs_on_its_own_runtime(run, tmp_path):
    pytest.importorskip("executorch", reason="the extra executorch is not installed")
    card = export.export(run, "executorch", tmp_path)
    assert (card.checked["count"], card.checked["differ"]) == (200, 0)


def test_from_the_command_line(run, tmp_path):
    done = CliRunner().invoke(app, ["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "predictions differ" in " ".join(done.output.split())
    assert (tmp_path / "out" / "card.json").exists()


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("resnet20", {"width": 4}),
        ("charlstm", {"hidden": 6}),
        ("chartransformer", {"width": 8, "heads": 2, "hidden": 8}),
    ],
)
def test_other_networks_say_the_same_as_onnx(model, options, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log; " * 8)
    source = f"text:{text}" if model.startswith("char") else "digits"
    partition = {"clients": 2, "partition": "iid", "source": source}
    folder = finished(
        tmp_path / "run", rounds=1, data=partition, model={"name": model, "options": options},
        options={"granularity": "channel", "schedule.sparsity": 0.5, "schedule.start": 0, "schedule.end": 0},
    )  # fmt: skip
    card = export.export(folder, "onnx", tmp_path / "out")
    assert card.checked["deviation"] < 1e-5
    assert any(0 < layer.kept < layer.units for layer in card.layers)


def test_without_the_data_random_rows_are_compared_and_the_card_says_so(tmp_path):
    study = small("oneshot", "schedule.at=0", "data.source=idx:/nowhere", model={"name": "smallcnn"})
    folder = tmp_path / "run"
    play(study, folder, tiny_shards(tmp_path / "shards"))
    card = export.export(folder, "safetensors")
    assert "random rows, as the run's data is not on this machine" in card.checked["rows"]
    assert (folder / "export" / "model.safetensors").exists()


def test_a_regression_is_judged_by_its_error(tmp_path):
    draw = np.random.default_rng(0)
    x, y = draw.random((60, 5), np.float32), draw.random(60).astype(np.float32)
    source = Source("made up", x, y, x[:20], y[:20], None, 1, kind="tabular", scale=1.0, task="regression")
    parts = [np.arange(k, 60, 4) for k in range(4)]
    (tmp_path / "shards").mkdir()
    make_shards(source, parts, test_fraction=0.2, seed=0, folder=tmp_path / "shards")
    play(small("fedavg", "data.source=idx:/nowhere"), tmp_path / "run", tmp_path / "shards")
    card = export.export(tmp_path / "run", "safetensors")
    assert "mae" in card.checked
    assert "accuracy" not in card.checked


# ---- refusals


def test_what_predicts_something_else_is_not_left_behind(run, tmp_path, monkeypatch):
    def writes(change):
        def write(shipped, _model, path):
            path.write_bytes(b"x")
            return lambda x: change(shipped.masked(x))

        return write

    monkeypatch.setattr(export, "_safetensors", writes(lambda y: y + 1))
    with pytest.raises(ModelError, match="outputs are .* away from those of the masked one"):
        export.export(run, "safetensors", tmp_path)
    monkeypatch.setattr(export, "_safetensors", writes(lambda y: y[:, :2]))
    with pytest.raises(ModelError, match=r"returns \(359, 2\) where \(359, 10\) is due"):
        export.export(run, "safetensors", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_refusals_name_what_to_do(run, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="unknown format 'onxx': did you mean 'onnx'"):
        export.export(run, "onxx")
    with pytest.raises(CheckpointError, match="holds no run: .*study.toml is missing"):
        export.export(tmp_path, "onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out"):
        export.export(run, "onnx", tmp_path / "file" / "out")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[export\]' in a clone"):
        export.export(run, "onnx", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[executorch\]' in a clone"):
        export.export(run, "executorch", tmp_path / "out")


def test_a_model_that_a_format_cannot_hold_is_one_line(run, tmp_path, monkeypatch):
    def fails(*_args, **_kwargs):
        try:
            raise KeyError("\x1b[96mno such operator\x1b[0m\nand a long tail")  # noqa: TRY301 -- a chain of causes
        except KeyError as cause:
            raise RuntimeError("step 1/3\nof many") from cause

    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(ModelError, match=r"exported to torch: KeyError: .*no such operator.*; keep forward to calls"):
        export.export(run, "torch", tmp_path)


def test_a_file_that_fails_on_rows_is_one_line_and_is_not_left_behind(run, tmp_path, monkeypatch):
    def session(*_args, **_kwargs):
        return SimpleNamespace(run=lambda *_: 1 / 0)

    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    with pytest.raises(ModelError, match=r"the exported model fails on \d+ rows \(ZeroDivisionError: .*secateur.load"):
        export.export(run, "onnx", tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("harm", ["model", "plan", "old"])
def test_damaged_or_old_folders_are_told_apart(run, tmp_path, harm):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    if harm == "plan":
        (folder / "plan.json").write_text("{")
        says = "not a structural plan"
    elif harm == "model":
        (folder / "model.safetensors").write_bytes(b"broken")
        says = "cannot be read"
    else:
        from secateur.federation import checkpoint

        tensors, mask, _ = checkpoint.shipped(folder)
        checkpoint.ship(folder, tensors, mask, {"study": ""})
        says = "made by an older version"
    if harm != "old":
        with pytest.raises(CheckpointError, match="was changed since the run wrote it, or is damaged"):
            read(folder)
        (folder / "digests.json").unlink()  # as of runs that have none
    with pytest.raises((CheckpointError, ModelError), match=says):
        read(folder)


# ---- cost, measured


def test_the_counter_sees_recurrent_layers_and_attention():
    lstm = nn.LSTM(3, 4, batch_first=True)
    x = torch.zeros(1, 5, 3)
    assert cost.counted(lstm, x) == cost.macs(cost.uses(lstm, x), lstm.state_dict(), None)

    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert cost.counted(Attention(), torch.zeros(1, 2, 6, 4)) == 2 * (2 * 6 * 6 * 4)


def test_memory_by_hand():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    found = cost.memory(model, torch.zeros(4, 3))
    assert found.parameters == 4 * (3 * 5 + 5 + 5 * 2 + 2)
    assert found.activations == 4 * 4 * 5  # the rectified features; the input is not counted


def test_latency_is_a_median_without_the_first_calls():
    calls = []

    def call():
        calls.append(None)
        if len(calls) <= 2:
            import time

            time.sleep(0.2)

    assert cost.latency(call, repeats=5, warmup=2) < 0.1
    assert len(calls) == 7


HOOKED = """
from torch import nn

class Watched(nn.Sequential):
    def __init__(self, shape, outputs):
        super().__init__(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, outputs))
        self.seen = {}
        self[1].register_forward_hook(lambda layer, inputs, output: self.seen.__setitem__("fc", output))
"""


def test_a_model_whose_hooks_keep_activations_is_exported(tmp_path, monkeypatch):
    """The hook of a copy writes into the model it was made in, and what holds a gradient cannot be copied."""
    (tmp_path / "their_hooks.py").write_text(HOOKED)
    monkeypatch.syspath_prepend(tmp_path)
    study = small("fedavg", model={"name": "their_hooks:Watched"}, rounds=1)
    with prepare.federation(study) as shards:
        play(study, tmp_path / "run", shards)
    assert export.export(tmp_path / "run", "torch").file == "model.pt2"
