"""A stack: the tensors of several clients' models along a new first dimension, and one batched pass through all."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import pad_sequence

from secateur.errors import ModelError
from secateur.learning.compute import Compute
from secateur.learning.loop import batches, forward, normalises
from secateur.learning.resident import LocalState
from secateur.learning.task import Data
from secateur.models.memory_format import lay_out
from secateur.pruning.mask import Tensors
from secateur.pruning.roles import roles
from secateur.streams import Turn, drawn_so_far, global_streams, stream

Chosen = slice | torch.Tensor
_DROPOUTS: Mapping[type[nn.Module], Literal["entries", "features"]] = {
    nn.Dropout: "entries", nn.Dropout1d: "features", nn.Dropout2d: "features", nn.Dropout3d: "features",
}  # fmt: skip
_KEPT = 4 * 2**30  # bytes of an array of rows that is kept on a device as a whole


class Rows:
    """Clients' rows on the device, where they stay between rounds.

    Args:
        compute: the device.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._held: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, parts: Sequence[Data]) -> tuple[Data, torch.Tensor]:
        """Return the rows of all clients as one, and the number of each client's first row in it."""
        sizes = torch.tensor([len(part) for part in parts])
        x, y = ([getattr(part, name) for part in parts] for name in ("x", "y"))
        whole_x, whole_y = self._whole(x), self._whole(y)
        first = _first(x)
        if whole_x is None or whole_y is None or not torch.equal(first, _first(y)):
            whole_x, whole_y = (self._compute.tensor(torch.cat(rows)) for rows in (x, y))
            first = sizes.cumsum(0) - sizes
        return replace(parts[0], x=whole_x, y=whole_y, dtype=self._compute.dtype), first

    def _whole(self, parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Return the array that all parts are rows of, on the device; None: there is none, or it is too large."""
        one = parts[0]
        storage, shape = one.untyped_storage(), one.shape[1:]
        row = max(1, shape.numel())
        alike = all(
            part.untyped_storage().data_ptr() == storage.data_ptr() and part.is_contiguous()
            and part.shape[1:] == shape and part.dtype == one.dtype and part.storage_offset() % row == 0
            for part in parts
        )  # fmt: skip
        if not alike or storage.nbytes() % (row * one.element_size()) or storage.nbytes() > _KEPT:
            return None
        key = storage.data_ptr(), one.dtype, shape
        if key not in self._held:
            own = torch.empty(0, dtype=one.dtype).set_(storage).view(-1, *shape)
            self._held[key] = own, self._compute.tensor(own)  # the first keeps the address from being used again
        return self._held[key][1]


def _first(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([part.storage_offset() // max(1, part.shape[1:].numel()) for part in parts])


@dataclass(frozen=True)
class Batch:
    """A step's batch: the rows of each chosen client.

    Attributes:
        chosen: which clients of the stack take the step.
        index: the numbers of their rows, shape (clients, rows), shorter ones filled up.
        length: how many rows each one has.
    """

    chosen: Chosen
    index: torch.Tensor
    length: torch.Tensor


def steps_of(
    rows: Sequence[torch.Tensor], active: torch.Tensor, size: int, *, even: bool, paired: bool
) -> Iterator[Batch]:
    """Yield the batches of an epoch: each client's rows in its own order, ``size`` at a time.

    Args:
        rows: the rows of each active client, those with the most first.
        active: the places of these clients in the stack, ascending.
        size: the number of rows in a batch.
        even: whether the clients of a batch must have equally many rows in it.
        paired: that of ``loop.batches``.
    """
    parts = [batches(own, size, paired=paired) for own in rows]
    prefix = torch.equal(active, torch.arange(len(active)))
    for step in range(len(parts[0])):
        now = [own[step] for own in parts if len(own) > step]
        length = torch.tensor([len(own) for own in now])
        for of in sorted(set(length.tolist())) if even else [0]:
            own = (length == of).nonzero().flatten() if even else torch.arange(len(now))
            index = pad_sequence([now[k] for k in own.tolist()], batch_first=True)
            whole = prefix and len(own) == len(now)  # a slice needs no copy
            yield Batch(slice(0, len(now)) if whole else active[own], index, length[own])


class Stack:
    """The tensors of several clients, and one batched pass through the model for all of them.

    Args:
        model: the model of all, slim if units are cut; it is copied.
        tensors: the exchanged tensors of each client.
        data: the rows of all, on the device.
        turns: the key of each client's random draws; None: nothing is drawn.
        compute: device and precision.
        training: whether the model is in training mode.
        dense: the resident model, if ``model`` was cut out of it; what was found out about it holds for both.

    Attributes:
        weights: the stacked parameters that are trained, by name.
        buffers: the stacked buffers that a pass may change, by name.
        even: whether the clients of a batch must have equally many rows in it, because the model mixes rows (batch
            norm), or draws at random for each.
        paired: that of ``loop.batches``.

    Raises:
        ModelError: the model draws from a global generator, or changes something of its own, in a pass.
    """

    def __init__(
        self, model: nn.Module, tensors: Sequence[Tensors], data: Data, turns: Sequence[Turn] | None, compute: Compute,
        *, training: bool = True, dense: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.compute, self.data = compute, data
        dense = model if dense is None else dense
        self.size = len(tensors)
        found = roles(model)
        keeps = {name.rpartition(".")[0] for name, role in found.items() if role == "buffer"}
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        counters = {n: t for n, t in model.state_dict().items() if n not in found and n.rpartition(".")[0] in keeps}
        self.weights = {name: self._stacked([own[name] for own in tensors]) for name in names}
        floats = [name for name, role in found.items() if role == "buffer"]
        self.buffers = {name: self._stacked([own[name] for own in tensors]) for name in floats}
        self.buffers |= {name: self._stacked([tensor] * self.size) for name, tensor in counters.items()}
        drawn = [name for name, layer in model.named_modules() if type(layer) in _DROPOUTS and _rate(layer)]
        draws = training and turns is not None and bool(drawn)
        if training and (does := _unsteady(dense, data)):
            raise ModelError(f"this {type(model).__name__} {does}")
        self.even = training and (draws or _mixes(dense, data))
        self.paired = normalises(model)
        orders = _orders(dense, data, drawn) if draws else {}
        self.model = copy.deepcopy(model).to(compute.device, compute.dtype).train(training)
        self._draws = _Draws(turns or ())
        for name in drawn if draws else ():
            owner, _, last = name.rpartition(".")
            layer = model.get_submodule(name)
            setattr(self.model.get_submodule(owner), last, _Drawn(layer, orders[name], self._draws))

    def _stacked(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        if all(part is parts[0] for part in parts):  # one is enough to be sent to the device
            one = parts[0].detach().to(self.compute.device)
            stack = one.expand(len(parts), *one.shape).clone()
        else:
            stack = torch.stack([part.detach() for part in parts]).to(self.compute.device)
        return stack.to(self.compute.dtype) if self.compute.dtype and stack.is_floating_point() else stack

    def place(self, index: torch.Tensor) -> torch.Tensor:
        """Return indices or counts on the device."""
        return index.to(self.compute.device)

    def chosen(self, chosen: Chosen) -> dict[str, torch.Tensor]:
        """Return the chosen clients' weights as leaves of a graph; a slice of them are views."""
        return {n: t[chosen].detach().requires_grad_() for n, t in self.weights.items()}

    def losses(self, weights: Tensors, batch: Batch) -> torch.Tensor:
        """Return the mean loss of each chosen client's batch; buffers move, and dropout draws."""
        x, y = self.data.batch(self.place(batch.index))
        there = torch.arange(batch.index.shape[1])[None, :] < batch.length[:, None]
        self._draws.choose(batch.chosen)
        buffers = {name: part[batch.chosen].clone() for name, part in self.buffers.items()}
        task = self.data.task

        def loss(own: Tensors, kept: Tensors, x: torch.Tensor, y: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
            tensors = {**own, **kept}
            output = forward(lambda x: functional_call(self.model, tensors, (x,)), x, self.compute.autocast)
            return (task.losses(output, y) * there).sum() / there.sum()

        losses: torch.Tensor = vmap(loss)(weights, buffers, x, y, self.place(there))
        for name, part in buffers.items():
            self.buffers[name][batch.chosen] = part
        return losses

    def outputs(self, index: torch.Tensor) -> torch.Tensor:
        """Return the outputs of each client's own model for its rows, shape (clients, rows, ...); nothing moves."""
        x, _ = self.data.batch(self.place(index))

        def output(own: Tensors, kept: Tensors, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = functional_call(self.model, {**own, **kept}, (x,))
            return found

        with torch.no_grad():
            made: torch.Tensor = vmap(output)(self.weights, self.buffers, x)
        return made

    def parts(self, stacked: Tensors) -> list[dict[str, torch.Tensor]]:
        """Return stacked tensors of this stack by client, on the CPU."""
        here = {name: part.detach().cpu().unbind() for name, part in stacked.items()}
        return [{name: own[k] for name, own in here.items()} for k in range(self.size)]

    def culprit(self, batch: Batch) -> str:
        """Return the layer in which a batched pass ends, with its name; empty if none does."""
        entered: list[str] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _, __, name=name: entered.append(name))
            for name, layer in self.model.named_modules()
            if not list(layer.children())
        ]
        try:
            self.losses(self.chosen(batch.chosen), batch)
        except Exception:  # noqa: BLE001 -- where it ends is what is asked
            last = entered[-1] if entered else ""
            layer = type(self.model.get_submodule(last))
            return f"{layer.__name__} {last!r}"
        finally:
            for hook in hooks:
                hook.remove()
        return ""


def along(factor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return a factor for each client, shaped to be multiplied with a stacked tensor."""
    return factor.reshape(-1, *[1] * (tensor.dim() - 1))


class _Draws:
    """The random draws of each client, each from its own stream, which is that of a training alone."""

    def __init__(self, turns: Iterable[Turn]) -> None:
        self._generators = [stream(turn.seed, "dropout", turn.round, turn.client) for turn in turns]
        self.now: list[torch.Generator] = self._generators

    def choose(self, chosen: Chosen) -> None:
        """Let the chosen clients draw next."""
        own = self._generators
        self.now = own[chosen] if isinstance(chosen, slice) else [own[k] for k in chosen.tolist()] if own else []


class _Drawn(nn.Module):
    """Dropout of several clients, each of which draws what it draws alone, in the same order of memory."""

    def __init__(self, layer: nn.Module, orders: Sequence[tuple[int, ...]], draws: _Draws) -> None:
        super().__init__()
        self.rate, self.features = _rate(layer), _DROPOUTS[type(layer)] == "features"
        self.orders, self.draws, self._calls = orders, draws, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped: torch.Tensor = _Dropped.apply(x, self)  # type: ignore[no-untyped-call]
        return dropped

    def noise(self, x: torch.Tensor) -> torch.Tensor:
        """Return the factors of a stack of activations."""
        order = self.orders[self._calls % len(self.orders)]
        self._calls += 1
        if self.rate == 1:
            return torch.zeros_like(x)
        drawn = []
        for generator in self.draws.now:
            shape = x.shape[1:]
            if self.features:
                own = torch.empty(*shape[:2], *[1] * (len(shape) - 2), dtype=x.dtype)
            else:
                own = torch.empty_permuted(shape, order, dtype=x.dtype)
            drawn.append(own.bernoulli_(1 - self.rate, generator=generator).div_(1 - self.rate))
        return torch.stack(drawn).to(x.device)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, layer: _Drawn) -> torch.Tensor:
        return x * layer.noise(x.unsqueeze(0)).squeeze(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep nothing: batched calls are made of torch's own operations."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: torch.Tensor, layer: _Drawn) -> tuple[torch.Tensor, int]:
        stacked = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        return stacked * layer.noise(stacked), 0


def _rate(layer: nn.Module) -> float:
    return float(cast("nn.Dropout", layer).p)


_FOUND: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
"""What was found out about resident models, once for each."""


def _few(model: nn.Module, data: Data, count: int) -> torch.Tensor:
    """Return inputs of the first rows, on the CPU, in the dtype of the model."""
    rows = torch.arange(count) % len(data)
    x, _ = replace(data, x=data.x[rows].cpu(), y=data.y[rows].cpu(), dtype=None).batch(torch.arange(count))
    dtype = next((p.dtype for p in model.parameters()), x.dtype)
    return x.to(dtype) if x.is_floating_point() else x


def _mixes(model: nn.Module, data: Data) -> bool:
    """Return whether a row's output, in training mode, depends on the other rows of its batch."""
    found = _FOUND.setdefault(model, {})
    if "mixes" not in found:
        mixes = normalises(model)
        if not mixes:
            own, x = copy.deepcopy(model).train(), _few(model, data, 3)
            for layer in own.modules():
                if type(layer) in _DROPOUTS:
                    layer.eval()
            with torch.no_grad():
                both, all_ = own(x[:2]), own(x)[:2]
            mixes = both.shape != all_.shape or not torch.allclose(both, all_, rtol=1e-3, atol=1e-5)
        found["mixes"] = mixes
    return bool(found["mixes"])


def _unsteady(model: nn.Module, data: Data) -> str:
    """Return what a model does in training that a stack cannot do for each client; empty: nothing."""
    found = _FOUND.setdefault(model, {})
    if "unsteady" not in found:
        trial = copy.deepcopy(model).train()
        for layer in trial.modules():
            if type(layer) in _DROPOUTS:
                layer.eval()
        local = LocalState(trial)
        with global_streams(0, "trial"), torch.no_grad():
            before = drawn_so_far()
            trial(_few(model, data, 2))
            drew = drawn_so_far() != before
        for layer in trial.modules():
            if isinstance(layer, _BatchNorm) and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.sub_(1)  # a stack counts them too
        changed = local.changed()
        found["unsteady"] = (
            "draws at random" if drew else f"changes its own {changed!r} in each pass" if changed else ""
        )
    return str(found["unsteady"])


def _orders(model: nn.Module, data: Data, names: Sequence[str]) -> dict[str, list[tuple[int, ...]]]:
    """Return, for each call of each named layer, the order of its input's dimensions in memory, outermost first."""
    found = _FOUND.setdefault(model, {})
    if "orders" not in found:
        orders: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}
        own = copy.deepcopy(model).train()
        lay_out(own)
        for name in names:
            layer = own.get_submodule(name).eval()
            layer.register_forward_pre_hook(lambda _, given, name=name: orders[name].append(_order(given[0])))
        with torch.no_grad():
            own(_few(model, data, 2))
        found["orders"] = orders
    return cast("dict[str, list[tuple[int, ...]]]", found["orders"])


def _order(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-int(tensor.stride()[dim]), dim)))
