"""Residual blocks: modules that return their input when all their tensors are zero, so that they can be removed.

They are found by a second walk over the trace, which checks each module, the innermost first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import fx, nn
from torch.nn import functional

from secateur.pruning.layers import (
    CONVS,
    KEEPS_ZERO,
    NORMS,
    POINTWISE,
    POINTWISE_CALLS,
    POOL_CALLS,
    POOLS,
    SUMS,
    called,
)
from secateur.pruning.structure import Group, Slot

Tag = Literal["input", "zero"] | None


def blocks(model: nn.Module, graph: fx.Graph) -> Iterator[Group]:
    """Iterate the innermost modules that return their input when all their tensors are zero."""
    modules, shapes = dict(model.named_modules()), {n: p.shape for n, p in model.named_parameters()}
    positive = _positive(graph, modules)
    found: list[str] = []
    inside: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        for name, _ in node.meta.get("nn_module_stack", {}).values():
            inside.setdefault(name, []).append(node)
    for name in sorted(inside, key=lambda n: -n.count(".")):
        holds = any(block.startswith(f"{name}.") for block in found)
        if name and not holds and len(inside[name]) > 1 and _passes_on(inside[name], modules, positive):
            found.append(name)
    for name in (name for name in inside if name in found):
        tensors = [n for n in shapes if n.startswith(f"{name}.")]
        if not all(shapes[n] for n in tensors):  # a number has no dimension to be removed along
            continue
        slots = tuple(Slot(n, 0, shapes[n][0]) for n in tensors)
        weights = tuple(slot for slot in slots if len(shapes[slot.tensor]) > 1)
        yield Group(name, 1, weights, slots, kind="block")


def _passes_on(nodes: list[fx.Node], modules: Mapping[str, nn.Module], positive: set[fx.Node]) -> bool:
    entering = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in nodes))
    leaving = [node for node in nodes if any(user not in nodes for user in node.users)]
    if len(entering) != 1 or len(leaving) != 1 or entering[0].op == "placeholder":
        return False
    tags: dict[fx.Node, Tag] = {entering[0]: "input"}
    for node in nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        tags[node] = _tag(node, module, [tags.get(n) for n in node.all_input_nodes], positive=entering[0] in positive)
    return tags[leaving[0]] == "input"


def _tag(node: fx.Node, module: nn.Module | None, entering: list[Tag], *, positive: bool) -> Tag:
    if isinstance(module, (*CONVS, nn.Linear)):
        return "zero"
    if isinstance(module, NORMS):
        return "zero" if getattr(module, "weight", None) is not None else None
    if node.target in SUMS and sorted(map(str, entering)) == ["input", "zero"]:
        return "input"
    if isinstance(module, nn.Identity):
        return entering[0]
    if entering and all(tag == "zero" for tag in entering):
        known = isinstance(module, (*POINTWISE, *POOLS)) or node.target in POINTWISE_CALLS | POOL_CALLS | SUMS
        return "zero" if known or called(node) in KEEPS_ZERO else None
    rectified = isinstance(module, nn.ReLU) or node.target in {torch.relu, functional.relu, "relu"}
    return "input" if rectified and positive and entering == ["input"] else None


def _positive(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> set[fx.Node]:
    """Return the nodes whose values are never negative."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        rectifies = isinstance(module, (nn.ReLU, nn.ReLU6)) or node.target in {torch.relu, functional.relu, "relu"}
        keeps = isinstance(module, (nn.Identity, nn.Dropout, *POOLS)) or node.target in POOL_CALLS | SUMS
        if rectifies or (keeps and node.all_input_nodes and all(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found
