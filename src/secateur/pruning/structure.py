"""Structure: the removable units of a model, and the plan, a JSON document, of the units that are removed.

A *unit* can be removed from a model without changing the rest: an output filter of a convolution, a neuron of a linear
layer, a hidden unit of a recurrent layer, an attention head, a residual block. Layers whose outputs are added share
their units. ``discovery`` finds the units of a model and ``surgery`` removes them from it; this module has the units,
their masks, the plan, and its effect on named tensors (weights, or an optimiser's moments).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from secateur.errors import ModelError
from secateur.pruning.mask import Mask, Tensors

OUTPUT = "it is the model's output"
"""The reason why a model's last layer keeps all its units."""
SINGLE = "it has one unit"
"""The reason why a layer with a single output keeps it."""

Role = Literal["weight", "bias", "norm", "buffer", "frozen", "constant"]
"""What a tensor is (``roles.roles`` says by which rule): only a ``weight`` is pruned as one; a ``norm`` is what scales
or shifts, in normalisation or elsewhere. ``frozen`` are parameters that need no gradient, ``constant`` buffers that
training leaves alone; neither is pruned, and neither travels with the weights (``federation.base``). A ``buffer`` is
one that training changes: running statistics."""

Kind = Literal["channel", "head", "block"]


@dataclass(frozen=True)
class Slot:
    """The place of a group's units in a tensor.

    From index ``offset`` on, dimension ``dim`` has ``tiles`` runs of all units, and each unit has ``repeat``
    consecutive indices in each run: a flattened feature map repeats each channel, an LSTM stacks four gates as tiles,
    and behind a concatenation each layer's units begin at an offset, and the dimension's ``size`` is that of all (0:
    its own).
    """

    tensor: str
    dim: int
    repeat: int = 1
    tiles: int = 1
    offset: int = 0
    size: int = 0

    def length(self, units: int) -> int:
        """Return the number of indices of so many units."""
        return units * self.repeat * self.tiles


@dataclass(frozen=True)
class Group:
    """A group of units that are removed by the same cuts.

    Attributes:
        name: the layer whose outputs they are (the first of several that are added), or the block's module.
        units: number of units in the dense model.
        weights: slots of the units' own weights, which give their scores.
        incoming: slots that are pruned with a unit: its weights, its bias, the scale and shift of a norm after it.
        statistics: slots of that norm's running statistics, which are removed with a unit and never masked.
        outgoing: slots of the matching inputs of the next layers.
        kind: ``channel`` (also neurons and hidden units), ``head`` or ``block``. A block is one unit; without it the
            model passes on the block's input.
        family: groups of one family must keep the same number of units (layers of one ``nn.LSTM``).
        calls: slots in the calls of modules' own code that name sizes (``forwards``), where the model needs that.
        silent: whether a unit with nothing incoming is zero when it is read. One behind a sigmoid is not: it is dead
            only where the weights that read it are pruned as well.
        numbers: slots of the units in integer attributes of modules that count them, such as a number of heads.
    """

    name: str
    units: int
    weights: tuple[Slot, ...]
    incoming: tuple[Slot, ...]
    statistics: tuple[Slot, ...] = ()
    outgoing: tuple[Slot, ...] = ()
    kind: Kind = "channel"
    family: str = ""
    silent: bool = True
    numbers: tuple[Slot, ...] = ()
    calls: tuple[Slot, ...] = ()

    @property
    def layers(self) -> set[str]:
        """Return the names of the layers whose own weights make the units."""
        return {slot.tensor.rpartition(".")[0] for slot in self.weights}


@dataclass(frozen=True)
class Layout:
    """The parts of a model as pruning sees them.

    Attributes:
        roles: the role of each floating-point tensor, in state-dict order.
        groups: the removable units, in forward order; blocks last.
        whole: layers whose units cannot be removed, with the reason; only their single weights can be pruned.
        tokens: weights with a row for each entry of a vocabulary (embeddings), whose rows are not units.
        features: how many features enter the linear layer that runs last; 0: it was not found.
        shares: the share of the model's MACs that each of the layers in ``whole`` has, in [0, 1].
    """

    roles: Mapping[str, Role]
    groups: tuple[Group, ...] = ()
    whole: Mapping[str, str] = field(default_factory=dict)
    tokens: frozenset[str] = frozenset()
    features: int = 0
    shares: Mapping[str, float] = field(default_factory=dict)

    def stays(self) -> list[str]:
        """Return a line on layers that keep all their units, other than the output's: which, why, their MACs' share."""
        layers: dict[str, list[str]] = {}
        for name, reason in self.whole.items():
            if reason not in {OUTPUT, SINGLE}:
                layers.setdefault(reason, []).append(name)
        if not layers:
            return []
        share = sum(self.shares.get(name, 0.0) for names in layers.values() for name in names)
        told = "; ".join(f"{', '.join(names) or 'model'}: {reason}" for reason, names in layers.items())
        return [f"layers with {share:.0%} of the MACs keep all their units ({told})"]

    def names(self, *roles: Role) -> list[str]:
        """Return the tensors of these roles, in order."""
        return [name for name, role in self.roles.items() if role in roles]

    @property
    def travelling(self) -> list[str]:
        """Return the tensors that are exchanged, in order: all but those that training leaves alone."""
        return self.names("weight", "bias", "norm", "buffer")

    @property
    def trainable(self) -> list[str]:
        """Return the tensors that training moves, in order: all but running statistics."""
        return self.names("weight", "bias", "norm")

    @property
    def layers(self) -> list[Group]:
        """Return the groups other than blocks, in order: those that can lose some of their units."""
        return self.of("channel", "head")

    def of(self, *kinds: Kind) -> list[Group]:
        """Return the groups of these kinds, in order."""
        return [group for group in self.groups if group.kind in kinds]


