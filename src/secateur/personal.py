"""Personal masks: the base of methods whose clients each keep a mask of their own, which the server knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from secateur.errors import check
from secateur.method import Ask, Method, Replies, State, absorb_slices, slice_ask, train_ask
from secateur.pruning import mask as masks
from secateur.pruning.allocation import highest, pruned_count
from secateur.pruning.mask import Mask, Tensors
from secateur.wire.message import Message

_OWN = "mask-"  # no slash: a checkpoint splits names there


@dataclass(frozen=True)
class Personal(Method):
    """Each client is sent its own part and answers under a mask within it; weights are averaged over who kept them.

    A weight that nobody kept stays. Each client is scored with its own part of the shipped model.

    Attributes:
        target: fraction of its weights that a client ends up without; 0 is FedAvg.
        share: p, of what is left, pruned in one step.
    """

    target: float = 0.5
    share: float = 0.1

    def __post_init__(self) -> None:
        check(0 <= self.target < 1, name="target", value=self.target, must="be in [0, 1)")
        check(0 < self.share < 1, name="share", value=self.share, must="be in (0, 1)")

    @property
    def personal(self) -> bool:
        """Return whether clients have masks at all."""
        return self.target > 0

    def plan(self, state: State) -> Ask | None:
        """Send each client of the next cohort its own part."""
        round_ = state.round + 1
        if round_ > state.setting.rounds:
            return None
        if not self.personal:
            return train_ask(state, round_, None)
        names = frozenset(state.setting.layout.names("weight"))
        ask = slice_ask(state, round_, {k: self.own(state, k) for k in state.setting.cohort(round_)})
        return replace(ask, expects=replace(ask.expects, mask="required", maskable=names, within=not self.regrows))

    def absorb(self, state: State, replies: Replies) -> State:
        """Average over who kept a weight, and note each client's mask."""
        heard: dict[str, Tensors] = {}

        def noted() -> Iterator[tuple[int, Message]]:
            for client, message in replies:
                heard[f"{_OWN}{client}"] = message.mask or {}
                yield client, message

        state = absorb_slices(state, Replies(replies.ask, noted()))
        return replace(state, memory={**state.memory, **(heard if self.personal else {})})

    def slices(self, state: State) -> Mapping[int, Mask] | None:
        """Return the part that each client is scored with: its own."""
        return {k: self.own(state, k) for k in range(state.setting.clients)} if self.personal else None

    def own(self, state: State, client: int) -> Mask:
        """Return a client's mask; before it answered for the first time, all weights."""
        full = {n: torch.ones_like(state.weights[n], dtype=torch.bool) for n in state.setting.layout.names("weight")}
        return state.memory.get(f"{_OWN}{client}", full)


def reached(mask: Mask, target: float) -> bool:
    """Return whether a mask is as sparse as ``target`` lets it be."""
    return masks.size(mask) - masks.kept(mask) >= pruned_count(target, masks.size(mask))


def thinner(weights: Tensors, mask: Mask, *, share: float, target: float) -> dict[str, torch.Tensor]:
    """Return a mask without the ``share`` of smallest magnitude of what it keeps; never sparser than ``target``."""
    total, kept = masks.size(mask), masks.kept(mask)
    gone = min(total - kept + pruned_count(share, kept), pruned_count(target, total))
    return highest({n: torch.where(m, weights[n].abs(), -1.0) for n, m in mask.items()}, total - gone)
