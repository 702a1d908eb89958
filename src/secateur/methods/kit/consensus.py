"""Consensus: who makes the mask: the server from the merged model, the clients by a vote, or the server by cohort."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Reduction, Sum, masks_of
from secateur.contract.state import State
from secateur.errors import ConfigError, check
from secateur.pruning.consensus import Rule, floored, vote
from secateur.pruning.mask import Mask

_VOTES = "votes"


class Prune(Protocol):
    """The function by which a consensus lets the other slots make a mask."""

    def __call__(self, cohort: tuple[int, ...] | None, *, anew: bool = False) -> Mask | None:
        """Return the mask at the schedule's sparsity.

        Without an event, or without the criterion's statistic, it is the current mask.

        Args:
            cohort: the clients whose statistics are used, if the criterion keeps them by client; None: all.
            anew: whether pruned weights may come back; if not, the mask lies within the current one.
        """


class Consensus:
    """Base of consensus rules, which say who makes the mask; frozen dataclasses. By default the server does.

    Your own consensus derives from this class and overrides what differs.
    """

    @property
    def regrows(self) -> bool:
        """Return whether each cohort gets a new mask before it trains, so that pruned weights may come back."""
        return False

    @property
    def ballot(self) -> Mapping[str, Reduction]:
        """Return the reductions of the masks that clients make, by names of your choice; empty: clients make none."""
        return {}

    def mask_after(self, state: State, prune: Prune) -> Mask | None:
        """Return the mask after an event, at the server; ``state`` holds the merged weights."""
        del state
        return prune(None)

    def mask_for(self, state: State, cohort: tuple[int, ...] | None, prune: Prune) -> Mask | None:
        """Return the mask under which a cohort trains; None for the cohort asks for the mask of the shipped model."""
        del cohort, prune
        return state.mask

    def enforced(self, mask: Mask | None) -> Mask | None:
        """Return the mask that clients apply while they train; None: they train and return dense weights."""
        return mask

    def vote(self, state: State, reduced: Reduced, budget: int) -> Mask:
        """Return the mask made from the clients' masks; it is then intersected with the mask before.

        Args:
            state: the state with the merged weights.
            reduced: the reduced replies, with the ballot's reductions; at least one client answered.
            budget: the number of entries that the schedule keeps.

        Raises:
            ConfigError: the consensus has a ballot but no ``vote``.
        """
        del state, reduced, budget
        raise ConfigError(f"consensus {type(self).__name__} has a ballot, and lacks 'vote' of Consensus")


@dataclass(frozen=True)
class Pooled(Consensus):
    """The server scores the merged model (or the mean statistic) and prunes it; masks are nested."""


@dataclass(frozen=True)
class Participants(Consensus):
    """The server makes a mask for each round from the statistics of the clients that take part in it.

    Attributes:
        static: use the statistics of all explorers in every round, which gives one mask (an ablation).
        enforce: clients apply the mask after every optimiser step and send surviving values only; False: the server
            prunes before it sends, and clients train and return the dense model (an ablation).

    Reference: AutoFLIP, arXiv 2405.10271: the mask is updated in each round.
    """

    static: bool = False
    enforce: bool = True

    @property
    def regrows(self) -> bool:
        """Return True: each cohort has a mask of its own."""
        return True

    def mask_after(self, state: State, prune: Prune) -> Mask | None:
        """Return the mask unchanged."""
        del prune
        return state.mask

    def mask_for(self, state: State, cohort: tuple[int, ...] | None, prune: Prune) -> Mask | None:
        """Return the mask from the cohort's statistics; the shipped mask is from those of all explorers."""
        del state
        return prune(None if self.static else cohort, anew=True)

    def enforced(self, mask: Mask | None) -> Mask | None:
        """Return the mask if it is enforced, otherwise None."""
        return mask if self.enforce else None


@dataclass(frozen=True)
class Majority(Consensus):
    """Each client prunes its own model; the server keeps what enough of them kept.

    Attributes:
        rule: with v of K votes, ``majority`` keeps v > K/2; ties (v = K/2) are kept by the larger mean magnitude while
            the schedule's budget has room. ``half`` keeps v >= max(1, floor(K/2)); the published code lacks the
            maximum, so that there a single voter keeps everything, whatever it pruned. ``union`` keeps v >= 1,
            ``intersection`` v = K.
        floor: the share of each tensor's entries that a vote leaves at least, those with the most votes; without it,
            voters who agree can empty a layer. 0: none.

    Guarantees:
        No rule keeps an entry that no voter kept, so masks are nested if the voters' masks are.

    Reference: FedSparsify-Local, arXiv 2204.12430; *read*: dstripelis/FedSparsify, utils/model_merge.py.
    """

    rule: Rule = "majority"
    floor: float = 0.0

    def __post_init__(self) -> None:
        check(0 <= self.floor < 1, name="consensus.floor", value=self.floor, must="be in [0, 1)")

    @property
    def ballot(self) -> Mapping[str, Reduction]:
        """Return the reduction that counts, for each entry, the clients that kept it."""
        return {_VOTES: Sum(masks_of)}

    def vote(self, state: State, reduced: Reduced, budget: int) -> Mask:
        """Return the mask of the vote."""
        votes = reduced[_VOTES]
        magnitude = {name: state.weights[name].abs() for name in votes}
        mask = vote(self.rule, votes, len(reduced.counted(_VOTES)), magnitude, budget)
        return floored(mask, votes, magnitude, state.mask, self.floor) if self.floor else mask
