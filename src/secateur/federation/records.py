"""Records: the summary of a run's rows, why clients were left out, and the check that every phase had replies."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from secateur.contract.suspects import SUSPECTED
from secateur.errors import NobodyTrainedError, plain
from secateur.learning.metrics import Metric, metric_of
from secateur.study.study import Study

Row = dict[str, Any]

VALIDATION = "validation"
"""The key, in a record, of the main score on validation rows; scores on test rows have their own names as keys."""

METRIC = "metric"
"""The key, in a record, that describes the main score; see ``metrics.metric_of``."""

ATTEMPT, BELOW = "attempt", "below_quorum"
"""The keys, in a record, of how often its exchange was tried before, and of the replies that it would have needed."""

UNSOUND = "unsound"
"""The key, in a record, of why nothing usable came of an exchange; the state is that of before."""

BOUNDED, MEDIANS, BLAMELESS = "bounded", "medians", "blameless"
"""The keys, in a record, of what guards cut replies down to, by client; of the medians with which the next cohort is
compared; and of clients whose replies were not finite because of what they were sent."""

EMPTIED = "emptied"
"""The key, in a record, of the layers that have no weight left."""

COUNT = "bytes_count"
"""The key, in a record and in the summary, of how its bytes are known; see ``wire.settings.Wire.count``."""

_RELAYED = ("down", "up", "sums", "single")
_BYTES = {
    "computed": "exact, from names, shapes and the masks that both sides hold, without writing them",
    "sampled": "some of a round's replies were written, and the others are taken to have their mean size",
}

_LONGEST = 500  # characters of a reason
_NUMBER = re.compile(r"[-+]?\d[\d.,:]*(?:e[-+]?\d+)?|\b(?:nan|inf)\b", re.IGNORECASE)


def told_of_bytes(count: str) -> list[str]:
    """Return what is said of bytes that are not all of payloads that were written; nothing of those that are."""
    return [f"bytes of replies are {count}: {_BYTES[count]}"] if count in _BYTES else []


def summarise(study: Study, rows: Sequence[Row], final: Row) -> Row:
    """Return the summary of a run: its records summed by phase, and who was left out, by client and by reason.

    Where there are relays, what they carried is summed under ``relayed``; whom robust rules left out, and how often,
    stands under ``suspected``.
    """
    summed = ("bytes_down", "bytes_up", "client_seconds", "seconds", "train_macs", "train_macs_physical")
    server = ("server_seconds", "server_macs")
    phases: dict[str, Row] = {}
    entries: list[Row] = []
    for row in rows:
        entries += row["left_out"]
        phase = phases.setdefault(row["phase"], dict.fromkeys(("asks", "left_out", *summed), 0))
        phase["asks"] += 1
        phase["left_out"] += len(row["left_out"])
        for name in summed:
            phase[name] += row[name]
        for name in server:
            if name in row:
                phase[name] = phase.get(name, 0) + row[name]
    left_out = Counter(int(entry["client"]) for entry in entries)
    named = {str(client): left_out[client] for client in sorted(left_out)}
    whole = {"study": study.hash(), "method": study.method, "seed": study.seed, COUNT: study.wire.count}
    cut = Counter(int(client) for row in rows for client, _ in row.get(BOUNDED, ()))
    whole |= {BOUNDED: {str(client): cut[client] for client in sorted(cut)}} if cut else {}
    doubted = Counter(int(entry["client"]) for row in rows for entry in row.get(SUSPECTED, ()))
    whole |= {SUSPECTED: {str(client): doubted[client] for client in sorted(doubted)}} if doubted else {}
    relayed = {name: sum(row.get("relayed", {}).get(name, 0) for row in rows) for name in _RELAYED}
    tiers = {"relayed": relayed} if relayed["down"] else {}
    return {**whole, "phases": phases, **tiers, "left_out": named, "reasons": by_reason(entries), "final": final}


def by_reason(entries: Iterable[Row]) -> list[Row]:
    """Return left-out requests grouped by reason, the most frequent first: ``reason``, ``requests`` and ``clients``.

    Reasons that differ only in their numbers are one group, named by the first of them.
    """
    groups: dict[str, Row] = {}
    for entry in entries:
        reason = short(entry["reason"])
        group = groups.setdefault(_NUMBER.sub("#", reason), {"reason": reason, "requests": 0, "clients": set()})
        group["requests"] += 1
        group["clients"].add(int(entry["client"]))
    ordered = sorted(groups.values(), key=lambda group: -group["requests"])
    return [{**group, "clients": sorted(group["clients"])} for group in ordered]


def common(entries: Sequence[Row], asked: int) -> str:
    """Return the most frequent reason of left-out requests in words, with the number of requests that it ended."""
    first = by_reason(entries)[0]
    return f"{first['requests']} of {asked} requests failed because: {first['reason']}"


def emptied(layers: Iterable[str]) -> list[str]:
    """Return a remark on each layer that has no weight left."""
    return [f"{name} has no weight left: nothing of its input comes through" for name in layers]


def listing(clients: Sequence[int], most: int = 6) -> str:
    """Return clients in words, the first of many only.

    >>> listing([3]), listing([1, 2, 3], most=2)
    ('client 3', '3 clients (1, 2, ...)')
    """
    if len(clients) == 1:
        return f"client {clients[0]}"
    some = ", ".join(map(str, clients[:most])) + (", ..." if len(clients) > most else "")
    return f"{len(clients)} clients ({some})"


def local_scores(replies: Sequence[Row], metrics: Sequence[Metric], *, central: bool) -> Row:
    """Return the scores in clients' replies to ``EVALUATE``: each client's score on test rows, and the means by rows.

    The means, on test and on validation rows, are the run's scores if the server has no test set (not ``central``). A
    further score is averaged over the clients on whose rows it is defined.
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
    """Return the name of the scalar by which a client says whether a further score is defined on its test rows."""
    return f"{metric.name}_defined"


