"""Scores by clients: what their numbers may be, and the means that a run records of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.bandwidth import SCORED
from secateur.contract.guard import Guard
from secateur.federation.exchange import Exchange
from secateur.federation.records import Row, local_scores
from secateur.learning.metrics import Metric

_COUNTS = ("samples", "validation_samples")


def bounds(metrics: Sequence[Metric]) -> dict[str, tuple[float, float]]:
    """Return least and most of the scalars of a client that scored a model; the first metric is the main one."""
    main = metrics[0].bounds
    found = {"metric": main, "validation": main, "sparsity": (0.0, 1.0)}
    return found | {metric.name: metric.bounds for metric in metrics[1:]}


def scores(exchange: Exchange, metrics: Sequence[Metric], *, central: bool) -> Row:
    """Return the clients' scores, and the bytes of the exchange under ``evaluate_bytes``, by client ``evaluate_each``.

    If the server has no test set (not ``central``), their mean by rows is the run's score; a client counts by no more
    rows than the guards believe.
    """
    return {
        "evaluate_bytes": sum(exchange.down.values()) + sum(exchange.up.values()),
        SCORED: [[who, *carried] for who, carried in sorted(exchange.carried.items())],
        **({"evaluate_relayed": dict(exchange.relayed)} if exchange.relayed else {}),
        **local_scores(_counted(exchange.reply_scalars, exchange.guards), metrics, central=central),
    }


def _counted(replies: Sequence[Mapping[str, Any]], guards: Sequence[Guard]) -> list[Row]:
    counts = {name: [int(reply[name]) for reply in replies] for name in _COUNTS}
    for guard in guards:
        counts = {name: guard.counted(rows) for name, rows in counts.items()}
    return [{**reply, **{name: counts[name][place] for name in _COUNTS}} for place, reply in enumerate(replies)]
