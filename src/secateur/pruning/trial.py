"""The trial of proposed groups: random units are masked, then removed, and both models must compute the same.

Whatever proposes units, a model's own code may do with them what nobody foresaw. Hence each model is tried as it will
be used: in evaluation and in training mode, images in the memory format of training, in double precision, with weights
away from their initial zeros and ones; outputs, and the gradients of what remains, must agree.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from secateur.errors import ModelError
from secateur.pruning import mask as masks
from secateur.pruning.roles import stored
from secateur.pruning.structure import Group, Plan, expand, plan, slim
from secateur.pruning.surgery import shrink
from secateur.streams import global_streams

_CLOSE, _CLOSE_SINGLE = 1e-9, 1e-3  # of the largest value, in double and in single precision
_GRADIENTS = 100  # their bound is so many times as wide, as some are ill-conditioned
_ROWS = 3  # batch norm of two rows makes signs of them, and hides what it is given


class Trial:
    """A model and inputs, to try groups of units on.

    Args:
        model: the model, which is not changed.
        example: an input of the model; its values are replaced by random ones that it can have.

    Attributes:
        model, rows: the model and its inputs as they are tried: in double precision, unless its code cannot.
        broken: why the model cannot be run at all; empty if it can.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        draw = torch.Generator().manual_seed(0)
        self.model = _stirred(model, draw)
        self.rows = _rows(self.model, example, draw)
        self._certain, self._close, self.broken = False, _CLOSE, self._runs()
        if self.broken:  # its code may flatten images with ``view``
            _lay_out(self.model, torch.contiguous_format)
            self.rows, self.broken = self.rows.contiguous(), self._runs()
        if self.broken:  # or make tensors of single precision
            self.model, self._close = self.model.float(), _CLOSE_SINGLE
            self.rows = self.rows.float() if self.rows.is_floating_point() else self.rows
            self.broken = self._runs()
        if not self.broken:
            self._certain = self._draws()

    def inputs(self, *, training: bool) -> torch.Tensor:
        """Return the rows for a mode: one fewer in evaluation, so that a number of rows in its code is noticed."""
        return self.rows if training else self.rows[:-1]

    def _draws(self) -> bool:
        """Return whether the model draws random numbers in evaluation mode too."""
        one, other = (
            _results(copy.deepcopy(self.model), self.inputs(training=False), _Mode(seed=seed))[0] for seed in (0, 1)
        )
        return not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    def _runs(self) -> str:
        for training in (False, True):
            try:
                _results(copy.deepcopy(self.model), self.inputs(training=training), _Mode(training=training))
            except Exception as broken:  # noqa: BLE001 -- a model's own code raises whatever it likes
                mode = "training" if training else "evaluation"
                return f"the model cannot be tried, it fails in {mode} mode ({_line(broken)})"
        return ""

    def passing(self, groups: Sequence[Group]) -> tuple[list[Group], dict[str, str]]:
        """Return the groups with which slim equals masked, and why each of the others does not."""
        atoms: dict[str, list[Group]] = {}
        for group in groups:
            atoms.setdefault(group.family or f"{group.name} {group.kind}", []).append(group)
        held: dict[str, str] = {}
        kept = self._search(list(atoms.values()), held)
        while held and (reason := self.failure(kept)):  # each passes alone, and not together: leave out until they do
            held[kept[-1].name] = reason
            kept = kept[:-1]
        return [group for group in groups if group in kept], held

    def _search(self, atoms: list[list[Group]], held: dict[str, str]) -> list[Group]:
        together = [group for atom in atoms for group in atom]
        reason = self.failure(together)
        if not reason:
            return together
        if len(atoms) == 1:
            held.update((group.name, reason) for group in together)
            return []
        half = len(atoms) // 2
        return self._search(atoms[:half], held) + self._search(atoms[half:], held)

    def failure(self, groups: Sequence[Group]) -> str:
        """Return why slim differs from masked without some units of each of these groups; empty if it does not."""
        if not groups:
            return ""
        for seed, training in enumerate((False, True, False, False)):
            mode = "training" if training else "evaluation"
            try:
                self._compare(groups, seed, training=training)
            except ModelError as differs:
                return f"{differs} in {mode} mode"
            except Exception as broken:  # noqa: BLE001 -- a cut model's own code raises whatever it likes
                return f"the model fails without some of them in {mode} mode ({_line(broken)})"
        return ""

    def _compare(self, groups: Sequence[Group], seed: int, *, training: bool) -> None:
        model = copy.deepcopy(self.model)
        tensors = {name: tensor.detach() for name, tensor in stored(model).items()}
        mask = _mask(groups, tensors, _flags(groups, seed, some=seed > 1))
        model.load_state_dict(masks.apply(tensors, mask), strict=False)
        removal = plan(mask, groups)
        small = shrink(model, removal)
        mode = _Mode(training=training, gradients=training, certain=training or self._certain)
        expected, found = (_results(net, self.inputs(training=training), mode) for net in (model, small))
        _same_shape(expected[0], found[0])
        for one, other in zip(expected[0], found[0], strict=True):
            _near(one, other, "without some of them the model computes something else", self._close)
        if training:
            trained = {name: grad for name, grad in expected[1].items() if not removal.drops(name)}
            cuts = tuple(cut for cut in removal.cuts if cut.tensor in trained)
            for name, grad in slim(trained, replace(removal, cuts=cuts)).items():
                part = slim({name: mask[name]}, Plan(removal.of(name)))[name] if name in mask else torch.ones_like(grad)
                words = f"without some of them {name!r} is trained otherwise"
                _near(grad * part, found[1][name] * part, words, self._close * _GRADIENTS)