def check_answers(rows: Iterable[Row]) -> None:
    """Refuse records with a phase in which no reply of any client counted, because such a run is no result.

    Raises:
        NobodyTrainedError: there is such a phase; the text names it and the most frequent reason.
    """
    asked, why = Counter[str](), dict[str, list[Row]]()
    for row in rows:
        asked[row["phase"]] += len(row["clients"])
        why.setdefault(row["phase"], []).extend(row["left_out"])
    for phase, count in asked.items():
        check_any(phase, count, why[phase])


def check_any(phase: str, asked: int, left_out: Sequence[Row]) -> None:
    """Refuse a phase in which all ``asked`` requests failed.

    Raises:
        NobodyTrainedError: there are at least as many left-out requests as requests; see ``check_answers``.
    """
    if asked and len(left_out) >= asked:
        raise NobodyTrainedError(
            f"no reply of any client counted in phase {phase!r}, so nothing was learnt from it: "
            f"{common(left_out, asked)}"
        )


def short(reason: str) -> str:
    """Return a reason as one printable line of at most 500 characters; a client's message may be longer."""
    return plain(reason, _LONGEST)


def line(row: Row) -> str:
    """Return a record as one line of text, for logs."""
    metric = metric_of(row)
    shown = ((metric.name, metric.shown), (VALIDATION, "validation"))
    quality = "".join(f"{label} {row[name]:.4f} " for name, label in shown if name in row)
    text = (
        f"{row['phase']} {row['round']}: {quality}sparsity {row['sparsity']:.4f} "
        f"down {row['bytes_down']} up {row['bytes_up']} B, {row['seconds']:.2f} s"
    )
    text += "".join(f"; client {k} had lost what it kept and went on without" for k in row.get("lost_state", []))
    text += "".join(f"; left out client {o['client']}: {short(o['reason'])}" for o in row["left_out"])
    text += f"; bounded {listing([k for k, _ in row[BOUNDED]])}" if row.get(BOUNDED) else ""
    text += f"; suspected {listing([o['client'] for o in row[SUSPECTED]])}" if row.get(SUSPECTED) else ""
    text += f"; {row[UNSOUND]}" if UNSOUND in row else ""
    return text + (f"; fewer replies than {row[BELOW]}: nothing is learnt from it" if BELOW in row else "")
