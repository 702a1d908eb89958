"""Progress of runs: a bar in a terminal or a notebook, and lines for Python's logging."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from rich.console import Console

from secateur.api import notebook
from secateur.federation.records import by_reason, line, listing
from secateur.report.terminal import Display, Runs

LOG = logging.getLogger("secateur")
Event = Mapping[str, Any]


class Shown(Protocol):
    """What shows the events of runs."""

    def watch(self, name: str, rounds: int) -> Callable[[Event], None]:
        """Return the callback for a run's events."""


@contextlib.contextmanager
def of_runs(progress: bool | None) -> Iterator[Callable[[str, int], Callable[[Event], None]]]:  # noqa: FBT001
    """Show single runs inside the block; yield what makes the callback for a run of some name and rounds.

    Args:
        progress: whether to draw a bar; None: in a terminal and in a notebook. Without one, who was left out of a round
            is a warning of the logger ``secateur``; what a round brought is always a line of level INFO.
    """
    with contextlib.ExitStack() as stack:
        shown: Shown | None = None
        if _wanted(progress):
            shown = notebook.Bars() if notebook.here() else stack.enter_context(Display(Console(stderr=True)))

        def watch(name: str, rounds: int) -> Callable[[Event], None]:
            draw = shown.watch(name, rounds) if shown else None

            def on(event: Event) -> None:
                _log(name, event, warn=draw is None)
                if draw:
                    draw(event)

            return on

        yield watch


@contextlib.contextmanager
def of_many(progress: bool | None) -> Iterator[Callable[[int, int, int, int], None]]:  # noqa: FBT001
    """Show a comparison inside the block; yield the callback for its counts, see ``comparison.grid.Report``."""
    with contextlib.ExitStack() as stack:
        if not _wanted(progress):
            yield lambda *counts: LOG.info("%d/%d runs, %d/%d rounds", *counts)
        elif notebook.here():
            yield notebook.Bars().report
        else:
            yield stack.enter_context(Runs(Console(stderr=True))).report


def _wanted(progress: bool | None) -> bool:  # noqa: FBT001
    return (notebook.here() or sys.stderr.isatty()) if progress is None else progress


def _log(name: str, event: Event, *, warn: bool) -> None:
    if event["event"] == "remark":
        LOG.info("%s: %s", name, event["text"])
    elif event["event"] == "row":
        LOG.info("%s %s", name, line(dict(event)))
        for group in by_reason(event["left_out"]) if warn else ():
            LOG.warning(
                "%s round %d: %s left out: %s", name, event["round"], listing(group["clients"]), group["reason"]
            )
