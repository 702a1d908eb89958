"""Structure: the roles of a model's tensors, its removable units, and their physical removal by a JSON plan.

A *unit* is an output filter of a convolution or a neuron of a linear layer. Units are found by tracing the
model with ``torch.fx``: a layer has removable units when everything between it and the next layers acts on
each channel alone and maps zero to zero. What lies outside that (residual sums, group normalisation,
recurrent layers, the output layer) keeps its width and is pruned weight by weight.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import fx, nn
from torch.nn import functional

from secateur.errors import ModelError
from secateur.pruning.mask import Mask, Tensors

Role = Literal["weight", "bias", "norm", "buffer"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)  # noqa: SLF001 -- torch's own base class
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CHANNELWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d),
)
_CHANNELWISE_CALLS = {
    *(torch.relu, functional.relu, functional.gelu, functional.silu, torch.tanh, functional.dropout),
    *(functional.max_pool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d, torch.flatten),
    *("relu", "tanh", "flatten", "contiguous"),
}


@dataclass(frozen=True)
class Slot:
    """Where a group's units lie in a tensor: along ``dim``, ``repeat`` consecutive indices for each unit."""

    tensor: str
    dim: int
    repeat: int = 1


@dataclass(frozen=True)
class Group:
    """The removable units of one layer.

    Attributes:
        name: the layer's module name.
        units: how many units the dense model has.
        weight: the layer's weight, units along dimension 0.
        incoming: what goes with a unit: weight, bias, and the affine parameters of a batch norm behind it.
        statistics: running statistics of such a batch norm; cut with the unit, never masked.
        outgoing: the matching inputs of the next layers.
    """

    name: str
    units: int
    weight: str
    incoming: tuple[Slot, ...]
    statistics: tuple[Slot, ...]
    outgoing: tuple[Slot, ...]


@dataclass(frozen=True)
class Layout:
    """What pruning has to know of a model.

    Attributes:
        roles: the role of each exchanged tensor, in state-dict order.
        groups: the removable units, in forward order.
    """

    roles: Mapping[str, Role]
    groups: tuple[Group, ...] = ()

    def names(self, *roles: Role) -> list[str]:
        """Return the tensors of these roles, in order."""
        return [name for name, role in self.roles.items() if role in roles]


def layout(model: nn.Module) -> Layout:
    """Return the layout of a model. Integer buffers (BatchNorm's counter) are not exchanged and left out."""
    roles: dict[str, Role] = {}
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name not in parameters:
            if tensor.is_floating_point():
                roles[name] = "buffer"
        elif isinstance(owner, _NORMS):
            roles[name] = "norm"
        else:
            roles[name] = "bias" if "bias" in name.rpartition(".")[2] else "weight"
    return Layout(roles, tuple(_groups(model)))


def _groups(model: nn.Module) -> Iterable[Group]:
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception:  # noqa: BLE001 -- fx raises whatever the model's own forward raises on a proxy
        return
    modules = dict(model.named_modules())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, _LAYERS) or calls.count(node.target) > 1 or getattr(layer, "groups", 1) > 1:
            continue
        reached = _reach(node, modules)
        if reached is not None:
            yield _group(str(node.target), modules, *reached)


