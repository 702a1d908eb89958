"""The walk: a model runs on an example, and every call of torch that it makes is followed by what it does to units.

Nothing is traced: the model's own Python runs, so that its control flow, its sizes and its memory layout are the real
ones. Whatever has no follower keeps the units that enter it. A call that torch does not show (a compiled function)
passes unseen; the trial of ``pruning.trial`` is there for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils.weak import WeakIdKeyDictionary

from secateur.errors import ModelError
from secateur.pruning.following.sites import Sites
from secateur.pruning.structure import OUTPUT, SINGLE
from secateur.pruning.units import Flow, Part, Units, varying

Follower = Callable[["Walk", "Call"], "Flow | Sequence[Any] | None"]
_FOLLOWERS: dict[str, Follower] = {}


def follows(*names: str) -> Callable[[Follower], Follower]:
    """Register a function as the follower of calls of these names, without leading and trailing underscores.

    A follower gets the walk and the call, and returns the ``Flow`` of its value (a sequence of them if it returns
    several values; None for what has no units). It raises ``ModelError`` with the reason where it cannot follow: all
    units that enter then stay.
    """

    def register(follower: Follower) -> Follower:
        _FOLLOWERS.update(dict.fromkeys(names, follower))
        return follower

    return register


@dataclass(frozen=True)
class Call:
    """A call that a model made.

    Attributes:
        name: the function's name without leading and trailing underscores (``add`` for ``__add__`` and ``add_``).
        function, args, kwargs: what was called, and with what.
        value: what it returned.
        owner: the name of the module whose forward pass made the call.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    value: Any
    owner: str

    def get(self, index: int, name: str, default: Any = None) -> Any:
        """Return an argument by its position or its name."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors among the arguments, in order."""
        return [leaf for leaf in _pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, torch.Tensor)]


