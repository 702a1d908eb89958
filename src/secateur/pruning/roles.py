"""Roles of a model's tensors: what is pruned, what travels, what training leaves alone."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from secateur.errors import ModelError
from secateur.pruning.layers import NORMS, WEIGHTED
from secateur.pruning.structure import Role

FIXED: frozenset[Role] = frozenset({"frozen", "constant"})
"""The roles of tensors that training leaves alone, and that do not travel with the weights."""

_REMEDIES = {
    WeightNorm: "torch.nn.utils.remove_weight_norm({layer})",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm({layer})",
    BasePruningMethod: "torch.nn.utils.prune.remove({layer}, {name!r})",
}


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's parameters and persistent buffers, themselves, in state-dict order.

    A tensor that stands in the model under several names (tied weights) is one tensor, and has the first of them.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        passing = module._non_persistent_buffers_set  # noqa: SLF001 -- torch has no other way to ask
        held = [*module._parameters.items()]  # noqa: SLF001 -- in the order of the state dict, and many times faster
        held += [item for item in module._buffers.items() if item[0] not in passing]  # noqa: SLF001 -- likewise
        for name, tensor in held:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{prefix}.{name}" if prefix else name] = tensor
    return found


def names_of(model: nn.Module) -> dict[int, str]:
    """Return the name that ``stored`` has of each tensor, by the tensor's identity."""
    return {id(tensor): name for name, tensor in stored(model).items()}


def tied(model: nn.Module) -> list[str]:
    """Return all names of the parameters that have several, in order."""
    named = list(model.named_parameters(remove_duplicate=False))
    names = Counter(id(parameter) for _, parameter in named)
    return [name for name, parameter in named if names[id(parameter)] > 1]


def tokens(model: nn.Module) -> frozenset[str]:
    """Return the weights of embeddings, by name."""
    names = names_of(model)
    return frozenset(names[id(m.weight)] for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))


def roles(model: nn.Module) -> dict[str, Role]:
    """Return the role of each floating-point tensor, in state-dict order; tied ones once, under their first name.

    A parameter that needs no gradient is frozen. Of the others, the weights of torch's own layers are weights
    (linear, convolutions, recurrent, attention, embeddings), and so is anybody's own parameter with two or more
    dimensions above 1, unless its first is 1 or its module names it in the attribute ``not_pruned``, which
    ``models.build`` sets after a trial. A name with ``bias`` in it is a bias. All else scales or shifts, as
    normalisation does: layer scale, slopes, class tokens, positions; and what a parametrisation computes a weight from.

    A buffer is constant where its module names it in the attribute ``constant_buffers``, which ``models.build`` sets
    after a trial.

    Raises:
        ModelError: a hook computes a layer's weight from other tensors (the older weight and spectral norm, masks of
            ``torch.nn.utils.prune``).
    """
    check_hooks(model)
    tensors, constant = stored(model), _constant(model)
    found: dict[str, Role] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if not isinstance(tensor, nn.Parameter):
            found[name] = "constant" if name in constant else "buffer"
        elif not tensor.requires_grad:
            found[name] = "frozen"
        else:
            prefix, _, own = name.rpartition(".")
            made_of = "parametrizations" in prefix.split(".")
            found[name] = "norm" if made_of else _trained(own, tensor, model.get_submodule(prefix))
    return found


def travelling(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a model that are exchanged, themselves, in state-dict order."""
    tensors = stored(model)
    # most models have no buffers, and asking each module for constant ones takes longer than all else here
    has_buffers = any(not isinstance(tensor, nn.Parameter) for tensor in tensors.values())
    constant = _constant(model) if has_buffers else set()
    return {
        name: tensor.detach()
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
        and name not in constant
        and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
    }


def matrix_like(parameter: torch.Tensor) -> bool:
    """Return whether the shape is that of a weight: two dimensions above 1, and the first is; else it is broadcast."""
    return parameter.dim() > 1 and len(parameter) > 1 and sum(size > 1 for size in parameter.shape) > 1


def remarks(model: nn.Module) -> list[str]:
    """Return a line for each layer that is trained and not pruned because its weight is computed from others."""
    found = [(name, layer) for name, layer in model.named_modules() if parametrize.is_parametrized(layer)]
    return [
        f"layer {name!r} is trained and not pruned: its {' and '.join(layer.parametrizations)} is computed in each step"
        for name, layer in found
    ]


def check_hooks(model: nn.Module) -> None:
    """Refuse a model of which a hook computes a layer's weight from other tensors before each call.

    Such a weight is no parameter and no property, but an attribute that a copy of the model cannot hold.

    Raises:
        ModelError: which layer, by what, and what undoes it.
    """
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():  # noqa: SLF001 -- torch has no other way to ask
            for kind, remedy in _REMEDIES.items():
                if isinstance(hook, kind):
                    own = str(getattr(hook, "name", "") or getattr(hook, "_tensor_name", "weight"))
                    by, layer = kind.__module__.rpartition(".")[2], f"model.{name}" if name else "model"
                    raise ModelError(
                        f"{own!r} of layer {name or type(module).__name__!r} is computed from other tensors before "
                        f"each call, by torch.nn.utils.{by}, and a mask on those is none on it: leave that out of the "
                        f"model, or undo it in the factory: {remedy.format(layer=layer, name=own)}"
                    )


def _trained(own: str, parameter: torch.Tensor, owner: nn.Module) -> Role:
    if isinstance(owner, NORMS):
        return "norm"
    if "bias" in own:
        return "bias"
    if isinstance(owner, WEIGHTED) and "weight" in own and parameter.dim() > 1:
        return "weight"
    return "weight" if matrix_like(parameter) and own not in getattr(owner, "not_pruned", ()) else "norm"


def _constant(model: nn.Module) -> set[str]:
    found: set[str] = set()
    for prefix, module in model.named_modules():
        if module._buffers:  # noqa: SLF001 -- most modules have none, and asking all of them takes longer
            found |= {f"{prefix}.{name}".lstrip(".") for name in getattr(module, "constant_buffers", ())}
    return found
