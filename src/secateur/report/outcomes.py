"""Outcomes: the quality and the cost of one run, read from its folder."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.bandwidth import Bandwidth, Spent, bytes_per_client, predict, scores
from secateur.contract.ask import TRAIN
from secateur.errors import NoResultError
from secateur.federation import checkpoint
from secateur.federation.folder import FAILED, SUMMARY, read_failure, read_records, read_study, read_summary
from secateur.federation.records import METRIC, VALIDATION, check_answers
from secateur.learning.metrics import ACCURACY, Metric, metric_of
from secateur.report.fairness import worst_tenth
from secateur.report.statistics import Curve
from secateur.wire.codec import encode
from secateur.wire.message import Message


@dataclass(frozen=True)
class PhaseCost:
    """The cost of one phase of a run, such as training or exploration.

    Attributes:
        asks: number of exchanges.
        clients: number of requests to single clients.
        rows: number of rows that clients processed.
        bytes_down, bytes_up: bytes that were carried.
        seconds: seconds measured at clients.
        macs, macs_physical: MACs of training, on surviving weights and on the physically smaller models.
    """

    asks: int = 0
    clients: int = 0
    rows: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    macs: int = 0
    macs_physical: int = 0


@dataclass(frozen=True)
class Outcome:
    """The quality and the cost of one run.

    Attributes:
        metric: what ``quality`` is: accuracy, mean absolute error, or a score of the task's own.
        quality: the shipped model's score on test rows.
        local: mean score over clients, each on its own test rows.
        lowest: mean score of the worst tenth of clients.
        sparsity: fraction pruned of the prunable weights.
        bytes, seconds: cost of all phases: bytes carried both ways, seconds measured at clients.
        macs, macs_physical: MACs of one example, on surviving weights and after physical removal.
        parameters: number of parameters after physical removal.
        by_round, by_bytes, by_seconds: curves of quality by round, by bytes and by client seconds so far.
        wall_seconds: seconds that passed on the machine of the run.
        by_link: curve of quality by predicted seconds on a network, where one was given; see ``bandwidth``.
        on_link: the predicted seconds of the whole run there, with the clients' scores at its end.
        unseen: the bytes of a client and an exchange that take a tenth of it there; fewer bytes can save no more.
        client_bytes: the most bytes that one client carried, scores included.
        local_sparsity: mean sparsity of the models that clients themselves use.
        size: bytes of the shipped model, with its mask, as one message; 0 while a run is not finished.
        phases: the cost of each phase by its name; the rounds are ``train``.
        server_macs: MACs of the server's own training.
        traffic: the mean training message as a share of the dense fp32 model, ``down_values``, ``down_mask``, ...
        state_bytes: mean bytes of the state that a client keeps between rounds; 0 where none keeps any.
        parameters_left: parameters after physical removal, as a share of all.
        widths: quality and MACs of the narrower models that the shipped one holds, by their width.
        validation: quality on validation rows, by which settings, epochs and rounds may be chosen; NaN without any.
        validation_by_round: curve of the same by round.
        count: how its bytes are known: ``encoded``, ``computed`` or ``sampled``; see ``wire.settings.Wire``.
    """

    metric: Metric
    quality: float
    local: float
    lowest: float
    sparsity: float
    bytes: int
    seconds: float
    macs: int
    macs_physical: int
    parameters: int
    by_round: Curve = ()
    by_bytes: Curve = ()
    by_seconds: Curve = ()
    wall_seconds: float = 0.0
    by_link: Curve = ()
    on_link: Spent | None = None
    unseen: float = math.nan
    client_bytes: int = 0
    local_sparsity: float = 0.0
    size: int = 0
    phases: Mapping[str, PhaseCost] = field(default_factory=dict)
    server_macs: int = 0
    traffic: Mapping[str, float] = field(default_factory=dict)
    state_bytes: float = 0.0
    parameters_left: float = 1.0
    widths: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    validation: float = math.nan
    validation_by_round: Curve = ()
    count: str = "encoded"

    def spent(self, figure: str, *, train: bool) -> float:
        """Return the sum of a field of ``PhaseCost``, over training rounds or over all other phases."""
        return sum(float(getattr(of, figure)) for phase, of in self.phases.items() if (phase == TRAIN) == train)


def outcome(folder: Path, bandwidth: Bandwidth | None = None) -> Outcome:
    """Return the outcome of a run's folder; of an unfinished run it is read from the last records.

    Raises:
        CheckpointError: the folder holds no records yet.
        NoResultError: the run ended without a result, or all rounds are over, and in some phase no client's reply ever
            counted.
    """
    if (failure := read_failure(folder)) is not None:
        raise NoResultError(failure[FAILED])
    records = read_records(folder)
    study = read_study(folder)
    if any(record["phase"] == TRAIN and record["round"] == study.rounds for record in records):
        check_answers(records)
    final = _final(folder, records)
    metric = metric_of(final)
    carried, worked, waited = 0, 0.0, 0.0
    waits, on_link = _on_link(records, final, bandwidth, study.data.clients)
    curves: list[list[tuple[float, float]]] = [[], [], [], []]
    for record, wait in zip(records, waits, strict=True):
        carried += record["bytes_down"] + record["bytes_up"]
        worked += record["client_seconds"]
        waited += wait.seconds
        if math.isfinite(record.get(metric.name, math.nan)):
            for curve, spent in zip(curves, (record["round"], carried, worked, waited), strict=True):
                curve.append((float(spent), record[metric.name]))
    local = final["local"]
    local_sparsity = final.get("local_sparsity", final["sparsity"])  # nobody was asked: the shipped model's
    by_round, by_bytes, by_seconds, by_link = curves
    validated = [(float(record["round"]), record[VALIDATION]) for record in records if VALIDATION in record]
    return Outcome(
        metric, final[metric.name], sum(local) / max(1, len(local)),
        worst_tenth(local, lower_is_better=not metric.higher),
        final["sparsity"] if final["central"] else local_sparsity, carried, worked,
        final["macs"], final["macs_physical"], final["parameters_physical"], by_round, by_bytes, by_seconds,
        sum(record["seconds"] for record in records), by_link if bandwidth else (),
        on_link, bandwidth.unseen(on_link, len(records)) if bandwidth and on_link else math.nan,
        max(bytes_per_client([*records, scores(final)]).values(), default=0), local_sparsity, _size(folder),
        phases=_phases(records), server_macs=sum(record.get("server_macs", 0) for record in records),
        traffic=_traffic(records, final), state_bytes=_state_bytes(folder),
        parameters_left=final["parameters_physical"] / final.get("parameters_dense", final["parameters_physical"]),
        widths={name: (part[metric.name], part["macs_physical"]) for name, part in final.get("widths", {}).items()},
        validation=final.get(VALIDATION, math.nan), validation_by_round=validated,
        count=study.wire.count,
    )  # fmt: skip


def _on_link(
    records: Sequence[Mapping[str, Any]], final: Mapping[str, Any], bandwidth: Bandwidth | None, clients: int
) -> tuple[list[Spent], Spent | None]:
    """Return what each record and the whole run take on a network; None without one."""
    if bandwidth is None:
        return [Spent()] * len(records), None
    waits = predict(records, bandwidth, clients)
    waits[:1] = [wait + bandwidth.greeting for wait in waits[:1]]
    return waits, sum([*waits, *predict([scores(final)], bandwidth, clients)], start=Spent())


def _phases(records: Sequence[Mapping[str, Any]]) -> dict[str, PhaseCost]:
    costs: dict[str, PhaseCost] = {}
    for record in records:
        old = costs.get(record["phase"], PhaseCost())
        costs[record["phase"]] = PhaseCost(
            old.asks + 1, old.clients + len(record["clients"]), old.rows + record["processed"],
            old.bytes_down + record["bytes_down"], old.bytes_up + record["bytes_up"],
            old.seconds + record["client_seconds"], old.macs + record["train_macs"],
            old.macs_physical + record["train_macs_physical"],
        )  # fmt: skip
    return costs


def _traffic(records: Sequence[Mapping[str, Any]], final: Mapping[str, Any]) -> dict[str, float]:
    train = [record for record in records if record["phase"] == TRAIN]
    whole = 4 * final.get("parameters_dense", 0) * sum(len(record["clients"]) for record in train)
    return {
        f"{way}_{part}": sum(record[way].get(part, 0) for record in train) / whole if whole else 0.0
        for way in ("down", "up")
        for part in ("values", "mask")
    }


def _state_bytes(folder: Path) -> float:
    sizes = [path.stat().st_size for path in (folder / "clients").glob("*.state")]
    return statistics.fmean(sizes) if sizes else 0.0


def _size(folder: Path) -> int:
    if not (folder / SUMMARY).exists():
        return 0
    tensors, mask, about = checkpoint.shipped(folder)
    base = set(json.loads(about.get(checkpoint.BASE, "[]")))  # as it is: it may hold infinities, which no message does
    weights = {name: tensor for name, tensor in tensors.items() if name not in base}
    return len(encode(Message(weights, mask or None))) + sum(tensors[name].nbytes for name in base)


def _final(folder: Path, records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    if (summary := read_summary(folder)) is not None:
        return dict(summary["final"])
    last = records[-1]
    scored = [record for record in records if math.isfinite(record.get(metric_of(record).name, math.nan))]
    metric = metric_of(scored[-1]) if scored else ACCURACY
    chosen = [record[VALIDATION] for record in records if VALIDATION in record]
    return {
        metric.name: scored[-1][metric.name] if scored else 0.0, METRIC: asdict(metric), "local": [], "central": True,
        VALIDATION: chosen[-1] if chosen else math.nan, "sparsity": last["sparsity"],
        "local_sparsity": last["sparsity"],
        "macs": last["macs"], "macs_physical": last["macs"], "parameters_physical": last["kept"],
    }  # fmt: skip
