"""The resident model: a process holds one module, into which weights are copied and from which they are read."""

from __future__ import annotations

import torch
from torch import nn

from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.roles import travelling


def load(model: nn.Module, tensors: Tensors) -> None:
    """Copy tensors into the parameters and buffers of a resident model with the same names."""
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of a model's exchanged tensors: the parameters and floating-point buffers that training changes."""
    return _copies(travelling(model))


def base_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the floating-point tensors that training does not change: frozen parameters, constant buffers.

    Both sides make them from the study's model and seed; a client that made others is sent them once. They are shipped
    with the model.
    """
    own = travelling(model)
    return _copies({n: t for n, t in model.state_dict().items() if n not in own and t.is_floating_point()})


def _copies(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}


def enforce(model: nn.Module, mask: Mask | None) -> None:
    """Set pruned entries of the resident model to +0.0."""
    if mask is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in mask:
                    parameter.masked_fill_(~mask[name], 0.0)
