"""Held masks: who holds which mask, so that it need not travel again, or only what changed of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

from secateur.pruning.mask import Tensors
from secateur.wire import masks
from secateur.wire.message import Masks, Spec

_MOST_VERSIONS = 32


def name_of(mask: Masks) -> str:
    """Return the name of a mask: the digest by which payloads refer to it."""
    return masks.digest(mask).hex()


class HeldMasks:
    """The server's notes of which client holds which mask.

    Of each client the mask's name is noted. What a name stands for is kept of masks that many hold, at a bit a weight:
    the 32 newest, together the size of one model, from which a client is told what changed. A mask of a client's own is
    not kept here: while it stays what it was, its name is all that has to travel, and whoever sends it has it at hand.
    Nothing breaks where a note is wrong: a client that does not hold what a payload refers to says so, and gets the
    whole mask within the same exchange.

    Args:
        specs: of the model's tensors.
        held: the name of the mask that each client holds.
        versions: packed masks by name.
        order: names of the versions, the newest last.
    """

    def __init__(
        self, specs: Mapping[str, Spec], held: MutableMapping[int, str] | None = None,
        versions: MutableMapping[str, Tensors] | None = None, order: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self.specs = specs
        self.held: MutableMapping[int, str] = {} if held is None else held
        self.versions: MutableMapping[str, Tensors] = {} if versions is None else versions
        self.order = list(order)

    def name(self, client: int, at_hand: str = "") -> str | None:
        """Return the name of the mask that a client holds; None where it is unknown, or what it stands for is.

        Args:
            client: whose.
            at_hand: the name of a mask that the caller has.
        """
        name = self.held.get(client)
        return name if name is not None and (name == at_hand or name in self.versions) else None

    def mask(self, name: str) -> Masks:
        """Return what the name of a version stands for."""
        return masks.unpack(self.versions[name], self.specs)

    def note(self, client: int, name: str | None) -> None:
        """Note which mask a client holds; None: it is not known any more."""
        if name is None:
            self.held.pop(client, None)
        else:
            self.held[client] = name

    def confirm(self, clients: Mapping[int, bool], mask: Masks) -> None:
        """Note who answered to a message with this mask; what the others hold is not known any more."""
        name = name_of(mask)
        for client, answered in clients.items():
            self.note(client, name if answered else None)
        if name in self.order:
            self.order.remove(name)
        elif any(clients.values()):
            self.versions[name] = masks.pack(mask)
        else:
            return
        self.order.append(name)
        while len(self.order) > _MOST_VERSIONS:
            del self.versions[self.order.pop(0)]
