"""Reductions: how the replies to an ask become one result, declared so that they can be reduced where they are made.

An ask names its reductions (``reduce={"mean": Mean(), "kept": Sum(masks_of)}``), and ``absorb`` gets their results.
Most reductions are linear: their accumulator is a sum, so parts of a cohort can be summed separately and then merged.
``Keep`` is not linear: it stores single replies, on disk if they are many.

Replies are joined in a fixed order (``contract.fold``), so that neither the number of workers nor relays nor the order
of arrival changes a bit of a sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from secateur.contract.reply import Reply, Sent, Stack
from secateur.contract.spool import Kept, Spool
from secateur.contract.state import State
from secateur.contract.weighted import Accumulator, add_part, add_weighted, weighted_mean
from secateur.errors import ConfigError
from secateur.pruning.mask import Tensors
from secateur.wire.message import Expected

By = Literal["rows", "clients"]
_BY = ("rows", "clients")


Made = Callable[[Reply, Sent], Tensors]
"""A function of a reply and its request that returns the tensors to reduce; it is found by its module and name."""


def tensors_of(reply: Reply, sent: Sent) -> Tensors:
    """Return the reply's tensors."""
    del sent
    return reply.tensors


def masks_of(reply: Reply, sent: Sent) -> Tensors:
    """Return the reply's mask, in the order of the model's tensors; empty if it has none.

    A mask has the order in which its reader learnt of it, and who reads a reply is a matter of speed.
    """
    mask = reply.mask or {}
    return {name: mask[name] for name in (*sent.setting.specs, *mask) if name in mask}


class Reduction(ABC):
    """Base of reductions, which turn the replies to an ask into one result; frozen dataclasses.

    Replies are added one by one, and parts of a cohort that were added elsewhere are merged. Of a linear reduction,
    merging with the accumulator of one reply must give the same bits as adding that reply, and accumulators must be
    made of tensors, numbers and dictionaries of these by text, since they travel between processes.

    Attributes:
        linear: whether the accumulator is a sum over clients, so that a secure sum, noise or a relay can be used.
        reveals: what the holder of the accumulator learns, in a few words.
        copies: whether ``add`` copies whatever it keeps of a reply, whose memory can then be reused; otherwise it is
            given replies in memory of their own.
    """

    linear: ClassVar[bool] = True
    reveals: ClassVar[str] = "sums over clients"
    copies: ClassVar[bool] = False

    def check(self, expects: Expected, clients: Sequence[int]) -> None:  # noqa: B027 -- most fit any reply
        """Refuse replies that the reduction cannot reduce; called before any client is asked.

        Raises:
            ConfigError: the text says what does not fit, and what to do.
        """

    @property
    def whole(self) -> bool:
        """Return whether replies are compared entry by entry, where one that did not come (``topk``) would be a lie."""
        return False

    def needs(self, replies: int) -> int:
        """Return how many of so many replies the result needs at least; with fewer, the exchange is asked again."""
        del replies
        return 0

    def zero(self, spool: Spool) -> Accumulator:
        """Return the accumulator of no reply; ``spool`` stores replies that must stay single."""
        del spool
        return {}

    @abstractmethod
    def add(self, accumulator: Accumulator, reply: Reply, sent: Sent) -> Accumulator:
        """Return the accumulator with one more reply; ``accumulator`` may be changed and must not be used again."""

    def add_stack(self, accumulator: Accumulator, stack: Stack, sent: Sequence[Sent]) -> Accumulator:
        """Return the accumulator with several more replies; the bits are those of adding them one by one."""
        for reply, request in zip(stack.replies(), sent, strict=True):
            accumulator = self.add(accumulator, reply, request)
        return accumulator

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Return the accumulator of both, the replies of ``one`` first; neither must be used again."""
        return {**one, **{name: _plus(one.get(name), part) for name, part in other.items()}}

    @abstractmethod
    def finish(self, accumulator: Accumulator, state: State) -> Any:
        """Return the result; ``state`` is the server's."""


