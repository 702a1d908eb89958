"""Tasks and their scores: against scikit-learn and by hand; a task of one's own in a whole run."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mean_absolute_error, r2_score, roc_auc_score

from helpers import play, rows_of, small, tiny_shards, tiny_source
from secateur.data.shards import make_shards, open_shards
from secateur.data.sources import Source
from secateur.errors import ConfigError
from secateur.federation import prepare as provision
from secateur.federation.client import example, make_model, wrap
from secateur.federation.records import local_scores
from secateur.learning import metrics
from secateur.learning.evaluate import evaluate
from secateur.learning.metrics import ACCURACY, MAE, Metric, metric_of
from secateur.learning.task import Classification, Data, Regression, Task, find
from secateur.report.outcomes import outcome


def drawn(seed, rows, classes):
    """Return outputs, some of them equal, and targets of every class."""
    draw = np.random.default_rng(seed)
    outputs = draw.integers(-3, 4, (rows, classes)).astype(np.float64) * draw.choice([1.0, 0.5])
    return torch.tensor(outputs), torch.tensor(np.r_[np.arange(classes), draw.integers(0, classes, rows - classes)])


@given(st.integers(0, 10**6), st.integers(8, 60), st.integers(3, 5))
def test_auroc_of_several_classes_is_scikit_learns_one_against_the_rest(seed, rows, classes):
    outputs, targets = drawn(seed, rows, classes)
    shares = torch.softmax(outputs, 1).numpy()
    expected = roc_auc_score(targets.numpy(), shares, multi_class="ovr", average="macro")
    assert metrics.auroc(outputs, targets) == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 10**6), st.integers(4, 60))
def test_auroc_of_two_classes_is_scikit_learns(seed, rows):
    outputs, targets = drawn(seed, rows, 2)
    expected = roc_auc_score(targets.numpy(), torch.softmax(outputs, 1)[:, 1].numpy())
    assert metrics.auroc(outputs, targets) == pytest.approx(expected, abs=1e-9)


def test_a_class_that_nobody_has_is_left_out_and_one_class_has_no_area():
    outputs = torch.tensor([[2.0, 0.0, -9.0], [0.0, 2.0, -9.0], [1.0, 0.0, -9.0]])
    assert metrics.auroc(outputs, torch.tensor([0, 1, 0])) == 1.0
    assert math.isnan(metrics.auroc(outputs, torch.tensor([1, 1, 1])))


def test_calibration_error_by_hand():
    """Probabilities 0.9 (right), 0.9 (wrong), 0.6 (right), of 15 bins the 14th twice and the 9th.

    |1 + 0 - 0.9 - 0.9| / 3 + |1 - 0.6| / 3 = 0.8 / 3 + 0.4 / 3 = 0.4.
    """
    shares = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]], dtype=torch.float64)
    assert metrics.calibration_error(shares.log(), torch.tensor([0, 1, 1])) == pytest.approx(0.4)
    assert metrics.calibration_error(shares.log(), torch.tensor([0, 1, 1]), bins=1) == pytest.approx(0.4 / 3)
    sure = torch.tensor([[200.0, 0.0]])  # a probability of 1 lies in the last bin
    assert metrics.calibration_error(sure, torch.tensor([0])) == pytest.approx(0.0)


@given(st.lists(st.tuples(st.floats(-50, 50, width=32), st.floats(-50, 50, width=32)), min_size=2, max_size=40))
def test_errors_of_values_are_scikit_learns(pairs):
    y, f = (np.array(part, dtype=np.float32) for part in zip(*pairs, strict=True))
    scores = Regression().scores(torch.tensor(f)[:, None], torch.tensor(y))
    assert scores["mae"] == pytest.approx(mean_absolute_error(y, f), rel=1e-5, abs=1e-6)
    if y.astype(np.float64).std() > 1e-3:
        assert scores["r2"] == pytest.approx(r2_score(y.astype(np.float64), f.astype(np.float64)), rel=1e-5, abs=1e-6)
    if len(set(y.tolist())) == 1:
        assert math.isnan(scores["r2"])


def test_errors_of_scaled_targets_are_told_in_their_own_unit():
    """Ages 20, 50, 80 with mean 50 and scale 30, predicted 35, 50, 50: off by 15, 0 and 30 years."""
    task = find("regression").in_units(30.0, "years")
    scores = task.scores(torch.tensor([[-0.5], [0.0], [0.0]]), torch.tensor([-1.0, 0.0, 1.0]))
    assert scores["mae"] == pytest.approx(15.0)
    assert scores["r2"] == pytest.approx(1 - (0.25 + 1) / 2)  # has no unit
    assert (task.metrics[0].shown, task.metrics[0].worded) == ("MAE in years", "mean absolute error in years")
    assert task.metrics[0].name == "mae"
    assert task.loss(torch.tensor([[0.5]]), torch.tensor([0.0])) == 0.25
    assert find("classification").in_units(30.0, "years").metrics == Classification().metrics


@pytest.mark.parametrize("task", [Classification(), Regression()])
def test_the_loss_of_a_batch_is_the_mean_of_its_rows(task):
    draw = torch.Generator().manual_seed(0)
    output = torch.randn(7, 3 if task.dtype == torch.int64 else 1, generator=draw)
    target = task.targets(torch.randint(0, 3, (7,), generator=draw))
    assert target.dtype == task.dtype
    torch.testing.assert_close(task.loss(output, target), task.losses(output, target).mean())
    assert [metric.name for metric in task.metrics] == list(task.scores(output, target))


def test_an_evaluation_in_batches_is_one_of_all_rows():
    draw = torch.Generator().manual_seed(0)
    rows = Data(torch.randn(50, 4, generator=draw), torch.randint(0, 3, (50,), generator=draw), "tabular")
    net = torch.nn.Linear(4, 3)
    few, all_ = evaluate(net, rows, batch_size=7), evaluate(net, rows)
    assert few.further == pytest.approx(dict(all_.further))
    assert set(all_.further) == {"auroc", "ece"}
    one = evaluate(net, Data(rows.x[:1], rows.y[:1], "tabular"))
    assert set(one.further) == {"ece"}  # of one class there is no area


def test_a_metric_knows_its_direction_and_range():
    assert (ACCURACY.sign, MAE.sign, ACCURACY.bounds, MAE.bounds) == (1, -1, (0, 1), (0, math.inf))
    assert (ACCURACY.text(0.913), MAE.text(0.42)) == ("91.3 %", "0.42")
    assert metric_of({"mae": 1.0}) == MAE  # a record of before there were several scores
    assert metric_of({"accuracy": 0.5}) == ACCURACY


def test_names_that_are_no_task_are_refused():
    with pytest.raises(ConfigError, match="unknown task 'clasification'"):
        find("clasification")
    with pytest.raises(ConfigError, match="give it as module:Class"):
        find("nowhere:Task")


def test_clients_scores_are_means_over_the_rows_they_are_defined_on():
    told = [
        {"samples": 10, "metric": 0.5, "loss": 1.0, "sparsity": 0.0, "validation_samples": 0, "validation": 0.0,
         "auroc": 0.75, "auroc_defined": True, "ece": 0.1, "ece_defined": True},
        {"samples": 30, "metric": 0.9, "loss": 2.0, "sparsity": 0.0, "validation_samples": 0, "validation": 0.0,
         "auroc": 0.0, "auroc_defined": False, "ece": 0.3, "ece_defined": True},
    ]  # fmt: skip
    row = local_scores(told, Classification().metrics, central=False)
    assert (row["accuracy"], row["auroc"], row["ece"]) == (pytest.approx(0.8), 0.75, pytest.approx(0.25))
    assert "auroc" not in local_scores(told, Classification().metrics, central=True)


def test_further_scores_stand_in_records_and_summary(tmp_path):
    shards = tiny_shards(tmp_path / "shards")
    summary = play(small(), tmp_path / "run", shards)
    row = rows_of(tmp_path / "run")[-1]
    for name in ("accuracy", "auroc", "ece"):
        assert summary["final"][name] == row[name]
        assert 0 <= row[name] <= 1
    assert metric_of(row) == metric_of(summary["final"]) == ACCURACY


def test_further_scores_of_clients_own_rows(tmp_path):
    """No server has rows to score personal models on: clients do, by name, beside the main score."""
    shards = tiny_shards(tmp_path / "shards")
    summary = play(small("subfedavg", "target=0.5", participation=1.0), tmp_path / "run", shards)
    assert {"accuracy", "auroc", "ece", "loss"} <= summary["final"].keys()
    assert 0 < summary["final"]["auroc"] <= 1


class Ordinal(Task):
    """A grade, by the squared error of the grade that is expected; scored by how far off the likeliest one is."""

    @property
    def metrics(self):
        return Metric("off", higher=False, most=None, label="grades off"), Metric("within", words="within one grade")

    def losses(self, output, target):
        grades = torch.arange(output.shape[-1], dtype=output.dtype)
        return (output.softmax(-1) @ grades - target).square()

    def scores(self, outputs, targets):
        apart = (outputs.argmax(1) - targets).abs().double()
        return {"off": float(apart.mean()), "within": float((apart <= 1).double().mean())}


def test_a_task_of_ones_own_in_a_run_and_its_report(tmp_path):
    source, folder = replace(tiny_source(), task="test_task:Ordinal"), tmp_path / "shards"
    folder.mkdir()
    make_shards(source, [np.arange(k, 96, 4) for k in range(4)], test_fraction=0.2, seed=0, folder=folder)
    summary = play(small("fedsparsify", "schedule.sparsity=0.5"), tmp_path / "run", folder)
    final = summary["final"]
    assert final["off"] >= 0
    assert 0 <= final["within"] <= 1
    assert "accuracy" not in final
    found = outcome(tmp_path / "run")
    assert (found.metric.shown, found.metric.higher, found.quality) == ("grades off", False, final["off"])
    assert found.lowest >= found.local  # the tenth that fares worst is further off


def test_regression_has_both_of_its_scores_in_records(tmp_path):
    draw = np.random.default_rng(0)
    x = draw.standard_normal((80, 3)).astype(np.float32)
    y = (x @ np.array([1.0, -2.0, 0.5])).astype(np.float32)
    source = Source("made up", x, y, x[:20], y[:20], None, 1, kind="tabular", scale=1.0, task="regression")
    folder = tmp_path / "shards"
    folder.mkdir()
    shards = make_shards(source, [np.arange(k, 80, 4) for k in range(4)], test_fraction=0.2, seed=0, folder=folder)
    study = small(rounds=12, training={"epochs": 5, "batch_size": 8, "lr": 0.05})
    final = play(study, tmp_path / "run", folder)["final"]
    model = make_model(study, shards)
    assert example(shards).shape == (1, 3)
    assert final["r2"] > 0.9
    rows = wrap(shards, *shards.server_test())
    assert evaluate(model, rows).further["r2"] < final["r2"]
    assert replace(rows, x=rows.x[:1], y=rows.y[:1]).task.dtype == torch.float32


def test_what_is_learnt_may_be_said_by_the_study():
    study = small("fedavg", "data.task=test_task:Ordinal", "data.source=digits")
    with provision.federation(study) as folder:
        assert open_shards(folder).task == "test_task:Ordinal"
        assert wrap(open_shards(folder), torch.zeros(1, 1, 8, 8), torch.zeros(1)).task.metrics == Ordinal().metrics