@dataclass
class Walk(TorchFunctionMode):
    """One or several runs of a model, in which the units of all values are followed.

    Attributes:
        model: the model, whose tensors it knows by name.
        units: what was found.
        whole: layers that could not be followed, with the reason.
        attributes: whether sizes that code names are bound to attributes that have these values, and not to the calls.
    """

    model: nn.Module
    units: Units = field(default_factory=Units)
    whole: dict[str, str] = field(default_factory=dict)
    attributes: bool = False

    def __post_init__(self) -> None:
        """Name the tensors of the model; of tied ones the first name counts."""
        super().__init__()
        tensors = [*self.model.named_buffers(), *self.model.named_parameters()]
        self._names: Mapping[torch.Tensor, str] = WeakIdKeyDictionary({t: n for n, t in tensors})
        self._flows: Any = WeakIdKeyDictionary()
        self._owners: list[tuple[str, nn.Module]] = [("", self.model)]
        self._sites = Sites(self.units)

    def run(self, *inputs: torch.Tensor) -> None:
        """Run the model in its current mode; the units of its outputs stay."""
        with self._watched(), torch.no_grad(), self:
            output = self.model(*inputs)
        for tensor in (leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)):
            flow = self.flow(tensor)
            if flow is not None:
                self.units.fix(flow.labels, OUTPUT)

    def finish(self) -> None:
        """Bind the units to the sizes that the model's own code names, after the last run."""
        self._sites.bind(self._count_all if self.attributes else None)

    def _count_all(self, owner: str, labels: torch.Tensor) -> None:
        """Say that each attribute of a module that has their number counts these labels."""
        for name, value in vars(self.model.get_submodule(owner)).items():
            if type(value) is int and value == len(labels):
                self.count(owner, name, labels)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Know whose forward pass is running."""
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda m, _, name=name: self._enter(name, m)))
            handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: nn.Module) -> None:
        self._owners.append((name, module))
        self._sites.enter()

    def _leave(self) -> None:
        self._owners.pop()
        self._sites.leave()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make the call, and follow it."""
        del types
        kwargs = kwargs or {}
        value = func(*args, **kwargs)
        name = func.__self__.__name__ if getattr(func, "__name__", "") == "__get__" else getattr(func, "__name__", "")
        call = Call(name.strip("_"), func, args, kwargs, value, self._owners[-1][0])
        if any(isinstance(leaf, torch.Tensor) for leaf in _pytree.tree_leaves(value)):
            entered = self.flow(args[0]) if args else None
            self._follow(call)
            if not _torchs_own(self._owners[-1][1]):
                flows = (entered, self.flow(value))
                self._sites.note(call.name, call.owner, args, call.get(2, "dim", 0), value, flows)
        elif name == "__setitem__":
            self.refuse(call, "entries of it are replaced")
        return value

    def _follow(self, call: Call) -> None:
        if not any(t in self._flows or t in self._names or self._sites.knows(t) for t in call.tensors):
            return
        try:
            found = _FOLLOWERS.get(call.name, _unknown)(self, call)
        except ModelError as refused:
            self.refuse(call, str(refused))
            return
        for value, flow in zip(
            *((v if isinstance(v, (tuple, list)) else [v]) for v in (call.value, found)), strict=True
        ):
            self._note(value, flow)

    def _note(self, value: Any, flow: Any) -> None:
        if isinstance(value, (tuple, list)):
            for one, its in zip(value, flow, strict=True):
                self._note(one, its)
        elif isinstance(value, torch.Tensor):
            self._flows.pop(value, None)
            if flow is not None and bool(flow.labels.any()):
                self._flows[value] = flow

    def refuse(self, call: Call, reason: str = "") -> None:
        """Keep the units that enter a call; its own value has none."""
        owner, module = self._owners[-1]
        where = f"{owner!r} ({type(module).__name__})" if _torchs_own(module) else call.name
        for flow in filter(None, map(self.flow, call.tensors)):
            self.units.fix(flow.labels, reason or f"{where} mixes its channels")
        for name in {self._names[t] for t in call.tensors if t in self._names and t.dim() > 1}:
            self.whole.setdefault(name.rpartition(".")[0], reason or f"units of this kind of {where} cannot be removed")
        if call.name.startswith(("conv", "linear")):
            self.whole.setdefault(owner, reason or f"units of this kind of {where} cannot be removed")
        self._note(call.value, _pytree.tree_map(lambda _: None, call.value))

    def flow(self, value: Any) -> Flow | None:
        """Return the flow of a value; None if nothing is known of units in it."""
        return self._flows.get(value) if isinstance(value, torch.Tensor) else None

    def filled(self, value: Any, labels: torch.Tensor | None = None) -> Flow | None:
        """Return the flow of a tensor of zeros that the model's own code made, such as a first state; None for others.

        Args:
            value: any value.
            labels: those that it gets, of its own shape; default: new ones along its last dimension.
        """
        if not isinstance(value, torch.Tensor) or not self._sites.knows(value) or not value.dim():
            return None
        if labels is None:
            labels = self.units.fresh(value.shape[-1]).expand(value.shape)
        self._sites.made(value, labels)
        flow = self._flows[value] = Flow(labels)
        return flow

    def name(self, tensor: torch.Tensor) -> str | None:
        """Return the name of a parameter or buffer; None for any other tensor."""
        return self._names.get(tensor)

    def named(self, tensor: torch.Tensor) -> str:
        """Return the name of a parameter or buffer.

        Raises:
            ModelError: it is neither, but computed from others.
        """
        name = self.name(tensor)
        if name is None:
            raise ModelError(
                f"a weight that {self._owners[-1][0] or 'the model'!r} computes, and does not hold, reads it"
            )
        return name

    def make(self, tensor: torch.Tensor, dim: int = 0, part: Part = "weights") -> torch.Tensor:
        """Return the labels of the units that a parameter makes along a dimension: new ones, or those it has."""
        name = self.named(tensor)
        known = self.units.axes.get((name, dim))
        if tensor.shape[dim] == 1 and part == "weights":
            self.whole.setdefault(name.rpartition(".")[0], SINGLE)
        labels = self.units.fresh(tensor.shape[dim]) if known is None else known.labels
        self.units.bind(name, dim, labels, part)
        return labels

    def bind(self, tensor: torch.Tensor | None, dim: int, labels: torch.Tensor, part: Part = "incoming") -> None:
        """Say which units lie along a dimension of a parameter or buffer; nothing for None."""
        if tensor is not None:
            self.units.bind(self.named(tensor), dim, labels, part)

    def count(self, owner: str, attribute: str, labels: torch.Tensor) -> None:
        """Say that an integer attribute of a module is the number of these labels, if it is."""
        if getattr(self.model.get_submodule(owner), attribute, None) == len(labels):
            self.units.bind(f"{owner}.{attribute}".lstrip("."), 0, labels, "numbers")

    def read(self, weight: torch.Tensor, dim: int, value: torch.Tensor, along: int) -> torch.Tensor:
        """Bind a weight's dimension to the units that it reads along a dimension of a value; return their labels."""
        flow = self.flow(value) or self.filled(value)
        if flow is None:
            labels = torch.zeros(weight.shape[dim], dtype=torch.int64)
        else:
            labels = flow.along(along, self.units)
            if not flow.zero:
                self.units.audible.append(labels)
        self.bind(weight, dim, labels, "outgoing")
        return labels


def _torchs_own(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules")


def _unknown(walk: Walk, call: Call) -> None:
    del walk, call
    raise ModelError("")


def places(walk: Walk, flow: Flow | None) -> tuple[int, ...]:
    """Return the dimensions of a value along which its units lie."""
    return () if flow is None else varying(walk.units.roots(flow.labels))
