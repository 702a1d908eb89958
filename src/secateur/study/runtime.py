"""A Runtime: the settings that only make a run faster; no bit of its result depends on them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from secateur.errors import ConfigError


@dataclass(frozen=True)
class Runtime:
    """How fast, and within which limits, a run is computed.

    Attributes:
        workers: worker processes, one thread each; 0 trains inside the server process. A GPU has one at most.
        deadline: seconds that a round waits for its clients; None waits for all. Clients that are late are left out
            and recorded, so that this one setting can change a result: set it where clients can fail to answer.
        relays: processes between the server and the workers, each of which asks its share of a cohort and hands on one
            message; the workers are divided among them. 0: none.
        state_budget: bytes of client state that are kept in memory before it is spilled to disk.
    """

    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    deadline: float | None = None
    relays: int = 0
    state_budget: int = 256 * 2**20

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"workers = {self.workers} must be 0 or more")
        if self.relays < 0:
            raise ConfigError(f"relays = {self.relays} must be 0 or more")
        if self.deadline is not None and self.deadline <= 0:
            raise ConfigError(f"deadline = {self.deadline} must be above 0 seconds")

    def on(self, device: str) -> Runtime:
        """Return the settings for a device: one process drives a GPU, and serves all clients of a stack."""
        return self if device == "cpu" else replace(self, workers=min(1, self.workers))
