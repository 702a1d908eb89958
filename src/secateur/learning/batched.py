"""Clients served in turn until each waits for a job; what waits for the same is done at once, in a stack.

Jobs that no stack takes, and clients of a model that no stack serves, are done one by one, on the same device.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar, cast

import torch

from secateur.errors import ConfigError, need
from secateur.learning import stacked
from secateur.learning.compute import Compute
from secateur.learning.loop import Fit
from secateur.learning.resident import tensors_of
from secateur.learning.stack import Rows
from secateur.learning.work import Job, Learn, Train, Worker
from secateur.streams import kept_globals

Clock = Callable[[], float]
_Answer = TypeVar("_Answer")
_Given = TypeVar("_Given", covariant=True)  # noqa: PLC0105

_LOG = logging.getLogger(__name__)


class Work(Protocol[_Given]):
    """A task that computes a client's whole answer; jobs are done by ``work``, and ``clock`` tells the time."""

    def __call__(self, work: Worker, clock: Clock) -> _Given:
        """Return the answer."""


class Batched:
    """Answers clients in stacks; it keeps their rows on the device from one call to the next.

    Args:
        compute: the device, the precision, and the number of clients in a stack.
    """

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self._rows = Rows(compute)

    def answers(self, tasks: Sequence[Work[_Answer]]) -> list[_Answer | Exception]:
        """Run tasks in turn until each waits for a job, do these jobs, and repeat until all are finished.

        An exception of a task stands in the place of its answer and does not affect the others. A task's clock counts
        its own time and its share, by rows, of the time of the jobs that were done at once.
        """
        turns = [_Coroutine(task, self.compute) for task in tasks]
        with self.compute.kernels():
            while waiting := [turn for turn in turns if turn.goes_on()]:
                begun = time.perf_counter()
                self._do(waiting)
                spent, rows = time.perf_counter() - begun, sum(turn.rows for turn in waiting)
                for turn in waiting:
                    turn.spent += spent * turn.rows / max(1, rows)
        return [cast("_Answer | Exception", turn.outcome) for turn in turns]

    def _do(self, waiting: Sequence[_Coroutine[Any]]) -> None:
        groups: dict[object, list[_Coroutine[Any]]] = {}
        for turn in waiting:
            groups.setdefault(stacked.kind(cast("Job", turn.job)), []).append(turn)
        for turn in groups.pop(None, []):
            turn.alone()
        for group in groups.values():
            self._stacked(group)

    def _stacked(self, group: Sequence[_Coroutine[Any]]) -> None:
        """Do jobs of one kind at once, or one by one if that fails: then only those fail that fail alone.

        Raises:
            ConfigError: the stack does not fit on the device.
        """
        jobs = [cast("Job", turn.job) for turn in group]
        made, error = self._tried(jobs)
        if error is None:
            for turn, result in zip(group, made, strict=True):
                turn.result = result
        elif _full(error):
            raise ConfigError(self._too_many(jobs)) from error
        elif sum(turn.alone() for turn in group) == len(group):
            warn_once(self._remark(jobs, error))

    def _tried(self, jobs: Sequence[Job]) -> tuple[list[Any], Exception | None]:
        """Return the results of jobs that are done at once, or why they cannot be."""
        try:
            return stacked.together(jobs, self.compute, self._rows), None
        except Exception as error:  # noqa: BLE001 -- raised again where it is a client's own
            return [], error.with_traceback(None)  # which would keep the stack in memory

    def _too_many(self, jobs: Sequence[Job]) -> str:
        """Return that a stack does not fit on the device, and which one does."""
        fits = len(jobs) // 2
        while fits and _full(self._tried(jobs[:fits])[1]):
            fits //= 2
        where = f"does not fit in the memory of {self.compute.device}"
        what = f"compute.together = {self.compute.together}: a stack of {len(jobs)} clients {where}"
        if not fits:
            return f"{what}, nor does one client: choose a smaller model or batch"
        return f"{what}, one of {fits} does: set compute.together = {fits}"

    def _remark(self, jobs: Sequence[Job], error: Exception) -> str:
        """Return why jobs went one by one, and that they did."""
        layer, line = stacked.culprit(jobs, self.compute, self._rows), (str(error).splitlines() or [repr(error)])[0]
        what = f"{layer} cannot be computed for several clients at once ({line})" if layer else line
        return f"{what}: such clients go one by one on {self.compute.device}"

    def refused(self, jobs: Sequence[Job]) -> str:
        """Return why jobs of one kind cannot be done at once; empty if they can."""
        _, error = self._tried(jobs)
        return "" if error is None else self._remark(jobs, error)


def answers(tasks: Sequence[Work[_Answer]], compute: Compute) -> list[_Answer | Exception]:
    """Run tasks once; see ``Batched.answers``."""
    return Batched(compute).answers(tasks)


@functools.cache
def warn_once(remark: str) -> None:
    """Log a remark once in a process."""
    _LOG.warning(remark)


def _full(error: Exception | None) -> bool:
    """Return whether an error says that memory is full; on a CPU torch has no class for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _greenlet() -> ModuleType:
    return need("greenlet", extra="together")


class _Coroutine(Generic[_Answer]):
    """A running task that is suspended when it needs a job, and resumed when the job is done."""

    def __init__(self, task: Work[_Answer], compute: Compute) -> None:
        greenlet = _greenlet()
        self._task, self._compute, self._since = task, compute, 0.0
        self._mine, self._caller = greenlet.greenlet(self._run), greenlet.getcurrent()
        self.job: Job | None = None
        self.result: Any = None
        self.outcome: _Answer | Exception | None = None
        self.finished = self._by_itself = False
        self.spent = 0.0

    @property
    def rows(self) -> int:
        """Return the rows that its last job processed."""
        made = self.result[0] if isinstance(self.job, Learn) and isinstance(self.result, tuple) else self.result
        fit = made[1] if isinstance(made, tuple) else None
        return fit.processed if isinstance(fit, Fit) else len(self.job.data) if self.job else 0

    def goes_on(self) -> bool:
        """Resume the task until it needs a job or is finished; return whether it needs one."""
        if not self.finished:
            self._since = time.perf_counter()
            self._mine.switch()
            self.spent += time.perf_counter() - self._since
        return not self.finished

    def alone(self) -> bool:
        """Let the task do its job by itself, and wait again; return whether that succeeded."""
        self._by_itself = True
        self._mine.switch()
        return not isinstance(self.result, Exception)

    def _run(self) -> None:
        try:
            self.outcome = self._task(self._work, lambda: self.spent + time.perf_counter() - self._since)
        except Exception as error:  # noqa: BLE001 -- stands in the place of its answer
            self.outcome = error
        self.finished = True

    def _work(self, job: Job) -> Any:
        self.job, self._by_itself = job, True
        while self._by_itself:
            self._by_itself = False
            with kept_globals():  # the other tasks draw from them too
                self._caller.switch()
            if self._by_itself:
                self.result = self._done(job)
        result, self.result = self.result, None
        if isinstance(result, Exception):
            raise result
        if isinstance(job, Learn):
            result, moved = result
            job.settle(moved)
        elif isinstance(job, Train):
            job.settle(result[0])
        return result

    def _done(self, job: Job) -> Any:
        """Return the result of a job that is done by itself, or what it raised."""
        try:
            made = job.alone(self._compute)
        except Exception as error:  # noqa: BLE001 -- raised when the task goes on
            return error
        return (made, tensors_of(job.model)) if isinstance(job, Learn) else made
