"""Experiment trackers: a run's records are written to TensorBoard or MLflow under their own names.

A file in the run's folder says how many records have been written, so that none is written twice.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.contract.ask import TRAIN
from secateur.errors import CheckpointError, ConfigError, need
from secateur.federation import checkpoint
from secateur.federation.folder import ROUNDS, read_records, read_study, read_summary
from secateur.study.options import dotted
from secateur.study.study import Study

_BATCH = 1000


@dataclass(frozen=True)
class Figure:
    """One number of a record at a ``step``; ``name`` is the record's, after ``PHASE/`` where that is not training."""

    name: str
    value: float
    step: int


def figures_by_record(records: Sequence[Mapping[str, Any]]) -> Iterator[list[Figure]]:
    """Return the figures of each record. A step is a round in training and an exchange in every other phase."""
    asked = Counter[str]()
    for record in records:
        phase = str(record["phase"])
        asked[phase] += 1
        step, prefix = (int(record["round"]), "") if phase == TRAIN else (asked[phase], f"{phase}/")
        yield [
            Figure(prefix + name, float(value), step)
            for name, value in record.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "round"
        ]


class Tracker(ABC):
    """A place that figures are written to; ``close`` makes them durable."""

    @abstractmethod
    def write(self, figures: Sequence[Figure]) -> None:
        """Write the figures of some records."""

    @abstractmethod
    def close(self, *, ended: bool) -> None:
        """Write what is still held back; ``ended`` says that the run has ended."""


class TensorBoard(Tracker):
    """Event files in the run's folder; ``tensorboard --logdir RUN/tensorboard`` shows them."""

    def __init__(self, folder: Path, study: Study, kept: dict[str, Any], store: str) -> None:
        del store
        need("tensorboard", extra="tensorboard")
        self._writer = need("torch.utils.tensorboard", extra="tensorboard").SummaryWriter(str(folder / "tensorboard"))
        if not kept["logged"]:
            self._writer.add_text("study", "\n".join(f"    {line}" for line in study.to_toml().splitlines()))

    def write(self, figures: Sequence[Figure]) -> None:
        """Add a scalar for each figure."""
        for figure in figures:
            self._writer.add_scalar(figure.name, figure.value, figure.step)

    def close(self, *, ended: bool) -> None:
        """Flush and close the event file."""
        del ended
        self._writer.close()


class MLflow(Tracker):
    """A run of the experiment ``secateur`` in an MLflow store; its id is kept as ``kept["run"]``."""

    def __init__(self, folder: Path, study: Study, kept: dict[str, Any], store: str) -> None:
        self._mlflow = need("mlflow", extra="mlflow")
        self._client = self._mlflow.MlflowClient(store or f"sqlite:///{(folder.parent / 'mlflow.db').absolute()}")
        if "run" not in kept:
            found = self._client.get_experiment_by_name("secateur")
            experiment = found.experiment_id if found else self._client.create_experiment("secateur")
            kept["run"] = self._client.create_run(experiment, run_name=folder.name).info.run_id
            for name, value in dotted(study.complete().model_dump(mode="json")).items():
                self._client.log_param(kept["run"], name, value)
            self._client.set_tag(kept["run"], "study", study.hash())
        self._run = kept["run"]

    def write(self, figures: Sequence[Figure]) -> None:
        """Log a metric for each figure, in batches."""
        metric = self._mlflow.entities.Metric
        now = int(time.time() * 1000)
        made = [metric(figure.name, figure.value, now, figure.step) for figure in figures]
        for start in range(0, len(made), _BATCH):
            self._client.log_batch(self._run, metrics=made[start : start + _BATCH])

    def close(self, *, ended: bool) -> None:
        """Mark the MLflow run as finished once the run has ended."""
        if ended:
            self._client.set_terminated(self._run)


KINDS: Mapping[str, Callable[[Path, Study, dict[str, Any], str], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
}


def log_records(folder: Path, kind: str, store: str = "") -> tuple[int, bool]:
    """Write those records of a run that the tracker has not yet; return their number, and whether the run has ended.

    Args:
        folder: the run's folder.
        kind: ``tensorboard`` or ``mlflow``.
        store: MLflow's tracking store; default: the SQLite file ``mlflow.db`` next to the run's folder.

    Raises:
        CheckpointError: the folder holds no run.
        ConfigError: the kind is unknown.
        MissingExtraError: the package is not installed.
    """
    if kind not in KINDS:
        raise ConfigError(f"--to {kind}: write to {' or '.join(KINDS)}")
    study = read_study(folder)
    path, ended = folder / ROUNDS, read_summary(folder) is not None
    begun = ended or (folder / checkpoint.NAME).exists() or (path.exists() and path.stat().st_size)
    records = read_records(folder) if begun else []
    state = folder / f"{kind}.json"
    kept = _kept(state)
    if kept["logged"] > len(records):
        raise CheckpointError(f"{state} knows of {kept['logged']} records, {path} has {len(records)}; remove {state}")
    fresh = list(figures_by_record(records))[kept["logged"] :]
    if fresh or not state.exists():
        tracker = KINDS[kind](folder, study, kept, store)
        tracker.write([figure for figures in fresh for figure in figures])
        tracker.close(ended=ended)
        kept["logged"] = len(records)
        checkpoint.write(state, json.dumps(kept).encode())
    return len(fresh), ended


def _kept(path: Path) -> dict[str, Any]:
    """Return what was noted of the records that a tracker has.

    Raises:
        CheckpointError: the note is damaged.
    """
    try:
        kept: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {"logged": 0}
        return kept | {"logged": int(kept["logged"])}
    except (ValueError, TypeError, KeyError, OSError) as broken:
        raise CheckpointError(
            f"{path} is damaged: remove it, and all records are written to the tracker again"
        ) from broken
