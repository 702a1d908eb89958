"""The updates of a cohort as robust rules read them: in blocks of coordinates, each with those clients that hold it.

The update of client k is Delta_k = w_k - W, with W as it was sent to the client. A coordinate is *held* by the clients
whose mask keeps it: a value that is absent is none, and never a zero. Running statistics (buffers) are no directions in
which a model learns: they are kept as values, and merged by their median over the clients that a rule keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from secateur.contract.reduction import Keep, Made
from secateur.contract.reply import Reply, Sent
from secateur.contract.spool import Spool
from secateur.contract.state import State
from secateur.contract.weighted import Accumulator
from secateur.pruning.mask import Tensors

FEWEST = 3
"""The fewest holders of a coordinate that a robust rule moves; among two nobody can be told from an outlier."""

_HELD = "held/"
_BLOCK = 2**20


def update_of(reply: Reply, sent: Sent) -> Tensors:
    """Return a reply's update with the flags of what the client holds, and the values of its running statistics."""
    before, buffers = sent.tensors, set(sent.setting.layout.names("buffer"))
    found = {name: value if name in buffers else value - before[name] for name, value in reply.tensors.items()}
    return found | held_of(reply, sent)


def held_of(reply: Reply, sent: Sent) -> dict[str, torch.Tensor]:
    """Return the flags of what a client holds, by the names under which ``Updates`` finds them."""
    buffers = set(sent.setting.layout.names("buffer"))
    return {_HELD + name: held for name, held in (reply.mask or {}).items() if name not in buffers}