@dataclass(frozen=True)
class _Mode:
    """How a model is run: in which mode, with which seed, with or without gradients, and whether dropout is off."""

    training: bool = False
    gradients: bool = False
    certain: bool = False
    seed: int = 0


def _results(net: nn.Module, rows: torch.Tensor, mode: _Mode) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Return a model's outputs and, if asked, the gradients of a sum of their squares."""
    net.train(mode.training)
    # torch's fast kernels of evaluation are not taken where calls are watched
    watched = _Certain() if mode.certain else contextlib.nullcontext()
    with global_streams(mode.seed, "trial"), warnings.catch_warnings(action="ignore"), watched:
        with torch.set_grad_enabled(mode.gradients):
            output = net(rows)
        leaves = [t for t in _pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if not mode.gradients:
            return [t.detach() for t in leaves], {}
        named = {name: p for name, p in net.named_parameters() if p.requires_grad}
        weighted = [t * torch.linspace(0.5, 1.5, t.numel()).view(t.shape).to(t) for t in leaves]
        loss = torch.stack([t.square().sum() for t in weighted]).sum()
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True) if named else ()
    found = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}
    return [t.detach() for t in leaves], found


def _same_shape(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> None:
    if [t.shape for t in expected] != [t.shape for t in found]:
        raise ModelError("without some of them the model's output has another shape")


def _near(expected: torch.Tensor, found: torch.Tensor, words: str, close: float) -> None:
    """Raise ``ModelError`` with these words unless two tensors are equal but for rounding."""
    most = max(1e-3, float(expected.abs().max()) if expected.numel() else 0.0)
    if not bool(((expected - found).abs() <= close * most).all()):
        raise ModelError(words)


def _mask(
    groups: Sequence[Group], tensors: Mapping[str, torch.Tensor], keep: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the smallest mask under which the units not kept are dead."""
    mask: dict[str, torch.Tensor] = {}
    for group in groups:
        for slot in group.incoming if group.silent else (*group.incoming, *group.outgoing):
            shape = tensors[slot.tensor].shape
            part = expand(keep[group.name], slot, shape)
            mask[slot.tensor] = mask.get(slot.tensor, torch.ones(shape, dtype=torch.bool)) & part
    return mask


def _flags(groups: Sequence[Group], seed: int, *, some: bool) -> dict[str, torch.Tensor]:
    """Return random flags of the units that stay: about half of each group, at least one; as many in a family.

    Args:
        groups: the groups.
        seed: seed of the draws.
        some: whether half of several groups lose none, as units of one may be needed by a size read off another, and
            the others are left one, which ``squeeze()`` takes for no dimension.
    """
    atoms = list(dict.fromkeys(group.family or group.name for group in groups))
    whole = set(atoms[seed % 2 :: 2]) if some and len(atoms) > 1 else set()
    draw = torch.Generator().manual_seed(seed)
    keep: dict[str, torch.Tensor] = {}
    for group in groups:
        flags = torch.zeros(group.units, dtype=torch.bool)
        if (group.family or group.name) in whole:
            keep[group.name] = ~flags
            continue
        count = (
            int(torch.randint(2, (1,), generator=draw))
            if group.kind == "block"
            else 1
            if some
            else max(1, group.units // 2)
        )
        flags[torch.randperm(group.units, generator=draw)[:count]] = True
        keep[group.name] = flags
    return keep


def _stirred(model: nn.Module, draw: torch.Generator) -> nn.Module:
    """Return a copy in double precision with weights, and statistics of norms, away from zero and one; no dropout."""
    model = copy.deepcopy(model)
    kinds = (nn.modules.batchnorm._NormBase,)  # noqa: SLF001 -- torch's own base class
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0  # type: ignore[assignment]
            tensors: list[torch.Tensor] = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
            if isinstance(module, kinds) and module.running_mean is not None:
                tensors += [module.running_mean]
                module.running_var.mul_(0.5 + torch.rand(module.running_var.shape, generator=draw))  # type: ignore[union-attr]
            for tensor in tensors:
                spread = 0.1 if tensor.dim() < 2 else 0.5 / max(1, tensor.numel() // max(1, len(tensor))) ** 0.5
                tensor.add_(spread * torch.randn(tensor.shape, generator=draw))
    _lay_out(model.double(), torch.channels_last)
    return model


def _lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Store the weights of convolutions as training does, unless their model is known not to take it."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and not getattr(layer, "channels_first", False):
            layer.weight.data = layer.weight.data.to(memory_format=memory_format)


def _rows(model: nn.Module, example: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    shape = (_ROWS + 1, *example.shape[1:])
    if example.is_floating_point():
        rows = torch.randn(shape, generator=draw).double()
        return rows.contiguous(memory_format=torch.channels_last) if rows.dim() == 4 else rows
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return torch.randint(0, max(1, min(sizes, default=int(example.max()) + 1)), shape, generator=draw)


class _Certain(TorchFunctionMode):
    """Calls of torch, but for dropout, which keeps everything: its draws depend on the number of units."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make the call, or return its input."""
        del types
        more = dict(kwargs or {})
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else more["input"]
        if "dropout_p" in more:
            more["dropout_p"] = 0.0
        return func(*args, **more)


def _line(broken: Exception) -> str:
    return f"{type(broken).__name__}: {' '.join(str(broken).split())[:200]}"
