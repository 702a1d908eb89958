"""The setting of a federation, which every method sees, and the state that its server keeps between two asks."""

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
    """What a method knows of the federation; the same on the server and on every client.

    Attributes:
        seed: the run's seed; every random draw follows from it and a label.
        rounds: R, the number of rounds (T in FedSparsify).
        clients: K, the number of clients.
        participation: C, the share of clients in a round's cohort.
        layout: the roles and the removable units of the model's tensors.
        specs: the shape and dtype of each exchanged tensor.
        attempt: how often the server has asked for the next exchange in vain; each time it asks other clients.
    """

    seed: int
    rounds: int
    clients: int
    participation: float
    layout: Layout
    specs: Mapping[str, Spec]
    attempt: int = 0

    def cohort(self, round_: int) -> tuple[int, ...]:
        """Return A_t, the cohort: max(floor(C K), 1) clients, drawn uniformly without replacement, ascending."""
        return self.drawn(max(1, math.floor(self.participation * self.clients + 1e-9)), "cohort", round_)

    def drawn(self, count: int, *label: int | str) -> tuple[int, ...]:
        """Return ``count`` clients, drawn uniformly without replacement from the stream of ``label``, ascending.

        All clients are drawn into an order once: each ``attempt`` takes the next ``count`` of it, and begins again at
        the front when it has come to the end, so that other clients are asked as long as there are any.
        """
        order = torch.randperm(self.clients, generator=stream(self.seed, *label))
        places = (torch.arange(count) + self.attempt * count) % self.clients
        return tuple(sorted(order[places].tolist()))


@dataclass(frozen=True)
class State:
    """All that the server knows of a method between two asks; a checkpoint holds exactly this.

    Attributes:
        setting: the federation; it is not stored, because it follows from the run's configuration.
        round: the number of completed training rounds.
        weights: W; pruned weights may keep a value here (a shadow).
        mask: M, True for kept entries; None: nothing is pruned.
        memory: further groups of tensors of the model's size, such as the server's momentum.
        notes: small facts, such as the number of exploration steps done.
        archive: tensors by key, on disk in a run (explorers' deviations, clients' own models); entries may be replaced
            and deleted, but the tensors of an entry are never changed in place.
    """

    setting: Setting
    round: int
    weights: Tensors
    mask: Mask | None = None
    memory: Memory = field(default_factory=dict)
    notes: Mapping[str, Scalar] = field(default_factory=dict)
    archive: Archive = field(default_factory=dict)

    def model(self) -> dict[str, torch.Tensor]:
        """Return W * M, the model that is evaluated, reported and shipped."""
        return masks.apply(self.weights, self.mask)
