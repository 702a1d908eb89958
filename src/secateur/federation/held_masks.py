"""Held masks: which client holds which mask, so that a mask travels only once, and later only its changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

from secateur.pruning.mask import Tensors
from secateur.wire import masks
from secateur.wire.message import Masks, Spec

_MOST_VERSIONS = 32


def name_of(mask: Masks) -> str:
    """Return the name of a mask: its digest, by which payloads refer to it."""
    return masks.digest(mask).hex()


class HeldMasks:
    """The server's notes of which client holds which mask.

    The notes have the name of each client's mask. The masks themselves are kept if many clients share them, at a bit a
    weight: the 32 newest versions, together the size of one model; a later mask is sent as its changes to one of them.
    A client's own mask is not kept here: as long as it does not change, only its name has to travel, and the sender has
    the mask. A wrong note does no harm: a client that does not hold the mask a payload refers to says so, and gets the
    whole mask within the same exchange.

    Args:
        specs: the shape and dtype of the model's tensors.
        held: the name of the mask that each client holds.
        versions: packed masks, by name.
        order: the names of the versions, the newest last.
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
        """Return the name of the mask that a client holds; None if the name or the mask is unknown.

        Args:
            client: the client.
            at_hand: the name of a mask that the caller has.
        """
        name = self.held.get(client)
        return name if name is not None and (name == at_hand or name in self.versions) else None

    def mask(self, name: str) -> Masks:
        """Return the mask of a version, by its name."""
        return masks.unpack(self.versions[name], self.specs)

    def note(self, client: int, name: str | None) -> None:
        """Note which mask a client holds; None: unknown from now on."""
        if name is None:
            self.held.pop(client, None)
        else:
            self.held[client] = name

    def confirm(self, clients: Mapping[int, bool], mask: Masks) -> None:
        """Note which clients answered a message with this mask; the masks of the others are unknown from now on."""
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
