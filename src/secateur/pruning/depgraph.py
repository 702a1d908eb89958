"""Removable units from torch-pruning's dependency graph, for models that ``torch.fx`` cannot trace.

The library only says which dimensions are coupled; scores, masks, plans and cuts are our own, and what it proposes is
tried like any other group (``pruning.trial``).
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError, need
from secateur.pruning.structure import Group, Slot

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)
_Member = tuple[str, nn.Module, bool, list[int]]  # name, layer, whether it makes the units, indices of unit 1


def units(model: nn.Module, example: torch.Tensor, *, seconds: float = 60.0) -> tuple[list[Group], dict[str, str]]:
    """Return the units that the library proposes, untried, and the layers without any, each with the reason.

    Args:
        model: the model, which is not changed.
        example: an input of the model; floating-point values are replaced by random ones.
        seconds: time limit for building the graph, which can take hours on some models.

    Raises:
        MissingExtraError: torch-pruning is not installed.
        ModelError: the library fails on the model, or takes too long.
    """
    library = need("torch_pruning", extra="structure")
    model = copy.deepcopy(model).eval().requires_grad_(True)
    draw = torch.Generator().manual_seed(0)
    rows = example.expand(2, *example.shape[1:])
    if example.is_floating_point():
        rows = torch.randn(rows.shape, generator=draw)
    graph = _graph(library, model, rows, seconds)
    found, whole = list[Group](), dict[str, str]()
    for root, coupled in _coupled(graph, model):
        try:
            found.append(_group(root, coupled))
        except ModelError as refused:
            whole[root] = str(refused)
    return found, whole


def _graph(library: ModuleType, model: nn.Module, rows: torch.Tensor, seconds: float) -> Any:
    """Return the dependency graph, built in a thread that is abandoned after the time limit."""
    result: list[Any] = []

    def build() -> None:
        try:
            result.append(library.DependencyGraph().build_dependency(model, example_inputs=rows))
        except Exception as broken:  # noqa: BLE001 -- the library raises whatever it stumbles over
            result.append(broken)

    worker = threading.Thread(target=build, daemon=True)
    with warnings.catch_warnings(action="ignore"):  # it warns of parameters that the trial of each group settles
        worker.start()
        worker.join(seconds)
    advice = "set model.structure=trace"
    if not result:
        raise ModelError(f"torch-pruning did not finish in {seconds:.0f} s on this model; {advice}")
    if isinstance(result[0], Exception):
        broken = result[0]
        raise ModelError(f"torch-pruning cannot handle this model ({type(broken).__name__}: {broken}); {advice}")
    return result[0]


def _coupled(graph: Any, model: nn.Module) -> Iterator[tuple[str, list[_Member]]]:
    """Iterate the groups: the name of the layer that makes a group's units, and all that is coupled to its unit 1."""
    names = {module: name for name, module in model.named_modules()}
    seen: set[nn.Module] = set()
    for root, named in names.items():
        # the units of a depthwise convolution are those of the layer before
        makes_own = isinstance(root, _LAYERS) and root.weight.shape[0] > 1 and getattr(root, "groups", 1) == 1
        if not makes_own or root in seen or root not in graph.module2node:
            continue
        members = []
        for dep, indices in graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, [1]):
            module = dep.target.module
            known = names.get(module) if isinstance(module, nn.Module) else None
            if known is not None:
                makes = bool(graph.is_out_channel_pruning_fn(dep.handler))
                members.append((known, module, makes, [int(i) for i in indices]))
                seen |= {module} if makes else set()
            elif isinstance(module, nn.Parameter):
                members.append(("a parameter outside of any layer", model, True, [1]))
        yield named, members


def _group(root: str, members: list[_Member]) -> Group:
    weights, incoming, statistics, outgoing = (list[Slot]() for _ in range(4))
    count = 0
    for name, module, makes, indices in members:
        if isinstance(module, _LAYERS) and getattr(module, "groups", 1) == 1:
            width = module.weight.shape[0 if makes else 1]
            count = count or width
            slot = _slot(name, "weight", 0 if makes else 1, indices, width, count)
            (weights if makes else outgoing).append(slot)
        elif isinstance(module, _NORMS) and module.weight is not None:
            incoming.append(_slot(name, "weight", 0, indices, len(module.weight), count))
            running = [p for p in ("running_mean", "running_var") if getattr(module, p, None) is not None]
            statistics += [_slot(name, part, 0, indices, len(module.weight), count) for part in running]
        elif isinstance(module, _LAYERS) and module.groups == module.weight.shape[0]:
            incoming.append(_slot(name, "weight", 0, indices, len(module.weight), count))
        elif _weighted(module):
            raise ModelError(f"{name!r} ({type(module).__name__}) is coupled to it")
        bias = getattr(module, "bias", None)
        if makes and isinstance(bias, nn.Parameter):
            incoming.append(_slot(name, "bias", 0, indices, len(bias), count))
    own, all_incoming = tuple(dict.fromkeys(weights)), tuple(dict.fromkeys([*weights, *incoming]))
    return Group(root, count, own, all_incoming, tuple(dict.fromkeys(statistics)), tuple(dict.fromkeys(outgoing)))


def _weighted(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _slot(name: str, part: str, dim: int, indices: list[int], width: int, units: int) -> Slot:
    """Return the slot of a group in a tensor, from the indices of unit 1: consecutive ones, or one in each tile."""
    times = width // units
    if width == times * units and indices == list(range(times, 2 * times)):
        return Slot(f"{name}.{part}", dim, repeat=times)
    if width == times * units and indices == list(range(1, width, units)):
        return Slot(f"{name}.{part}", dim, tiles=times)
    raise ModelError(f"its units share {name!r} with those of other layers (a concatenation)")