def per_unit(tensor: torch.Tensor, slot: Slot, units: int) -> torch.Tensor:
    """Return the entries of a tensor by unit, shape (units, entries of each)."""
    front = tensor.movedim(slot.dim, 0).narrow(0, slot.offset, slot.length(units))
    return front.reshape(slot.tiles, units, slot.repeat, -1).transpose(0, 1).reshape(units, -1)


def spread(units: torch.Tensor, slot: Slot) -> torch.Tensor:
    """Return one value for each index along the slot's dimension, given one for each unit; 1 for those of others."""
    own = units.repeat_interleave(slot.repeat).repeat(slot.tiles)
    if not slot.size:
        return own
    whole = torch.ones(slot.size, dtype=units.dtype, device=units.device)
    whole[slot.offset : slot.offset + len(own)] = own
    return whole


def expand(units: torch.Tensor, slot: Slot, shape: torch.Size) -> torch.Tensor:
    """Broadcast one value for each unit to the entries of a tensor of ``shape`` that belong to it; 1 to the others."""
    view = [1] * len(shape)
    view[slot.dim] = -1
    return spread(units, slot).view(view).expand(shape)


def slice_of(
    groups: Iterable[Group], shapes: Mapping[str, tuple[int, ...]], keep: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the mask of a smaller model. ``keep`` has a flag for each unit by group name; other groups stay whole."""
    mask: dict[str, torch.Tensor] = {}
    for group in groups:
        if group.name not in keep:
            continue
        for slot in (*group.incoming, *group.outgoing):
            shape = torch.Size(shapes[slot.tensor])
            held = mask.get(slot.tensor, torch.ones(shape, dtype=torch.bool))
            mask[slot.tensor] = held & expand(keep[group.name], slot, shape)
    return mask


def dead_units(mask: Mask, group: Group) -> torch.Tensor:
    """Return a flag for each unit: whether all its incoming entries are pruned, bias and norm included.

    Such a unit is zero for every input, so removing it changes nothing. A unit whose bias is not masked
    still adds a constant and is not dead. One that is not ``silent`` is a constant, and dead if nothing reads it.
    """
    needed = group.incoming if group.silent else (*group.incoming, *group.outgoing)
    if any(slot.tensor not in mask for slot in needed):
        return torch.zeros(group.units, dtype=torch.bool)
    dead = torch.ones(group.units, dtype=torch.bool)
    for slot in needed:
        dead &= ~per_unit(mask[slot.tensor], slot, group.units).any(1)
    return dead


@dataclass(frozen=True)
class Cut:
    """One removal: along ``dim`` of ``tensor`` only the indices ``kept`` remain of ``size``."""

    tensor: str
    dim: int
    size: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Number:
    """A count of units that a module holds in an integer attribute: ``left`` remain of ``size``."""

    attribute: str
    size: int
    left: int


@dataclass(frozen=True)
class Plan:
    """The parts to remove from a model; a plan can be applied to any fresh model of the same architecture.

    Attributes:
        cuts: at most one for each tensor and dimension.
        dropped: the removed blocks; the model passes on their inputs.
        numbers: the attributes of modules that count units, at most one entry for each.
        calls: what is left of sizes that modules' own code names, in the place of the tensor the call (``forwards``).
    """

    cuts: tuple[Cut, ...] = ()
    dropped: tuple[str, ...] = ()
    numbers: tuple[Number, ...] = ()
    calls: tuple[Cut, ...] = ()

    def __bool__(self) -> bool:
        """Return whether anything is removed."""
        return bool(self.cuts or self.dropped)

    def to_json(self) -> str:
        """Return the plan as a JSON document."""
        document: dict[str, Any] = {"secateur_plan": 2, "dropped": list(self.dropped), "cuts": _json(self.cuts)}
        if self.numbers or self.calls:  # what reads version 2 does not know of them
            numbers = [asdict(number) for number in self.numbers]
            document |= {"secateur_plan": 3, "numbers": numbers, "calls": _json(self.calls)}
        return json.dumps(document)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            ModelError: not a plan of version 1 to 3, a tensor's dimension cut twice, or indices out of range, repeated
                or unordered.
        """
        try:
            document = json.loads(text)
            if document["secateur_plan"] not in {1, 2, 3}:
                raise ModelError(f"structural plan of version {document['secateur_plan']!r}: this reads 1 to 3")
            cuts = tuple(_cut(entry) for entry in document["cuts"])
            calls = tuple(_cut(entry) for entry in document.get("calls", []))
            dropped = tuple(str(name) for name in document.get("dropped", []))
            numbers = tuple(
                Number(str(entry["attribute"]), int(entry["size"]), int(entry["left"]))
                for entry in document.get("numbers", [])
            )
        except (ValueError, KeyError, TypeError) as broken:
            raise ModelError(f"not a structural plan: {type(broken).__name__}: {broken}") from broken
        for cut in (*cuts, *calls):
            rising = bool(cut.kept) and list(cut.kept) == sorted(set(cut.kept))
            if not rising or cut.dim < 0 or not 0 <= cut.kept[0] <= cut.kept[-1] < cut.size:
                raise ModelError(
                    f"structural plan, tensor {cut.tensor!r}: kept indices must rise within 0..{cut.size - 1}"
                )
        if len({(cut.tensor, cut.dim) for cut in (*cuts, *calls)}) < len(cuts) + len(calls):
            raise ModelError("structural plan: a dimension of a tensor is cut twice")
        for number in numbers:
            if not 0 < number.left <= number.size:
                raise ModelError(f"structural plan: {number.attribute!r} must keep 1 to {number.size} units")
        return cls(cuts, dropped, numbers, calls)

    def of(self, tensor: str) -> tuple[Cut, ...]:
        """Return the cuts of one tensor."""
        return tuple(cut for cut in self.cuts if cut.tensor == tensor)

    def drops(self, name: str) -> bool:
        """Return whether a tensor or a module goes with a dropped block."""
        return any(name == block or name.startswith(f"{block}.") for block in self.dropped)

    def then(self, later: Plan) -> Plan:
        """Return one plan for the dense model that equals this one followed by ``later``, which is for its result."""
        counts = {number.attribute: number for number in self.numbers}
        for number in later.numbers:
            size = counts[number.attribute].size if number.attribute in counts else number.size
            counts[number.attribute] = Number(number.attribute, size, number.left)
        both = Plan((), self.dropped + later.dropped)
        return Plan(
            tuple(cut for cut in composed(self.cuts, later.cuts) if not both.drops(cut.tensor)), both.dropped,
            tuple(number for number in counts.values() if not both.drops(number.attribute)),
            tuple(call for call in composed(self.calls, later.calls) if not both.drops(call.tensor.partition(":")[0])),
        )  # fmt: skip


def _json(cuts: Iterable[Cut]) -> list[dict[str, Any]]:
    return [{"tensor": c.tensor, "dim": c.dim, "size": c.size, "kept": list(c.kept)} for c in cuts]


def composed(first: Iterable[Cut], later: Iterable[Cut]) -> tuple[Cut, ...]:
    """Return the cuts that equal the first ones followed by later ones, which are of what the first leave.

    Raises:
        ModelError: a later cut is of another size.
    """
    found = {(cut.tensor, cut.dim): cut for cut in first}
    for cut in later:
        before = found.get((cut.tensor, cut.dim))
        if before is not None and cut.size != len(before.kept):
            raise ModelError(f"structural plan cuts {cut.tensor!r} to {cut.size}: the first left {len(before.kept)}")
        kept = cut.kept if before is None else tuple(before.kept[i] for i in cut.kept)
        size = cut.size if before is None else before.size
        found[cut.tensor, cut.dim] = Cut(cut.tensor, cut.dim, size, kept)
    return tuple(found.values())


def _cut(entry: Mapping[str, Any]) -> Cut:
    return Cut(str(entry["tensor"]), int(entry["dim"]), int(entry["size"]), tuple(int(i) for i in entry["kept"]))


def plan(mask: Mask, groups: Iterable[Group]) -> Plan:
    """Return the plan that removes every dead unit; each layer keeps at least one unit.

    All layers of a family keep as many units as the layer with the most living ones, some of them dead.
    """
    groups = list(groups) if mask else []
    dropped = Plan((), tuple(g.name for g in groups if g.kind == "block" and bool(dead_units(mask, g).all())))
    layers = [g for g in groups if g.kind != "block" and not dropped.drops(g.name)]
    keep = {group.name: ~dead_units(mask, group) for group in layers}
    for group in layers:
        relatives = [g.name for g in layers if group.family and g.family == group.family]
        least = max(1, *(int(keep[name].sum()) for name in (*relatives, group.name)))
        dead = (~keep[group.name]).nonzero().flatten()
        keep[group.name][dead[: max(0, least - int(keep[group.name].sum()))]] = True
    kept: dict[tuple[str, int], torch.Tensor] = {}
    whole = {group.name for group in layers if bool(keep[group.name].all())}
    for group in layers:
        tensors = () if group.name in whole else (*group.incoming, *group.statistics, *group.outgoing, *group.numbers)
        # a size may be read off a value that has lost other units: all are named as soon as any unit goes
        for slot in (*tensors, *(group.calls if len(whole) < len(layers) else ())):
            if not dropped.drops(slot.tensor.partition(":")[0]):
                flags = spread(keep[group.name], slot)
                kept[slot.tensor, slot.dim] = kept.get((slot.tensor, slot.dim), flags) & flags
    counts = {slot.tensor for group in layers for slot in group.numbers}
    calls = {slot.tensor for group in layers for slot in group.calls}
    cuts = [Cut(*at, len(f), tuple(f.nonzero().flatten().tolist())) for at, f in kept.items() if at[0] not in counts]
    numbers = [Number(name, len(f), int(f.sum())) for (name, _), f in kept.items() if name in counts]
    of_tensors, of_calls = ([c for c in cuts if (c.tensor in calls) == named] for named in (False, True))
    return Plan(tuple(of_tensors), dropped.dropped, tuple(numbers), tuple(of_calls))


def slim(tensors: Tensors, plan: Plan) -> dict[str, torch.Tensor]:
    """Return the tensors after the plan's cuts, without those of dropped blocks.

    Raises:
        ModelError: a cut names a tensor that is absent or has another size.
    """
    left = {name: tensor for name, tensor in tensors.items() if not plan.drops(name)}
    for cut in plan.cuts:
        left[cut.tensor] = _checked(left, cut).index_select(cut.dim, torch.tensor(cut.kept))
    return left


def slim_mask(mask: Mask, plan: Plan) -> dict[str, torch.Tensor]:
    """Return the part of a mask that covers the slim tensors."""
    covered = Plan(tuple(cut for cut in plan.cuts if cut.tensor in mask), plan.dropped)
    return slim(mask, covered)


def widen(tensors: Tensors, plan: Plan, base: Tensors) -> dict[str, torch.Tensor]:
    """Return ``base`` with the entries of slim tensors where the plan kept them: the inverse of ``slim``.

    Raises:
        ModelError: a slim tensor is absent, or does not have the shape that the plan leaves of ``base``.
    """
    widened: dict[str, torch.Tensor] = {}
    for name, tensor in base.items():
        if plan.drops(name):
            widened[name] = tensor
            continue
        found = tensors.get(name)
        inner = [tensor]
        cuts = plan.of(name)
        for cut in cuts:
            inner.append(_checked({name: inner[-1]}, cut).index_select(cut.dim, torch.tensor(cut.kept)))
        if found is None or found.shape != inner[-1].shape:
            shown = "absent" if found is None else f"of shape {tuple(found.shape)}"
            raise ModelError(f"slim tensor {name!r} is {shown}: the plan leaves {tuple(inner[-1].shape)}")
        for cut, outer in zip(reversed(cuts), reversed(inner[:-1]), strict=True):
            found = outer.index_copy(cut.dim, torch.tensor(cut.kept), found)
        widened[name] = found
    return widened


def sizes(shapes: Mapping[str, tuple[int, ...]], plan: Plan) -> dict[str, int]:
    """Return the number of entries of each tensor after the cuts; 0 for those of dropped blocks."""
    left = {name: list(shape) for name, shape in shapes.items()}
    for cut in plan.cuts:
        left[cut.tensor][cut.dim] = len(cut.kept)
    return {n: 0 if plan.drops(n) else int(torch.Size(shape).numel()) for n, shape in left.items()}


def _checked(tensors: Tensors, cut: Cut) -> torch.Tensor:
    tensor = tensors.get(cut.tensor)
    if tensor is None or cut.dim >= tensor.dim() or tensor.shape[cut.dim] != cut.size:
        found = "absent" if tensor is None else f"of shape {tuple(tensor.shape)}"
        raise ModelError(f"structural plan cuts {cut.tensor!r} to {cut.size} along {cut.dim}: it is {found}")
    return tensor
