"""Suspects: the clients that a robust rule left out of a result because theirs differ from the others'.

A suspicion is a matter of statistics, and honest clients with unusual rows come under it too. It is never mixed with
``left_out``, which names the clients whose replies failed, or were refused because they could not be true.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

SUSPECTED = "suspected"
"""The key, in a record, of the clients under suspicion: a list of ``{"client": number, "reason": text}``, as that of
``left_out``; absent if there are none."""


@dataclass(frozen=True)
class Sifted(Mapping[str, torch.Tensor]):
    """Tensors that replies were reduced to, by name, and the clients that were left out of them.

    Attributes:
        tensors: the result.
        suspected: the reason for each client that was left out.
    """

    tensors: Mapping[str, torch.Tensor]
    suspected: Mapping[int, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.tensors)


def suspected(results: Iterable[Any]) -> dict[int, str]:
    """Return the reason for each client that some of the results of an ask's reductions leave out, ascending."""
    found: dict[int, str] = {}
    for result in results:
        if isinstance(result, Sifted):
            found = {**result.suspected, **found}
    return dict(sorted(found.items()))
