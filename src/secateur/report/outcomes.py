"""Outcomes: what one run ended with, and what it had spent on the way, read from its folder."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.bandwidth import Links, per_client, predicted
from secateur.contract.method import TRAIN
from secateur.errors import CheckpointError
from secateur.federation import checkpoint
from secateur.federation import run as runs
from secateur.federation.records import METRIC, VALIDATION, check_answers
from secateur.learning.metrics import ACCURACY, Metric, metric_of
from secateur.report.statistics import Curve
from secateur.report.worst import worst_tenth
from secateur.wire.codec import encode
from secateur.wire.message import Message


@dataclass(frozen=True)
class Spent:
    """What one phase of a run cost: training, scores, exploration.

    Attributes:
        asks: exchanges.
        clients: requests to single clients.
        rows: that they processed.
        bytes_down, bytes_up: as carried.
        seconds: measured at clients.
        macs, macs_physical: of their training, on surviving weights, and on the models that were really cut.
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
    """What one run ended with, and what it had spent on the way.

    Attributes:
        metric: what ``quality`` is: accuracy, mean absolute error, or a score of the task's own.
        quality: of the shipped model, on test rows.
        local: mean over clients' own test rows.
        lowest: mean over the tenth of clients that fare worst.
        bytes, seconds: of all phases: carried both ways; measured at clients.
        macs, macs_physical: of one example, on surviving weights, and when dead units are cut out.
        parameters: when dead units are cut out.
        rounds, carried, worked: quality by round, by bytes and by client seconds so far.
        wall: seconds that passed on the machine of the run.
        linked: quality by predicted seconds on a link, where one was given; see ``report.links``.
        client_bytes: the most that one client carried.
        local_sparsity: mean over the models that clients themselves use.
        size: bytes of the shipped model, with its mask, as one message; 0 while a run is not finished.
        phases: what each phase cost, by its name; ``train`` are the rounds.
        server_macs: of the server's own work on the model.
        traffic: the mean training message as a share of the dense fp32 model, ``down_values``, ``down_mask``, ...
        kept: mean bytes of what a client keeps between rounds; 0 where none keeps anything.
        left: parameters left when dead units are cut out, as a share of all.
        widths: of the narrower models that the shipped one holds, quality and MACs, by their width.
        validation: quality on validation rows, by which settings, epochs and rounds may be chosen; NaN without such.
        validated: the same by round.
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
    rounds: Curve = ()
    carried: Curve = ()
    worked: Curve = ()
    wall: float = 0.0
    linked: Curve = ()
    client_bytes: int = 0
    local_sparsity: float = 0.0
    size: int = 0
    phases: Mapping[str, Spent] = field(default_factory=dict)
    server_macs: int = 0
    traffic: Mapping[str, float] = field(default_factory=dict)
    kept: float = 0.0
    left: float = 1.0
    widths: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    validation: float = math.nan
    validated: Curve = ()

    def spent(self, figure: str, *, train: bool) -> float:
        """Return a figure of ``Spent``, of the rounds or of all that is not rounds, added up."""
        return sum(float(getattr(of, figure)) for phase, of in self.phases.items() if (phase == TRAIN) == train)


def outcome(folder: Path, links: Links | None = None) -> Outcome:
    """Read a run's folder; of a run that is not finished, what its last records say.

    Raises:
        CheckpointError: the folder holds no records yet.
        NobodyTrainedError: the run went through all its rounds, and there is nothing that it could have learnt.
    """
    if not (folder / runs.ROUNDS).exists():
        raise CheckpointError(f"{folder} holds no records of a run yet: {folder / runs.ROUNDS} is missing")
    records = [json.loads(line) for line in (folder / runs.ROUNDS).read_text("utf-8").splitlines()]
    study = runs.read_study(folder)
    if any(record["phase"] == TRAIN and record["round"] == study.rounds for record in records):
        check_answers(records)
    final = _final(folder, records)
    metric = metric_of(final)
    carried, worked, linked = 0, 0.0, 0.0
    waits = predicted(records, links, study.data.clients) if links else [0.0] * len(records)
    curves: list[list[tuple[float, float]]] = [[], [], [], []]
    for record, wait in zip(records, waits, strict=True):
        carried += record["bytes_down"] + record["bytes_up"]
        worked += record["client_seconds"]
        linked += wait
        if metric.name in record:
            for curve, spent in zip(curves, (record["round"], carried, worked, linked), strict=True):
                curve.append((float(spent), record[metric.name]))
    local = final["local"]
    local_sparsity = final.get("local_sparsity", final["sparsity"])  # nobody was asked: the shipped model's
    by_round, by_bytes, by_seconds, by_link = curves
    validated = [(float(record["round"]), record[VALIDATION]) for record in records if VALIDATION in record]
    return Outcome(
        metric, final[metric.name], sum(local) / max(1, len(local)), worst_tenth(local, least=not metric.higher),
        final["sparsity"] if final["central"] else local_sparsity, carried, worked,
        final["macs"], final["macs_physical"], final["parameters_physical"], by_round, by_bytes, by_seconds,
        sum(record["seconds"] for record in records), by_link if links else (),
        max(per_client(records).values(), default=0), local_sparsity, _size(folder),
        phases=_phases(records), server_macs=sum(record.get("server_macs", 0) for record in records),
        traffic=_traffic(records, final), kept=_kept(folder),
        left=final["parameters_physical"] / final["parameters_dense"] if "parameters_dense" in final else 1.0,
        widths={name: (part[metric.name], part["macs_physical"]) for name, part in final.get("widths", {}).items()},
        validation=final.get(VALIDATION, math.nan), validated=validated,
    )  # fmt: skip


def _phases(records: Sequence[Mapping[str, Any]]) -> dict[str, Spent]:
    found: dict[str, Spent] = {}
    for record in records:
        old = found.get(record["phase"], Spent())
        found[record["phase"]] = Spent(
            old.asks + 1, old.clients + len(record["clients"]), old.rows + record["processed"],
            old.bytes_down + record["bytes_down"], old.bytes_up + record["bytes_up"],
            old.seconds + record["client_seconds"], old.macs + record["train_macs"],
            old.macs_physical + record["train_macs_physical"],
        )  # fmt: skip
    return found


def _traffic(records: Sequence[Mapping[str, Any]], final: Mapping[str, Any]) -> dict[str, float]:
    train = [record for record in records if record["phase"] == TRAIN]
    whole = 4 * final.get("parameters_dense", 0) * sum(len(record["clients"]) for record in train)
    return {
        f"{way}_{part}": sum(record[way].get(part, 0) for record in train) / whole if whole else 0.0
        for way in ("down", "up")
        for part in ("values", "mask")
    }


def _kept(folder: Path) -> float:
    sizes = [path.stat().st_size for path in (folder / "clients").glob("*.state")]
    return statistics.fmean(sizes) if sizes else 0.0


def _size(folder: Path) -> int:
    if not (folder / runs.SUMMARY).exists():
        return 0
    tensors, mask, about = checkpoint.shipped(folder)
    base = set(json.loads(about.get(checkpoint.BASE, "[]")))  # as it is: it may hold infinities, which no message does
    weights = {name: tensor for name, tensor in tensors.items() if name not in base}
    return len(encode(Message(weights, mask or None))) + sum(tensors[name].nbytes for name in base)


def _final(folder: Path, records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    if (folder / runs.SUMMARY).exists():
        return dict(json.loads((folder / runs.SUMMARY).read_text("utf-8"))["final"])
    last = records[-1]
    scored = [record for record in records if metric_of(record).name in record]
    metric = metric_of(scored[-1]) if scored else ACCURACY
    chosen = [record[VALIDATION] for record in records if VALIDATION in record]
    return {
        metric.name: scored[-1][metric.name] if scored else 0.0, METRIC: asdict(metric), "local": [], "central": True,
        VALIDATION: chosen[-1] if chosen else math.nan, "sparsity": last["sparsity"],
        "local_sparsity": last["sparsity"],
        "macs": last["macs"], "macs_physical": last["macs"], "parameters_physical": last["kept"],
    }  # fmt: skip
