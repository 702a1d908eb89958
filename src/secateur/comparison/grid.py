"""The grid of a comparison: every run of a suite and its controls, in parallel processes, none of them twice."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Self

import torch

from secateur.comparison.suite import Cell, Suite, cells, controls
from secateur.data.shards import open_shards
from secateur.engines.script import spared
from secateur.engines.workers import for_workers, processes
from secateur.errors import CheckpointError, NoResultError, SecateurError
from secateur.federation import checkpoint, prepare, server
from secateur.federation.folder import ROUNDS, finished, read_failure, read_summary, reserve
from secateur.study.runtime import Runtime
from secateur.study.study import Study

RUNS, _DATA = "runs", "data"
_LOOK_EVERY, _PATIENCE = 0.5, 20.0  # seconds
_AHEAD = 64  # runs that are given to the processes at a time: the folder of each is looked into again and again


Report = Callable[[int, int, int, int], None]
"""A callback with four counts: runs done, runs known, rounds done, rounds known so far."""


def silent(*counts: int) -> None:
    """Report nothing."""
    del counts


def folder_of(out: Path, study: Study) -> Path:
    """Return the folder of a study's run; equal studies share one."""
    return out / RUNS / f"{study.method.rpartition('.')[2]}-{study.hash()}"


def cell_name(cell: Cell) -> str:
    """Return a cell in words: its variant, control, partition and seed."""
    return f"{cell.variant}{', ' + cell.control if cell.control else ''}, {cell.partition}, seed {cell.seed}"


def run_suite(
    suite: Suite, out: Path, *, data: str | None = None, jobs: int = 0, report: Report = silent,
    executor: Executor | None = None,
) -> list[Cell]:  # fmt: skip
    """Make those runs of a suite that ``out`` does not hold yet; return all cells, controls included.

    A comparison that was stopped or killed continues: each of its runs does so from its last exchange. A run that ends
    without a result has a ``failure.json``, and its variant no further controls; the others go on.

    Args:
        suite: the suite.
        out: the comparison's folder, with runs in ``out/runs`` and the rows that they share in ``out/data``.
        data: folder or file of the suite's source.
        jobs: number of processes, which make one run at a time each; 0: one for each core.
        report: called with the progress every half second or so.
        executor: makes the runs, and is shut down at the end; None: ``in_processes(jobs)``.

    Raises:
        SecateurError: a setting is wrong (before anything runs), or a run could not be made; the text names it.
    """
    first = cells(suite, data)
    out.mkdir(parents=True, exist_ok=True)
    with for_workers(), checkpoint.alone(out), _Pool(out, executor or in_processes(jobs), report) as pool:
        pool.finish(first)
        more: list[Cell] = []
        for cell in first:
            if not cell.control and read_failure(folder_of(out, cell.study)) is None:
                more += _controls(suite, cell, out)
        pool.finish(more)
    return first + more


def _controls(suite: Suite, cell: Cell, out: Path) -> list[Cell]:
    folder = folder_of(out, cell.study)
    _, mask, _ = checkpoint.shipped(folder)
    final = (read_summary(folder) or {})["final"]
    return controls(suite, cell, mask, final, open_shards(prepare.simulated(cell.study, out / _DATA)))


def in_processes(jobs: int = 0, start: BaseContext | None = None) -> Executor:
    """Return processes that make runs.

    Args:
        jobs: how many; 0: one for each core.
        start: how they are started; None: as this system does it best.
    """
    return ProcessPoolExecutor(jobs or os.cpu_count() or 1, start or processes(), _begin)


class Here(Executor):
    """Makes runs in this process, one after the other, when they are submitted."""

    def submit(self, make: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        """Make a run; return its outcome."""
        made: Future[Any] = Future()
        try:
            made.set_result(make(*given, **named))
        except Exception as broken:  # noqa: BLE001 -- raised where the outcome is asked for
            made.set_exception(broken)
        return made


class _Pool:
    """Worker processes that make one run at a time each."""

    def __init__(self, out: Path, executor: Executor, report: Report) -> None:
        self.out, self.report = out, report
        self.known: dict[Path, int] = {}  # rounds of each run
        self.done: set[Path] = set()
        self.executor = executor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.executor.shutdown(wait=not any(exception), cancel_futures=True)
        if any(exception):
            # they would play to the end
            for process in list((getattr(self.executor, "_processes", None) or {}).values()):
                process.kill()

    def finish(self, todo: Iterable[Cell]) -> None:
        """Make the run of each cell that has none yet."""
        ahead = deque(self._new(todo))
        waiting: dict[Future[None], tuple[Path, str]] = {}
        while ahead or waiting:
            while ahead and len(waiting) < _AHEAD:
                folder, cell = ahead.popleft()
                shards = prepare.simulated(cell.study, self.out / _DATA)
                study = cell.study.model_dump_json()
                with spared(study):
                    waiting[self.executor.submit(_make_run, study, folder, shards)] = folder, cell_name(cell)
            over, _ = wait(waiting, _LOOK_EVERY, FIRST_COMPLETED)
            for future in over:
                folder, name = waiting.pop(future)
                try:
                    future.result()
                except NoResultError:  # told by its folder
                    self.done.add(folder)
                except SecateurError as broken:
                    raise type(broken)(f"{name} ({folder}): {broken}") from broken
                except BrokenProcessPool as broken:
                    raise SecateurError(
                        f"a process of the comparison was killed, perhaps for memory: {name}"
                    ) from broken
                self.done.add(folder)
            self._tell(folder for folder, _ in waiting.values())

    def _new(self, todo: Iterable[Cell]) -> Iterator[tuple[Path, Cell]]:
        """Yield the cells whose runs are to be made, each with its folder, and note them and those that are there."""
        for cell in todo:
            folder = folder_of(self.out, cell.study)
            if folder in self.known:
                continue
            self.known[folder] = cell.study.rounds
            if finished(folder) is None:
                yield folder, cell
            else:
                self.done.add(folder)

    def _tell(self, waiting: Iterable[Path]) -> None:
        rounds = sum(self.known[folder] for folder in self.done) + sum(_rounds(folder) for folder in waiting)
        self.report(len(self.done), len(self.known), rounds, sum(self.known.values()))


def _rounds(folder: Path) -> int:
    path = folder / ROUNDS
    return path.read_bytes().count(b'"phase": "train"') if path.exists() else 0


def _begin() -> None:
    """Prepare a worker process: it uses one torch thread, and ends when its parent does."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _make_run(study: str, folder: Path, shards: Path) -> None:
    reserve(folder, Study.model_validate_json(study))
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            server.resume(folder, Runtime(workers=0), shards=shards)
        except CheckpointError as broken:  # a process that was killed a moment ago may still hold the folder
            if "another process" not in str(broken) or time.monotonic() > end:
                raise
            time.sleep(_LOOK_EVERY)
        else:
            return
