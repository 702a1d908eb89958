"""What a method may know of a federation, and all that its server knows between two asks."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field

import torch

from secateur.pruning import mask as masks
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.structure import Layout
from secateur.streams import stream
from secateur.wire.message import Scalar, Spec

Archive = MutableMapping[str, Tensors]
Memory = Mapping[str, Tensors]


@dataclass(frozen=True)
class Setting:
    """What a method may know of the federation; the same on the server and on every client.

    Attributes:
        seed: of the run; every draw comes from it and a label.
        rounds: R (T in FedSparsify).
        clients: K.
        participation: C, the share of clients in a round's cohort.
        layout: roles and removable units of the model's tensors.
        specs: shape and dtype of each exchanged tensor.
    """

    seed: int
    rounds: int
    clients: int
    participation: float
    layout: Layout
    specs: Mapping[str, Spec]

    def cohort(self, round_: int) -> tuple[int, ...]:
        """Return A_t: max(floor(C K), 1) clients, uniform without replacement, ascending."""
        count = max(1, math.floor(self.participation * self.clients + 1e-9))
        draw = torch.randperm(self.clients, generator=stream(self.seed, "cohort", round_))[:count]
        return tuple(sorted(draw.tolist()))


@dataclass(frozen=True)
class State:
    """The server's whole knowledge between two asks; a checkpoint holds exactly this.

    Attributes:
        setting: see ``Setting``; not stored, it follows from the run's configuration.
        round: training rounds completed.
        weights: W, which may be dense beneath the mask (a shadow).
        mask: M; None: dense.
        memory: further named tensors of O(model) size, such as the server's velocity.
        notes: small facts, such as how many exploration steps are done.
        archive: tensors by key, on disk in a run (explorers' deviations, clients' own models); an entry is never
            changed after it was written, and may be deleted when it is needed no more.
    """

    setting: Setting
    round: int
    weights: Tensors
    mask: Mask | None = None
    memory: Memory = field(default_factory=dict)
    notes: Mapping[str, Scalar] = field(default_factory=dict)
    archive: Archive = field(default_factory=dict)

    def model(self) -> dict[str, torch.Tensor]:
        """Return W * M: the model that is evaluated, reported and shipped."""
        return masks.apply(self.weights, self.mask)
