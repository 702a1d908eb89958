"""Personal tensors: those that the server keeps for each client, and the base of methods with personal masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from secateur.aggregation import Aggregator
from secateur.aggregation.steps import Mean
from secateur.contract.ask import Ask
from secateur.contract.checks import KeptByTensor
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Keep, masks_of
from secateur.contract.state import Setting, State
from secateur.errors import check
from secateur.methods.kit.rounds import MEAN, merged, train_ask
from secateur.methods.kit.submodels import check_merge, own_masks, slice_ask
from secateur.pruning.allocation import lowest, pruned_count
from secateur.pruning.mask import Mask, Tensors
from secateur.wire.message import Message

_MASK = "mask"


def load_own(state: State, kind: str, client: int) -> Tensors | None:
    """Return a client's tensors of a kind (``mask``, ``weights`` ...) from the archive; None if there are none."""
    return state.archive.get(f"{kind}/{client}")


def store_own(state: State, kind: str, kept: Iterable[tuple[int, Tensors]]) -> None:
    """Write each client's tensors of a kind into the archive, replacing those before."""
    for client, tensors in kept:
        state.archive[f"{kind}/{client}"] = tensors


class LazyTensors(Mapping[int, Tensors]):
    """Tensors by client, made by a function each time an entry is read, so that memory holds one client's."""

    def __init__(self, clients: Collection[int], make: Callable[[int], Tensors]) -> None:
        self._clients, self._make = clients, make

    def __getitem__(self, client: int) -> Tensors:
        """Return a client's tensors, newly made."""
        if client not in self._clients:
            raise KeyError(client)
        return self._make(client)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the clients."""
        return iter(self._clients)

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self._clients)


@dataclass(frozen=True)
class Personal(Method):
    """Base of methods with personal masks: each weight is averaged over the clients whose masks keep it.

    Each client is sent the model under its own mask and answers under a mask within that one. A weight that no client
    kept does not change. Each client is scored with its own part of the shipped model.

    Attributes:
        target: the fraction of its weights that a client prunes in the end; 0 is FedAvg.
        share: p, the share of each tensor's kept weights that is pruned in one step.
        aggregator: what becomes of the replies, each weight over those who keep it; by default their mean by rows.
    """

    later: ClassVar[frozenset[str]] = frozenset({"aggregator"})

    target: float = 0.5
    share: float = 0.1
    aggregator: Aggregator = field(default_factory=Mean)

    def __post_init__(self) -> None:
        check(0 <= self.target < 1, name="target", value=self.target, must="be in [0, 1)")
        check(0 < self.share < 1, name="share", value=self.share, must="be in (0, 1)")

    @property
    def personal_masks(self) -> bool:
        """Return whether clients have their own masks; not if ``target`` is 0."""
        return self.target > 0

    def check(self, setting: Setting) -> None:
        """Refuse a rule that cannot merge personal masks.

        Raises:
            ConfigError: the text says why.
        """
        name = type(self).__name__
        check_merge(self.aggregator, setting, "own" if self.personal_masks else "shared", name)

    def plan(self, state: State) -> Ask | None:
        """Return the ask that sends each client of the next cohort its own part of the model."""
        round_ = state.round + 1
        if round_ > state.setting.rounds:
            return None
        if not self.personal_masks:
            return train_ask(state, round_, None, reduce={MEAN: self.aggregator.reduction(masked=False)})
        names = frozenset(state.setting.layout.names("weight"))
        ask = slice_ask(state, round_, self.parts(state, state.setting.cohort(round_)))
        sizes = {name: state.setting.specs[name].size for name in sorted(names)}
        counts = tuple((name, size - pruned_count(self.target, size), size) for name, size in sizes.items())
        expects = own_masks(ask, names, within=not self.regrows)
        expects = replace(expects, checks=(*expects.checks, KeptByTensor(counts)))
        return replace(ask, expects=expects, reduce={MEAN: self.aggregator.over_holders(), _MASK: Keep(masks_of)})

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Merge each weight over the clients that kept it, and store each client's mask."""
        store_own(state, _MASK, reduced.get(_MASK, {}).items())
        return merged(state, reduced, self.aggregator)

    def examine(self, state: State) -> Ask:
        """Return the ask by which each client scores its own part of the model."""
        ask = super().examine(state)
        if not self.personal_masks:
            return ask
        return replace(ask, message=Message(dict(state.weights)), slices=self.parts(state, ask.clients))

    def parts(self, state: State, clients: Collection[int]) -> Mapping[int, Mask]:
        """Return the masks of clients; a client that has not answered yet has all weights."""
        full = {n: torch.ones_like(state.weights[n], dtype=torch.bool) for n in state.setting.layout.names("weight")}
        return LazyTensors(clients, lambda client: load_own(state, _MASK, client) or full)


def reached(mask: Mask, target: float) -> bool:
    """Return whether every tensor of a mask has reached the sparsity ``target``."""
    return all(int((~kept).sum()) >= pruned_count(target, kept.numel()) for kept in mask.values())


def thinner(weights: Tensors, mask: Mask, *, share: float, target: float = 1.0) -> dict[str, torch.Tensor]:
    """Return a mask without the kept weights below the ``share`` quantile of each tensor's kept magnitudes.

    ceil(share (n - 1)) of n kept weights are pruned, so that the largest of a tensor stays; no tensor becomes sparser
    than ``target``.

    >>> thinner({"w": torch.tensor([1.0, 2.0, 3.0])}, {"w": torch.ones(3, dtype=torch.bool)}, share=0.9)["w"].tolist()
    [False, False, True]
    """
    thinned = {}
    for name, held in mask.items():
        total, kept = held.numel(), int(held.sum())
        gone = min(total - kept + math.ceil(share * (kept - 1) - 1e-9), pruned_count(target, total))
        size = torch.where(held, weights[name].abs(), -1.0).reshape(-1)
        thinned[name] = held & ~lowest(size, gone).reshape(held.shape)
    return thinned
