"""Records: what the rows of a run add up to, and whether it was a run at all."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from secateur.errors import NobodyTrainedError
from secateur.learning.metrics import Metric, metric_of
from secateur.study.study import Study

Row = dict[str, Any]

VALIDATION = "validation"
"""The main score on validation rows, in a record; scores on test rows stand under their own names."""

METRIC = "metric"
"""Where a record says which score is the main one, and which way is better; see ``metrics.metric_of``."""

_LONGEST = 500  # characters of a reason


def summarise(study: Study, rows: Iterable[Row], final: Row) -> Row:
    """Add up a run's records, each phase on its own line; ``left_out``: by client, in how many exchanges."""
    summed = ("bytes_down", "bytes_up", "client_seconds", "seconds", "train_macs", "train_macs_physical")
    server = ("server_seconds", "server_macs")
    phases: dict[str, Row] = {}
    left_out: Counter[int] = Counter()
    for row in rows:
        left_out.update(entry["client"] for entry in row["left_out"])
        phase = phases.setdefault(row["phase"], dict.fromkeys(("asks", "left_out", *summed), 0))
        phase["asks"] += 1
        phase["left_out"] += len(row["left_out"])
        for name in summed:
            phase[name] += row[name]
        for name in server:
            if name in row:
                phase[name] = phase.get(name, 0) + row[name]
    named = {str(client): left_out[client] for client in sorted(left_out)}
    whole = {"study": study.hash(), "method": study.method, "seed": study.seed}
    return {**whole, "phases": phases, "left_out": named, "final": final}


def local_scores(replies: Sequence[Row], metrics: Sequence[Metric], *, central: bool) -> Row:
    """Return what clients' replies to ``EVALUATE`` add up to: each one's score on test rows, and means by rows.

    The means, on test and on validation rows, are the run's scores where no server has one (not ``central``). Of the
    scores beside the main one, those clients count on whose rows they are defined.
    """
    scored = [t for t in replies if int(t["samples"])]
    row: Row = {"local": sorted(float(t["metric"]) for t in scored)}
    if replies:
        row["local_sparsity"] = sum(float(t["sparsity"]) for t in scored or replies) / len(scored or replies)
    if central:
        return row
    main, *further = metrics
    parts = [
        (main.name, "metric", "samples", replies), ("loss", "loss", "samples", replies),
        *((m.name, m.name, "samples", [t for t in replies if t[defined(m)]]) for m in further),
        (VALIDATION, "validation", "validation_samples", replies),
    ]  # fmt: skip
    for name, key, rows, of in parts:
        count = sum(int(t[rows]) for t in of)
        if count:
            row[name] = sum(float(t[key]) * int(t[rows]) for t in of) / count
    return row | {METRIC: dataclasses.asdict(main)}


def defined(metric: Metric) -> str:
    """Return the scalar by which a client says that a score beside the main one is defined on its test rows."""
    return f"{metric.name}_defined"


def check_answers(rows: Iterable[Row]) -> None:
    """Refuse records with a phase in which no reply of any client ever counted: their run is no result.

    Raises:
        NobodyTrainedError: the text names the phase, and the reason that was given most often.
    """
    asked, why = Counter[str](), dict[str, list[Row]]()
    for row in rows:
        asked[row["phase"]] += len(row["clients"])
        why.setdefault(row["phase"], []).extend(row["left_out"])
    for phase, count in asked.items():
        check_any(phase, count, [entry["reason"] for entry in why[phase]])


def check_any(phase: str, asked: int, reasons: Sequence[str]) -> None:
    """Raise where all that were asked in a phase were left out, for these reasons.

    Raises:
        NobodyTrainedError: see ``check_answers``.
    """
    if not asked or len(reasons) < asked:
        return
    ((reason, count),) = Counter(map(short, reasons)).most_common(1)
    raise NobodyTrainedError(
        f"no reply of any client counted in phase {phase!r}, so nothing was learnt from it: "
        f"{count} of {asked} requests failed because: {reason}"
    )


def short(reason: str) -> str:
    """Return a reason as one line: a client's own words may be long, and of several lines."""
    text = " ".join(reason.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def line(row: Row) -> str:
    """Return a record in one line, for logs."""
    metric = metric_of(row)
    shown = ((metric.name, metric.shown), (VALIDATION, "validation"))
    quality = "".join(f"{label} {row[name]:.4f} " for name, label in shown if name in row)
    text = (
        f"{row['phase']} {row['round']}: {quality}sparsity {row['sparsity']:.4f} "
        f"down {row['bytes_down']} up {row['bytes_up']} B, {row['seconds']:.2f} s"
    )
    text += "".join(f"; client {k} had lost what it kept and went on without" for k in row.get("lost_state", []))
    return text + "".join(f"; left out client {o['client']}: {short(o['reason'])}" for o in row["left_out"])
