"""Sub-FedAvg (unstructured): each client prunes a mask of its own while it trains; masks overlap in the average.

    train    from w under the client's mask m_k; after the first and the last epoch the p share of what m_k keeps with
             smallest |w_k|, all weights together, would go: masks a and b
    prune    m_k <- b where the two differ in more than e of m_k's weights, the client's accuracy is above A, and m_k
             keeps more than 1 - target
    merge    each weight is the mean over those clients that kept it, by rows; one that nobody kept stays

Paper symbol -> option: target pruning rate: target; r_p: share; epsilon: distance; Acc_th: accuracy.

Reference: Vahidian et al., "Personalized Federated Learning by Structured and Unstructured Pruning under Data
Heterogeneity", arXiv 2105.00562. *Read*: the published code.
Departures: the accuracy that opens the gate is on the client's training rows; the published code looks at its test
rows. With a single local epoch the first mask is made of the weights that were sent.
Not reproduced: the paper's personal accuracies; we did not run its settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from secateur.errors import check
from secateur.method import Ask, Client, Method, Replies, State, absorb_slices, report, slice_ask, train_ask
from secateur.pruning import mask as masks
from secateur.pruning.allocation import highest, pruned_count
from secateur.pruning.mask import Mask, Tensors
from secateur.training import Effort, evaluate
from secateur.wire.message import Message

_OWN = "mask-"  # no slash: a checkpoint splits names there


@dataclass(frozen=True)
class SubFedAvg(Method):
    """Personal masks, overlapping averages.

    Attributes:
        target: fraction of its weights that a client ends up without; 0 is FedAvg.
        share: p, of what is left, pruned in one step.
        distance: e, how much the two masks must differ.
        accuracy: A, on the client's training rows.
    """

    target: float = 0.5
    share: float = 0.1
    distance: float = 1e-4
    accuracy: float = 0.5

    def __post_init__(self) -> None:
        check(0 <= self.target < 1, name="target", value=self.target, must="be in [0, 1)")
        check(0 < self.share < 1, name="share", value=self.share, must="be in (0, 1)")

    def plan(self, state: State) -> Ask | None:
        """Send each client of the next cohort its own part."""
        round_ = state.round + 1
        if round_ > state.setting.rounds:
            return None
        if not self.target:
            return train_ask(state, round_, None)
        names = frozenset(state.setting.layout.names("weight"))
        ask = slice_ask(state, round_, {k: self._own(state, k) for k in state.setting.cohort(round_)})
        return replace(ask, expects=replace(ask.expects, mask="required", maskable=names, within=True))

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train; prune the own mask where the gate is open."""
        sent, mask = ask.message.tensors, ask.message.mask
        if mask is None or client.training.epochs < 2:
            weights, done = client.train(sent, mask, round_=ask.round)
            early = sent
        else:
            early, first = client.train(sent, mask, round_=ask.round, effort=Effort(1))
            weights, done = client.train(early, mask, round_=ask.round, effort=Effort(client.training.epochs - 1))
            done = replace(done, processed=first.processed + done.processed)
        if mask is None:
            return Message(weights, None, report(done))
        if masks.sparsity(mask) < self.target - 1e-9:
            done = replace(done, processed=done.processed + len(client.data) // 3)  # a third: forward only
            a, b = self.step(early, mask), self.step(weights, mask)
            differ = sum(int((a[n] != b[n]).sum()) for n in mask) / max(1, masks.size(mask))
            if differ > self.distance and evaluate(client.model, client.data).metric > self.accuracy:
                mask = b
        return Message(masks.apply(weights, mask), mask, report(done))

    def absorb(self, state: State, replies: Replies) -> State:
        """Average over who kept a weight, and note each client's mask."""
        heard: dict[str, Tensors] = {}

        def noted() -> Iterator[tuple[int, Message]]:
            for client, message in replies:
                heard[f"{_OWN}{client}"] = message.mask or {}
                yield client, message

        state = absorb_slices(state, Replies(replies.ask, noted()))
        return replace(state, memory={**state.memory, **(heard if self.target else {})})

    def slices(self, state: State) -> Mapping[int, Mask] | None:
        """Return the part that each client is scored with: its own."""
        return {k: self._own(state, k) for k in range(state.setting.clients)} if self.target else None

    def step(self, weights: Tensors, mask: Mask) -> dict[str, torch.Tensor]:
        """Return the mask after one more step, never beyond the target."""
        total, kept = masks.size(mask), masks.kept(mask)
        gone = min(total - kept + pruned_count(self.share, kept), pruned_count(self.target, total))
        sizes = {n: torch.where(m, weights[n].abs(), -1.0) for n, m in mask.items()}
        return highest(sizes, total - gone)

    def _own(self, state: State, client: int) -> Mask:
        full = {n: torch.ones_like(state.weights[n], dtype=torch.bool) for n in state.setting.layout.names("weight")}
        return state.memory.get(f"{_OWN}{client}", full)
