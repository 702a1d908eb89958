"""Roles of a model's tensors: what is pruned, what travels, what training leaves alone."""

from __future__ import annotations

import torch
from torch import nn

from secateur.pruning.layers import NORMS
from secateur.pruning.structure import Role

FIXED: frozenset[Role] = frozenset({"frozen", "constant"})
"""The roles of tensors that training leaves alone, and that do not travel with the weights."""


def tokens(model: nn.Module) -> frozenset[str]:
    """Return the weights of embeddings, by name."""
    return frozenset(f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))


def roles(model: nn.Module) -> dict[str, Role]:
    """Return the role of each floating-point tensor, in state-dict order.

    A parameter that needs no gradient is frozen. A buffer is constant where its module names it in the attribute
    ``constant_buffers``, which ``models.build`` sets after a trial.
    """
    found: dict[str, Role] = {}
    fixed, state = _fixed(model), model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in (name for name, tensor in state.items() if tensor.is_floating_point()):
        if name in fixed:
            found[name] = fixed[name]
        elif name not in parameters:
            found[name] = "buffer"
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), NORMS):
            found[name] = "norm"
        else:
            found[name] = "bias" if "bias" in name.rpartition(".")[2] else "weight"
    return found


def travelling(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a model that are exchanged, themselves, in state-dict order."""
    state = model.state_dict(keep_vars=True)
    # most models have no buffers, and asking each module for constant ones takes longer than all else here
    has_buffers = any(not isinstance(tensor, nn.Parameter) for tensor in state.values())
    constant = _constant(model) if has_buffers else set()
    return {
        name: tensor.detach()
        for name, tensor in state.items()
        if tensor.is_floating_point()
        and name not in constant
        and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
    }


def _fixed(model: nn.Module) -> dict[str, Role]:
    parameters = model.named_parameters(remove_duplicate=False)
    frozen: dict[str, Role] = {name: "frozen" for name, parameter in parameters if not parameter.requires_grad}
    return frozen | dict.fromkeys(_constant(model), "constant")


def _constant(model: nn.Module) -> set[str]:
    found: set[str] = set()
    for prefix, module in model.named_modules():
        if module._buffers:  # noqa: SLF001 -- most modules have none, and asking all of them takes longer
            found |= {f"{prefix}.{name}".lstrip(".") for name in getattr(module, "constant_buffers", ())}
    return found
