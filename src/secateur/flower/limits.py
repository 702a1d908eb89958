"""Limits of what a request may cost on a node: they are looked at before work begins, and time while it runs."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as registering
from torch.overrides import TorchFunctionMode

from secateur import models
from secateur.data.shards import Shards
from secateur.errors import SecateurError
from secateur.federation.client import Participant
from secateur.flower.codes import RefusedError
from secateur.flower.site import Most, Site, site_of
from secateur.learning.work import Evaluate, Learn, Measure, Train, Worker
from secateur.study.study import Study

Made = TypeVar("Made")

_PARTS = 100_000  # modules and tensors of a model
_LETTERS, _SETTINGS = 65_536, 1_000  # of a run's settings


def check_most(what: str, wanted: float, most: float) -> None:
    """Refuse what would cost more than the node's owner lets it.

    Raises:
        RefusedError: it would.
    """
    if wanted > most:
        why = f"{what}: {wanted:g} are asked for, {most:g} at most are allowed here"
        raise RefusedError("limit", why, f"{what} {most:g}")


def limited(node_config: Mapping[str, Any], make: Callable[[Site], Made]) -> Made:
    """Return what is made for a message, in no more seconds than the node's owner lets it take.

    Args:
        node_config: of the node.
        make: called with what its owner says.

    Raises:
        RefusedError: the owner's configuration is wrong, or it took longer.
        Exception: whatever ``make`` raises.
    """
    site = site_of(node_config)
    with within(site.most.seconds):
        return make(site)


def check_settings(run_config: Mapping[str, Any]) -> None:
    """Refuse a run's settings that are too many or too long to be looked at.

    Raises:
        RefusedError: they are.
    """
    letters = sum(len(str(key)) + len(str(value)) for key, value in run_config.items())
    check_most("characters of settings", letters, _LETTERS)
    check_most("settings", len(run_config), _SETTINGS)


def participant(study: Study, rows: Shards, client: int, most: Most) -> Participant:
    """Return what serves a client's requests, after checking that model and training cost no more than they may.

    Raises:
        RefusedError: they do.
    """
    check_study(study, rows.count(client, "train"), most)
    check_model(study, rows.input_shape, rows.outputs, most)
    made = Participant(study, rows)
    check_made(made.model, most)
    return made


def check_study(study: Study, rows: int, most: Most) -> None:
    """Refuse a study whose local training would cost more than a request may, before anything is tried.

    Args:
        study: the study.
        rows: how many training rows this node has.
        most: the limits.

    Raises:
        RefusedError: it would; or its clients train in stacks, whose work is not measured.
    """
    if study.compute.stacks:
        raise RefusedError("settings", f"compute.together = {study.compute.together}: a node trains by itself")
    Meter(most, lambda _job: None).book(study.training.epochs, study.training.epochs * rows)


@dataclass
class Meter:
    """A worker that books each job of a request before it begins, and refuses what is beyond the limits.

    Attributes:
        most: the limits.
        work: does the jobs.
        epochs, rows: what has been booked.
    """

    most: Most
    work: Worker
    epochs: int = 0
    rows: int = 0

    def __call__(self, job: Any) -> Any:
        """Book a job, and do it."""
        self.book(*_cost(job))
        return self.work(job)

    def book(self, epochs: int, rows: int) -> None:
        """Book epochs and rows.

        Raises:
            RefusedError: with what was booked before they are more than allowed.
        """
        self.epochs += epochs
        self.rows += rows
        check_most("epochs", self.epochs, self.most.epochs)
        check_most("rows", self.rows, self.most.rows)


def _cost(job: Any) -> tuple[int, int]:
    """Return the epochs that a job trains at most, and the rows that it processes at most."""
    match job:
        case Train():
            return job.passes.epochs, job.passes.epochs * job.passes.rows(len(job.data))
        case Learn():
            return job.training.epochs, job.training.epochs * len(job.data)
        case Measure():
            return 0, job.batches * min(job.training.batch_size, len(job.data))
        case Evaluate():
            return 0, len(job.data)
    raise TypeError(f"a job of type {type(job).__name__} has no known cost")


class _OvertimeError(BaseException):
    """A request has run too long; no ``except Exception`` on the way catches it."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """End the block once it has run for so many seconds, as soon as Python runs its next instruction.

    Raises:
        RefusedError: it was ended.
    """
    thread, lock = threading.get_ident(), threading.Lock()
    over_, struck = False, False

    def strike() -> None:
        nonlocal struck
        with lock:
            if not over_:
                struck = True
                _raise_in(thread, _OvertimeError)

    timer = threading.Timer(seconds, strike)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:
                over_ = True
            timer.cancel()
            if struck:
                _raise_in(thread, None)  # what has not arrived yet
    except _OvertimeError:
        raise RefusedError("limit", f"the request was ended after {seconds:g} s", f"seconds {seconds:g}") from None


def _raise_in(thread: int, what: type[BaseException] | None) -> None:
    given = None if what is None else ctypes.py_object(what)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), given)


def check_model(study: Study, input_shape: tuple[int, ...], outputs: int, most: Most) -> None:
    """Refuse a model of this package that is too large, without making it.

    A model that the owner allows by name is anyone's code, and is made once only; ``check_made`` looks at it then.

    Raises:
        RefusedError: it is too large.
    """
    if ":" in study.model.name:
        return
    make = models.find(study.model.name)
    said_later = contextlib.suppress(SecateurError, TypeError, ValueError, RuntimeError)  # when the model is made
    with _counted(most), torch.device("meta"), _Unfilled(), said_later:
        make(input_shape, outputs, **study.model.options)


def check_made(model: nn.Module, most: Most) -> None:
    """Refuse a model that is too large.

    Raises:
        RefusedError: it is.
    """
    held = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    check_most("parameters", held, most.parameters)


class _Unfilled(TorchFunctionMode):
    """Tensors are not filled: those of torch's device ``meta`` hold nothing, and filling them imports its compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        given = {} if kwargs is None else dict(kwargs)
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.startswith("__"):
            return args[0] if args else given["tensor"]
        return func(*args, **given)


class _TooLargeError(BaseException):
    """A model that is being built is too large."""


@contextlib.contextmanager
def _counted(most: Most) -> Iterator[None]:
    """Count what is registered in modules within the block, and end it when that is too much."""
    held, parts = 0, 0

    def count(_module: nn.Module, _name: str, part: Any) -> None:
        nonlocal held, parts
        parts += 1
        held += part.numel() if isinstance(part, torch.Tensor) else 0
        if held > most.parameters or parts > _PARTS:
            raise _TooLargeError

    hooks: tuple[Callable[[Any], Any], ...] = (
        registering.register_module_parameter_registration_hook,
        registering.register_module_buffer_registration_hook,
        registering.register_module_module_registration_hook,
    )
    handles = [hook(count) for hook in hooks]
    try:
        yield
    except _TooLargeError:
        why = f"parameters: the model has more than the {most.parameters} that are allowed here, or too many parts"
        raise RefusedError("limit", why, f"parameters {most.parameters}") from None
    finally:
        for handle in handles:
            handle.remove()
