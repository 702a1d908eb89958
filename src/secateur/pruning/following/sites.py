"""Calls whose arguments name sizes: where units lie in them, for models that fail without (``forwards``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from secateur.pruning.forwards import BOUNDED, FILLED, SHAPED, Site
from secateur.pruning.units import Flow, Units, varying

_CARRIED = {"to", "float", "double", "half", "contiguous", "clone", "type_as", "requires_grad"}


@dataclass
class Sites:
    """What a walk notes of calls that name sizes."""

    units: Units
    _calls: list[Counter[str]] = field(default_factory=lambda: [Counter()])
    _found: list[tuple[Site, torch.Tensor, set[int]]] = field(default_factory=list)
    _makers: Any = field(default_factory=WeakIdKeyDictionary)

    def enter(self) -> None:
        """Begin a module's forward pass."""
        self._calls.append(Counter())

    def leave(self) -> None:
        """End the forward pass that began last."""
        self._calls.pop()

    def note(
        self, name: str, owner: str, args: tuple[Any, ...], dim: Any, value: Any, flows: tuple[Flow | None, Flow | None]
    ) -> None:
        """Note a call.

        Args:
            name: what is called.
            owner: the module in whose forward pass.
            args: its arguments.
            dim: the dimension along which a split or a chunk goes.
            value: what it returned.
            flows: those of its first argument and of its value.
        """
        entering, leaving = flows
        if name in _CARRIED and args and args[0] in self._makers:
            self._makers[value] = self._makers[args[0]]
        if name not in SHAPED | BOUNDED | FILLED or (name == "getitem" and isinstance(args[1], int)):
            return
        index = self._calls[-1][name]
        self._calls[-1][name] += 1
        if name in FILLED:
            self._makers[value] = Site(owner, name, index, value.dim())
        elif name in SHAPED and leaving is not None:
            self._found.append((Site(owner, name, index, value.dim()), leaving.labels, set(range(value.dim()))))
        elif name in BOUNDED and entering is not None:
            rank, every = args[0].dim() if name == "getitem" else len(value), set(range(args[0].dim()))
            dims = _sliced(args[1], rank) if name == "getitem" else every if name == "unbind" else {dim % len(every)}
            self._found.append((Site(owner, name, index, rank), entering.labels, dims))

    def made(self, value: torch.Tensor, labels: torch.Tensor) -> None:
        """Note that units lie in a tensor that the model filled itself."""
        self._found.append((self._makers[value], labels, set(range(labels.dim()))))

    def knows(self, value: torch.Tensor) -> bool:
        """Return whether the model filled a tensor itself."""
        return value in self._makers

    def bind(self, count: Callable[[str, torch.Tensor], None] | None = None) -> None:
        """Bind units to the calls' sizes; those that lie along several dimensions of a value become one on the last.

        Args:
            count: gets module and labels of each size, instead of binding them; default: they are bound to the calls.
        """
        for _, labels, _ in self._found:
            lying = varying(self.units.roots(labels))
            if len(lying) > 1 and not self._related(labels):
                Flow(labels).along(lying[-1], self.units)
        sizes: dict[tuple[Site, int], set[int]] = {}
        for site, labels, dims in self._found:
            for dim in dims:
                sizes.setdefault((site, dim), set()).add(labels.shape[dim])
        for site, labels, dims in self._found:
            for dim in dims.intersection(varying(self.units.roots(labels))):
                line = self._line(labels, dim)
                if line is None or len(sizes[site, dim]) > 1:  # it depends on the number of rows
                    continue
                if count is None:
                    self.units.bind(str(site), dim, line, "calls")
                else:
                    count(site.module, line)

    def _related(self, labels: torch.Tensor) -> bool:
        """Return whether all units are of one family: they are not the same, but always as many in each layer."""
        stored = labels[tuple(slice(None) if stride else slice(0, 1) for stride in labels.stride())]
        families = {self.units.families.get(label) for label in stored.flatten().tolist()}
        return len(families) == 1 and None not in families

    def _line(self, labels: torch.Tensor, dim: int) -> torch.Tensor | None:
        """Return the units along a dimension; of one family, those of its first layer, along the last dimension."""
        if len(varying(self.units.roots(labels))) < 2 or not self._related(labels):
            return Flow(labels).along(dim, self.units)
        return self.units.roots(labels[(0,) * (labels.dim() - 1)]) if dim == labels.dim() - 1 else None


def _sliced(index: Any, rank: int) -> set[int]:
    """Return the dimensions along which an index names the bounds of a slice."""
    found, dim = set[int](), 0
    parts = index if isinstance(index, tuple) else (index,)
    for n, part in enumerate(parts):
        if part is Ellipsis:
            dim = rank - sum(later is not None for later in parts[n + 1 :])
        elif part is not None:
            if isinstance(part, slice) and (part.start or part.stop is not None):
                found.add(dim)
            dim += 1
    return found
