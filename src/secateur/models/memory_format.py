"""The memory format of images: channels last, which is faster, but for the layers and models that cannot take it."""

from __future__ import annotations

import copy

import torch
from torch import nn

CHANNELS_FIRST = "channels_first"
"""The attribute of the convolutions of a model that cannot take images in the channels-last memory format."""


def fragile(layer: nn.Module) -> bool:
    """Return whether a layer must not get images in the channels-last memory format.

    Its model may not take them (``keep_channels_first``). And on CPUs without AVX-512, torch 2.13's gradient of the
    weights of a strided pointwise convolution writes beyond its buffers if there are few channels, not a multiple of
    eight, in that format: it crashes, or trains on noise.
    """
    if not isinstance(layer, nn.Conv2d):
        return False
    return getattr(layer, CHANNELS_FIRST, False) or (_strided_point(layer) and bool(layer.weight.shape[1] % 8))


def _strided_point(layer: nn.Conv2d) -> bool:
    return set(layer.kernel_size) == {1} and set(layer.stride) != {1}


def lay_out(model: nn.Module) -> None:
    """Store convolutions' weights channels last: most networks of images take a fifth less time."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight.data
            # with one input channel a weight is contiguous in both orders, and only its strides say which one is meant:
            # a flat view and back sets those of channels first; ``to`` sets those of channels last, ``contiguous`` not
            layer.weight.data = (
                weight.flatten(1).view(len(weight), *weight.shape[1:])
                if fragile(layer)
                else weight.to(memory_format=torch.channels_last)
            )


def keep_channels_first(model: nn.Module, *, everywhere: bool = False) -> None:
    """Give ``fragile`` layers, and those that become so when they are cut, their inputs with channels first.

    Args:
        model: the model.
        everywhere: whether all its convolutions are fragile, because the model flattens images with ``view``, which
            needs channels first.
    """
    if everywhere:
        model.register_forward_pre_hook(_contiguous)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and (everywhere or _strided_point(layer)):
            if everywhere:
                setattr(layer, CHANNELS_FIRST, True)
            layer.register_forward_pre_hook(_channels_first)


def _channels_first(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return _contiguous(layer, inputs) if fragile(layer) else inputs


def _contiguous(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    del layer
    # one channel is contiguous in both formats, and only its strides say which one is meant: a flat view sets them
    return tuple(x.flatten(1).view_as(x) if x.size(1) == 1 else x.contiguous() for x in inputs)


def takes_channels_last(model: nn.Module, input_shape: tuple[int, ...]) -> bool:
    """Return whether a model runs on images as training lays them out in memory, in both modes.

    A fault that has nothing to do with the format is none here.
    """
    first = torch.zeros((2, *input_shape))
    last = first.to(memory_format=torch.channels_last)
    trial, laid_out = copy.deepcopy(model), copy.deepcopy(model)
    lay_out(laid_out)
    return all(_runs(laid_out.train(mode), last) or not _runs(trial.train(mode), first) for mode in (False, True))


def _runs(model: nn.Module, x: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            model(x)
    except RuntimeError:
        return False
    return True
