"""Jobs of several clients done at once: one batched step trains, measures or evaluates a whole stack.

The algorithm and the batches are those of a client alone; only the order of floating-point sums differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.learning.compute import Compute
from secateur.learning.evaluate import Score, scored
from secateur.learning.hook import Steps, View
from secateur.learning.loop import Effort, Fit, batches, orders
from secateur.learning.stack import Batch, Chosen, Rows, Stack, along, steps_of
from secateur.learning.stacked_optimiser import StackedOptimiser
from secateur.learning.work import Evaluate, Job, Learn, Made, Measure, Train, fined, placed, returned
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.structure import slim_mask
from secateur.pruning.surgery import shrink
from secateur.streams import Turn

_EVALUATED = 1000  # rows at a time, as in ``evaluate``


def kind(job: Job) -> object:
    """Return the key that jobs must share to be done together; None: the job must be done alone."""
    if not len(job.data) or (isinstance(job, Measure) and job.form == "flow"):
        return None
    shapes = tuple((name, tuple(t.shape)) for name, t in job.tensors.items())
    trained = tuple((name, p.requires_grad) for name, p in job.model.named_parameters())
    key = type(job), type(job.model), shapes, trained, job.data.x.shape[1:], type(job.data.task)
    if isinstance(job, Train):
        effort = job.passes
        hooks = tuple(type(hook) for hook in job.hooks)
        return *key, job.training, effort.epochs, effort.patience, job.removal, hooks, job.turn.round
    if isinstance(job, Measure):
        return *key, job.training, job.form, job.batches
    if isinstance(job, Learn):
        return *key, job.training, tuple((name, tuple(t.shape)) for name, t in job.scores.items()), job.turn.round
    return key


def together(jobs: Sequence[Job], compute: Compute, rows: Rows) -> list[Any]:
    """Do jobs of one kind at once; return each one's result, and for ``Learn`` the buffers that moved as well.

    Args:
        jobs: at least one.
        compute: device and precision.
        rows: the rows of clients.
    """
    order = sorted(range(len(jobs)), key=lambda k: -_use(jobs[k]))
    ordered = [jobs[k] for k in order]
    ordered[0].restore()
    run = _RUNS[type(ordered[0])](ordered, compute, rows)
    made = run.done()
    return [made[order.index(k)] for k in range(len(jobs))]


def culprit(jobs: Sequence[Job], compute: Compute, rows: Rows) -> str:
    """Return the layer in which a batched pass for some jobs ends, with its name; empty if it is not a layer."""
    try:
        run = _RUNS[type(jobs[0])](jobs, compute, rows)
    except Exception:  # noqa: BLE001 -- it does not come as far as the model
        return ""
    batch = Batch(slice(0, run.stack.size), run.first[: run.stack.size, None], torch.ones(run.stack.size))
    layer: str = run.stack.culprit(batch)
    return layer


def _use(job: Job) -> int:
    return job.passes.rows(len(job.data)) if isinstance(job, Train) else len(job.data)


class _Epochs:
    """The epochs of stacked trainings; those with the most batches come first, so that active ones are a prefix."""

    def __init__(
        self, sizes: Sequence[int], turns: Sequence[Turn], efforts: Sequence[Effort], first: torch.Tensor
    ) -> None:
        self._effort, self.first = efforts[0], first
        self._drawn = [orders(*one) for one in zip(sizes, efforts, turns, strict=True)]
        self._sizes = sizes
        self._use = torch.tensor([effort.rows(size) for effort, size in zip(efforts, sizes, strict=True)])

    def run(self, step: Callable[[Batch], torch.Tensor], size: int, stack: Stack) -> list[Fit]:
        """Call ``step`` with each batch; it returns the loss of each chosen client. Return what was done."""
        count = len(self._sizes)
        active = torch.arange(count)
        best = torch.full((count,), torch.inf, dtype=torch.float64)
        stale, mean, epochs = torch.zeros(count, dtype=torch.int64), torch.zeros_like(best), [0] * count
        for _ in range(self._effort.epochs):
            rows = [next(self._drawn[k]) + self.first[k] for k in active.tolist()]
            total, sums = torch.zeros_like(best), list[tuple[Batch, torch.Tensor]]()
            taken = steps_of(rows, active, size, even=stack.even, paired=stack.paired)
            sums.extend((batch, step(batch)) for batch in taken)
            for batch, losses in sums:  # read at the end of an epoch, so that a device need not wait
                total[batch.chosen] += losses.to("cpu", torch.float64) * batch.length
            mean[active] = (total / self._use)[active]
            for k in active.tolist():
                epochs[k] += 1
            better = mean < best
            stale[active] = torch.where(better, 0, stale + 1)[active]
            best = torch.where(better, mean, best)
            if self._effort.patience:
                active = active[stale[active] < self._effort.patience]
            if not len(active):
                break
        steps = [len(batches(torch.arange(use), size, paired=stack.paired)) for use in self._use.tolist()]
        done = zip(self._sizes, self._use.tolist(), steps, epochs, mean.tolist(), strict=True)
        return [Fit(rows, n * use, n * each, n, loss) for rows, use, each, n, loss in done]


class _Training:
    """Stacked local trainings; see ``loop.fit``."""

    def __init__(self, jobs: Sequence[Train], compute: Compute, rows: Rows) -> None:
        first = jobs[0]
        self._jobs, self._training, self._compute = jobs, first.training, compute
        removal = first.removal
        model = shrink(first.model, removal) if removal else first.model
        starts = [slim_mask(job.tensors, removal) if removal else job.tensors for job in jobs]
        self._starts = starts
        data, self.first = rows.of([job.data for job in jobs])
        self.stack = Stack(model, starts, data, [job.turn for job in jobs], compute, dense=first.model)
        weights = self.stack.weights
        self._dense = any(hook.dense for hook in first.hooks)
        self._keep = self._masks([None if self._dense else job.mask for job in jobs])
        for name, keep in self._keep.items():
            weights[name].masked_fill_(keep == 0, 0.0)
        self._actions = [_Actions(job, weights, k, compute) for k, job in enumerate(jobs)] if first.hooks else []
        if self._actions:
            self._keep = self._masks([own.kept() for own in self._actions])
        self._anchor = {n: t.clone() for n, t in weights.items()} if first.training.prox else {}
        self._optimiser = StackedOptimiser(weights, first.training, max(1, first.turn.round))

    def _masks(self, masks: Sequence[Mask | None]) -> dict[str, torch.Tensor]:
        """Return the stacked masks, as factors, of the tensors in which some entry is pruned."""
        kept = {}
        for name, weights in self.stack.weights.items():
            parts = [(mask or {}).get(name) for mask in masks]
            if all(part is parts[0] for part in parts):
                if parts[0] is not None and not bool(parts[0].all()):
                    kept[name] = parts[0].to(weights).expand(weights.shape)
            elif any(part is not None and not bool(part.all()) for part in parts):
                whole = torch.ones(weights.shape[1:])
                stack = torch.stack([whole if part is None else part.to("cpu", torch.float32) for part in parts])
                kept[name] = stack.to(weights)
        return kept

    def done(self) -> list[Made]:
        """Train all; return the trained tensors, and what was done."""
        jobs, stack = self._jobs, self.stack
        efforts = [job.passes for job in jobs]
        epochs = _Epochs([len(job.data) for job in jobs], [job.turn for job in jobs], efforts, self.first)
        done = epochs.run(self._step, self._training.batch_size, stack)
        if not self._dense:
            for name, keep in self._keep.items():
                stack.weights[name].masked_fill_(keep == 0, 0.0)
        parts = stack.parts({**stack.weights, **stack.buffers})
        trained = [
            {n: own[n].to(t.dtype) if n in own else t for n, t in start.items()}
            for own, start in zip(parts, self._starts, strict=True)
        ]
        return list(zip(trained, done, strict=True))

    def _step(self, batch: Batch) -> torch.Tensor:
        """Take one step of the chosen clients; return the mean loss of each one's batch."""
        stack, chosen = self.stack, _device(batch.chosen, self._compute)
        batch = dataclasses.replace(batch, chosen=chosen)
        acting = _of(self._actions, chosen)
        with torch.no_grad():
            for own in acting:
                own.before()
        weights = stack.chosen(chosen)
        losses = stack.losses(weights, batch)
        slopes = dict(zip(weights, torch.autograd.grad(losses.sum(), list(weights.values())), strict=True))
        with torch.no_grad():
            for name, slope in slopes.items():
                if self._anchor:
                    slope.add_(weights[name] - self._anchor[name][chosen], alpha=self._training.prox)
            for place, own in enumerate(acting):
                own.hide({name: slope[place] for name, slope in slopes.items()}, clips=self._training.clip > 0)
            self._clip(slopes, chosen)
            for own in acting:
                own.gradients()
            for name, slope in slopes.items():
                moved = (stack.weights[name][chosen] if acting else weights[name]).detach()
                self._optimiser.move(name, moved, slope, chosen)
                if name in self._keep:
                    moved.mul_(self._keep[name][chosen])
                if not isinstance(chosen, slice):
                    stack.weights[name][chosen] = moved
        return losses.detach()

    def _clip(self, slopes: Mapping[str, torch.Tensor], chosen: Chosen) -> None:
        """Clip each client's gradient to the allowed norm; pruned entries do not count."""
        if not self._training.clip:
            return
        for name, slope in slopes.items():
            if name in self._keep and not self._actions:
                slope.mul_(self._keep[name][chosen])
        norm = torch.stack([slope.flatten(1).norm(dim=1) for slope in slopes.values()]).norm(dim=0)
        factor = (self._training.clip / (norm + 1e-6)).clamp(max=1.0)
        for slope in slopes.values():
            slope.mul_(along(factor, slope))