@dataclass(frozen=True)
class Mean(Reduction):
    """The weighted mean sum_k n_k x_k / sum_k n_k, summed in float64; float32 tensors by name, empty without replies.

    Attributes:
        of: returns the tensors of a reply that are averaged.
        by: n_k is a client's rows (``rows``), or 1 (``clients``).
        holders: returns a mask for each reply: each coordinate is divided by the weight of the clients whose mask is
            True there. None: every client counts at every coordinate.
        fallback: the value of a coordinate that no client holds: ``zero``, or that of the server's ``state``.

    Reference: FedAvg, arXiv 1602.05629; over holders: FedSparsify's normalised masked average, arXiv 2204.12430.
    """

    copies: ClassVar[bool] = True

    of: Made = tensors_of
    by: By = "rows"
    holders: Made | None = None
    fallback: Literal["zero", "state"] = "zero"

    def __post_init__(self) -> None:
        _one_of(self, by=(self.by, _BY), fallback=(self.fallback, ("zero", "state")))
        named(self.of)
        named(self.holders)

    def check(self, expects: Expected, clients: Sequence[int]) -> None:
        """Refuse to average masks if replies have none."""
        del clients
        _needs_masks(self, expects, self.of, self.holders)

    def add(self, accumulator: Accumulator, reply: Reply, sent: Sent) -> Accumulator:
        """Add n_k x_k, and n_k at each coordinate that the client holds."""
        weight = float(reply.rows if self.by == "rows" else 1)
        held = None if self.holders is None else self.holders(reply, sent)
        return add_weighted(accumulator, self.of(reply, sent), weight, held)

    def finish(self, accumulator: Accumulator, state: State) -> dict[str, torch.Tensor]:
        """Return the mean: the sum over its weight."""
        return weighted_mean(accumulator, state.weights if self.fallback == "state" else None)


@dataclass(frozen=True)
class _OfReplies(Reduction):
    """Base of reductions of something that a function makes of each reply, with a weight for each client."""

    copies: ClassVar[bool] = True

    of: Made = tensors_of
    by: By = "clients"

    def __post_init__(self) -> None:
        _one_of(self, by=(self.by, _BY))
        named(self.of)

    def check(self, expects: Expected, clients: Sequence[int]) -> None:
        """Refuse to reduce masks if replies have none."""
        del clients
        _needs_masks(self, expects, self.of)


@dataclass(frozen=True)
class Sum(_OfReplies):
    """The sum over clients: int64 for integers and booleans, float64 for others; by name, empty without replies.

    The sum of masks counts, for each entry, the clients that kept it.

    Attributes:
        of: returns the tensors of a reply that are summed.
        by: whether a client counts once (``clients``) or as often as it has rows (``rows``).
    """

    def add(self, accumulator: Accumulator, reply: Reply, sent: Sent) -> Accumulator:
        """Add x_k, or n_k x_k."""
        for name, value in self.of(reply, sent).items():
            part = value.to(torch.float64 if value.is_floating_point() else torch.int64, copy=True)
            add_part(accumulator, name, part.mul_(reply.rows) if self.by == "rows" else part)
        return accumulator

    def finish(self, accumulator: Accumulator, state: State) -> dict[str, torch.Tensor]:
        """Return the sums."""
        del state
        return dict(accumulator)


@dataclass(frozen=True)
class Spread:
    """Mean and variance of each entry.

    Attributes:
        mean: by name, float64.
        variance: by name, float64; the population variance (divided by the weight, not by one less).
        weight: the weight of all replies together.
    """

    mean: Tensors
    variance: Tensors
    weight: float


@dataclass(frozen=True)
class Moments(_OfReplies):
    """Weighted mean and variance of each entry over clients, from sums of x and x^2 in float64.

    Attributes:
        of: returns the tensors of a reply whose moments are taken.
        by: whether a client's weight is its rows (``rows``) or 1 (``clients``).
    """

    def add(self, accumulator: Accumulator, reply: Reply, sent: Sent) -> Accumulator:
        """Add n_k x_k and n_k x_k^2."""
        weight = float(reply.rows if self.by == "rows" else 1)
        for name, value in self.of(reply, sent).items():
            exact = value.double()
            add_part(accumulator, f"sum {name}", exact * weight)
            add_part(accumulator, f"square {name}", exact.square() * weight)
        accumulator["weight"] = accumulator.get("weight", 0.0) + weight
        return accumulator

    def finish(self, accumulator: Accumulator, state: State) -> Spread:
        """Return mean and variance."""
        del state
        weight = float(accumulator.get("weight", 0.0))
        sums = {n.removeprefix("sum "): t for n, t in accumulator.items() if n.startswith("sum ")} if weight else {}
        mean = {name: part / weight for name, part in sums.items()}
        squares = {name: accumulator[f"square {name}"] / weight for name in mean}
        return Spread(mean, {n: (squares[n] - m.square()).clamp(min=0.0) for n, m in mean.items()}, weight)


@dataclass(frozen=True)
class Scalars(Reduction):
    """The weighted mean of one scalar of the replies; None without replies.

    Attributes:
        name: the scalar's name.
        by: whether a client's weight is its rows (``rows``) or 1 (``clients``).
    """

    copies: ClassVar[bool] = True

    name: str
    by: By = "rows"

    def __post_init__(self) -> None:
        _one_of(self, by=(self.by, _BY))

    def check(self, expects: Expected, clients: Sequence[int]) -> None:
        """Refuse a scalar that replies do not have."""
        del clients
        if expects.scalars is not None and self.name not in expects.scalars:
            raise ConfigError(f"reduction Scalars({self.name!r}): replies have {sorted(expects.scalars)}")

    def add(self, accumulator: Accumulator, reply: Reply, sent: Sent) -> Accumulator:
        """Add n_k s_k and n_k."""
        del sent
        weight = float(reply.rows if self.by == "rows" else 1)
        accumulator["sum"] = accumulator.get("sum", 0.0) + float(reply.scalars[self.name]) * weight
        accumulator["weight"] = accumulator.get("weight", 0.0) + weight
        return accumulator

    def finish(self, accumulator: Accumulator, state: State) -> float | None:
        """Return the mean, or None without replies."""
        del state
        weight = float(accumulator.get("weight", 0.0))
        return float(accumulator["sum"]) / weight if weight else None


