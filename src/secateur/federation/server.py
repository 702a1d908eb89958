"""The server's side of a run: the round loop that joins a method and an engine, its records and its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import cost
from secateur.contract.ask import EVALUATE, SERVER, TRAIN, Ask
from secateur.contract.client import Client
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.spool import Spool
from secateur.contract.state import Setting, State
from secateur.data.shards import SCHEMA, Shape, Shards, open_shards
from secateur.engines import Engine
from secateur.errors import ConfigError, EngineError, NoResultError
from secateur.federation import base, checkpoint, client, client_scores, gathering, tables, trial
from secateur.federation.books import Books
from secateur.federation.claims import unknown
from secateur.federation.costs import train_macs
from secateur.federation.endings import called, check_new, check_same, write_failure
from secateur.federation.exchange import Exchange
from secateur.federation.folder import (
    FAILURE,
    ROUNDS,
    STUDY,
    SUMMARY,
    finished,
    new_folder,
    open_log,
    read_records,
    read_study,
    reserve,
)
from secateur.federation.intake import SECONDS
from secateur.federation.ledger import Ledger
from secateur.federation.opening import OpenEngine, check_begin, open_local
from secateur.federation.origin import origin
from secateur.federation.quorum import Attempts
from secateur.federation.records import (
    COUNT,
    EMPTIED,
    Row,
    check_answers,
    check_any,
    emptied,
    line,
    summarise,
    told_of_bytes,
)
from secateur.federation.removal import remarks_on_units
from secateur.federation.scoring import Scoring
from secateur.federation.soundness import check_sendable, check_start, unsound
from secateur.pruning.roles import remarks
from secateur.streams import global_streams, kept_globals
from secateur.study.runtime import Runtime
from secateur.study.study import Study

Watch = Callable[[Row], None]


def silent(row: Row) -> None:
    """Ignore an event of the run."""
    del row


class Run:
    """A run and its folder: ``study.toml``, ``rounds.jsonl``, checkpoint, ``model.safetensors``, ``run.log``.

    Args:
        study: what defines the result.
        runtime: settings that do not change the result, such as the number of workers.
        folder: the run's folder.
        shards: the folder of the clients' rows.
        open_engine: makes the engine.

    Raises:
        ConfigError: the study, its method, model and data do not fit together.
        ModelError: the method cannot serve the model.
    """

    def __init__(
        self, study: Study, runtime: Runtime, folder: Path, shards: Path, open_engine: OpenEngine = open_local
    ) -> None:
        self.study = study.complete()
        self.runtime, self.folder = runtime.on(study.compute.device), folder
        self.shards_folder, self.open_engine = shards, open_engine
        self.shards: Shards = open_shards(shards)
        self.model: nn.Module = client.make_model(self.study, self.shards)
        example = client.example(self.shards)
        self.setting: Setting = client.make_setting(self.study, self.model, self.shards.clients, example)
        self.method: Method = self.study.build_method()
        self.method.check(self.setting)
        if self.method.wants_public and not len(self.shards.public()[1]):
            raise ConfigError(f"{study.method} trains at the server: give it rows with data.public = N")
        self.scoring = Scoring(self.study, self.shards, self.method, self.setting, self.model)
        check_begin(self.study, runtime, self.method, self.setting, self.shards, self.scoring.initial)
        self.server: dict[str, float] = {}
        self.attempt = 0
        self.ledger = Ledger(folder / ROUNDS)
        self.made_of = {"data": self.shards.fingerprint(), "origin": origin(self.study)}
        self.accepted: list[str] = []
        self.guards = self.study.build_guards()
        told = [*self.shards.meta.remarks, *self.method.remarks(self.setting), *remarks(self.model)]
        told += client.stack_remarks(self.study, self.model, self.shards)
        self.remarks = [*told, *told_of_bytes(self.study.wire.count)]
        known = unknown if self.shards.empty else self.shards.count
        self.books = Books(folder, self.setting.specs, known, base=self.scoring.base)
        self.log = logging.getLogger(f"secateur.federation.server.{folder}")

    def create(self) -> State:
        """Return the first state of a new run, before any client is asked.

        Raises:
            CheckpointError: the folder holds a run whose checkpoint is missing.
        """
        self.remarks += check_new(self.folder)
        if (self.folder / STUDY).exists():
            checkpoint.seal(self.folder, STUDY)
        self.books.begin()
        return called(self.method.start, 0, self.setting, self.scoring.initial, self.books.archive)

    def restore(self, *, accept: bool = False) -> State:
        """Return the state of the last checkpoint; ``accept``: also if study, version or code have changed since.

        Raises:
            CheckpointError: the run cannot go on from there; nothing in its folder was changed.
        """
        saved = checkpoint.load(self.folder, self.setting, self.books.archive)
        accepted = check_same(self.folder, saved, self.made_of, accept=accept)
        self.ledger.go_on(saved.extra["records"])
        self.books.restore(saved)
        if accepted:
            checkpoint.seal(self.folder, STUDY)
        self.accepted = [*saved.extra["accepted"], *accepted]
        self.remarks += self.accepted
        self.attempt = saved.extra["attempt"]
        return saved.state

    def play(self, state: State, watch: Watch = silent) -> Row:
        """Run from ``state`` to the end, with a checkpoint after every exchange; return the summary.

        Raises:
            NobodyTrainedError: no step could be taken before the first round, or too few replies counted in some
                exchange, however often it was tried.
            DivergedError: the model that came of it is not usable.
            NoResultError: the method's own code raises.
            ConfigError: the method's ``plan`` goes on beyond the last round.
            CheckpointError: something cannot be written.
        """
        handler = open_log(self.log, self.folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            came = str((self.folder / base.NAME).absolute())
            make = gathering.build if (self.folder / checkpoint.NAME).exists() else trial.build
            serve = partial(make, self.study.model_dump_json(), str(self.shards_folder), came)
            more = {"together": self.study.compute.together} if self.study.compute.together > 1 else {}
            with self.open_engine(serve, self.shards.clients, self.runtime, self.folder, **more) as engine:
                self.books.attach(engine.states)
                for left in self.folder.glob("spool-*"):  # by a server that was killed
                    shutil.rmtree(left, ignore_errors=True)
                self.ledger.cut()
                return self._loop(state, engine, watch)
        except EngineError as broken:
            raise trial.said_by_worker(broken) from broken.__cause__
        finally:
            torch.set_num_threads(threads)
            self.log.removeHandler(handler)
            handler.close()

    def _loop(self, state: State, engine: Engine, watch: Watch) -> Row:
        self.log.info("study %s, method %s, round %d", self.study.hash(), self.study.method, state.round)
        for remark in self.remarks:
            self.log.info("%s", remark)
            watch({"event": "remark", "text": remark})
        if not (self.folder / checkpoint.NAME).exists():
            for asked in tables.begin(self.shards_folder, self.folder):
                row = asked | self.scoring.quality(state, evaluate=False)
                self.ledger.append(row)
                watch({"event": "row", **row})
            state = self._refined(state)
            check_start(state, self.study.wire.values)
        attempts = Attempts(self.study, self.attempt, lambda: read_records(self.folder))
        while True:
            begun, attempt = time.perf_counter(), attempts.count
            ask, planned = attempts.plan(self.method, state)
            if ask is None:
                return self._finish(called(self.method.final, state.round, state), engine, watch)

            def notify(done: int, total: int, ask: Ask = ask) -> None:
                watch({"event": "reply", "phase": ask.phase, "round": ask.round, "done": done, "total": total})

            check_sendable(ask, self.study.wire.values)
            exchange = self._exchange(ask, engine, notify=notify, macs_of=self.scoring.macs)
            with Spool(self.folder) as spool:
                reduced = exchange.reduce(planned, spool)
                after = self._absorbed(planned, reduced) if attempts.settle(exchange) else None
            if enough := after is not None and attempts.usable(exchange, unsound(after, self.study.wire.values)):
                state, self.books.medians = after, self.books.medians | exchange.compared()
            else:
                self.books.archive.revert()
            row = self._row(ask, exchange, state, time.perf_counter() - begun, enough=enough)
            row |= {"lost_state": engine.states.lost(), **attempts.note(attempt)}
            row = tables.with_resent(row, engine.states.resent())
            if enough and self._due(ask) and not self.scoring.central:
                scores = self.scoring.clients(self._examined(state, engine))
                row |= {k: v for k, v in scores.items() if not k.startswith("local")}
            self.ledger.append(row)
            kept = {"records": self.ledger.mark, "attempt": attempts.count, "accepted": self.accepted, **self.made_of}
            self.books.save(state, kept, engine.states)
            watch({"event": "row", **row})
            self.log.info("%s", line(row))
            attempts.check(ask)

    def _exchange(self, ask: Ask, engine: Engine, **more: Any) -> Exchange:
        return Exchange(
            ask, engine, self.study, self.books, self.setting, self.guards, deadline=self.runtime.deadline, **more
        )

    def _absorbed(self, planned: State, reduced: Reduced) -> State:
        """Return the state after an exchange, and after the server's own work if it was a training."""
        after = replace(called(self.method.absorb, reduced.ask, planned, reduced), setting=self.setting)
        return self._refined(after) if reduced.ask.phase == TRAIN else after

    def _refined(self, state: State) -> State:
        """Return the state after the server's own work on the model; its cost is written to the next record."""
        if not self.method.refines:
            return state
        begun = time.perf_counter()
        rows = client.wrap(self.shards, *self.shards.public())
        settings, restore = self.study.training, self.scoring.local.restore
        view = Client(SERVER, self.setting, self.model, rows, settings, {}, self.scoring.initial, restore=restore)
        restore()
        with global_streams(self.study.seed, "server", state.round):
            state, processed = called(self.method.refine, state.round, state, view)
        macs = 3 * processed * cost.macs(self.scoring.uses, self.scoring.whole(state.weights), None)
        for name, value in (("server_seconds", time.perf_counter() - begun), ("server_macs", macs)):
            self.server[name] = self.server.get(name, 0) + value
        return state

    def _row(self, ask: Ask, exchange: Exchange, state: State, seconds: float, *, enough: bool) -> Row:
        processed = sum(int(t.get("processed", 0)) for t in exchange.reply_scalars)
        worked = {int(t["client"]): float(t[SECONDS]) for t in exchange.reply_scalars}
        losses = [(float(t["loss"]), exchange.rows[int(t["client"])]) for t in exchange.reply_scalars if "loss" in t]
        return {
            "phase": ask.phase,
            "round": ask.round,
            "clients": list(ask.clients),
            "left_out": exchange.left_out,
            COUNT: self.study.wire.count,
            "bytes_down": sum(exchange.down.values()),
            "bytes_up": sum(exchange.up.values()),
            "down": exchange.down,
            "up": exchange.up,
            **exchange.counted(),
            "each": [[who, *carried] for who, carried in sorted(exchange.carried.items())],
            "each_seconds": [[who, spent] for who, spent in worked.items()],
            "client_seconds": sum(worked.values()),
            "seconds": seconds,
            "processed": processed,
            **train_macs(ask, exchange, self.scoring.macs),
            "train_loss": sum(v * n for v, n in losses) / max(1, sum(n for _, n in losses)) if losses else None,
            **self.scoring.quality(state, evaluate=enough and self._due(ask)),
            **{name: self.server.pop(name) for name in list(self.server)},
        }

    def _due(self, ask: Ask) -> bool:
        every = self.study.evaluate_every
        return ask.phase == TRAIN and (ask.round % every == 0 or ask.round == self.study.rounds)

    def _finish(self, state: State, engine: Engine, watch: Watch) -> Row:
        rows = read_records(self.folder)
        check_answers(rows)
        final = {
            "central": self.scoring.central,
            **self.scoring.quality(state, evaluate=True),
            **self.scoring.structure(self.folder, state),
            **self.scoring.widths(state),
        }
        if self.scoring.central:
            self.scoring.check_learnt(final, state)
        about = {"study": self.study.to_toml(), "shape": json.dumps(dataclasses.asdict(Shape.of(self.shards)))}
        about |= {SCHEMA: self.shards.schema.to_json()} if self.shards.schema else {}
        about |= {checkpoint.BASE: json.dumps(sorted(self.scoring.base))} if self.scoring.base else {}
        checkpoint.ship(self.folder, self.scoring.whole(state.model()), state.mask, about)
        examined = self._examined(state, engine)
        if not self.scoring.central:
            check_any(EVALUATE, len(examined.ask.clients), examined.left_out)
        final |= self.scoring.clients(examined)
        if not self.scoring.central:
            self.scoring.check_learnt(final, state)
        final["histograms"] = self.method.histograms(state)
        final["evaluate_bytes"] += sum(row.get("evaluate_bytes", 0) for row in rows)
        told = [*self.remarks, *emptied(final.get(EMPTIED, [])), *remarks_on_units(final)]
        summary = {**summarise(self.study, rows, final), "remarks": told}
        beside = {ROUNDS: checkpoint.read(self.folder / ROUNDS)}
        checkpoint.put(self.folder, SUMMARY, json.dumps(summary, indent=1).encode(), beside=beside)
        watch({"event": "end", **summary})
        return summary

    def _examined(self, state: State, engine: Engine) -> Exchange:
        """Ask clients to score a model on their held-out rows, if there are any; return the exchange."""
        rows = self.study.data.test_fraction or (self.study.data.validation_fraction and not self.scoring.central)
        ask = self.method.examine(state)
        asked = {**(ask.expects.scalars or {}), **client.further_scores(self.scoring.task)}
        expects = replace(ask.expects, scalars=asked)
        ask = replace(ask, clients=tuple(engine.clients()) if rows else (), expects=expects)
        bounds = client_scores.bounds(self.scoring.task.metrics)
        exchange = self._exchange(replace(ask, reduce={}), engine, bounds=bounds)
        with Spool(self.folder) as spool:
            exchange.reduce(state, spool)
        return exchange