class _Actions:
    """What a client's hooks do in the steps of a stack: they see the client's part of it."""

    def __init__(self, job: Train, weights: Tensors, place: int, compute: Compute) -> None:
        self._parameters = {name: part[place] for name, part in weights.items()}
        self._names = {part: name for name, part in self._parameters.items()}
        mask = compute.moved({n: keep for n, keep in (job.mask or {}).items() if n in weights})
        self._view = View(cast("Mapping[str, nn.Parameter]", self._parameters), mask or None)
        self._steps = [hook.begin(self._view, job.turn) for hook in compute.moved(tuple(job.hooks))]
        for hook, steps in zip(job.hooks, self._steps, strict=True):
            if type(steps).forward is not Steps.forward:
                raise ModelError(f"{type(hook).__name__} acts on single clients' forward passes")

    def kept(self) -> dict[str, torch.Tensor]:
        """Return the mask of the weights after each step, as factors."""
        return {self._names[part]: keep for part, keep in self._view.kept.items()}

    def before(self) -> None:
        """Act before a step's forward pass."""
        for steps in self._steps:
            steps.before()

    def hide(self, slopes: Tensors, *, clips: bool) -> None:
        """Take the gradients of a step, without pruned entries if they are to be clipped."""
        for name, part in self._parameters.items():
            part.grad = slopes[name]
        for part, gone in self._view.pruned if clips else ():
            if part.grad is not None:
                part.grad.masked_fill_(gone, 0.0)

    def gradients(self) -> None:
        """Act on the gradients."""
        for steps in self._steps:
            steps.gradients()


