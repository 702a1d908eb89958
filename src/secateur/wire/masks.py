"""The mask of a message as bytes: each tensor in the smallest of four forms.

A tensor's form is one byte. With bit 0, dead rows and columns (dimensions 0 and 1: output and input units) are listed
first, and their entries are left out. With bit 1, the mask is coded as a change of the one that the receiver holds: one
run for the entries that it keeps and one for those that it prunes. Counts alone give the size of each form exactly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from secateur.errors import WireError
from secateur.wire import entropy
from secateur.wire.entropy import Flags, Run
from secateur.wire.message import Masks, Spec

HASH = 16
_UNITS, _CHANGE = 1, 2


def digest(mask: Masks) -> bytes:
    """Return the 16 bytes that name a mask: BLAKE2b over name, shape and bitmap, in the order of names."""
    running = hashlib.blake2b(digest_size=HASH)
    for name in sorted(mask):
        running.update(f"{name}{tuple(mask[name].shape)}".encode())
        running.update(np.packbits(flags(mask[name]), bitorder="little").data)
    return running.digest()


def flags(mask: torch.Tensor) -> Flags:
    """Return a mask as numpy flags of the same shape, not copied where it is on the CPU already."""
    return mask.detach().cpu().contiguous().numpy()


def same(mask: Masks, known: Masks | None) -> bool:
    """Return whether two masks cover the same tensors and keep the same entries."""
    return (
        known is not None
        and mask.keys() == known.keys()
        and all(mask[name] is known[name] or torch.equal(mask[name], known[name]) for name in mask)
    )


def write(mask: Masks, names: Sequence[str], held: Masks | None) -> tuple[bytes, bool]:
    """Return a mask as one section, and whether it refers to ``held``.

    Args:
        mask: the mask.
        names: the names of all tensors of the message, in the order of the wire; a bit for each says if it is covered.
        held: the mask that the receiver holds; None: the mask cannot be coded as a change.
    """
    parts: list[bytes | Run] = [Run.of(np.array([name in mask for name in names], dtype=bool))]
    changes = False
    for name in names:
        if name in mask:
            base = None if held is None else held.get(name)
            form, runs = _cheapest(flags(mask[name]), None if base is None else flags(base))
            changes |= bool(form & _CHANGE)
            parts += [bytes([form]), *runs]
    return entropy.write(parts), changes


def _cheapest(mask: Flags, base: Flags | None) -> tuple[int, list[Run]]:
    found = {0: [Run.of(mask)]}
    alive = _alive(mask)
    if base is not None and base.shape == mask.shape:
        found[_CHANGE] = _change(mask, base)
    if not all(part.all() for part in alive):
        units, inside = [Run.of(part) for part in alive], _inside(mask, alive)
        found[_UNITS] = [*units, Run.of(inside)]
        if base is not None and _CHANGE in found:
            found[_UNITS | _CHANGE] = [*units, *_change(inside, _inside(base, alive))]
    return min(found.items(), key=lambda item: (sum(run.size for run in item[1]), item[0]))


def _alive(mask: Flags) -> tuple[Flags, ...]:
    """Return flags of the rows and of the columns with kept entries; nothing for fewer than two dimensions."""
    if mask.ndim < 2 or not mask.size:
        return ()
    rows = mask.reshape(mask.shape[0], -1)
    return np.any(rows, axis=1), np.any(np.any(rows, axis=0).reshape(mask.shape[1], -1), axis=1)


def _inside(mask: Flags, alive: tuple[Flags, ...]) -> Flags:
    rows, columns = alive
    return mask[rows][:, columns]


def _change(mask: Flags, base: Flags) -> list[Run]:
    held = int(np.count_nonzero(base))
    stays, back = int(np.count_nonzero(mask & base)), int(np.count_nonzero(mask & ~base))
    return [
        Run(None if stays in {0, held} else mask[base], held, stays),
        Run(None if back in {0, mask.size - held} else mask[~base], mask.size - held, back),
    ]


def read(
    section: memoryview, specs: Mapping[str, Spec], held: Masks | None, *, changes: bool
) -> dict[str, torch.Tensor]:
    """Return the mask in a section; ``specs`` in the order of the wire, ``changes``: it may refer to ``held``.

    Raises:
        WireError: the section is not one that ``write`` could have made for these tensors.
    """
    reader = entropy.RunReader(section, "the mask")
    covered = reader.run(len(specs))
    found: dict[str, torch.Tensor] = {}
    for (name, spec), here in zip(specs.items(), covered, strict=True):
        if here:
            reader.what = f"the mask of {name!r}"
            base = held.get(name) if changes and held is not None else None
            found[name] = torch.from_numpy(_read(reader, spec.shape, None if base is None else flags(base)))
    reader.end()
    return found


def _read(reader: entropy.RunReader, shape: tuple[int, ...], base: Flags | None) -> Flags:
    form = reader.heads.byte(reader.what)
    fits = base is not None and base.shape == shape
    if form > _UNITS | _CHANGE or (form & _CHANGE and not fits) or (form & _UNITS and len(shape) < 2):
        raise WireError(f"{reader.what}: form {form} does not fit here")
    if not form & _UNITS:
        return _fill(reader, shape, base if form & _CHANGE else None)
    alive = reader.run(shape[0]), reader.run(shape[1])
    inner = (int(alive[0].sum()), int(alive[1].sum()), *shape[2:])
    inside = _fill(reader, inner, _inside(base, alive) if base is not None and form & _CHANGE else None)
    mask = np.zeros(shape, bool)
    mask[np.ix_(*alive)] = inside
    return mask


def _fill(reader: entropy.RunReader, shape: tuple[int, ...], base: Flags | None) -> Flags:
    if base is None:
        return reader.run(math.prod(shape)).reshape(shape)
    mask = np.empty(shape, bool)
    held = int(np.count_nonzero(base))
    mask[base] = reader.run(held)
    mask[~base] = reader.run(mask.size - held)
    return mask


def pack(mask: Masks) -> dict[str, torch.Tensor]:
    """Return a mask as uint8 bitmaps, one bit an entry, the first entry in the lowest bit."""
    return {name: torch.from_numpy(np.packbits(flags(part), bitorder="little")) for name, part in mask.items()}


def unpack(packed: Masks, specs: Mapping[str, Spec]) -> dict[str, torch.Tensor]:
    """Return the mask that ``pack`` packed, in the shapes of ``specs``."""
    bits = {name: _bits(part, specs[name].size) for name, part in packed.items()}
    return {name: torch.from_numpy(flat).reshape(specs[name].shape) for name, flat in bits.items()}


def _bits(packed: torch.Tensor, count: int) -> Flags:
    return np.unpackbits(packed.numpy(), count=count, bitorder="little").view(np.bool_)
