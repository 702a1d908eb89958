"""Recovery: from which weights the federation goes on after weights were pruned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from secateur.contract.state import State
from secateur.errors import check

_REWIND = "rewind"


class Recovery(ABC):
    """Says what becomes of the weights that survive a pruning; frozen dataclasses.

    An own recovery derives from this class and writes ``recover``, and ``remember`` where it needs the past.
    """

    def remember(self, state: State) -> State:
        """Return the state that keeps what ``recover`` will need; asked at the start and after each merge."""
        return state

    @abstractmethod
    def recover(self, state: State) -> State:
        """Return the state from which training goes on; ``state.mask`` is new, ``state.weights`` are still dense."""


@dataclass(frozen=True)
class FineTune(Recovery):
    """Survivors keep what they were trained to, and are trained on.

    Reference: Renda et al., "Comparing Rewinding and Fine-tuning in Neural Network Pruning", arXiv 2003.02389.
    """

    def recover(self, state: State) -> State:
        """Return the state as it is."""
        return state


@dataclass(frozen=True)
class Rewind(Recovery):
    """Survivors go back to what they were after an early round; what the server's steps accumulated is dropped.

    An event before that round leaves them as they are.

    Attributes:
        round: 0: theta_0, the lottery ticket; a few rounds: late rewinding.

    Reference: Frankle and Carbin, arXiv 1803.03635; to an early round: Frankle et al., arXiv 1903.01611.
    """

    round: int = 0

    def __post_init__(self) -> None:
        check(self.round >= 0, name="recovery.round", value=self.round, must="be 0 or more")

    def remember(self, state: State) -> State:
        """Keep the weights of that round."""
        if state.round != self.round:
            return state
        return replace(state, memory={**state.memory, _REWIND: state.weights})

    def recover(self, state: State) -> State:
        """Return the weights of that round."""
        if _REWIND not in state.memory:
            return state
        return replace(state, weights=state.memory[_REWIND], memory={_REWIND: state.memory[_REWIND]})
