"""Discovery: the roles of a model's tensors, and its removable units.

``following`` proposes groups of units by running the model once in each mode, ``blocks`` proposes residual blocks, and
``depgraph`` what torch-pruning finds in the rest, if asked. A ``Trial`` decides: what it refuses stays whole.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn

from secateur import cost
from secateur.errors import ModelError
from secateur.pruning import depgraph, ends
from secateur.pruning.blocks import blocks
from secateur.pruning.examples import example_of
from secateur.pruning.following import Walk
from secateur.pruning.proposals import proposals
from secateur.pruning.roles import FIXED, roles, stored, tied, tokens
from secateur.pruning.structure import Group, Layout
from secateur.pruning.trial import Trial

How = Literal["trace", "both", "torch_pruning", "none"]

_KNOWN: dict[Hashable, tuple[tuple[Group, ...], dict[str, str], dict[str, int]]] = {}
"""What was found for models by all that their forward passes depend on, but for the values of their weights: a trial
takes longer than many a round, and the same models come again."""
_MOST = 64


def layout(model: nn.Module, how: How = "trace", example: torch.Tensor | None = None) -> Layout:
    """Return the layout of a model, without integer buffers (BatchNorm's counter), which are not exchanged.

    Units of which a part is never trained (a frozen layer reads or makes them) cannot be removed.

    Args:
        model: any network.
        how: how units are found: ``trace`` by following what the model calls, ``torch_pruning`` by that package's
            dependency graph, ``both`` by the graph where the trace finds none, ``none`` not at all.
        example: an input of the model, shape (1, ...), on which units are tried; by default one of the first layer's
            sizes is made up, and no units are found if the model does not take it.

    Raises:
        MissingExtraError: torch-pruning is asked for and not installed.
        ModelError: torch-pruning is asked for alone, and fails on the model or takes too long.
    """
    found, width = roles(model), ends.features(model)
    example = example_of(model) if example is None and how != "none" else example
    if how == "none" or example is None:
        whole = {} if how == "none" else {"": "units are tried on an example of an input, and none was given"}
        return Layout(found, whole=whole, tokens=tokens(model), features=width)
    facts = _facts(model, how, example)
    if facts not in _KNOWN:
        while len(_KNOWN) >= _MOST:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[facts] = (*units(model, how, example), _macs(model, example))
    groups, whole, macs = _KNOWN[facts]
    groups, fixed = _movable(groups, {name for name, role in found.items() if role in FIXED}, tied(model))
    whole = {**whole, **fixed}
    shares = {name: macs[name] / max(1, sum(macs.values())) for name in whole if name in macs}
    return Layout(found, groups, whole, tokens(model), width, shares)


def _macs(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Return the MACs of one example by layer; empty if the model cannot be run."""
    try:
        uses = cost.uses(copy.deepcopy(model), example)
    except Exception:  # noqa: BLE001 -- a model's own code raises whatever it likes; ``units`` tells
        return {}
    tensors, found = dict(model.named_parameters(remove_duplicate=False)), dict[str, int]()
    for name, count in uses.items():
        layer = name.rpartition(".")[0]
        found[layer] = found.get(layer, 0) + (count * tensors[name].numel() if name in tensors else 0)
    return found


def _facts(model: nn.Module, how: How, example: torch.Tensor) -> Hashable:
    """Return all that decides what the units of a model are, as far as it can be seen."""
    skipped = {"training", "_parameters", "_buffers", "_modules"}
    modules = [
        (
            name,
            type(module),
            *(
                (k, _hashable(list(v.values()) if k.endswith("_hooks") else v))
                for k, v in vars(module).items()
                if k not in skipped
            ),
        )
        for name, module in model.named_modules()
    ]
    tensors = [(name, tensor.shape, tensor.dtype) for name, tensor in stored(model).items()]
    largest = None if example.is_floating_point() else int(example.max())
    return how, example.shape, example.dtype, largest, tuple(modules), tuple(tensors)


def _hashable(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return tuple((_hashable(k), _hashable(v)) for k, v in value.items())
    if isinstance(value, (list, tuple, set)):
        return tuple(_hashable(v) for v in value)
    return value if isinstance(value, Hashable) else repr(value)


def _movable(
    groups: tuple[Group, ...], fixed: Collection[str], shared: Collection[str]
) -> tuple[tuple[Group, ...], dict[str, str]]:
    """Return the groups that no fixed tensor is part of, without the relatives of one that has such; and why.

    Blocks with a shared parameter, by any of its names, are not returned either: without them another layer would be 0.
    """
    held: dict[str, str] = {}
    for group in groups:
        slots = (*group.weights, *group.incoming, *group.statistics, *group.outgoing)
        tensor = next((slot.tensor for slot in slots if slot.tensor in fixed), None)
        if tensor is not None:
            held[group.name] = f"{tensor!r} is never trained, and would have to be cut with its units"
        elif group.kind == "block" and (name := next((n for n in shared if n.startswith(f"{group.name}.")), "")):
            held[group.name] = f"{name!r} is shared with another layer"
    families = {group.family: group.name for group in groups if group.family and group.name in held}
    held |= {g.name: held[families[g.family]] for g in groups if g.family in families and g.name not in held}
    return tuple(group for group in groups if group.name not in held), held


def units(model: nn.Module, how: How, example: torch.Tensor) -> tuple[tuple[Group, ...], dict[str, str]]:
    """Return the removable units of a model, and the layers without any, each with the reason.

    A model that cannot be run has no units, with the reason under the empty name.
    """
    trial = Trial(model, example)
    if trial.broken:
        return (), {"": trial.broken}
    proposed, whole = proposed_by_walk(trial) if how != "torch_pruning" else ([], dict[str, str]())
    found, held = _tried(trial, [*proposed, *_blocks(copy.deepcopy(trial.model))])
    cut = {layer for group in found for layer in group.layers}
    lost = {layer: held[group.name] for group in proposed if group.name in held for layer in group.layers - cut}
    named = {group.name for group in proposed}
    whole |= lost | {block: reason for block, reason in held.items() if block not in named}
    if how in {"both", "torch_pruning"}:
        more, refused = _by_graph(model, example, trial, found, alone=how == "torch_pruning")
        named = {group.name for group in more}
        found, whole = [*found, *more], {n: why for n, why in {**refused, **whole}.items() if n not in named}
    return tuple(sorted(found, key=lambda group: group.kind == "block")), whole


def _tried(trial: Trial, groups: list[Group]) -> tuple[list[Group], dict[str, str]]:
    """Return the groups that pass, and why others do not; sizes in a model's own code change only if they must."""

    def bare(some: list[Group]) -> list[Group]:
        return [replace(group, calls=()) for group in some]

    if not any(group.calls for group in groups) or not trial.failure(bare(groups)):
        return trial.passing(bare(groups))
    found, held = trial.passing(groups)
    again = [group for group in groups if group.calls and group.name in held]
    if not trial.failure(bare(found)):
        found = bare(found)
    if again:  # without its code changed after all, or with attributes changed that its code may take the sizes from
        counted = proposed_by_walk(trial, attributes=True)[0]
        for other in (bare(again), [group for group in counted if group.name in {g.name for g in again}]):
            found = trial.passing([*found, *(group for group in other if group.name not in {g.name for g in found})])[0]
    named = {group.name for group in found}
    return found, {name: why for name, why in held.items() if name not in named}


def _by_graph(
    model: nn.Module, example: torch.Tensor, trial: Trial, found: list[Group], *, alone: bool
) -> tuple[list[Group], dict[str, str]]:
    """Return torch-pruning's groups that lie where no group was found, as far as they pass, and why others do not."""
    try:
        proposed, whole = depgraph.units(model, example)
    except ModelError as failed:
        if alone:
            raise
        return [], {"torch-pruning": str(failed)}
    layers = [group for group in found if group.kind != "block"]
    taken = {(slot.tensor, slot.dim) for group in layers for slot in (*group.incoming, *group.outgoing)}
    free = [g for g in proposed if taken.isdisjoint((s.tensor, s.dim) for s in (*g.incoming, *g.outgoing))]
    passing, held = trial.passing(free)
    # the graph does not know which units are constants and not zero where they are read
    loud, held = trial.passing([replace(group, silent=False) for group in free if group.name in held])
    named = {group.name: group for group in (*passing, *loud)}
    return [named[group.name] for group in free if group.name in named], whole | _by_layer(held, free)


def _by_layer(held: Mapping[str, str], groups: Sequence[Group]) -> dict[str, str]:
    """Return why groups were refused by the layers that make their units, in the order of the groups."""
    return {layer: held[group.name] for group in groups if group.name in held for layer in group.layers}


def proposed_by_walk(trial: Trial, *, attributes: bool = False) -> tuple[list[Group], dict[str, str]]:
    """Return what a walk through a model proposes, in both modes: a layer of one mode only must fit both.

    Args:
        trial: the model and its inputs.
        attributes: whether sizes are changed in attributes of modules instead of in their code.
    """
    model = copy.deepcopy(trial.model)
    walk = Walk(model, attributes=attributes)
    for training in (False, True):
        model.train(training)
        with warnings.catch_warnings(action="ignore"):
            walk.run(trial.inputs(training=training))
    walk.finish()
    groups, whole = proposals(walk.units)
    return groups, {name: why for name, why in walk.whole.items() if name not in whole} | whole


def _blocks(model: nn.Module) -> list[Group]:
    """Return residual blocks, if ``torch.fx`` can trace the model; a block that cannot be found stays."""
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception:  # noqa: BLE001 -- fx raises whatever the model's own forward raises on a proxy
        return []
    return list(blocks(model, graph))
