"""Random streams: every draw comes from the run's seed and a label such as (round, client).

No module of the package uses a global generator. Two different labels give independent streams; the same
label gives the same draws in any process, on any engine, and after any resume.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Turn:
    """Whose work it is, and in which round: all that a local training draws follows from it.

    Attributes:
        seed: of the run.
        round: t; 0 is before the first, where clients explore or are scored.
        client: its number.
    """

    seed: int
    round: int
    client: int

    def derive(self, label: str) -> int:
        """Return the seed of a draw of this turn."""
        return derive(self.seed, label, self.round, self.client)


def derive(seed: int, *label: int | str) -> int:
    """Return a 63-bit seed for ``label``: the first 8 bytes of SHA-256 over seed and label.

    >>> derive(0, "cohort", 1) == derive(0, "cohort", 1)
    True
    >>> derive(0, "cohort", 1) == derive(0, "cohort", 2)
    False
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *label))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *label: int | str) -> torch.Generator:
    """Return a fresh CPU generator for ``label``."""
    return torch.Generator().manual_seed(derive(seed, *label))


def drawn_so_far() -> str:
    """Return the digest of the global generators' states, which changes if anything is drawn from one of them."""
    state = np.random.get_state(legacy=False)  # noqa: NPY002 -- the very one that others' code draws from
    with np.printoptions(threshold=sys.maxsize):
        seen = random.getstate(), state, torch.default_generator.get_state().tolist()
        return hashlib.sha256(repr(seen).encode()).hexdigest()


def seed_globals(seed: int, *label: int | str) -> None:
    """Seed the global generators of torch, numpy and Python, for code that may be anyone's."""
    derived = derive(seed, *label)
    random.seed(derived)
    np.random.seed(derived % 2**32)  # noqa: NPY002 -- the very one that others' code draws from
    torch.default_generator.manual_seed(derived)


@contextmanager
def kept_globals() -> Iterator[None]:
    """Restore the global generators of torch, numpy and Python after the block, as they may be somebody else's too."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002 -- likewise
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002 -- likewise
        torch.default_generator.set_state(before[2])


@contextmanager
def global_streams(seed: int, *label: int | str) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python inside the block and restore them after."""
    with kept_globals():
        seed_globals(seed, *label)
        yield


@contextmanager
def global_stream(seed: int, *label: int | str) -> Iterator[None]:
    """Seed torch's global generator inside the block and restore it after.

    Only for code that cannot be handed a generator: ``nn.init`` and dropout.
    """
    # not torch.manual_seed: it seeds every device, and notes a stack trace for each that was never used
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(derive(seed, *label))
    try:
        yield
    finally:
        generator.set_state(before)