def start(study: Study, runtime: Runtime, folder: Path, *, shards: Path, watch: Watch = silent) -> Row:
    """Run a study in a new folder and return its summary.

    Raises:
        SecateurError: the run cannot start or go on; see ``Run``.
    """
    reserve(new_folder(study, folder), study)
    return resume(folder, runtime, shards=shards, watch=watch)


def resume(
    folder: Path,
    runtime: Runtime,
    *,
    shards: Path,
    watch: Watch = silent,
    open_engine: OpenEngine = open_local,
    accept: bool = False,
) -> Row:
    """Go on with a run from its last checkpoint, and return its summary; a finished run is not changed.

    Args:
        folder: the run's folder.
        runtime: settings that do not change the result.
        shards: the folder of the clients' rows.
        watch: is told what happens.
        open_engine: makes the engine.
        accept: go on though the study, the version of this package or the method's code have changed since the run
            began; the summary says so.

    Raises:
        CheckpointError: the folder holds no run, one that cannot go on, or a file that is damaged.
    """
    if (summary := finished(folder)) is not None:
        return summary
    with checkpoint.alone(folder), kept_globals():
        return _resume(
            Run(read_study(folder, edited=accept), runtime, folder, shards, open_engine), watch, accept=accept
        )


def _resume(run: Run, watch: Watch, *, accept: bool) -> Row:
    (run.folder / FAILURE).unlink(missing_ok=True)
    with contextlib.closing(run.books):
        begun = (run.folder / checkpoint.NAME).exists()
        try:
            return run.play(run.restore(accept=accept) if begun else run.create(), watch)
        except NoResultError as failed:
            write_failure(run.folder, run.study, failed)
            raise
