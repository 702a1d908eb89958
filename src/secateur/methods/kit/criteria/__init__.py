"""Criteria: scores of the importance of each weight; the lowest scores are pruned first.

A criterion that needs more than the weights asks clients for it. Each docstring says whether the non-linear step comes
before or after the mean over clients: |mean g| and mean |g| are different criteria.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from secateur.contract.ask import Ask
from secateur.contract.client import Client
from secateur.contract.reducer import Reduced
from secateur.contract.state import State
from secateur.errors import ConfigError
from secateur.pruning.criteria import magnitudes, uniform
from secateur.pruning.mask import Mask, Tensors
from secateur.wire.message import Message


class Criterion(ABC):
    """Base of criteria, which score weights; frozen dataclasses. By default clients are asked for nothing.

    Your own criterion derives from this class and writes ``scores``, or derives from ``measured.Statistic``.
    """

    @abstractmethod
    def scores(self, weights: Tensors, statistics: Iterable[Tensors], *, seed: int) -> dict[str, torch.Tensor]:
        """Return one score for each entry of ``weights`` (same names and shapes) that may be pruned.

        ``statistics`` is the result of the method of that name, or of ``own``; ``seed`` is the run's.
        """

    def ask(self, state: State, *, due: bool) -> Ask | None:
        """Return the next ask for the criterion's statistic; None if nothing is missing.

        Args:
            state: the server's state.
            due: whether the server is about to make a mask, at the end of round ``state.round``.
        """
        del state, due
        return None

    def respond(self, ask: Ask, client: Client) -> Message:
        """Return a client's answer to ``ask``.

        Raises:
            ConfigError: the criterion asks for nothing.
        """
        name, who = type(self).__name__, client.id
        raise ConfigError(f"criterion {name} asks clients for nothing, and client {who} got phase {ask.phase!r}")

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Return the state that keeps the reduced answers to ``ask``.

        Raises:
            ConfigError: the criterion asks for nothing.
        """
        name, phase = type(self).__name__, reduced.ask.phase
        raise ConfigError(f"criterion {name} asks clients for nothing, and got {phase!r} after round {state.round}")

    def statistics(self, state: State, cohort: tuple[int, ...] | None) -> Iterable[Tensors] | None:
        """Return the kept statistics for ``scores``, of the cohort if they are kept by client; None: there are none."""
        del state, cohort
        return ()

    def own(self, client: Client, weights: Tensors, mask: Mask | None, round_: int) -> tuple[Tensors | None, int]:
        """Return a client's own statistic, from which it makes its own mask, and the rows processed for it.

        None: the client has no statistic and cannot make a mask. If the criterion asks clients and they make the masks,
        ``client.memory`` holds the client's last answer under the names of its tensors.
        """
        del client, weights, mask, round_
        return {}, 0

    @property
    def refines(self) -> bool:
        """Return whether the server itself measures the statistic; see ``refine``."""
        return False

    def refine(self, state: State, server: Client) -> tuple[State, int]:
        """Return the state with the statistic that the server measured, and the rows processed for it."""
        del server
        return state, 0

    @property
    def by_training(self) -> int | None:
        """Return the epochs of ordinary training after which a client's answer is the squared change of its weights.

        0: clients are asked for nothing. None: clients need the criterion's own code.
        """
        return 0

    def histograms(self, state: State) -> Mapping[str, Mapping[str, list[int]]]:
        """Return histograms of the scores: by name and tensor, counts in bins of equal width."""
        del state
        return {}


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The magnitude |w| of the merged weights; the absolute value is taken after the mean over clients.

    Reference: FedSparsify, arXiv 2204.12430.
    """

    def scores(self, weights: Tensors, statistics: Iterable[Tensors], *, seed: int) -> dict[str, torch.Tensor]:
        """Return |w|."""
        del statistics, seed
        return magnitudes(weights)


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform random scores, fixed by the run's seed: every round and every client prunes the same entries first.

    Reference: the random control of FedSparsify, arXiv 2204.12430 (one fixed permutation).
    """

    def scores(self, weights: Tensors, statistics: Iterable[Tensors], *, seed: int) -> dict[str, torch.Tensor]:
        """Return uniform numbers in [0, 1), one stream for each tensor name."""
        del statistics
        return uniform(weights, seed)
