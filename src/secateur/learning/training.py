"""The local loop: a resident model, seeded batches, a mask that holds after every optimiser step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from secateur.errors import check
from secateur.models import fragile
from secateur.pruning import activations
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.view import View
from secateur.streams import derive, global_stream


@dataclass(frozen=True)
class Training:
    """How a client trains.

    Attributes:
        epochs: E, local epochs in a round.
        batch_size: B.
        optimiser: ``sgd`` or ``adam``; made anew in each round, so no optimiser state crosses rounds.
        lr: learning rate eta of round 1.
        decay: factor on the learning rate for each further round.
        momentum: of SGD.
        weight_decay: L2 coefficient in the optimiser.
        prox: mu of FedProx, the weight of (mu/2) |w - w_server|^2 (arXiv 1812.06127); 0 is plain FedAvg.
        clip: largest L2 norm of a step's gradient; 0 means no clipping.
    """

    epochs: int = 5
    batch_size: int = 16
    optimiser: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.1
    decay: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    prox: float = 0.0
    clip: float = 0.0

    def __post_init__(self) -> None:
        check(self.epochs >= 1, name="training.epochs", value=self.epochs, must="be at least 1")
        check(self.batch_size >= 1, name="training.batch_size", value=self.batch_size, must="be at least 1")
        check(self.lr > 0, name="training.lr", value=self.lr, must="be above 0")
        check(0 < self.decay <= 1, name="training.decay", value=self.decay, must="be in (0, 1]")
        for name in ("momentum", "weight_decay", "prox", "clip"):
            value = getattr(self, name)
            check(value >= 0, name=f"training.{name}", value=value, must="be 0 or more")

    def rate(self, round_: int) -> float:
        """Return eta_t = lr * decay^(t - 1)."""
        return self.lr * self.decay ** (round_ - 1)


@dataclass(frozen=True)
class Data:
    """A client's rows as stored, and how a batch becomes the model's input.

    Attributes:
        x: rows, shape (n, ...); uint8 images or tokens, or float32 features.
        y: targets, shape (n,): class indices, or float32 values for regression.
        kind: ``image`` rows are divided by ``scale``; ``tokens`` become int64; ``tabular`` stay.
        scale: see ``kind``.
        task: chooses the loss: cross-entropy or mean squared error.
    """

    x: torch.Tensor
    y: torch.Tensor
    kind: str = "image"
    scale: float = 255.0
    task: str = "classification"

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.y)

    def batch(self, index: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return model inputs and targets of these rows."""
        x, y = _rows(self.x, index), _rows(self.y, index)
        if self.kind == "tokens":
            x = x.long()
        elif self.kind == "image":
            x = x / self.scale
            x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        return x, y.float() if self.task == "regression" else y.long()

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch."""
        if self.task == "regression":
            return nn.functional.mse_loss(output.squeeze(-1), target)
        return nn.functional.cross_entropy(output, target)

    def losses(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of each row of a batch."""
        if self.task == "regression":
            return (output.squeeze(-1) - target).square()
        return nn.functional.cross_entropy(output, target, reduction="none")


def _rows(tensor: torch.Tensor, index: torch.Tensor | slice) -> torch.Tensor:
    if isinstance(index, torch.Tensor) and index.dim() == 1:
        return tensor.index_select(0, index)  # copies whole rows, where indexing goes entry by entry
    return tensor[index]


@dataclass(frozen=True)
class Fit:
    """What a local training did: rows it holds, rows processed, optimiser steps, epochs, last epoch's loss."""

    samples: int
    processed: int
    steps: int
    epochs: int
    loss: float


@dataclass(frozen=True)
class Effort:
    """How long one call of ``fit`` trains, where that differs from the round's setting, and how much it remembers.

    Attributes:
        epochs: how many, at most.
        patience: epochs without a better mean loss after which it stops; 0: none.
        share: of the rows.
        activations: share of each activation's entries, the largest, that is kept for the backward pass; see
            ``pruning.activations``.
    """

    epochs: int
    patience: int = 0
    share: float = 1.0
    activations: float = 1.0

    def rows(self, count: int) -> int:
        """Return how many of a client's rows are used."""
        return max(1, math.ceil(self.share * count))


def load(model: nn.Module, tensors: Tensors) -> None:
    """Copy tensors into a resident model, in place."""
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the exchanged tensors: parameters and floating-point buffers."""
    own = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
    return {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in own.items()}


def lay_out(model: nn.Module) -> None:
    """Let convolutions' weights lie in memory channels last: most networks of images take a fifth less time so."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight.data
            # where one input channel leaves the order open, strides tell it: a flat view and back for channels first,
            # and for channels last ``to``, which sets them where ``contiguous`` lets them be
            layer.weight.data = (
                weight.flatten(1)[:, :, None, None] if fragile(layer) else weight.to(memory_format=torch.channels_last)
            )


