"""TensorBoard and MLflow show the numbers of the records, each once."""

import json

import pytest

from helpers import play, small, tiny_shards
from secateur.errors import CheckpointError, ConfigError
from secateur.federation.folder import ROUNDS, read_study
from secateur.report import trackers


@pytest.fixture
def folder(tmp_path):
    """A run of AutoFLIP that stops after two rounds, and a function that plays it to its end."""
    shards = tiny_shards(tmp_path / "rows")
    place = tmp_path / "runs" / "mine"

    class Stop(Exception):
        pass

    def stop(event):
        if event["event"] == "row" and event["phase"] == "train" and event["round"] == 2:
            raise Stop

    with pytest.raises(Stop):
        play(small("autoflip"), place, shards, watch=stop)
    return place, lambda: play(small("autoflip"), place, shards)


def expected(place):
    """Return {name: {step: value}} of a run's records, by another way than the journal's."""
    found = {}
    explored = 0
    for line in (place / ROUNDS).read_text().splitlines():
        row = json.loads(line)
        explored += row["phase"] == "explore"
        step = row["round"] if row["phase"] == "train" else explored
        for name in (
            "bytes_down",
            "bytes_up",
            "sparsity",
            "train_loss",
            "client_seconds",
            "train_macs",
            "accuracy",
            "kept",
        ):
            if row.get(name) is not None:
                key = name if row["phase"] == "train" else f"explore/{name}"
                found.setdefault(key, {})[step] = row[name]
    return found


def test_tensorboard_has_every_number_once(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place, finish = folder
    first, ended = trackers.log_records(place, "tensorboard")
    assert not ended
    assert trackers.log_records(place, "tensorboard") == (0, False)
    finish()
    more, ended = trackers.log_records(place, "tensorboard")
    assert ended
    assert first + more == len((place / ROUNDS).read_text().splitlines())
    events = EventAccumulator(str(place / "tensorboard")).Reload()
    for name, values in expected(place).items():
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in told] == list(values)
        assert [value for _, value in told] == pytest.approx(list(values.values()), rel=1e-6)
    assert "study/text_summary" in events.Tags()["tensors"]


@pytest.mark.filterwarnings("ignore:.*noload.*")  # MLflow's own use of SQLAlchemy
def test_mlflow_has_every_number_once(folder):
    import mlflow

    place, finish = folder
    trackers.log_records(place, "mlflow")
    finish()
    _, ended = trackers.log_records(place, "mlflow")
    assert ended
    assert trackers.log_records(place, "mlflow") == (0, True)
    client = mlflow.MlflowClient(f"sqlite:///{place.parent / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "secateur"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params["method"] == "autoflip"
    assert run.data.params["training.lr"] == "0.1"
    assert run.data.tags["study"] == read_study(place).hash()
    for name, values in expected(place).items():
        told = sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name))
        assert told == sorted(values.items())


def test_wrong_use_is_one_line(tmp_path, folder):
    place, _ = folder
    with pytest.raises(ConfigError, match="--to wandb: write to tensorboard or mlflow"):
        trackers.log_records(place, "wandb")
    with pytest.raises(CheckpointError, match="holds no run"):
        trackers.log_records(tmp_path, "mlflow")
    trackers.log_records(place, "tensorboard")
    (place / ROUNDS).write_text("")
    with pytest.raises(CheckpointError, match=r"rounds.jsonl is shorter than its checkpoint says"):
        trackers.log_records(place, "tensorboard")


def test_a_note_that_is_damaged_or_of_other_records_is_one_line(folder):
    place, _ = folder
    trackers.log_records(place, "tensorboard")
    note = place / "tensorboard.json"
    for text, told in (
        ("{", "is damaged: remove it"),
        ('{"logged": 99}', "knows of 99 records, .* remove .*tensorboard.json"),
    ):
        note.write_text(text)
        with pytest.raises(CheckpointError, match=told):
            trackers.log_records(place, "tensorboard")
