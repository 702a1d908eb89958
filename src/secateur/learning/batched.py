"""Local training of several clients at once: their weights are stacked, and one batched step trains all of them.

The algorithm and the batches are those of ``loop.fit``; only the order of floating-point sums differs.
"""

from __future__ import annotations

import copy
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.rnn import pad_sequence

from secateur.errors import ConfigError, ModelError, check, need
from secateur.learning.loop import Effort, Fit, fit, forward, orders
from secateur.learning.optimiser import BETAS, EPSILON, Training
from secateur.learning.resident import LocalState, load, tensors_of
from secateur.learning.task import Data
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.roles import roles, stored
from secateur.pruning.surgery import SlimGroupNorm
from secateur.streams import Turn, drawn_so_far, global_streams

Answer = tuple[bytes, bytes | None]
Clock = Callable[[], float]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compute:
    """How clients' training steps are computed; the choice changes only the last bits of a result, and the speed.

    Attributes:
        together: the most clients that a worker of the local engine trains in one batched step; 1: each client alone,
            with the same bits for every engine and number of workers.
        device: the device for training: ``cpu``, ``cuda`` or ``cuda:N``.
        autocast: ``bf16`` computes forward and backward passes in bfloat16 in those operations that torch deems safe;
            weights, gradients and steps stay in float32.

    Raises:
        ConfigError: a field is out of range.
    """

    together: int = 1
    device: str = "cpu"
    autocast: Literal["none", "bf16"] = "none"

    def __post_init__(self) -> None:
        check(self.together >= 1, name="compute.together", value=self.together, must="be at least 1")
        kind, _, number = self.device.partition(":")
        known = kind in {"cpu", "cuda"} and (not number or (number.isdigit() and kind == "cuda"))
        check(known, name="compute.device", value=self.device, must="be cpu, cuda or cuda:N")

    @property
    def stacks(self) -> bool:
        """Return whether clients are trained by this module and not by ``loop.fit``."""
        return self.together > 1 or self.device != "cpu"

    def check(self, model: nn.Module, inputs: torch.Tensor) -> None:
        """Refuse a model that cannot be trained stacked, or a device that is missing; ``inputs`` is a batch of one row.

        Raises:
            ModelError: a layer draws at random, keeps statistics of what it saw, or cannot be batched over weights.
            ConfigError: torch finds no such device.
            MissingExtraError: greenlet is not installed.
        """
        if not self.stacks:
            return
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ConfigError(f"compute.device = {self.device!r}: torch finds no such device here; use cpu")
        keeps = {name.rpartition(".")[0] for name, role in roles(model).items() if role == "buffer"}
        for name, layer in model.named_modules():
            batch = isinstance(layer, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001 -- a stack's batches are padded
            if name in keeps or batch or (isinstance(layer, _DropoutNd) and layer.p > 0):
                raise _refused(f"{type(layer).__name__} {name!r}")
        _greenlet()
        stack = {name: p.detach().expand(2, *p.shape) for name, p in model.named_parameters()}
        try:
            _check_steady(model, inputs)
            vmap(lambda weights, x: functional_call(model, weights, (x,)))(stack, inputs.expand(2, *inputs.shape))
        except (RuntimeError, NotImplementedError, ValueError) as broken:
            reason = str(broken).splitlines()[0]
            raise ModelError(
                f"this model cannot be trained for several clients at once ({reason}): set compute.together = 1"
            ) from broken


def _check_steady(model: nn.Module, inputs: torch.Tensor) -> None:
    """Refuse a model that draws from a global generator, or changes something of its own, in a training step."""
    trial = copy.deepcopy(model).train()
    local = LocalState(trial)
    with global_streams(0, "trial"), torch.no_grad():
        before = drawn_so_far()
        trial(inputs.expand(2, *inputs.shape[1:]))
        if drawn_so_far() != before:
            raise _refused(f"this {type(model).__name__}")
    if changed := local.changed():
        raise _refused(f"{changed!r} of this {type(model).__name__}")


def _refused(what: str) -> ModelError:
    return ModelError(
        f"{what} cannot be trained for several clients at once: it draws at random or keeps statistics; set "
        "compute.together = 1 and compute.device = cpu"
    )


class Work(Protocol):
    """A task that computes a client's whole answer; it trains with ``fit`` and reads the time from ``clock``."""

    def __call__(self, fit: Callable[..., Fit], clock: Clock) -> Answer:
        """Return the reply, and the client's new state (None: unchanged)."""


def answers(tasks: Sequence[Work], compute: Compute) -> list[Answer | Exception]:
    """Run tasks in turn until each waits for a training, train these together, and repeat until all are finished.

    An exception of a task stands in the place of its answer and does not affect the others. A task's clock counts its
    own time and its share, by rows, of the time of the joint trainings.
    """
    turns = [_Coroutine(task) for task in tasks]
    while waiting := [turn for turn in turns if turn.goes_on()]:
        begun = time.perf_counter()
        _train([turn.job for turn in waiting if turn.job], compute)
        spent, rows = time.perf_counter() - begun, sum(turn.rows for turn in waiting)
        for turn in waiting:
            turn.spent += spent * turn.rows / max(1, rows)
    return [turn.outcome for turn in turns if turn.outcome is not None]


@dataclass
class _Job:
    """A training that a task waits for, and its result."""

    model: nn.Module
    data: Data
    training: Training
    turn: Turn
    how: Mapping[str, Any]
    start: dict[str, torch.Tensor]
    trained: dict[str, torch.Tensor] = field(default_factory=dict)
    done: Fit | Exception = field(default_factory=lambda: ModelError("this training was not reached"))

    def __post_init__(self) -> None:
        self.moves = {n: self.start[n] for n, p in self.model.named_parameters() if p.requires_grad}

    @property
    def mask(self) -> Mask:
        """Return the mask of the training; empty: nothing is pruned."""
        return self.how.get("mask") or {}

    @property
    def effort(self) -> Effort:
        """Return the epochs, patience and share of rows of the training."""
        return self.how.get("effort") or Effort(self.training.epochs)

    def kind(self) -> object:
        """Return the key that jobs must share to be trained together; None: the job must be trained alone."""
        hooks = self.how.get("hooks") or ()
        for hook in hooks:
            _warn_once(f"{type(hook).__name__} acts on single clients' steps: clients that train with it go one by one")
        if hooks or not len(self.data):
            return None
        shapes = tuple((name, tuple(t.shape)) for name, t in self.moves.items())
        effort, saved = self.effort, self.model.state_dict()
        # a stack has the buffers of one client's model: those that no weight's shape tells, such as which channels a
        # slim group norm lacks, must be equal
        own = tuple((n, b.numpy().tobytes()) for n, b in self.model.named_buffers() if n not in saved)
        return type(self.model), shapes, own, self.training, effort.epochs, effort.patience, self.data.x.shape[1:]


@functools.cache
def _warn_once(remark: str) -> None:
    """Log a remark once in a process."""
    _LOG.warning(remark)


def _greenlet() -> ModuleType:
    return need("greenlet", extra="together")


class _Coroutine:
    """A running task that is suspended when it needs a training, and resumed when the training is done."""

    def __init__(self, task: Work) -> None:
        greenlet = _greenlet()
        self._task, self._since = task, 0.0
        self._mine, self._caller = greenlet.greenlet(self._run), greenlet.getcurrent()
        self.job: _Job | None = None
        self.outcome: Answer | Exception | None = None
        self.spent = 0.0

    @property
    def rows(self) -> int:
        """Return the rows that its last training processed."""
        return self.job.done.processed if self.job and isinstance(self.job.done, Fit) else 0

    def goes_on(self) -> bool:
        """Resume the task until it needs a training or is finished; return whether it needs one."""
        if self.outcome is None:
            self._since = time.perf_counter()
            self._mine.switch()
            self.spent += time.perf_counter() - self._since
        return self.outcome is None

    def _run(self) -> None:
        try:
            self.outcome = self._task(self._fit, lambda: self.spent + time.perf_counter() - self._since)
        except Exception as error:  # noqa: BLE001 -- stands in the place of its answer
            self.outcome = error

    def _fit(self, model: nn.Module, data: Data, training: Training, turn: Turn, **how: Any) -> Fit:
        job = self.job = _Job(model, data, training, turn, how, tensors_of(model))
        self._caller.switch()
        if isinstance(job.done, Exception):
            raise job.done
        load(model, job.trained)
        return job.done


def _train(jobs: Sequence[_Job], compute: Compute) -> None:
    groups: dict[object, list[_Job]] = {}
    for job in jobs:
        groups.setdefault(job.kind(), []).append(job)
    trainings = [([job], partial(_alone, job, compute)) for job in groups.pop(None, [])]
    trainings += [(group, partial(_stacked, group, compute)) for group in groups.values()]
    for group, train in trainings:
        try:
            train()
        except Exception as error:  # noqa: BLE001 -- raised where the clients of this training wait, and nowhere else
            for job in group:
                job.done = error


def _alone(job: _Job, compute: Compute) -> None:
    load(job.model, job.start)
    job.done = fit(job.model, job.data, job.training, job.turn, **job.how, autocast=compute.autocast)
    job.trained = tensors_of(job.model)


def _stacked(jobs: Sequence[_Job], compute: Compute) -> None:
    _Stack(sorted(jobs, key=lambda job: -_use(job)), compute).train()


def _use(job: _Job) -> int:
    return job.effort.rows(len(job.data))


class _Stack:
    """Stacked trainings of one kind, those with the most batches first, so that the active ones are a prefix."""

    def __init__(self, jobs: list[_Job], compute: Compute) -> None:
        first, self._device = jobs[0], torch.device(compute.device)
        self._jobs, self._compute = jobs, compute
        self._model, self._training, self._effort = first.model.train(), first.training, first.effort
        for layer in self._model.modules():
            if isinstance(layer, SlimGroupNorm):
                layer.eval()  # its own gradient cannot be stacked, autograd's of its plain form can
        starts = [job.moves for job in jobs]
        self._weights = {n: torch.stack([s[n] for s in starts]).to(self._device) for n in starts[0]}
        self._keep = self._masks()
        for name, keep in self._keep.items():
            self._weights[name].masked_fill_(keep == 0, 0.0)
        self._anchor = {n: t.clone() for n, t in self._weights.items()} if first.training.prox else {}
        self._steps = _Steps(self._weights, first.training, max(1, first.turn.round))
        held = stored(self._model)
        self._fixed = {n: t.to(self._device) for n, t in held.items() if n not in self._weights}
        x, y = torch.cat([job.data.x for job in jobs]), torch.cat([job.data.y for job in jobs])
        self._data = replace(first.data, x=x.to(self._device), y=y.to(self._device))
        sizes = torch.tensor([len(job.data) for job in jobs])
        self._first = sizes.cumsum(0) - sizes

    def _masks(self) -> dict[str, torch.Tensor]:
        """Return the stacked masks, as factors, of the tensors in which some entry is pruned."""
        kept = {}
        for name, weights in self._weights.items():
            parts = [job.mask.get(name) for job in self._jobs]
            if any(part is not None and not bool(part.all()) for part in parts):
                whole = torch.ones(weights.shape[1:], dtype=torch.bool)
                stack = torch.stack([whole if part is None else part for part in parts])
                kept[name] = stack.to(self._device, torch.float32)
        return kept

    def train(self) -> None:
        """Train all jobs, and store the result in each."""
        effort = self._effort
        drawn = [orders(len(job.data), job.effort, job.turn) for job in self._jobs]
        use = torch.tensor([_use(job) for job in self._jobs])
        active = torch.arange(len(self._jobs))
        best = torch.full((len(self._jobs),), torch.inf, dtype=torch.float64)
        stale, mean = torch.zeros(len(self._jobs), dtype=torch.int64), torch.zeros_like(best)
        epochs = torch.zeros_like(stale)
        for _ in range(effort.epochs):
            rows = [next(drawn[i]) + self._first[i] for i in active.tolist()]
            mean[active] = self._epoch(rows, active) / use[active]
            epochs[active] += 1
            better = mean < best
            stale[active] = torch.where(better, 0, stale + 1)[active]
            best = torch.where(better, mean, best)
            if effort.patience:
                active = active[stale[active] < effort.patience]
            if not len(active):
                break
        left = {n: t.masked_fill(self._keep[n] == 0, 0.0) if n in self._keep else t for n, t in self._weights.items()}
        parts = {n: t.cpu().unbind() for n, t in left.items()}
        for i, job in enumerate(self._jobs):
            count, used = int(epochs[i]), int(use[i])
            steps = count * -(-used // self._training.batch_size)
            job.done = Fit(len(job.data), count * used, steps, count, float(mean[i]))
            job.trained = {**job.start, **{n: part[i] for n, part in parts.items()}}

    def _epoch(self, rows: Sequence[torch.Tensor], active: torch.Tensor) -> torch.Tensor:
        """Train the active clients for one epoch of ``rows``; return the sum of each client's losses."""
        size = self._training.batch_size
        counts = torch.tensor([len(part) for part in rows])
        total = torch.zeros(len(rows), dtype=torch.float64)
        # a slice needs no copy
        whole = len(active) == len(self._jobs)
        for start in range(0, int(counts[0]), size):
            here = int((counts > start).sum())
            length = (counts[:here] - start).clamp(max=size)
            index = pad_sequence([part[start : start + size] for part in rows[:here]], batch_first=True)
            chosen = slice(0, here) if whole else active[:here].to(self._device)
            total[:here] += self._step(chosen, index.to(self._device), length.to(self._device)).cpu() * length
        return total

    def _step(self, chosen: slice | torch.Tensor, index: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Take one step of the chosen clients; return the mean loss of each one's batch."""
        weights = {n: t[chosen].detach().requires_grad_() for n, t in self._weights.items()}
        x, y = self._data.batch(index)
        there = torch.arange(index.shape[1], device=self._device) < length[:, None]

        def loss(own: Tensors, x: torch.Tensor, y: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
            tensors = {**self._fixed, **own}
            output = forward(lambda x: functional_call(self._model, tensors, (x,)), x, self._compute.autocast)
            return (self._data.task.losses(output, y) * there).sum() / there.sum()

        losses = vmap(loss)(weights, x, y, there)
        slopes = dict(zip(weights, torch.autograd.grad(losses.sum(), list(weights.values())), strict=True))
        with torch.no_grad():
            for name, slope in slopes.items():
                if self._anchor:
                    slope.add_(weights[name] - self._anchor[name][chosen], alpha=self._training.prox)
            self._clip(slopes, chosen)
            for name, slope in slopes.items():
                moved = weights[name].detach()
                self._steps.move(name, moved, slope, chosen)
                if name in self._keep:
                    moved.mul_(self._keep[name][chosen])
                if not isinstance(chosen, slice):
                    self._weights[name][chosen] = moved
        return losses.detach().double()

    def _clip(self, slopes: Mapping[str, torch.Tensor], chosen: slice | torch.Tensor) -> None:
        """Clip each client's gradient to the allowed norm; pruned entries do not count."""
        if not self._training.clip:
            return
        for name, slope in slopes.items():
            if name in self._keep:
                slope.mul_(self._keep[name][chosen])
        norm = torch.stack([slope.flatten(1).norm(dim=1) for slope in slopes.values()]).norm(dim=0)
        factor = (self._training.clip / (norm + 1e-6)).clamp(max=1.0)
        for slope in slopes.values():
            slope.mul_(_along(factor, slope))


def _along(factor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return factor.reshape(-1, *[1] * (tensor.dim() - 1))


class _Steps:
    """SGD, Adam or AdamW on stacked weights, with the moments of each client."""

    def __init__(self, weights: Mapping[str, torch.Tensor], training: Training, round_: int) -> None:
        self._training, self._rate = training, training.rate(round_)
        moments = 2 if training.rule.adaptive else int(training.momentum > 0)
        self._moments = {name: [torch.zeros_like(t) for _ in range(moments)] for name, t in weights.items()}
        self._taken = {name: torch.zeros(len(t), dtype=torch.float64, device=t.device) for name, t in weights.items()}

    def move(self, name: str, weights: torch.Tensor, slope: torch.Tensor, chosen: slice | torch.Tensor) -> None:
        """Move ``weights``, the entries ``chosen`` of a stack, in place."""
        rule, decay = self._training.rule, self._training.weight_decay
        if decay and rule.decoupled:
            weights.mul_(1 - self._rate * decay)
        elif decay:
            slope = slope.add(weights, alpha=decay)
        if rule.adaptive:
            slope = self._adam(name, slope, chosen)
        elif self._training.momentum:
            velocity = self._moments[name][0]
            slope = velocity[chosen] * self._training.momentum + slope
            velocity[chosen] = slope
        weights.add_(slope, alpha=-self._rate)

    def _adam(self, name: str, slope: torch.Tensor, chosen: slice | torch.Tensor) -> torch.Tensor:
        first, second = self._moments[name]
        first[chosen] = first[chosen].lerp(slope, 1 - BETAS[0])
        second[chosen] = second[chosen] * BETAS[1] + slope.square() * (1 - BETAS[1])
        self._taken[name][chosen] += 1
        taken = self._taken[name][chosen]
        far, near = (_along(1 - beta**taken, slope).to(slope.dtype) for beta in BETAS)
        return first[chosen] / far / ((second[chosen] / near).sqrt() + EPSILON)
