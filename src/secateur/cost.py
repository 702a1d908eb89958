"""Cost: multiply-accumulate operations of a model, dense, by surviving weights, and after physical removal."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def uses(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Return how often each weight entry is multiplied in one forward pass of one example.

    A convolution's weight is used once for each output position, a linear layer's once for each vector it
    maps, a recurrent layer's once for each time step. The MACs of a layer are its weight's entries times its
    uses; biases, normalisation, activations and table look-ups are not counted.

    Args:
        model: the model; run once in evaluation mode on ``example``.
        example: a model input of batch size 1.
    """
    counted: dict[str, int] = {}
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
            for weight, count in _layer_uses(module, inputs[0], output).items():
                key = f"{name}.{weight}" if name else weight
                counted[key] = counted.get(key, 0) + count

        handles.append(module.register_forward_hook(hook))

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.RNNBase, nn.modules.conv._ConvNd)):  # noqa: SLF001 -- torch's own base class
            watch(name, module)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return counted


def _layer_uses(module: nn.Module, entered: torch.Tensor, output: object) -> dict[str, int]:
    if isinstance(module, nn.RNNBase):
        steps = entered.shape[1] if module.batch_first else entered.shape[0]
        return {name: steps for name, _ in module.named_parameters() if name.startswith("weight")}
    assert isinstance(output, torch.Tensor)  # noqa: S101 -- conv and linear layers return one tensor
    if isinstance(module, nn.Linear):
        return {"weight": output.numel() // output.shape[-1]}
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # noqa: SLF001 -- likewise
        return {"weight": entered[0, 0].numel()}
    return {"weight": output[0, 0].numel()}


def macs(uses: Mapping[str, int], tensors: Mapping[str, torch.Tensor], mask: Mapping[str, torch.Tensor] | None) -> int:
    """Return MACs of one example on surviving weights: sum over layers of kept entries times uses.

    With mask None these are the dense MACs. Sparse weights inside a layer are skipped only by hardware that
    can; for what dense hardware saves, count the physically shrunken model.
    """
    total = 0
    for name, count in uses.items():
        kept = int(mask[name].sum()) if mask is not None and name in mask else tensors[name].numel()
        total += kept * count
    return total


def physical(uses: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Return MACs of one example on a model cut to these tensor sizes, whatever is zero in them.

    ``sizes`` has the entries of each weight after the cuts; see ``pruning.structure.sizes``.
    """
    return sum(sizes[name] * count for name, count in uses.items())
