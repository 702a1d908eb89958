"""Messages on Flower, and what else of Flower is used. Only this module imports flwr, and ``supernode``.

There are two types of message. ``query.secateur`` asks a node which client it is; ``train.secateur`` carries a request
or its reply, in every phase. The payload is cut into ``Array``s with a ``stype`` of their own, so that Flower's
strategies refuse it instead of misreading it. They are so small that each arrives in a quarter of the 30 s that Flower
gives a request, two at a time, on a link of 300 kbit/s, and smaller or larger where links are known (``PART``). What
has arrived is not sent again: Flower gives up a reply of which a part took more than 30 s and had arrived all the same.
No smaller: each costs a SuperLink about 20 ms each way. A ``ConfigRecord`` goes with it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from secateur.errors import ConfigError, MissingExtraError, install, plain
from secateur.flower.asked import About, Answer, Asked, Node

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import Result, Strategy
except ImportError as missing:
    raise MissingExtraError(f"this needs Flower as of 1.41 ({missing}): {install('flower', upgrade=True)}") from missing

__all__ = [
    "HELLO", "LEAST", "LOG", "MOST", "PART", "SERVE", "USUAL", "About", "Array", "ArrayRecord", "ClientApp",
    "ConfigRecord", "Context", "Error", "Grid", "Message", "MetricRecord", "RecordDict", "Result", "ServerApp",
    "Strategy", "asked_by", "look_often", "pack", "payload_of", "reason_of", "reply", "unpack", "with_arrays",
    "with_payload",
]  # fmt: skip


class _Ours(logging.LoggerAdapter[logging.Logger]):
    """Flower's logger, with a prefix that marks our lines."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        return f"secateur: {msg}", kwargs


LOG = _Ours(logging.getLogger("flwr.secateur"))
HELLO, SERVE = "query.secateur", "train.secateur"

_ABOUT, _PAYLOAD = "about", "payload"
PART = "part"
"""The fact of a request that tells the bytes of its parts, and of those of its reply."""
_STYPE, _KEPT_STYPE = "secateur.wire", "secateur.kept"
_LOOKS: dict[str, Any] = {"initial_backoff": 0.25, "backoff_cap": 1.0, "max_tries_per_object": None}
_OURS = "secateur-"  # the records of ours in a Context begin so
_LONGEST_REASON = 300
USUAL, MOST, LEAST = 2**17, 2**22, 2**12
"""Bytes of a payload in one array where nothing is known of links; the most and the fewest that may be asked for."""


def _wrapped(payload: bytes, most: int = USUAL) -> ArrayRecord:
    """Return bytes as an ``ArrayRecord`` of parts."""
    parts = [payload[start : start + most] for start in range(0, len(payload), most)] or [b""]
    return ArrayRecord({_part(k): Array("uint8", (len(part),), _STYPE, part) for k, part in enumerate(parts)})


def _unwrapped(arrays: ArrayRecord) -> bytes | None:
    """Return the bytes of an ``ArrayRecord`` of ours; None: it is another's, or lacks a part."""
    parts = [arrays.get(_part(k)) for k in range(len(arrays))]
    if not parts or not all(isinstance(part, Array) and part.stype == _STYPE for part in parts):
        return None
    return b"".join(part.data for part in parts if part is not None)


def _part(place: int) -> str:
    return f"{_PAYLOAD}.{place}"


def pack(about: Mapping[str, Any], payload: bytes | None = None, part: int = USUAL) -> RecordDict:
    """Return the content of a message: facts, and a payload in parts if there is one.

    Parts of another size than usual are told to the node among the facts, so that it cuts its reply likewise.
    """
    facts = about if part == USUAL else {**about, PART: part}
    content = RecordDict({_ABOUT: ConfigRecord(dict(facts))})
    if payload is not None:
        content[_PAYLOAD] = _wrapped(payload, part)
    return content


def unpack(content: RecordDict) -> tuple[About, bytes | None]:
    """Return the facts and the payload that ``pack`` was given; a record of another kind counts as missing."""
    about, arrays = content.get(_ABOUT), content.get(_PAYLOAD)
    facts = dict(about) if isinstance(about, ConfigRecord) else {}
    return facts, _unwrapped(arrays) if isinstance(arrays, ArrayRecord) else None


def look_often() -> None:
    """Let this process's Grid look again soon for a part of a reply that is on its way: after 1/4 s, then 1 s at most.

    Flower's own waits double from 1 to 10 s, so that a reply on a thin link lies there for up to 10 s; and it looks 500
    times at most, which would be too few at these waits. Where Flower has no such defaults, nothing changes.
    """
    try:
        from flwr.supercore.inflatable.inflatable_utils import pull_objects  # noqa: PLC0415 -- of no public module
    except ImportError:
        return
    defaults = pull_objects.__kwdefaults__ or {}
    if defaults.keys() >= _LOOKS.keys():
        defaults.update(_LOOKS)


def asked_by(message: Message, context: Context) -> Asked:
    """Return what a message asks, with what Flower keeps for its node."""
    about, payload = unpack(message.content)
    kept = {
        key: {name: array.data for name, array in record.items() if array.stype == _KEPT_STYPE}
        for key, record in context.state.items()
        if key.startswith(_OURS) and isinstance(record, ArrayRecord)
    }
    node = Node(context.node_id, context.run_id, context.node_config, context.run_config, kept)
    return Asked(message.metadata.message_type, about, payload, node)


def reply(message: Message, context: Context, asked: Asked, answer: Answer) -> Message:
    """Return the reply to a message, and let Flower keep what its node keeps now."""
    for key, held in asked.node.kept.items():
        arrays = {name: Array("uint8", (len(data),), _KEPT_STYPE, data) for name, data in held.items()}
        context.state[key] = ArrayRecord(arrays)
    part = asked.about.get(PART)
    part = part if isinstance(part, int) and LEAST <= part <= MOST else USUAL
    return Message(pack(answer.about, answer.payload, part), reply_to=message)


def payload_of(content: RecordDict) -> tuple[str, bytes | None]:
    """Return the key of the only ``ArrayRecord`` of another app's message, and the payload in it if it is ours.

    The key is empty unless there is exactly one.
    """
    records = list(content.array_records.items())
    if len(records) != 1:
        return "", None
    key, arrays = records[0]
    return key, _unwrapped(arrays)


def with_arrays(content: RecordDict, arrays: ArrayRecord) -> RecordDict:
    """Return a message's content with its only ``ArrayRecord`` replaced."""
    key, _ = payload_of(content)
    if not key:
        raise ConfigError(f"a message holds {len(content.array_records)} ArrayRecords; exactly 1 is expected")
    return RecordDict({k: arrays if k == key else record for k, record in content.items()})


def with_payload(content: RecordDict, payload: bytes) -> RecordDict:
    """Return a message's content with its only ``ArrayRecord`` replaced by a payload."""
    return with_arrays(content, _wrapped(payload))


def reason_of(reply: Message) -> str:
    """Return an error reply's reason as one printable line; its text is the node's, or its Flower's."""
    return plain(str(reply.error.reason or f"error {reply.error.code}"), _LONGEST_REASON)
