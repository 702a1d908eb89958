"""Compare: every run of a suite, in parallel, none twice; then one table that sets each method beside its controls."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Self

import torch

from secateur.compare.suite import Cell, Suite, cells, controls
from secateur.data.shards import open_shards
from secateur.engines.local import for_workers, processes
from secateur.engines.script import spared
from secateur.errors import CheckpointError, SecateurError
from secateur.federation import checkpoint, prepare, server
from secateur.federation.folder import ROUNDS, SUMMARY, reserve
from secateur.study.runtime import Runtime
from secateur.study.study import Study

RUNS, _DATA = "runs", "data"
_LOOK_EVERY, _PATIENCE = 0.5, 20.0  # seconds


Told = Callable[[int, int, int, int], None]
"""Called with runs done and known so far, rounds done and known so far."""


def silent(*counts: int) -> None:
    """Tell nobody."""
    del counts


def folder_of(out: Path, study: Study) -> Path:
    """Return where a study's run lies; equal studies share it."""
    return out / RUNS / f"{study.method.rpartition('.')[2]}-{study.hash()}"


def play(suite: Suite, out: Path, *, data: str | None = None, jobs: int = 0, report: Told = silent) -> list[Cell]:
    """Run what is missing of a suite in ``out``; return all its cells, controls included.

    A comparison that was stopped or killed goes on where it was: each run from its last exchange.

    Args:
        suite: what is compared.
        out: runs lie in ``out/runs``, the clients' rows, which runs share, in ``out/data``.
        data: folder or file of the suite's source.
        jobs: processes, one run in each; 0: as many as there are cores.
        told: called now and then.

    Raises:
        SecateurError: a setting is wrong (before anything runs), or a run failed; the text names it.
    """
    found = cells(suite, data)
    out.mkdir(parents=True, exist_ok=True)
    with for_workers(), checkpoint.alone(out), _Pool(out, jobs or os.cpu_count() or 1, report) as pool:
        pool.finish(found)
        more: list[Cell] = []
        for cell in found:
            if not cell.control:
                more += _controls(suite, cell, out)
        pool.finish(more)
    return found + more


def _controls(suite: Suite, cell: Cell, out: Path) -> list[Cell]:
    folder = folder_of(out, cell.study)
    _, mask, _ = checkpoint.shipped(folder)
    final = json.loads((folder / SUMMARY).read_text("utf-8"))["final"]
    return controls(suite, cell, mask, final, open_shards(prepare.simulated(cell.study, out / _DATA)))


class _Pool:
    """Processes that each play one run at a time."""

    def __init__(self, out: Path, jobs: int, report: Told) -> None:
        self.out, self.report = out, report
        self.known: dict[Path, int] = {}  # rounds of each run
        self.done: set[Path] = set()
        self.executor = ProcessPoolExecutor(jobs, processes(), _begin)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.executor.shutdown(wait=not any(exception), cancel_futures=True)
        if any(exception):
            for process in list((self.executor._processes or {}).values()):  # noqa: SLF001 -- they would play to the end
                process.kill()

    def finish(self, todo: Iterable[Cell]) -> None:
        """Play each study that was not played yet."""
        waiting: dict[Future[None], tuple[Path, str]] = {}
        for cell in todo:
            folder = folder_of(self.out, cell.study)
            if folder in self.known:
                continue
            self.known[folder] = cell.study.rounds
            if (folder / SUMMARY).exists():
                self.done.add(folder)
                continue
            shards = prepare.simulated(cell.study, self.out / _DATA)
            name = f"{cell.variant}{', ' + cell.control if cell.control else ''}, {cell.partition}, seed {cell.seed}"
            study = cell.study.model_dump_json()
            with spared(study):
                waiting[self.executor.submit(_play, study, folder, shards)] = folder, name
        while waiting:
            over, _ = wait(waiting, _LOOK_EVERY, FIRST_COMPLETED)
            for future in over:
                folder, name = waiting.pop(future)
                try:
                    future.result()
                except SecateurError as broken:
                    raise type(broken)(f"{name} ({folder}): {broken}") from broken
                except BrokenProcessPool as broken:
                    raise SecateurError(
                        f"a process of the comparison was killed, perhaps for memory: {name}"
                    ) from broken
                self.done.add(folder)
            self._tell(folder for folder, _ in waiting.values())

    def _tell(self, waiting: Iterable[Path]) -> None:
        rounds = sum(self.known[folder] for folder in self.done) + sum(_rounds(folder) for folder in waiting)
        self.report(len(self.done), len(self.known), rounds, sum(self.known.values()))


def _rounds(folder: Path) -> int:
    path = folder / ROUNDS
    return path.read_bytes().count(b'"phase": "train"') if path.exists() else 0


def _begin() -> None:
    """Prepare a process: one torch thread, and no life after the parent's."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _play(study: str, folder: Path, shards: Path) -> None:
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
