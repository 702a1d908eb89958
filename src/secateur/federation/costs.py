"""The MACs that an exchange cost its clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from secateur.contract.ask import Ask
from secateur.federation.exchange import Exchange
from secateur.federation.intake import MEASURED
from secateur.federation.records import Row
from secateur.pruning.mask import Mask


def train_macs(ask: Ask, exchange: Exchange, macs_of: Callable[[Mask | None], tuple[int, int]]) -> Row:
    """Return the MACs that clients computed: on surviving weights, and on the models with units cut.

    A training row costs three passes of MACs: forward, and backward for a layer's inputs and for its weights. If
    gradients of all weights are measured, the third pass counts all weights, and nothing is cut.

    Args:
        ask: what was asked.
        exchange: its exchange, after the replies were read.
        macs_of: returns the MACs of an example under a mask, on surviving weights and with units cut.
    """
    trained, measured = Counter[int](), Counter[int]()  # by client, or -1 if all have one mask
    for reply in exchange.reply_scalars:
        who, rows = int(reply["client"]) if ask.slices else -1, int(reply.get("processed", 0))
        measured[who] += min(rows, int(reply[MEASURED]))
        trained[who] += rows - min(rows, int(reply[MEASURED]))
    shared, whole = None if ask.dense else ask.message.mask, macs_of(None)[0]
    surviving = physical = 0
    for who, rows in trained.items():
        kept, cut = exchange.macs[who] if ask.slices and not ask.dense else macs_of(shared)
        surviving += 3 * rows * kept + measured[who] * (2 * kept + whole)
        physical += 3 * rows * cut + 3 * measured[who] * whole
    return {"train_macs": surviving, "train_macs_physical": physical}