def enforce(model: nn.Module, mask: Mask | None) -> None:
    """Set pruned entries of the resident model to +0.0."""
    if mask is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in mask:
                    parameter.masked_fill_(~mask[name], 0.0)


def fit(  # noqa: PLR0913 -- one for each thing that a local training is told
    model: nn.Module,
    data: Data,
    training: Training,
    *,
    round_: int,
    seed: int,
    client: int,
    mask: Mask | None = None,
    effort: Effort | None = None,
    feedback: bool = False,
    narrow: Sequence[Mask] = (),
    fading: Mask | None = None,
    fade: float = 0.0,
    autocast: str = "none",
) -> Fit:
    """Train the resident model in place on a client's rows.

    After every optimiser step w <- w * M, so a pruned weight is exactly 0 whatever the momentum says. With
    ``effort.patience`` P > 0 training stops after P epochs without a better epoch-mean loss.

    Args:
        round_: t; sets the learning rate, and with ``client`` the random stream (0 is exploration).
        effort: epochs, patience and share of rows where they differ from the round's setting.
        feedback: gradients are taken under the mask, but move all weights, and the mask does not hold in the result
            (dynamic pruning with feedback, Lin et al., arXiv 2006.07253).
        narrow: masks of which each step draws one: its gradient is that of the model under it, and moves only what it
            keeps (ordered dropout, Horváth et al., arXiv 2102.13451).
        fading: entries that are pulled to 0 beside the loss, by ``fade`` times the L2 norm of each tensor's.
        autocast: ``bf16`` computes the model in bfloat16 where torch deems it safe.

    Guarantees:
        The same (seed, round, client) and weights give the same bits in any process with one thread.
    """
    lay_out(model)
    enforce(model, None if feedback else mask)
    parameters = dict(model.named_parameters())
    view = View(parameters, mask, feedback=feedback, narrow=narrow, seed=derive(seed, "narrow", round_, client))
    optimiser = Optimiser(parameters.values(), training, max(1, round_), view.kept)
    anchor = [p.detach().clone() for p in parameters.values()] if training.prox else []
    remembered = effort.activations if effort else 1.0
    fades = [(p, fading[n]) for n, p in parameters.items() if fading and n in fading]

    def step(index: torch.Tensor) -> float:
        view.enter()
        optimiser.clear()
        loss = _gradient(model, data, index, training, anchor, view.pruned, remembered, autocast)
        view.leave()
        for parameter, chosen in fades:
            if parameter.grad is not None:
                part = parameter.detach() * chosen
                parameter.grad.add_(part * (fade / part.norm().clamp(min=1e-12)))
        optimiser.step()
        return loss

    if not model.training:
        model.train()
    done = loop(step, data, training, effort or Effort(training.epochs), round_=round_, seed=seed, client=client)
    if not feedback:
        enforce(model, mask)
    return done


def loop(
    step: Callable[[torch.Tensor], float], data: Data, training: Training, effort: Effort, *,
    round_: int, seed: int, client: int,
) -> Fit:  # fmt: skip
    """Call ``step`` with the rows of each batch, epoch after epoch; it returns the batch's mean loss.

    The rows of each batch, and what dropout draws, follow from (seed, round, client).
    """
    use = effort.rows(len(data))
    drawn = orders(len(data), effort, round_=round_, seed=seed, client=client)
    best, stale, epoch, processed, steps, mean_loss = math.inf, 0, 0, 0, 0, 0.0
    with global_stream(seed, "dropout", round_, client):
        for epoch, rows in enumerate(drawn, start=1):  # noqa: B007 -- the count is returned
            total = 0.0
            for index in torch.split(rows, training.batch_size):
                total += step(index) * len(index)
                steps += 1
            processed += use
            mean_loss = total / use
            stale = 0 if mean_loss < best else stale + 1
            best = min(best, mean_loss)
            if effort.patience and stale >= effort.patience:
                break
    return Fit(len(data), processed, steps, epoch, mean_loss)


def orders(count: int, effort: Effort, *, round_: int, seed: int, client: int) -> Iterator[torch.Tensor]:
    """Yield the rows of each epoch, of ``count``, in the order in which a client goes through them."""
    shuffle = torch.Generator().manual_seed(derive(seed, "batches", round_, client))
    use = effort.rows(count)
    rows = torch.randperm(count, generator=shuffle)[:use] if use < count else torch.arange(use)
    for _ in range(effort.epochs):
        yield rows[torch.randperm(use, generator=shuffle)]