def _reach(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[list[str], list[str]] | None:
    """Follow a layer's output; return (batch norms passed, layers reached), None if anything mixes channels."""
    norms: list[str] = []
    layers: list[str] = []
    ahead = list(node.users)
    while ahead:
        user = ahead.pop(0)
        module = modules.get(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, _LAYERS) and getattr(module, "groups", 1) == 1:
            layers.append(str(user.target))
            continue
        if isinstance(module, _BATCH_NORMS):
            norms.append(str(user.target))
        elif not isinstance(module, _CHANNELWISE) and user.target not in _CHANNELWISE_CALLS:
            return None
        ahead.extend(user.users)
    return (norms, layers) if layers else None


def _group(name: str, modules: Mapping[str, nn.Module], norms: list[str], layers: list[str]) -> Group:
    layer = modules[name]
    units = _weight(layer).shape[0]
    owners = [name, *norms]
    incoming = [
        Slot(f"{owner}.{part}", 0)
        for owner in owners
        for part in ("weight", "bias")
        if isinstance(getattr(modules[owner], part, None), nn.Parameter)
    ]
    statistics = [
        Slot(f"{owner}.{part}", 0)
        for owner in norms
        for part in ("running_mean", "running_var")
        if isinstance(getattr(modules[owner], part, None), torch.Tensor)
    ]
    outgoing = [Slot(f"{reached}.weight", 1, _weight(modules[reached]).shape[1] // units) for reached in layers]
    return Group(name, units, f"{name}.weight", tuple(incoming), tuple(statistics), tuple(outgoing))


def _weight(layer: nn.Module) -> torch.Tensor:
    return cast("torch.Tensor", layer.weight)


def expand(units: torch.Tensor, slot: Slot, shape: torch.Size) -> torch.Tensor:
    """Broadcast one flag for each unit to the entries of a tensor of ``shape`` that belong to it."""
    view = [1] * len(shape)
    view[slot.dim] = -1
    return units.repeat_interleave(slot.repeat).view(view).expand(shape)


def slice_of(layout: Layout, shapes: Mapping[str, tuple[int, ...]], keep: Mapping[str, torch.Tensor]) -> Mask:
    """Return the mask of a narrower model: ``keep`` has a flag for each unit of each group, by the group's name."""
    mask: dict[str, torch.Tensor] = {}
    for group in layout.groups:
        for slot in (*group.incoming, *group.outgoing):
            shape = torch.Size(shapes[slot.tensor])
            held = mask.get(slot.tensor, torch.ones(shape, dtype=torch.bool))
            mask[slot.tensor] = held & expand(keep[group.name], slot, shape)
    return mask


def dead_units(mask: Mask, group: Group) -> torch.Tensor:
    """Return a flag for each unit whose incoming entries are all pruned, bias and norm included.

    Such a unit is zero for every input, so removing it changes nothing. A unit whose bias is not masked
    still adds a constant and is not dead.
    """
    dead = torch.ones(group.units, dtype=torch.bool)
    for slot in group.incoming:
        if slot.tensor not in mask:
            return torch.zeros(group.units, dtype=torch.bool)
        dead &= ~mask[slot.tensor].flatten(1).any(1) if mask[slot.tensor].dim() > 1 else ~mask[slot.tensor]
    return dead


@dataclass(frozen=True)
class Cut:
    """One physical removal: of ``tensor`` along ``dim`` only ``kept`` (original indices) remain of ``size``."""

    tensor: str
    dim: int
    size: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What is physically removed from a model; replays on a fresh model of the same architecture."""

    cuts: tuple[Cut, ...]

    def to_json(self) -> str:
        """Return the plan as a JSON document."""
        cuts = [{"tensor": c.tensor, "dim": c.dim, "size": c.size, "kept": list(c.kept)} for c in self.cuts]
        return json.dumps({"secateur_plan": 1, "cuts": cuts})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            ModelError: not a plan of version 1, or indices out of range, repeated or unordered.
        """
        try:
            document = json.loads(text)
            if document["secateur_plan"] != 1:
                raise ModelError(f"structural plan of version {document['secateur_plan']!r}: this reads version 1")
            cuts = tuple(
                Cut(str(c["tensor"]), int(c["dim"]), int(c["size"]), tuple(int(i) for i in c["kept"]))
                for c in document["cuts"]
            )
        except (ValueError, KeyError, TypeError) as broken:
            raise ModelError(f"not a structural plan: {type(broken).__name__}: {broken}") from broken
        for cut in cuts:
            if list(cut.kept) != sorted(set(cut.kept)) or not all(0 <= i < cut.size for i in cut.kept):
                raise ModelError(
                    f"structural plan, tensor {cut.tensor!r}: kept indices must rise within 0..{cut.size - 1}"
                )
        return cls(cuts)


def plan(mask: Mask, groups: Iterable[Group]) -> Plan:
    """Return the plan that removes every dead unit. The last unit of a layer stays."""
    cuts: list[Cut] = []
    for group in groups:
        keep = ~dead_units(mask, group)
        if bool(keep.all()):
            continue
        if not bool(keep.any()):
            keep[0] = True
        for slot in (*group.incoming, *group.statistics, *group.outgoing):
            index = keep.repeat_interleave(slot.repeat).nonzero().squeeze(1)
            cuts.append(Cut(slot.tensor, slot.dim, group.units * slot.repeat, tuple(index.tolist())))
    return Plan(tuple(cuts))


def slim(tensors: Tensors, plan: Plan) -> dict[str, torch.Tensor]:
    """Return the tensors with the plan's cuts made.

    Raises:
        ModelError: a cut names a tensor that is absent or has another size.
    """
    cut_tensors = dict(tensors)
    for cut in plan.cuts:
        tensor = cut_tensors.get(cut.tensor)
        if tensor is None or cut.dim >= tensor.dim() or tensor.shape[cut.dim] != cut.size:
            found = "absent" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise ModelError(f"structural plan cuts {cut.tensor!r} to {cut.size} along {cut.dim}: it is {found}")
        cut_tensors[cut.tensor] = tensor.index_select(cut.dim, torch.tensor(cut.kept))
    return cut_tensors


def shrink(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` that is physically smaller by the plan: a plain module, weights copied."""
    model = copy.deepcopy(model)
    names = list(dict.fromkeys(cut.tensor for cut in plan.cuts))
    smaller = slim({name: tensor.detach() for name, tensor in model.state_dict().items()}, plan)
    for name in names:
        owner_name, _, part = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if isinstance(getattr(owner, part), nn.Parameter):
            setattr(owner, part, nn.Parameter(smaller[name].clone()))
        else:
            setattr(owner, part, smaller[name].clone())
        _resize(owner)
    return model


def _resize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    else:  # the only other members of a group are batch norms
        cast("nn.BatchNorm2d", module).num_features = len(_weight(module))
