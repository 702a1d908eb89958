"""Consensus: who makes the mask: the server of the merged model, each client with a vote, or the server by cohort."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Reduction, Sum, masks_of
from secateur.contract.state import State
from secateur.errors import ConfigError
from secateur.pruning.consensus import Rule, vote
from secateur.pruning.mask import Mask

_VOTES = "votes"


class Prune(Protocol):
    """Makes a mask of the other slots."""

    def __call__(self, cohort: tuple[int, ...] | None, *, anew: bool = False) -> Mask | None:
        """Return the mask at the schedule's level.

        Without an event, or where the criterion lacks its statistic, it is the mask that is held.

        Args:
            cohort: by whose statistics, where the criterion keeps them client by client; None: by all.
            anew: whether a weight may come back; else the mask lies within the one that is held.
        """


class Consensus:
    """Says who makes the mask; frozen dataclasses. What stands here is the server's own choice: see ``Pooled``.

    An own consensus derives from this class and writes what differs.
    """

    @property
    def regrows(self) -> bool:
        """Return whether the mask is made for each cohort before it trains, so that pruned weights may come back."""
        return False

    @property
    def ballot(self) -> Mapping[str, Reduction]:
        """Return what becomes of the masks that clients make, by names of your own; empty: clients make none."""
        return {}

    def mask_after(self, state: State, prune: Prune) -> Mask | None:
        """Return the mask after an event, at the server; ``state`` is merged."""
        del state
        return prune(None)

    def mask_for(self, state: State, cohort: tuple[int, ...] | None, prune: Prune) -> Mask | None:
        """Return the mask under which a cohort trains; without a cohort the one that is shipped."""
        del cohort, prune
        return state.mask

    def enforced(self, mask: Mask | None) -> Mask | None:
        """Return what clients hold to while they train under a mask; None: they train and return dense weights."""
        return mask

    def vote(self, state: State, reduced: Reduced, budget: int) -> Mask:
        """Return the mask that clients' masks come to; it is then held within the mask before.

        Args:
            state: merged.
            reduced: what the replies became, the ballot's reductions among it; at least one client answered.
            budget: how many entries the schedule leaves.

        Raises:
            ConfigError: the consensus has a ballot, and no vote.
        """
        del state, reduced, budget
        raise ConfigError(f"consensus {type(self).__name__} has a ballot, and lacks 'vote' of Consensus")


@dataclass(frozen=True)
class Pooled(Consensus):
    """The server scores the merged model (or the mean statistic) and prunes it; masks are nested."""


@dataclass(frozen=True)
class Participants(Consensus):
    """A mask for each round from the statistics of the clients that take part in it.

    Attributes:
        static: use all explorers' statistics in every round instead (one mask, the ablation).
        enforce: clients prune after every optimiser step and send surviving values only; False: the server
            prunes before it sends, clients train and return the dense model (the ablation).

    Reference: AutoFLIP, arXiv 2405.10271: the mask is updated in each round.
    """

    static: bool = False
    enforce: bool = True

    @property
    def regrows(self) -> bool:
        """Return True: each cohort has a mask of its own."""
        return True

    def mask_after(self, state: State, prune: Prune) -> Mask | None:
        """Return the mask as it is."""
        del prune
        return state.mask

    def mask_for(self, state: State, cohort: tuple[int, ...] | None, prune: Prune) -> Mask | None:
        """Return the mask of the cohort's statistics; the shipped one is of all."""
        del state
        return prune(None if self.static else cohort, anew=True)

    def enforced(self, mask: Mask | None) -> Mask | None:
        """Return the mask, or nothing."""
        return mask if self.enforce else None


@dataclass(frozen=True)
class Majority(Consensus):
    """Each client prunes its own model; the server keeps what enough of them kept.

    Attributes:
        rule: ``majority`` keeps v > K/2; ties (v = K/2) go to the larger mean magnitude while the schedule's
            budget has room. ``half`` keeps v >= max(1, floor(K/2)): the published code without the maximum, so
            that one voter alone keeps everything there, whatever it pruned. ``union`` keeps v >= 1,
            ``intersection`` v = K.

    Guarantees:
        No rule keeps what no voter kept, so that masks are nested where voters' are.

    Reference: FedSparsify-Local, arXiv 2204.12430; *read*: dstripelis/FedSparsify, utils/model_merge.py.
    """

    rule: Rule = "majority"

    @property
    def ballot(self) -> Mapping[str, Reduction]:
        """Count, for each entry, the clients that kept it."""
        return {_VOTES: Sum(masks_of)}

    def vote(self, state: State, reduced: Reduced, budget: int) -> Mask:
        """Return the mask voted for."""
        votes = reduced[_VOTES]
        magnitude = {name: state.weights[name].abs() for name in votes}
        return vote(self.rule, votes, len(reduced.clients), magnitude, budget)