@dataclass(frozen=True)
class Single(Keep):
    """Base of reductions that read single replies as ``Updates``; those of clients without rows are not counted."""

    of: Made = update_of

    def zero(self, spool: Spool) -> Accumulator:
        """Return an accumulator without replies, which stores them in the spool."""
        return {**super().zero(spool), "rows": {}}

    def add(self, accumulator: Accumulator, reply: Reply, sent: Sent) -> Accumulator:
        """Store what is made of the reply, unless its client has no rows."""
        if reply.rows:
            accumulator = super().add(accumulator, reply, sent)
            accumulator["rows"][reply.client] = reply.rows
        return accumulator

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Return the replies of both, those of ``one`` first."""
        return {**super().merge(one, other), "rows": {**one["rows"], **other["rows"]}}

    def updates(self, accumulator: Accumulator, state: State) -> Updates:
        """Return the replies as updates."""
        setting = state.setting
        shapes = {name: tuple(spec.shape) for name, spec in setting.specs.items()}
        rows, buffers = accumulator["rows"], setting.layout.names("buffer")
        return Updates(accumulator["spool"], accumulator["entries"], rows, shapes, buffers)


@dataclass(frozen=True)
class Block:
    """Some coordinates of a tensor that somebody holds.

    Attributes:
        name: the tensor's.
        where: the places of the coordinates in the flattened tensor.
        values: the updates, shape (clients, coordinates), 0 where a client does not hold the coordinate.
        held: who holds what, of the same shape; None: everybody holds all of them.
    """

    name: str
    where: torch.Tensor
    values: torch.Tensor
    held: torch.Tensor | None

    @property
    def holders(self) -> torch.Tensor:
        """Return how many clients hold each coordinate."""
        clients, width = self.values.shape
        return torch.full((width,), clients) if self.held is None else self.held.sum(dim=0)

    @property
    def flags(self) -> torch.Tensor:
        """Return ``held`` in float64."""
        return torch.ones_like(self.values, dtype=torch.float64) if self.held is None else self.held.double()


@dataclass(frozen=True)
class Products:
    """Products of all pairs of updates; matrices of shape (clients, clients), float64.

    Attributes:
        inner: the inner products over the coordinates that both hold.
        apart: the squared distances over these.
        common: the numbers of these.
        size: the number of coordinates that somebody holds.
    """

    inner: torch.Tensor
    apart: torch.Tensor
    common: torch.Tensor
    size: int

    @property
    def norms(self) -> torch.Tensor:
        """Return the norm of each update, as if the client held all coordinates: its root mean square times sqrt(N)."""
        held = self.common.diagonal().clamp(min=1)
        return (self.inner.diagonal() * self.size / held).sqrt()

    @property
    def distances(self) -> torch.Tensor:
        """Return the squared distances, as if each pair held all coordinates.

        Two clients without a common coordinate are as far apart as the two that are farthest.
        """
        scaled = self.apart * self.size / self.common.clamp(min=1)
        return torch.where(self.common > 0, scaled, scaled.max())


class Updates:
    """The updates of those clients that answered and have rows.

    Args:
        spool: where they are.
        entries: the handle of each client's, in the order of the ask.
        rows: n_k of each client.
        shapes: of the model's tensors, by name.
        buffers: the names of running statistics.
    """

    def __init__(
        self, spool: Spool, entries: Mapping[int, int], rows: Mapping[int, int],
        shapes: Mapping[str, tuple[int, ...]], buffers: Collection[str],
    ) -> None:  # fmt: skip
        self._spool, self._handles = spool, list(entries.values())
        self._buffers, self._shapes = buffers, shapes
        self.clients = tuple(entries)
        self.rows = torch.tensor([float(rows[client]) for client in self.clients], dtype=torch.float64)

    @property
    def trained(self) -> list[str]:
        """Return the names of the tensors of which there are updates."""
        return [name for name in self._shapes if name not in self._buffers]

    def blocks(self, *, whole: bool = False) -> Iterator[Block]:
        """Yield the coordinates that somebody holds, a million numbers at a time, or each tensor as a whole."""
        for name, part in self._parts(0 if whole else _BLOCK):
            yield self._block(name, part)

    def mask(self, place: int) -> dict[str, torch.Tensor]:
        """Return the mask of one client; empty if it has none."""
        found = self._spool.get(self._handles[place])
        return {name.removeprefix(_HELD): held for name, held in found.items() if name.startswith(_HELD)}

    def one(self, place: int) -> torch.Tensor:
        """Return the update of one client at the coordinates that it holds, those of all tensors in a row."""
        entry, handle = self._spool.get(self._handles[place]), self._handles[place]
        masked = [name for name in self.trained if _HELD + name in self._spool.sizes(handle)]
        return torch.cat(
            [entry[n][entry[_HELD + n]] if n in masked else entry[n].reshape(-1) for n in self.trained]
            or [torch.zeros(0)]
        )

    @cached_property
    def size(self) -> int:
        """Return N, the number of coordinates that somebody holds."""
        total = 0
        for name, part in self._parts(_BLOCK):
            held = self._flags(name, part)
            total += part.stop - part.start if held is None else int(held.any(dim=0).sum())
        return total

    def _parts(self, size: int) -> Iterator[tuple[str, slice]]:
        """Yield each tensor in parts of which all clients' have at most ``size`` numbers; 0: as a whole."""
        for name in self.trained:
            count = torch.Size(self._shapes[name]).numel()
            step = max(1, size // len(self.clients)) if size else max(1, count)
            for start in range(0, count, step):
                yield name, slice(start, min(count, start + step))

    def _block(self, name: str, part: slice) -> Block:
        values, where = self._stacked(name, part), torch.arange(part.start, part.stop)
        held = self._flags(name, part)
        if held is None:
            return Block(name, where, values, None)
        some = held.any(dim=0)
        if not bool(some.all()):
            where, values, held = where[some], values[:, some], held[:, some]
        if bool(held.all()):
            return Block(name, where, values, None)
        return Block(name, where, torch.where(held, values, torch.zeros(())), held)

    def _stacked(self, name: str, part: slice) -> torch.Tensor:
        return torch.stack([self._spool.part(handle, name, part) for handle in self._handles])

    def _flags(self, name: str, part: slice) -> torch.Tensor | None:
        """Return who holds some places of a tensor; None: nobody has a mask of it."""
        flags, name = [], _HELD + name
        masked = [name in self._spool.sizes(handle) for handle in self._handles]
        if not any(masked):
            return None
        for handle, has in zip(self._handles, masked, strict=True):
            whole = torch.ones(part.stop - part.start, dtype=torch.bool)
            flags.append(self._spool.part(handle, name, part) if has else whole)
        return torch.stack(flags)

    @cached_property
    def products(self) -> Products:
        """Return the products of all pairs of updates, from one pass over the blocks."""
        shape = len(self.clients), len(self.clients)
        inner, apart, common = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
        for block in self.blocks():
            values = block.values.double()
            product, squares = values @ values.T, values.square()
            if block.held is None:
                norms = squares.sum(dim=1)
                between, both = norms[:, None] + norms[None, :], torch.full(shape, float(values.shape[1]))
            else:
                flags = block.flags
                both = flags @ flags.T
                one = squares @ flags.T
                between = one + one.T
            inner += product
            apart += (between - 2 * product).clamp(min=0.0)
            common += both
        return Products(inner, apart.fill_diagonal_(0.0), common, self.size)

    def overlaps(self) -> torch.Tensor:
        """Return the Jaccard index of each pair of masks, over the tensors that have any; shape (clients, clients)."""
        both = torch.zeros(len(self.clients), len(self.clients), dtype=torch.float64)
        for name, part in self._parts(_BLOCK):
            held = self._flags(name, part)
            if held is not None:
                both += (held.float() @ held.float().T).double()
        sizes = both.diagonal()
        return both / (sizes[:, None] + sizes[None, :] - both).clamp(min=1.0)

    def made(self, rule: Callable[[Block], torch.Tensor], *, whole: bool = False) -> dict[str, torch.Tensor]:
        """Return the tensors that a rule makes of each block; 0 where fewer than ``FEWEST`` clients hold a coordinate.

        Args:
            rule: returns one number for each coordinate of a block.
            whole: whether each tensor is one block.
        """
        found = {name: torch.zeros(torch.Size(self._shapes[name]).numel()) for name in self.trained}
        for block in self.blocks(whole=whole):
            moved = rule(block).float()
            enough = block.holders >= FEWEST
            found[block.name][block.where] = torch.where(enough, moved, torch.zeros(()))
        return {name: part.reshape(self._shapes[name]) for name, part in found.items()}

    def weighed(self, gains: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return sum_k g_k Delta_k / sum_k h_k, each sum over the holders of a coordinate that have h_k > 0.

        Args:
            gains: g, one of each client, float64.
            weights: h, likewise.
        """

        def mean(block: Block) -> torch.Tensor:
            total = weights @ block.flags if block.held is not None else weights.sum()
            summed = gains @ block.values.double()
            return torch.where(total > 0, summed / total.clamp(min=1e-300), torch.zeros((), dtype=torch.float64))

        return self.made(mean)

    def settled(self, keep: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return the median of each running statistic over the clients that are kept; None: over all."""
        chosen = [handle for place, handle in enumerate(self._handles) if keep is None or bool(keep[place])]
        found = {}
        for name in self._buffers:
            count = torch.Size(self._shapes[name]).numel()
            values = torch.stack([self._spool.part(handle, name, slice(0, count)) for handle in chosen])
            found[name] = middle(values).reshape(self._shapes[name])
        return found


def middle(values: torch.Tensor) -> torch.Tensor:
    """Return the median along the first dimension; of an even number the mean of the middle two."""
    ordered, count = np.sort(values.numpy(), axis=0), values.shape[0]
    low, high = ordered[(count - 1) // 2].astype(np.float64), ordered[count // 2].astype(np.float64)
    return torch.from_numpy(((low + high) / 2).astype(np.float32))