class _Learning:
    """Stacked trainings of scores; see ``supermask.learn``."""

    def __init__(self, jobs: Sequence[Learn], compute: Compute, rows: Rows) -> None:
        first = jobs[0]
        self._jobs, self._compute, self._training = jobs, compute, first.training
        data, self.first = rows.of([job.data for job in jobs])
        self.stack = Stack(first.model, [job.tensors for job in jobs], data, [job.turn for job in jobs], compute)
        self._effective = [placed(job.effective, compute) for job in jobs]
        self._penalty = [job.penalty and fined(job.penalty, compute) for job in jobs]
        stacks = {n: torch.stack([job.scores[n].detach() for job in jobs]) for n in first.scores}
        self._scores = {n: t.to(compute.device, compute.dtype) for n, t in stacks.items()}
        self._optimiser = StackedOptimiser(self._scores, first.training, max(1, first.turn.round))

    def done(self) -> list[tuple[Made, dict[str, torch.Tensor]]]:
        """Train all; return the scores and what was done, and the buffers that moved."""
        jobs, stack = self._jobs, self.stack
        efforts = [Effort(self._training.epochs)] * len(jobs)
        epochs = _Epochs([len(job.data) for job in jobs], [job.turn for job in jobs], efforts, self.first)
        done = epochs.run(self._step, self._training.batch_size, stack)
        learnt = [returned(own, jobs[0].scores) for own in stack.parts(self._scores)]
        moved = stack.parts({n: t for n, t in stack.buffers.items() if n in jobs[0].tensors})
        return list(zip(zip(learnt, done, strict=True), moved, strict=True))

    def _step(self, batch: Batch) -> torch.Tensor:
        chosen = _device(batch.chosen, self._compute)
        batch = dataclasses.replace(batch, chosen=chosen)
        scores = {n: t[chosen].detach().requires_grad_() for n, t in self._scores.items()}
        effective, penalties = _of(self._effective, chosen), _of(self._penalty, chosen)
        single = [{name: part[k] for name, part in scores.items()} for k in range(len(effective))]
        made = [make(own) for make, own in zip(effective, single, strict=True)]
        weights = {n: t[chosen] for n, t in self.stack.weights.items()}
        weights |= {name: torch.stack([own[name] for own in made]) for name in made[0]}
        losses = self.stack.losses(weights, batch)
        terms = [penalty(own) for penalty, own in zip(penalties, single, strict=True) if penalty is not None]
        total = torch.stack([losses.sum(), *terms]).sum() if terms else losses.sum()
        slopes = torch.autograd.grad(total, list(scores.values()), allow_unused=True)
        with torch.no_grad():
            for (name, part), slope in zip(scores.items(), slopes, strict=True):
                if slope is None:
                    continue
                moved = part.detach()
                self._optimiser.move(name, moved, slope, chosen)
                if not isinstance(chosen, slice):
                    self._scores[name][chosen] = moved
        return losses.detach()


