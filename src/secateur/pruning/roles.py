"""Roles of a model's tensors: what is pruned, what travels, what training leaves alone."""

from __future__ import annotations

from torch import nn

from secateur.pruning.layers import NORMS
from secateur.pruning.structure import Role

FIXED: frozenset[Role] = frozenset({"frozen", "constant"})
"""The roles of tensors that training leaves alone, and that never travel."""


def tokens(model: nn.Module) -> frozenset[str]:
    """Return the weights of embeddings, by name."""
    return frozenset(f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))


def roles(model: nn.Module) -> dict[str, Role]:
    """Return the role of each floating-point tensor, in state-dict order.

    A parameter that needs no gradient is frozen. A buffer is constant where its module names it in the attribute
    ``constant_buffers``, which ``models.build`` sets after a trial.
    """
    found: dict[str, Role] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict().items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name not in parameters:
            if tensor.is_floating_point():
                constant = name.rpartition(".")[2] in getattr(owner, "constant_buffers", ())
                found[name] = "constant" if constant else "buffer"
        elif not parameters[name].requires_grad:
            if tensor.is_floating_point():
                found[name] = "frozen"
        elif isinstance(owner, NORMS):
            found[name] = "norm"
        else:
            found[name] = "bias" if "bias" in name.rpartition(".")[2] else "weight"
    return found


def travelling(model: nn.Module) -> list[str]:
    """Return the tensors of a model that are exchanged, in state-dict order."""
    return [name for name, role in roles(model).items() if role not in FIXED]
