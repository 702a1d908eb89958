"""The resident model: a process holds one module, into which weights are copied and from which they are read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.roles import stored, travelling

_TORCHS_OWN = frozenset(vars(nn.Module()))
"""The attributes of every module: tables of parameters, buffers, submodules and hooks, and the mode."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type)


def load(model: nn.Module, tensors: Tensors) -> None:
    """Copy tensors into the parameters and buffers of a resident model with the same names."""
    held = stored(model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            held[name].copy_(tensor)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of a model's exchanged tensors: the parameters and floating-point buffers that training changes."""
    return _copies(travelling(model))


def base_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the floating-point tensors that training does not change: frozen parameters, constant buffers.

    Both sides make them from the study's model and seed; a client that made others is sent them once. They are shipped
    with the model.
    """
    own = travelling(model)
    return _copies({n: t for n, t in stored(model).items() if n not in own and t.is_floating_point()})


def _copies(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}


def enforce(model: nn.Module, mask: Mask | None) -> None:
    """Set pruned entries of the resident model to +0.0."""
    if mask is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in mask:
                    parameter.masked_fill_(~mask[name], 0.0)


class LocalState:
    """All of a resident model that is not exchanged, as it was when this was made; ``restore`` puts it back.

    These are integer and non-persistent buffers (counters), constant ones, and what modules keep in attributes of
    their own, so that one client's work never meets what another's left behind. Parameters, and buffers that are
    exchanged, are not part of it.

    Args:
        model: the resident model, as it was built.

    Raises:
        ModelError: an attribute of a module cannot be copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._modules = model, dict(model.named_modules())
        held = travelling(model)
        sent = {t.untyped_storage().data_ptr() for t in held.values()}
        stays = [*self._modules.values(), *model.parameters()]
        stays += [b for b in model.buffers() if b.untyped_storage().data_ptr() in sent]
        self._stays = {id(one): one for one in stays}
        self._names = {name: frozenset(vars(module)) for name, module in self._modules.items()}
        self._plain: dict[str, dict[str, Any]] = {}
        self._deep: dict[str, dict[str, Any]] = {}
        self._buffers: dict[str, dict[str, torch.Tensor | None]] = {}
        memo = dict(self._stays)
        for name, module in self._modules.items():
            self._keep(name, module, memo)

    def restore(self) -> None:
        """Put everything back."""
        fresh = copy.deepcopy(self._deep, dict(self._stays)) if self._deep else {}
        for name, module in self._modules.items():
            own, names = module.__dict__, self._names[name]
            if len(own) != len(names):
                for new in own.keys() - names:
                    del own[new]
            if name in self._plain:
                own.update(self._plain[name])
            if name in fresh:
                own.update(fresh[name])
            if name in self._buffers:
                held = module._buffers  # noqa: SLF001 -- of any type
                held.update({n: _put_back(held.get(n), kept) for n, kept in self._buffers[name].items()})

    def load(self, tensors: Tensors) -> None:
        """Put everything back, and copy tensors into the model."""
        self.restore()
        load(self._model, tensors)

    def changed(self) -> str:
        """Return the name of something that is not as it was; empty: nothing whose values can be compared."""
        for name, module in self._modules.items():
            own = vars(module)
            label = f"{name}." if name else ""
            for new in own.keys() - self._names[name]:
                return f"{label}{new}"
            for kept in (self._plain.get(name, {}), self._deep.get(name, {})):
                for attribute, value in kept.items():
                    if not _alike(own.get(attribute), value):
                        return f"{label}{attribute}"
            for buffer, value in self._buffers.get(name, {}).items():
                if not _alike(module._buffers.get(buffer), value):  # noqa: SLF001 -- any type of buffer
                    return f"{label}{buffer}"
        return ""

    def _keep(self, name: str, module: nn.Module, memo: dict[int, Any]) -> None:
        own = {n: value for n, value in vars(module).items() if n not in _TORCHS_OWN}
        plain = {n: value for n, value in own.items() if isinstance(value, _PLAIN)}
        if plain:
            self._plain[name] = plain
        deep = {n: value for n, value in own.items() if n not in plain}
        if deep and not type(module).__module__.startswith("torch."):  # torch's layers keep no more than numbers
            self._deep[name] = {n: _copied(value, memo, f"{name}.{n}".lstrip(".")) for n, value in deep.items()}
        buffers = {n: b for n, b in module._buffers.items() if id(b) not in self._stays}  # noqa: SLF001 -- any type
        if buffers:
            self._buffers[name] = {n: None if b is None else b.detach().clone() for n, b in buffers.items()}


def _copied(value: object, memo: dict[int, Any], label: str) -> object:
    try:
        return copy.deepcopy(value, memo)
    except Exception as broken:  # an attribute may be anything
        raise ModelError(
            f"attribute {label!r} of the model, a {type(value).__name__}, cannot be copied ({broken}), and a model is "
            "copied to make it smaller: make it where it is used, or keep it outside of the model"
        ) from broken


def _put_back(now: torch.Tensor | None, kept: torch.Tensor | None) -> torch.Tensor | None:
    if kept is None:
        return None
    fits = now is not None and (now.shape, now.dtype) == (kept.shape, kept.dtype) and not now.requires_grad
    return now.copy_(kept) if fits and now is not None else kept.clone()


def _alike(one: Any, other: Any) -> bool:
    """Return whether two values are equal; containers of other things than plain values count as equal."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    plain = isinstance(one, _PLAIN) and isinstance(other, _PLAIN)
    return one == other if plain else type(one) is type(other)