class _Measuring:
    """Stacked statistics of gradients; see ``gradients.gradient_statistic``."""

    def __init__(self, jobs: Sequence[Measure], compute: Compute, rows: Rows) -> None:
        self._jobs, self._compute = jobs, compute
        data, self.first = rows.of([job.data for job in jobs])
        self.stack = Stack(jobs[0].model, [job.tensors for job in jobs], data, [job.turn for job in jobs], compute)
        self._sums = {name: torch.zeros_like(t) for name, t in self.stack.weights.items()}

    def done(self) -> list[Made]:
        """Measure all; return the statistics, and what was done."""
        jobs, stack, size = self._jobs, self.stack, self._jobs[0].training.batch_size
        drawn = []
        for job, first in zip(jobs, self.first.tolist(), strict=True):
            shuffle = torch.Generator().manual_seed(job.turn.derive("gradients"))
            order = torch.randperm(len(job.data), generator=shuffle)
            drawn.append(batches(order + first, size, paired=stack.paired, most=job.batches))
        total = torch.zeros(len(jobs), dtype=torch.float64)
        rows = [torch.cat(parts) for parts in drawn]
        for batch in steps_of(rows, torch.arange(len(jobs)), size, even=stack.even, paired=stack.paired):
            total[batch.chosen] += self._batch(batch).to("cpu", torch.float64) * batch.length
        counts = torch.tensor([len(parts) for parts in drawn])
        parts = stack.parts({n: t / along(stack.place(counts), t) for n, t in self._sums.items()})
        passes = 2 if jobs[0].form == "curvature" else 1
        done = []
        for job, own, count, loss in zip(jobs, parts, map(len, rows), total.tolist(), strict=True):
            fit = Fit(len(job.data), passes * count, 0, 0, loss / count)
            done.append((returned(own, job.tensors), fit))
        return done

    def _batch(self, batch: Batch) -> torch.Tensor:
        form, chosen = self._jobs[0].form, _device(batch.chosen, self._compute)
        weights = self.stack.chosen(chosen)
        losses = self.stack.losses(weights, dataclasses.replace(batch, chosen=chosen))
        slopes = _gradients(losses.sum(), weights, again=form == "curvature")
        if form == "square":
            slopes = {name: slope.square() for name, slope in slopes.items()}
        elif form == "saliency":
            slopes = {name: (weights[name].detach() * slope).abs() for name, slope in slopes.items()}
        elif form == "curvature":
            inner = torch.stack([(g * g.detach()).sum() for g in slopes.values() if g.requires_grad]).sum()
            slopes = _gradients(inner, weights)
        for name, slope in slopes.items():
            self._sums[name][chosen] += slope.detach()
        return losses.detach()


