"""What the two ends of a link remember, so that less has to travel: which mask is held, what rounding left out.

Pure bookkeeping and arithmetic: nothing is sent here and no file is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from secateur.errors import WireError
from secateur.pruning.mask import apply
from secateur.wire import masks
from secateur.wire.message import Masks, Message, Spec, Tensors

_MOST_VERSIONS = 32
_HELD, _ERROR = "wire.held/", "wire.error/"


class Links:
    """The server's book of which client holds which mask.

    A version is kept, at a bit a weight, while some client holds it; 32 at most, together the size of one model. Who
    holds an older one is sent a whole mask again. Nothing breaks where the book is wrong: a client that does not hold
    what a payload refers to says so, and gets the whole mask within the same exchange.

    Attributes:
        held: the name of the mask that each client holds.
        versions: packed masks by name, the newest last.
    """

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        self.specs = specs
        self.held: dict[int, str] = {}
        self.versions: dict[str, Tensors] = {}

    def mask(self, client: int) -> Masks | None:
        """Return the mask that a client holds, None where that is not known."""
        version = self.held.get(client)
        return None if version is None else masks.unpack(self.versions[version], self.specs)

    def confirm(self, clients: Mapping[int, bool], mask: Masks) -> None:
        """Note who answered to a message with this mask; what the others hold is not known any more."""
        version = masks.digest(mask).hex()
        self.versions.pop(version, None)
        self.versions[version] = masks.pack(mask)
        for client, answered in clients.items():
            self.held.pop(client, None)
            if answered:
                self.held[client] = version
        used = set(self.held.values())
        kept = [name for name in self.versions if name in used][-_MOST_VERSIONS:]
        self.versions = {name: self.versions[name] for name in kept}
        self.held = {client: name for client, name in self.held.items() if name in self.versions}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the versions as named tensors, for a checkpoint."""
        return {f"{v}/{name}": part for v, packed in self.versions.items() for name, part in packed.items()}

    def restore(self, held: Mapping[int, str], tensors: Tensors) -> None:
        """Go on from what ``held`` and ``tensors()`` were."""
        self.held, self.versions = dict(held), {}
        for label, part in tensors.items():
            version, _, name = label.partition("/")
            self.versions[version] = {**self.versions.get(version, {}), name: part}


@dataclass(frozen=True)
class Kept:
    """What a client's end remembers between requests.

    Attributes:
        held: the mask of the last request that had one.
        error: what its replies left out so far.
    """

    held: Masks | None = None
    error: Tensors = field(default_factory=dict)

    @classmethod
    def split(cls, memory: Tensors, specs: Mapping[str, Spec]) -> tuple[Kept, dict[str, torch.Tensor]]:
        """Return what ``tensors`` wrote into a client's memory, and the rest of the memory."""
        packed = {n.removeprefix(_HELD): t for n, t in memory.items() if n.startswith(_HELD)}
        fits = all(n in specs and t.numel() == (specs[n].size + 7) // 8 for n, t in packed.items())
        held = masks.unpack(packed, specs) if packed and fits else None
        error = {n.removeprefix(_ERROR): t for n, t in memory.items() if n.startswith(_ERROR)}
        rest = {n: t for n, t in memory.items() if not n.startswith((_HELD, _ERROR))}
        return cls(held, {n: t for n, t in error.items() if n in specs and tuple(t.shape) == specs[n].shape}), rest

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return it as named tensors, beside which a method's memory may stand."""
        packed = masks.pack(self.held or {})
        return {_HELD + n: t for n, t in packed.items()} | {_ERROR + n: t for n, t in self.error.items()}


def add(message: Message, error: Tensors) -> Message:
    """Return the message with what was left out before added to its float tensors, where its mask keeps them."""
    more = {n: t + error[n] for n, t in message.tensors.items() if n in error}
    return replace(message, tensors=apply({**message.tensors, **more}, message.mask))


def left_out(wanted: Message, arrived: Message) -> dict[str, torch.Tensor]:
    """Return what did not arrive of a message's float tensors."""
    return {
        name: tensor - arrived.tensors[name] for name, tensor in wanted.tensors.items() if tensor.dtype == torch.float32
    }


def as_update(reply: Message, base: Tensors) -> Message:
    """Return a reply's float tensors as differences to what the client was sent, under the reply's mask."""
    tensors = {n: t - base[n] if t.dtype == torch.float32 else t for n, t in reply.tensors.items()}
    return replace(reply, tensors=apply(tensors, reply.mask))


def from_update(update: Message, base: Tensors) -> Message:
    """Return the reply that ``as_update`` was given, but for rounding.

    Raises:
        WireError: a sum is beyond fp32's range.
    """
    tensors = {n: base[n] + t if t.dtype == torch.float32 else t for n, t in update.tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float32 and not bool(tensor.isfinite().all()):
            raise WireError(f"tensor {name!r}: the update leads beyond fp32's range")
    return replace(update, tensors=apply(tensors, update.mask))


def largest(update: Message, share: float) -> Message:
    """Return the ``share`` of largest magnitude of what an update's mask keeps, all float tensors together.

    At least one entry is kept; of equal magnitudes the earlier one, tensors in the order of their names.
    """
    names = sorted(name for name, tensor in update.tensors.items() if tensor.dtype == torch.float32)
    held = update.mask or {}
    allowed = {n: held.get(n, torch.ones((), dtype=torch.bool)).expand(update.tensors[n].shape) for n in names}
    kept = np.concatenate([allowed[n].reshape(-1).numpy() for n in names])
    sizes = np.where(kept, np.concatenate([update.tensors[n].abs().reshape(-1).numpy() for n in names]), -1)
    chosen = np.zeros(kept.size, bool)
    chosen[np.argsort(-sizes, kind="stable")[: max(1, int(share * np.count_nonzero(kept)))]] = True
    ends = np.cumsum([update.tensors[n].numel() for n in names])[:-1]
    parts = zip(names, np.split(chosen, ends), strict=True)
    mask = {name: torch.from_numpy(part).reshape(update.tensors[name].shape) for name, part in parts}
    return replace(update, tensors=apply(update.tensors, mask), mask=mask)