@dataclass(frozen=True)
class Grouped(Reduction):
    """One reduction for each class of clients; the result maps each class that answered to its own result.

    Attributes:
        inner: the reduction of a class; it must be linear.
        classes: the class of each client.

    Raises:
        ConfigError: the inner reduction is not linear.
    """

    inner: Reduction
    classes: Mapping[int, int]

    def __post_init__(self) -> None:
        if not self.inner.linear:
            raise ConfigError(f"reduction Grouped of {type(self.inner).__name__}: group a linear one, such as Mean")

    def check(self, expects: Expected, clients: Sequence[int]) -> None:
        """Refuse replies that the inner reduction refuses."""
        missing = [client for client in clients if client not in self.classes]
        if missing:
            raise ConfigError(f"reduction Grouped: clients {missing[:5]} are asked and have no class")
        self.inner.check(expects, clients)

    def add(self, accumulator: Accumulator, reply: Reply, sent: Sent) -> Accumulator:
        """Add the reply to the accumulator of its client's class."""
        group = self.classes[reply.client]
        accumulator[str(group)] = self.inner.add(accumulator.get(str(group), {}), reply, sent)
        return accumulator

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Merge class by class."""
        return {**one, **{g: self.inner.merge(one[g], part) if g in one else part for g, part in other.items()}}

    def finish(self, accumulator: Accumulator, state: State) -> dict[int, Any]:
        """Return the result of each class, classes ascending."""
        return {int(g): self.inner.finish(accumulator[g], state) for g in sorted(accumulator, key=int)}


@dataclass(frozen=True)
class Keep(Reduction):
    """Keeps single replies, to be read by client or in blocks of coordinates, any number of times; see ``Kept``.

    They can be read until ``absorb`` returns.

    Attributes:
        of: returns the tensors of a reply that are kept.
    """

    linear: ClassVar[bool] = False
    reveals: ClassVar[str] = "each client's reply"
    copies: ClassVar[bool] = True

    of: Made = tensors_of

    def __post_init__(self) -> None:
        named(self.of)

    def check(self, expects: Expected, clients: Sequence[int]) -> None:
        """Refuse to keep masks if replies have none."""
        del clients
        _needs_masks(self, expects, self.of)

    def zero(self, spool: Spool) -> Accumulator:
        """Return an accumulator without replies, which stores them in the spool."""
        return {"spool": spool, "entries": {}}

    def add(self, accumulator: Accumulator, reply: Reply, sent: Sent) -> Accumulator:
        """Store the reply in the spool."""
        accumulator["entries"][reply.client] = accumulator["spool"].put(self.of(reply, sent))
        return accumulator

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Return the replies of both, those of ``one`` first."""
        return {**one, "entries": {**one["entries"], **other["entries"]}}

    def finish(self, accumulator: Accumulator, state: State) -> Kept:
        """Return the stored replies."""
        del state
        return Kept(accumulator["spool"], accumulator["entries"])


def named(function: Callable[..., Any] | None) -> None:
    """Check that a function can be found by its module and name.

    Raises:
        ConfigError: it is a lambda, a function within another one, or a partial function.
    """
    name = "" if function is None else getattr(function, "__qualname__", type(function).__qualname__)
    if function is not None and ("<" in name or getattr(function, "__module__", None) in {None, "functools"}):
        raise ConfigError(
            f"a reduction's function must stand in a module under a name, so that it can be found there: {function!r}"
        )


def _one_of(reduction: Reduction, **choices: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, known) in choices.items():
        if value not in known:
            raise ConfigError(
                f"reduction {type(reduction).__name__}: {name} = {value!r}; it can be {' or '.join(known)}"
            )


def _needs_masks(reduction: Reduction, expects: Expected, *made: Made | None) -> None:
    if masks_of in made and expects.mask == "none":
        raise ConfigError(
            f"reduction {type(reduction).__name__} is of masks, and the ask expects replies without any: "
            "let them be expected (Ask.expects.mask), or reduce tensors"
        )


def _plus(one: Any, part: Any) -> Any:
    """Return a sum of tensors, in place, or of numbers; ``one`` may be None."""
    if one is None:
        return part
    return one.add_(part) if isinstance(one, torch.Tensor) else one + part
