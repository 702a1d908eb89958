"""The resident model: one module in a process, into which weights are copied and from which they are read."""

from __future__ import annotations

import torch
from torch import nn

from secateur.models import fragile
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.roles import travelling


def load(model: nn.Module, tensors: Tensors) -> None:
    """Copy tensors into a resident model, in place."""
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the exchanged tensors: parameters and floating-point buffers that training changes."""
    return _copies(travelling(model))


def base_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the floating-point tensors that training leaves alone: frozen parameters, constant buffers.

    Both sides make them, from the study's model and seed; they travel once, to who made others. They are shipped with
    the model.
    """
    own = travelling(model)
    return _copies({n: t for n, t in model.state_dict().items() if n not in own and t.is_floating_point()})


def _copies(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}


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
