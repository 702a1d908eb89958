"""The cost of a model: multiply-accumulate operations (MACs), memory and latency."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode


def uses(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Return the number of times that each entry of a weight is multiplied in one forward pass of one example.

    A convolution's weight is used once for each output position, a linear layer's once for each vector it
    maps, a recurrent layer's once for each time step, as are the projections of ``nn.MultiheadAttention`` (on average,
    where keys and queries are of different lengths). The MACs of a layer are its weight's entries times its
    uses; biases, normalisation, activations and table look-ups are not counted. A weight that several layers
    share is one, and has the uses of all of them.

    Args:
        model: the model, which is run once in evaluation mode.
        example: an input of batch size 1.
    """
    counted: dict[str, int] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def count(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: object) -> None:
        for weight, times in _layer_uses(module, (*inputs, *named.values()), output).items():
            for parameter in _made_of(module, weight):
                name = names[id(parameter)]
                counted[name] = counted.get(name, 0) + times

    layers = (nn.Linear, nn.RNNBase, nn.MultiheadAttention, nn.modules.conv._ConvNd)  # noqa: SLF001 -- torch's own base class
    counting = [module for module in model.modules() if isinstance(module, layers)]
    handles = [module.register_forward_hook(count, with_kwargs=True) for module in counting]
    was_training, was_fast = model.training, torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # it calls no layers, and hides padding from those that it calls
    try:
        with torch.no_grad():
            model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return counted


def _made_of(module: nn.Module, weight: str) -> list[torch.Tensor]:
    """Return a layer's weight if it is a parameter, else the parameter of its size that it is computed from, if any."""
    tensor = attrgetter(weight)(module)
    if isinstance(tensor, nn.Parameter):
        return [tensor]
    prefix, _, own = weight.rpartition(".")
    owner: Any = module.get_submodule(prefix)
    makers = owner.parametrizations[own].parameters() if parametrize.is_parametrized(owner, own) else ()
    return [p for p in makers if p.numel() == tensor.numel()][:1]


def _layer_uses(module: nn.Module, inputs: tuple[Any, ...], output: object) -> dict[str, int]:
    entered = inputs[0]
    if isinstance(module, nn.RNNBase):
        if isinstance(entered, nn.utils.rnn.PackedSequence):
            steps = len(entered.data)
        else:
            steps = entered.shape[1] if module.batch_first else entered.shape[0]
        return {n: steps for layer in module._all_weights for n in layer if n.startswith("weight")}  # noqa: SLF001 -- as made
    if isinstance(module, nn.MultiheadAttention):
        queries, keys = (part.numel() // part.shape[-1] for part in inputs[:2])
        fused = {"in_proj_weight": (queries + 2 * keys) // 3, "out_proj.weight": queries}
        parts = {"q_proj_weight": queries, "k_proj_weight": keys, "v_proj_weight": keys}
        return {name: count for name, count in (fused | parts).items() if name in dict(module.named_parameters())}
    assert isinstance(output, torch.Tensor)  # noqa: S101 -- conv and linear layers return one tensor
    if isinstance(module, nn.Linear):
        return {"weight": output.numel() // output.shape[-1]}
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # noqa: SLF001 -- likewise
        return {"weight": entered[0, 0].numel()}
    return {"weight": output[0, 0].numel()}


def macs(uses: Mapping[str, int], tensors: Mapping[str, torch.Tensor], mask: Mapping[str, torch.Tensor] | None) -> int:
    """Return MACs of one example on surviving weights: sum over layers of kept entries times uses.

    Without a mask these are the dense MACs. Only special hardware skips single weights; what dense hardware saves is
    counted on the physically smaller model.
    """
    total = 0
    for name, count in uses.items():
        kept = int(mask[name].sum()) if mask is not None and name in mask else tensors[name].numel()
        total += kept * count
    return total


def physical(uses: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Return MACs of one example on a model with these tensor sizes, zeros in them included.

    ``sizes`` is the number of entries of each weight after physical removal; see ``pruning.structure.sizes``.
    """
    return sum(sizes[name] * count for name, count in uses.items())


def counted(model: nn.Module, example: torch.Tensor) -> int:
    """Return MACs of one forward pass by torch's own counter: half of its floating-point operations.

    Recurrent layers and attention run as matrix products, which the counter knows. Unlike ``macs`` it includes products
    without weights, as in attention.
    """
    model = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)  # torch's counter follows gradients, if any
    plain_kernels = torch.backends.mkldnn.flags(enabled=False)
    counter = FlopCounterMode(display=False)
    quiet = warnings.catch_warnings(action="ignore")  # torch remarks on devices that are not here
    with quiet, torch.no_grad(), plain_kernels, sdpa_kernel(SDPBackend.MATH), counter:
        model(example)
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class Memory:
    """Bytes of a model's tensors, and of the activations that one training step saves for its backward pass."""

    parameters: int
    activations: int


def memory(model: nn.Module, batch: torch.Tensor) -> Memory:
    """Return the memory of a model; its activations are those that autograd saves, without parameters and inputs."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), batch)}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(batch)
    del output
    parameters = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return Memory(parameters, sum(saved.values()))


def latency(call: Callable[[], object], *, repeats: int = 30, warmup: int = 5) -> float:
    """Return the median seconds of ``repeats`` calls, after ``warmup`` calls that are not counted."""
    taken = []
    for n in range(warmup + repeats):
        begun = time.perf_counter()
        call()
        if n >= warmup:
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken)
