"""Parcels: what a worker hands to the server for several clients, as buffers and back.

The first buffer is a JSON document with the answers, and with the place of each tensor among the other buffers.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from secateur.contract.fold import Node
from secateur.contract.reducer import Sums
from secateur.contract.reply import Reply
from secateur.errors import EngineError, NotFiniteError, WireError
from secateur.wire.message import Scalar

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    )
}  # fmt: skip


_THIN = b"zlib"
_WORDS = {4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Account:
    """What is said of one client's answer.

    Attributes:
        client: the client.
        length: the bytes of its reply.
        parts: these bytes by part of the payload.
        scalars: the scalars of the reply.
        refused: why the reply was refused; empty: it counts.
        failed: what the client's code raised; empty: there is a reply.
        own: the name of the reply's mask where it is another than that of the request.
        sent: whether the request went out.
        written: whether the reply was written; otherwise its length is that of values which are not packed.
        rows: by how many rows the client counts.
        facts, bounded: what guards measured of the reply, and what they cut it down to.
        finite: False: it was refused because it holds NaN or infinity.
    """

    client: int
    length: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)
    scalars: Mapping[str, Scalar] = field(default_factory=dict)
    refused: str = ""
    failed: str = ""
    own: str = ""
    sent: bool = True
    written: bool = True
    rows: int = 0
    facts: Mapping[str, float] = field(default_factory=dict)
    bounded: Mapping[str, float] = field(default_factory=dict)
    finite: bool = True

    def listed(self) -> list[Any]:
        """Return its fields in their order, as JSON can say them."""
        return [dict(value) if isinstance(value, Mapping) else value for value in vars(self).values()]

    @classmethod
    def refusing(cls, client: int, length: int, parts: Mapping[str, int], why: WireError) -> Account:
        """Return the account of a client whose reply was refused."""
        return cls(client, length, parts, refused=str(why), finite=not isinstance(why, NotFiniteError))


@dataclass(frozen=True)
class Parcel:
    """What became of the replies to a task.

    Attributes:
        accounts: of each client of the task but those that must be asked again.
        sums: the sums of those whose replies count, by node of the fold; None: nobody's of that node.
        replies: single replies, which are not summed.
        lacking: the clients that lack the mask, or the tensors (True), that their requests refer to.
        again: the clients that must be asked again: those that lack something, and those asked together with them.
        broken: what keeps any reply from being read; empty: nothing.
    """

    accounts: Sequence[Account] = ()
    sums: Sequence[tuple[Node, Sums | None]] = ()
    replies: Sequence[Reply] = ()
    lacking: Mapping[int, bool] = field(default_factory=dict)
    again: Sequence[int] = ()
    broken: str = ""

    def write(self, *, thin: bool = False) -> list[bytes | memoryview]:
        """Return it as buffers.

        Args:
            thin: whether zeros in sums are left out where that is shorter, as those of pruned weights are, and what is
                said of clients is compressed.

        Raises:
            EngineError: a reduction's accumulator holds what cannot travel between processes.
        """
        buffers: list[bytes | memoryview] = [b""]
        head = {
            "accounts": [account.listed() for account in self.accounts],
            "sums": [
                [node.level, node.index, None if sums is None else _packed(sums.of, buffers, thin=thin)]
                for node, sums in self.sums
            ],
            "replies": [
                [r.client, r.rows, _packed(r.tensors, buffers), None if r.mask is None else _packed(r.mask, buffers)]
                for r in self.replies
            ],
            "lacking": list(self.lacking.items()),
            "again": list(self.again),
            "broken": self.broken,
        }
        described = json.dumps(head).encode()
        buffers[0] = _THIN + zlib.compress(described) if thin else described
        return buffers

    @classmethod
    def read(cls, buffers: Sequence[memoryview]) -> Parcel:
        """Return what was written; the tensors are views of the buffers."""
        said = bytes(buffers[0])
        head = json.loads(zlib.decompress(said[len(_THIN) :]) if said.startswith(_THIN) else said)
        accounts = [Account(*account) for account in head["accounts"]]
        of = {account.client: account for account in accounts}
        sums = [
            (Node(level, index), None if found is None else Sums(_unpacked(found, buffers), borrowed=True))
            for level, index, found in head["sums"]
        ]
        replies = []
        for client, rows, tensors, mask in head["replies"]:
            held = None if mask is None else _unpacked(mask, buffers)
            one, own = of[client], _unpacked(tensors, buffers)
            replies.append(Reply(client, rows, own, held, one.scalars, True, one.facts, one.bounded))
        return cls(accounts, sums, replies, dict(head["lacking"]), head["again"], head["broken"])


def _packed(part: Any, buffers: list[bytes | memoryview], *, thin: bool = False) -> Any:
    """Return a part as JSON, in which lists stand for tensors, which are added to the buffers."""
    if isinstance(part, torch.Tensor):
        flat = part.detach().cpu().contiguous().reshape(-1)
        kept = _not_zero(flat) if thin else None
        if kept is not None:
            buffers.append(np.packbits(kept.numpy()).tobytes())
            flat = flat[kept]
        buffers.append(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        return [len(buffers) - 1, kept is not None, str(part.dtype).removeprefix("torch."), *part.shape]
    if isinstance(part, Mapping):
        return {str(name): _packed(inner, buffers, thin=thin) for name, inner in part.items()}
    if isinstance(part, bool | int | float | str):
        return part
    raise EngineError(
        f"a reduction's accumulator holds {type(part).__name__}, which cannot travel between processes: hold tensors, "
        "numbers and dictionaries of these, or set linear = False"
    )


def _not_zero(flat: torch.Tensor) -> torch.Tensor | None:
    """Return which entries are not zero, if they are shorter with a bit for each entry; -0.0 is not zero."""
    words = _WORDS.get(flat.element_size())
    if words is None or not flat.numel():
        return None
    kept = flat.view(words) != 0
    size = int(kept.sum()) * flat.element_size() + -(-flat.numel() // 8)
    return kept if size < flat.numel() * flat.element_size() else None


def _unpacked(part: Any, buffers: Sequence[memoryview]) -> Any:
    if isinstance(part, dict):
        return {name: _unpacked(inner, buffers) for name, inner in part.items()}
    if not isinstance(part, list):
        return part
    number, thin, dtype, *shape = part
    buffer, whole = buffers[number], torch.zeros(0, dtype=_DTYPES[dtype])
    if len(buffer):
        whole = torch.from_numpy(np.frombuffer(buffer, np.uint8)).view(_DTYPES[dtype])
    if thin:
        kept = np.unpackbits(np.frombuffer(buffers[number - 1], np.uint8), count=math.prod(shape)).astype(bool)
        values, whole = whole, whole.new_zeros(len(kept))
        whole[torch.from_numpy(kept)] = values
    return whole.reshape(shape)


def sampled_sizes(
    written: Sequence[Mapping[str, int]], unwritten: Sequence[Account]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the mean size of each part of the replies that were written, and what a record says of this sample.

    Where none was written, the sizes that the others would have are taken.
    """
    known = written or [account.parts for account in unwritten]
    names = dict.fromkeys(name for parts in known for name in parts)
    mean = {name: round(sum(parts.get(name, 0) for parts in known) / len(known)) for name in names}
    totals = [sum(parts.values()) for parts in known] or [0]
    return mean, {"written": len(written), "least": min(totals), "most": max(totals)}
