"""Proposals: the groups of units that a walk's labels describe, and the layers that keep theirs, with the reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from secateur.pruning.structure import Group, Slot
from secateur.pruning.units import Axis, Units, distinct

_ALONE = "all its units go together"
_MINGLED = "its units do not lie in the same order everywhere"


def proposals(units: Units) -> tuple[list[Group], dict[str, str]]:
    """Return the groups, in the order in which their layers ran, and the layers that have none, with the reason."""
    axes = [(axis, units.roots(axis.labels).contiguous()) for axis in units.axes.values()]
    facts = _Facts.of(units)
    groups, whole = [], dict[str, str]()
    for members in _families(axes, facts):
        found = _group(members, axes, facts)
        if isinstance(found, Group):
            groups.append(found)
            continue
        alone = [
            name
            for name, labels in units.alone.items()
            if not set(distinct(units.roots(labels)).tolist()).isdisjoint(members)
        ]
        whole.update(dict.fromkeys([*_makers(members, axes), *alone], found))
    return _renamed(groups), whole


@dataclass(frozen=True)
class _Facts:
    """What is known of roots: why they are fixed, whether they are heads, or audible; family and name of each."""

    fixed: Mapping[int, str]
    heads: frozenset[int]
    audible: frozenset[int]
    families: Mapping[int, str]
    names: Mapping[int, str]

    @classmethod
    def of(cls, units: Units) -> _Facts:
        def flat(parts: list[torch.Tensor]) -> frozenset[int]:
            return frozenset(int(r) for part in parts for r in distinct(units.roots(part)))

        fixed: dict[int, str] = {}
        for labels, reason in units.fixed:
            for root in distinct(units.roots(labels)).tolist():
                fixed.setdefault(root, reason)
        families, names = (
            {int(units.roots(torch.tensor([label]))): text for label, text in known.items()}
            for known in (units.families, units.names)
        )
        return cls(fixed, flat(units.heads), flat(units.audible), families, names)


def _families(axes: list[tuple[Axis, torch.Tensor]], facts: _Facts) -> Iterator[list[int]]:
    """Iterate lists of roots that lie in the same places equally often, and have the same fate: one group each."""
    places: dict[int, list[tuple[int, int]]] = {}
    for index, (_, labels) in enumerate(axes):
        for root, count in Counter(labels.tolist()).items():
            if root:
                places.setdefault(root, []).append((index, count))
    alike: dict[tuple[object, ...], list[int]] = {}
    for _, labels in axes:
        for root in dict.fromkeys(labels.tolist()):
            if root in places:
                fate = facts.fixed.get(root), root in facts.heads, facts.families.get(root)
                alike.setdefault((*places.pop(root), *fate), []).append(root)
    yield from alike.values()


def _makers(members: list[int], axes: list[tuple[Axis, torch.Tensor]]) -> list[str]:
    """Return the layers whose own weights make these units, in order."""
    roots = torch.tensor(members)
    found = [
        a.tensor.rpartition(".")[0]
        for a, labels in axes
        if a.part == "weights" and bool(torch.isin(labels, roots).any())
    ]
    return list(dict.fromkeys(found))


def _group(members: list[int], axes: list[tuple[Axis, torch.Tensor]], facts: _Facts) -> Group | str:
    """Return the group of these units, or why they stay."""
    first = members[0]
    if first in facts.fixed:
        return facts.fixed[first]
    if len(members) == 1:
        return _ALONE
    order = torch.tensor(members)
    slots: dict[str, list[Slot]] = {
        "weights": [],
        "incoming": [],
        "statistics": [],
        "outgoing": [],
        "numbers": [],
        "calls": [],
    }
    for axis, labels in axes:
        places = _slots(axis, labels, order)
        if places is None:
            return _MINGLED
        slots[axis.part] += places
    if not slots["weights"]:
        return "no layer makes them"
    name = facts.names.get(first) or slots["weights"][0].tensor.rpartition(".")[0]
    own, more = tuple(slots["weights"]), tuple(slots["incoming"])
    return Group(
        name, len(members), own, own + more, tuple(slots["statistics"]), tuple(slots["outgoing"]),
        "head" if first in facts.heads else "channel", facts.families.get(first, ""),
        silent=facts.audible.isdisjoint(members), numbers=tuple(slots["numbers"]),
        calls=tuple(slots["calls"]),
    )  # fmt: skip


def _slots(axis: Axis, labels: torch.Tensor, order: torch.Tensor) -> list[Slot] | None:
    """Return where units lie in an axis, as runs of all of them in order; None if they lie in another way."""
    found, units = list[Slot](), len(order)
    own = torch.isin(labels, order)
    at = int(own.int().argmax()) if bool(own.any()) else len(labels)
    while at < len(labels):
        if not own[at]:
            at += int(own[at:].int().argmax()) if bool(own[at:].any()) else len(labels)
            continue
        others = (labels[at:] != labels[at]).nonzero()
        repeat = int(others[0]) if len(others) else len(labels) - at
        run = order.repeat_interleave(repeat)
        if not torch.equal(labels[at : at + len(run)], run):
            return None
        last = found[-1] if found else None
        if last and last.repeat == repeat and last.offset + last.length(units) == at:
            found[-1] = Slot(axis.tensor, axis.dim, repeat, last.tiles + 1, last.offset)
        else:
            found.append(Slot(axis.tensor, axis.dim, repeat, 1, at))
        at += len(run)
    whole = len(found) == 1 and found[0].length(units) == len(labels)
    return found if whole else [Slot(s.tensor, s.dim, s.repeat, s.tiles, s.offset, len(labels)) for s in found]


def _renamed(groups: list[Group]) -> list[Group]:
    """Return the groups with names of their own.

    Layers of one recurrent module have their number, and ``reverse``; of other groups in one layer, all but the first
    say where they begin.
    """
    taken: set[str] = set()
    found = []
    for group in groups:
        name, slot = group.name, group.weights[0]
        part = re.fullmatch(r"weight_ih_l(\d+)(_reverse)?", slot.tensor.rpartition(".")[2])
        if group.family and part:
            name = f"{name}.{part[1]}{'.reverse' if part[2] else ''}".removeprefix(".")
        elif name in taken:
            name = f"{name}[{slot.offset}:{slot.offset + slot.length(group.units)}]"
        taken.add(name)
        found.append(replace(group, name=name))
    return found