def forward(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, autocast: str) -> torch.Tensor:
    """Return a model's output, in float32 where ``autocast`` lets it compute in bfloat16."""
    if autocast == "none":
        return model(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        output = model(x)
    return output.float()


def _gradient(
    model: nn.Module, data: Data, index: torch.Tensor, training: Training, anchor: list[torch.Tensor],
    pruned: Sequence[tuple[nn.Parameter, torch.Tensor]], remembered: float = 1.0, autocast: str = "none",
) -> float:  # fmt: skip
    x, y = data.batch(index)
    with activations.keeping(remembered) if remembered < 1 else contextlib.nullcontext():
        output = forward(model, x, autocast)
    loss = data.loss(output, y)
    value = loss.item()
    for parameter, start in zip(model.parameters(), anchor, strict=False):
        loss = loss + 0.5 * training.prox * (parameter - start).square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    if training.clip:
        for parameter, gone in pruned:  # what is pruned takes no step, and must not shorten the others'
            if parameter.grad is not None:
                parameter.grad.masked_fill_(gone, 0.0)
        nn.utils.clip_grad_norm_(model.parameters(), training.clip)
    return value


class Optimiser:
    """The steps of torch's SGD and Adam, bit for bit; where a mask is to hold, times it.

    Args:
        parameters: what is moved.
        training: how.
        round_: t, for the learning rate.
        kept: for each parameter that a mask prunes, the mask as a factor; what it prunes is 0 already, and stays so.

    Its Optimizer classes are not used: the first one made in a process imports the compiler, which takes as long as
    torch itself, and on a federation a process lives for one message.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        training: Training,
        round_: int,
        kept: Mapping[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self._training = training
        self._kept = kept or {}
        self._rate = training.rate(round_)
        self._parameters: list[torch.Tensor] = [p for p in parameters if p.requires_grad]
        self._momenta: dict[torch.Tensor, torch.Tensor | None] = {}
        self._moments: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def step(self) -> None:
        """Move each parameter that has a gradient."""
        moved = [p for p in self._parameters if p.grad is not None]
        gradients = [p.grad for p in moved if p.grad is not None]
        with torch.no_grad():
            if self._training.optimiser == "adam":
                self._adam(moved, gradients)
            elif self._kept and not self._training.momentum and not self._training.weight_decay:
                self._within(moved, gradients)
                return
            else:
                self._sgd(moved, gradients)
            for parameter in moved:
                if parameter in self._kept:
                    parameter.mul_(self._kept[parameter])  # several times faster than a fill

    def _within(self, moved: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        """Take a step of plain SGD under the masks, in one pass over memory where a step and a product take two."""
        for parameter, gradient in zip(moved, gradients, strict=True):
            if parameter in self._kept:
                parameter.addcmul_(gradient, self._kept[parameter], value=-self._rate)
            else:
                parameter.add_(gradient, alpha=-self._rate)

    def _sgd(self, moved: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        momenta = [self._momenta.get(p) for p in moved]
        sgd(
            moved, gradients, momenta,
            foreach=True, weight_decay=self._training.weight_decay, momentum=self._training.momentum,
            lr=self._rate, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip
        self._momenta |= dict(zip(moved, momenta, strict=True))

    def _adam(self, moved: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        for p in moved:
            if p not in self._moments:
                self._moments[p] = torch.zeros_like(p), torch.zeros_like(p), torch.tensor(0.0)
        first, second, steps = (list(part) for part in zip(*(self._moments[p] for p in moved), strict=True))
        adam(
            moved, gradients, first, second, [], steps,
            foreach=True, amsgrad=False, beta1=0.9, beta2=0.999, lr=self._rate,
            weight_decay=self._training.weight_decay, eps=1e-8, maximize=False,
        )  # fmt: skip


@dataclass(frozen=True)
class Score:
    """Quality on a set of rows.

    Attributes:
        metric: accuracy in [0, 1]; for regression the mean absolute error.
        loss: mean cross-entropy, or mean squared error.
        samples: rows scored.
    """

    metric: float
    loss: float
    samples: int


def evaluate(model: nn.Module, data: Data, *, batch_size: int = 1000) -> Score:
    """Score the resident model; fixed batches, so that the figures do not depend on who computes them."""
    model.eval()
    lay_out(model)
    total, hits = 0.0, 0.0
    with torch.no_grad():
        for start in range(0, len(data), batch_size):
            x, y = data.batch(slice(start, start + batch_size))
            output = model(x)
            total += float(data.loss(output, y)) * len(y)
            if data.task == "regression":
                hits += float((output.squeeze(-1) - y).abs().sum())
            else:
                hits += float((output.argmax(1) == y).sum())
    count = len(data)
    return Score(hits / count, total / count, count) if count else Score(math.nan, math.nan, 0)