def _gradients(value: torch.Tensor, weights: Tensors, *, again: bool = False) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(value, list(weights.values()), allow_unused=True, create_graph=again)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(weights.items(), found, strict=True)}


class _Evaluation:
    """Evaluations at once; of one model, if all clients evaluate the same tensors."""

    def __init__(self, jobs: Sequence[Evaluate], compute: Compute, rows: Rows) -> None:
        self._jobs = jobs
        data, self.first = rows.of([job.data for job in jobs])
        one = jobs[0].tensors
        self._same = all(job.tensors is one or _same(job.tensors, one) for job in jobs)
        kept = [one] if self._same else [job.tensors for job in jobs]
        self.stack = Stack(jobs[0].model, kept, data, None, compute, training=False)

    def done(self) -> list[Score]:
        """Evaluate all."""
        sizes = [len(job.data) for job in self._jobs]
        if self._same:
            rows = torch.cat([torch.arange(size) + first for size, first in zip(sizes, self.first, strict=True)])
            made = torch.cat([self.stack.outputs(part[None])[0] for part in torch.split(rows, _EVALUATED)])
            outputs = list(torch.split(made.cpu(), sizes))
        else:
            most, parts = max(sizes), []
            step = max(1, _EVALUATED // len(sizes))
            for start in range(0, most, step):
                index = torch.stack([(start + torch.arange(min(step, most - start))).clamp(max=n - 1) for n in sizes])
                parts.append(self.stack.outputs(index + self.first[:, None]).cpu())
            outputs = [own[:size] for own, size in zip(torch.cat(parts, 1), sizes, strict=True)]
        return [self._scored(job, own) for job, own in zip(self._jobs, outputs, strict=True)]

    def _scored(self, job: Evaluate, outputs: torch.Tensor) -> Score:
        _, y = dataclasses.replace(job.data, dtype=self.stack.data.dtype).batch(slice(0, len(job.data)))
        return scored(outputs, y, job.data.task, _EVALUATED)


def _same(one: Tensors, other: Tensors) -> bool:
    return all(tensor is other.get(name) for name, tensor in one.items())


def _of(parts: Sequence[Any], chosen: Chosen) -> Sequence[Any]:
    if not parts:
        return ()
    return parts[chosen] if isinstance(chosen, slice) else [parts[k] for k in chosen.tolist()]


def _device(chosen: Chosen, compute: Compute) -> Chosen:
    return chosen if isinstance(chosen, slice) else chosen.to(compute.device)


_RUNS: Mapping[type, Callable[..., Any]] = {
    Train: _Training, Learn: _Learning, Measure: _Measuring, Evaluate: _Evaluation,
}  # fmt: skip
