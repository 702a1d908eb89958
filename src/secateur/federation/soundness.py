"""Soundness: whether the server's own state can be used and sent; if not, no client is to blame for what follows."""

from __future__ import annotations

from secateur.contract.ask import Ask
from secateur.contract.state import State
from secateur.errors import DivergedError
from secateur.pruning.mask import Tensors
from secateur.wire.values import LARGEST, Values, beyond

_ROOM = 1 - 2**-7  # what error feedback adds to a message is less than the rest
_MEND = (
    "lower training.lr, set training.clip, or let a guard bound what one client can do "
    "(guards.norms.times, guards.bounds.largest)"
)


def unsound(state: State, values: Values) -> str:
    """Return why a state can neither be saved nor sent: a number of it is not finite, or beyond the wire's range.

    Args:
        state: the server's state.
        values: the format in which its weights are sent.

    Returns:
        The reason in words; empty: the state is sound.
    """
    groups: dict[str, tuple[Tensors, float]] = {"weights": (state.weights, LARGEST[values] * _ROOM)}
    groups |= {f"memory {name!r}": (tensors, LARGEST["fp32"]) for name, tensors in state.memory.items()}
    for group, (tensors, most) in groups.items():
        if (name := beyond(tensors, most)) is not None:
            return f"what the server made of the replies is not usable: {name!r} of its {group} is beyond {most:.3g}"
    return ""


def check_sendable(ask: Ask, values: Values) -> None:
    """Refuse to send what no client could read.

    Raises:
        DivergedError: a tensor of the ask's message is not finite, or beyond the range of the format.
    """
    if (name := beyond(ask.message.tensors, LARGEST[values])) is not None:
        raise DivergedError(
            f"the run diverged: {name!r} of what clients would be sent in phase {ask.phase!r} of round {ask.round} "
            f"holds NaN, or what {values} cannot say; {_MEND}"
        )


def check_start(state: State, values: Values) -> None:
    """Refuse to begin with a state that is not sound.

    Raises:
        DivergedError: see ``unsound``.
    """
    if why := unsound(state, values):
        raise DivergedError(f"before any client is asked, {why}; {_MEND}")


def unusable(asked: int, not_finite: int, phase: str, round_: int) -> str:
    """Return the end of a run whose clients could not work with what they were sent."""
    return (
        f"the run diverged: {not_finite} of {asked} replies in phase {phase!r} of round {round_} hold NaN or infinity, "
        f"so what the clients were sent is to blame, and no client is; {_MEND}"
    )
