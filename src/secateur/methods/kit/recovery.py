"""Recovery: the weights from which the federation goes on after a pruning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from secateur.contract.state import State
from secateur.errors import check

_REWIND = "rewind"


class Recovery(ABC):
    """Base of recoveries, which set the weights that survive a pruning; frozen dataclasses.

    Your own recovery derives from this class and writes ``recover``, and ``remember`` if it needs earlier weights.
    """

    def remember(self, state: State) -> State:
        """Return the state with what ``recover`` will need; called at the start and after each merge."""
        return state

    @abstractmethod
    def recover(self, state: State) -> State:
        """Return the state from which training goes on; ``state.mask`` is new, ``state.weights`` are still dense."""


@dataclass(frozen=True)
class FineTune(Recovery):
    """Surviving weights keep their values, and training goes on from them.

    Reference: Renda et al., "Comparing Rewinding and Fine-tuning in Neural Network Pruning", arXiv 2003.02389.
    """

    def recover(self, state: State) -> State:
        """Return the state unchanged."""
        return state


@dataclass(frozen=True)
class Rewind(Recovery):
    """Surviving weights return to their values after an early round, and the memory of the server's steps is dropped.

    An event before that round does not change them.

    Attributes:
        round: the number of the early round; 0: theta_0, the lottery ticket; a few rounds: late rewinding.

    Reference: Frankle and Carbin, arXiv 1803.03635; to an early round: Frankle et al., arXiv 1903.01611.
    """

    round: int = 0

    def __post_init__(self) -> None:
        check(self.round >= 0, name="recovery.round", value=self.round, must="be 0 or more")

    def remember(self, state: State) -> State:
        """Keep the weights of the early round."""
        if state.round != self.round:
            return state
        return replace(state, memory={**state.memory, _REWIND: state.weights})

    def recover(self, state: State) -> State:
        """Return the state with the weights of the early round."""
        if _REWIND not in state.memory:
            return state
        return replace(state, weights=state.memory[_REWIND], memory={_REWIND: state.memory[_REWIND]})
