"""Signals that end a process become an exception, so that what it has opened is closed and nothing is left behind."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Stopped(BaseException):
    """This process was asked to end; no error, so that nothing takes it for one.

    Attributes:
        number: of the signal.
        again: what goes on with what was stopped, as a command; empty: nothing was begun that could be gone on with.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number, self.again = number, ""

    @property
    def status(self) -> int:
        """Return the exit status of a process that ends by the signal, as shells have it."""
        return 128 + self.number

    def __str__(self) -> str:
        """Return what happened and what to do, in a line."""
        how = "stopped" if self.number == signal.SIGINT else f"stopped by {signal.Signals(self.number).name}"
        return f"{how}; go on with: {self.again}" if self.again else how


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raise ``Stopped`` in this thread, the main one, when the process is asked to end inside the block.

    That is by Control-C (SIGINT), SIGTERM, or the end of its terminal (SIGHUP). Once it is raised, further signals are
    ignored, so that they do not interrupt the cleaning up. A signal that this process was started to ignore, as by
    ``nohup``, stays ignored.
    """
    handled = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in handled}
    taken = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        for other in taken:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


@contextlib.contextmanager
def going_on(again: str) -> Iterator[None]:
    """Let a ``Stopped`` that is raised inside the block say by which command to go on."""
    try:
        yield
    except Stopped as stopped:
        stopped.again = stopped.again or again
        raise
