"""Outcomes: what one run ended with, and what it had spent on the way, read from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur import checkpoint
from secateur import run as runs
from secateur.errors import CheckpointError
from secateur.report.links import Links, per_client, predicted
from secateur.report.statistics import Curve
from secateur.wire.codec import encode
from secateur.wire.message import Message


@dataclass(frozen=True)
class Outcome:
    """What one run ended with, and what it had spent on the way.

    Attributes:
        metric: ``accuracy``, in [0, 1], or ``mae``, of which less is better.
        quality: of the shipped model.
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
    """

    metric: str
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


def outcome(folder: Path, links: Links | None = None) -> Outcome:
    """Read a run's folder; of a run that is not finished, what its last records say.

    Raises:
        CheckpointError: the folder holds no records yet.
    """
    if not (folder / runs.ROUNDS).exists():
        raise CheckpointError(f"{folder} holds no records of a run yet: {folder / runs.ROUNDS} is missing")
    records = [json.loads(line) for line in (folder / runs.ROUNDS).read_text("utf-8").splitlines()]
    final = _final(folder, records)
    metric = "accuracy" if "accuracy" in final else "mae"
    carried, worked, linked = 0, 0.0, 0.0
    clients = runs.read_study(folder).data.clients
    waits = predicted(records, links, clients) if links else [0.0] * len(records)
    curves: list[list[tuple[float, float]]] = [[], [], [], []]
    for record, wait in zip(records, waits, strict=True):
        carried += record["bytes_down"] + record["bytes_up"]
        worked += record["client_seconds"]
        linked += wait
        if metric in record:
            for curve, spent in zip(curves, (record["round"], carried, worked, linked), strict=True):
                curve.append((float(spent), record[metric]))
    local = sorted(final["local"], reverse=metric == "mae")
    local_sparsity = final.get("local_sparsity", final["sparsity"])  # nobody was asked: the shipped model's
    tenth = local[: max(1, len(local) // 10)]
    by_round, by_bytes, by_seconds, by_link = curves
    return Outcome(
        metric, final[metric], sum(local) / max(1, len(local)), sum(tenth) / max(1, len(tenth)),
        final["sparsity"] if final["central"] else local_sparsity, carried, worked,
        final["macs"], final["macs_physical"], final["parameters_physical"], by_round, by_bytes, by_seconds,
        sum(record["seconds"] for record in records), by_link if links else (),
        max(per_client(records).values(), default=0), local_sparsity, _size(folder),
    )  # fmt: skip


def _size(folder: Path) -> int:
    if not (folder / runs.SUMMARY).exists():
        return 0
    weights, mask, _ = checkpoint.shipped(folder)
    return len(encode(Message(weights, mask or None)))


def _final(folder: Path, records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    if (folder / runs.SUMMARY).exists():
        return dict(json.loads((folder / runs.SUMMARY).read_text("utf-8"))["final"])
    last = records[-1]
    metric = "mae" if any("mae" in record for record in records) else "accuracy"
    scored = [record[metric] for record in records if metric in record]
    return {
        metric: scored[-1] if scored else 0.0, "local": [], "central": True, "sparsity": last["sparsity"],
        "local_sparsity": last["sparsity"],
        "macs": last["macs"], "macs_physical": last["macs"], "parameters_physical": last["kept"],
    }  # fmt: skip
