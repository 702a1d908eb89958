"""What becomes of the replies to an ask: declared, so that they can be added up wherever they were made.

A reduction turns the replies into one thing. An ask names several (``reduce={"mean": Mean(), "kept": Sum(masks_of)}``),
and ``absorb`` gets what each of them came to. Most are linear: what they keep on the way is a sum, so parts of a cohort
can be added up apart and merged. ``Keep`` is not: it holds single replies, on disk where they are many.

The replies are added up block by block, ``BLOCK`` clients of the ask at a time, in the order of the ask, and the blocks
are merged in their order. So neither workers nor relays nor the order of arrival change a bit of a sum.
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
from secateur.errors import ConfigError
from secateur.pruning.mask import Tensors
from secateur.wire.message import Expected

BLOCK = 4
"""Clients of an ask whose replies are added up together. Smaller costs more merging, larger keeps more workers idle."""

By = Literal["rows", "clients"]


Made = Callable[[Reply, Sent], Tensors]
"""Makes of a reply and its request what is reduced. A function of a module: its name can be told to whoever adds up."""

Accumulator = dict[str, Any]
"""What a reduction keeps on the way: for linear ones tensors by name, which are added up to merge two."""


def tensors_of(reply: Reply, sent: Sent) -> Tensors:
    """Return the reply's tensors."""
    del sent
    return reply.tensors


def masks_of(reply: Reply, sent: Sent) -> Tensors:
    """Return the reply's mask; nothing where it has none."""
    del sent
    return reply.mask or {}


class Reduction(ABC):
    """Turns the replies to an ask into one thing; frozen dataclasses.

    Attributes:
        linear: whether its accumulator is a sum over clients, so that it may be added up by others, in a secure sum or
            under noise.
        reveals: what whoever holds the accumulator learns, in a few words.
    """

    linear: ClassVar[bool] = True
    reveals: ClassVar[str] = "sums over clients"

    def check(self, expects: Expected) -> None:  # noqa: B027 -- most fit any reply
        """Refuse replies that the reduction does not fit; called before anybody is asked.

        Raises:
            ConfigError: the text says what does not fit, and what to do.
        """

    def zero(self, spool: Spool) -> Accumulator:
        """Return the accumulator of no reply; ``spool`` takes what must stay single."""
        del spool
        return {}

    @abstractmethod
    def add(self, accumulator: Accumulator, reply: Reply, sent: Sent) -> Accumulator:
        """Return the accumulator with one more reply; the one given is used up."""

    def add_stack(self, accumulator: Accumulator, stack: Stack, sent: Sequence[Sent]) -> Accumulator:
        """Return the accumulator with several more replies; the same bits as one after the other."""
        for reply, request in zip(stack.replies(), sent, strict=True):
            accumulator = self.add(accumulator, reply, request)
        return accumulator

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Return the accumulator of the replies of both, those of ``one`` first; both are used up."""
        return {**one, **{name: _plus(one.get(name), part) for name, part in other.items()}}

    @abstractmethod
    def finish(self, accumulator: Accumulator, state: State) -> Any:
        """Return what the replies became."""


@dataclass(frozen=True)
class Mean(Reduction):
    """The weighted mean sum_k n_k x_k / sum_k n_k, summed in float64; float32 tensors by name, none of no reply.

    Attributes:
        of: what of a reply is averaged.
        by: n_k is a client's rows, or 1.
        holders: the mask of a reply whose entries it counts for: each coordinate is divided by the weight of those who
            hold it. None: everybody holds everything.
        fallback: a coordinate that nobody holds is ``zero``, or what it is in the server's ``state``.

    Reference: FedAvg, arXiv 1602.05629; over holders: FedSparsify's normalised masked average, arXiv 2204.12430.
    """

    of: Made = tensors_of
    by: By = "rows"
    holders: Made | None = None
    fallback: Literal["zero", "state"] = "zero"

    def __post_init__(self) -> None:
        named(self.of)
        named(self.holders)

    def check(self, expects: Expected) -> None:
        """Refuse to average masks that no reply has."""
        _needs_masks(self, expects, self.of, self.holders)

    def add(self, accumulator: Accumulator, reply: Reply, sent: Sent) -> Accumulator:
        """Add n_k x_k, and n_k where the client holds it."""
        weight = float(reply.rows if self.by == "rows" else 1)
        held = {} if self.holders is None else self.holders(reply, sent)
        for name, value in self.of(reply, sent).items():
            part = value.to(torch.float64, copy=True).mul_(weight)
            _add(accumulator, f"sum {name}", part)
            if self.holders is not None:
                gain = torch.full_like(part, weight) if name not in held else held[name].double() * weight
                _add(accumulator, f"held {name}", gain)
        _add(accumulator, "weight", torch.tensor(weight, dtype=torch.float64))
        return accumulator

    def finish(self, accumulator: Accumulator, state: State) -> dict[str, torch.Tensor]:
        """Divide."""
        weight = accumulator.get("weight")
        if weight is None or not weight:
            return {}
        sums = {name.removeprefix("sum "): part for name, part in accumulator.items() if name.startswith("sum ")}
        if self.holders is None:
            return {name: (part / weight).float() for name, part in sums.items()}
        mean = {}
        for name, part in sums.items():
            held = accumulator[f"held {name}"]
            otherwise = state.weights[name].double() if self.fallback == "state" else torch.zeros((), dtype=part.dtype)
            mean[name] = torch.where(held > 0, part / held.clamp(min=1e-300), otherwise).float()
        return mean


@dataclass(frozen=True)
class Sum(Reduction):
    """The sum over clients, integers and truth values exactly in int64, others in float64; none of no reply.

    Of masks it counts, for each entry, the clients that kept it.

    Attributes:
        of: what of a reply is added up.
        by: each client once, or as often as it has rows.
    """

    of: Made = tensors_of
    by: By = "clients"

    def __post_init__(self) -> None:
        named(self.of)

    def check(self, expects: Expected) -> None:
        """Refuse to add up masks that no reply has."""
        _needs_masks(self, expects, self.of)

    def add(self, accumulator: Accumulator, reply: Reply, sent: Sent) -> Accumulator:
        """Add x_k, or n_k x_k."""
        for name, value in self.of(reply, sent).items():
            part = value.to(torch.float64 if value.is_floating_point() else torch.int64, copy=True)
            _add(accumulator, name, part.mul_(reply.rows) if self.by == "rows" else part)
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
        variance: by name, float64, of the whole (divided by the weight, not by one less).
        weight: of all replies together.
    """

    mean: Tensors
    variance: Tensors
    weight: float


@dataclass(frozen=True)
class Moments(Reduction):
    """Weighted mean and variance of each entry over clients, from sums of x and x^2 in float64.

    Attributes:
        of: what of a reply.
        by: a client's weight is its rows, or 1.
    """

    of: Made = tensors_of
    by: By = "clients"

    def __post_init__(self) -> None:
        named(self.of)

    def check(self, expects: Expected) -> None:
        """Refuse moments of masks that no reply has."""
        _needs_masks(self, expects, self.of)

    def add(self, accumulator: Accumulator, reply: Reply, sent: Sent) -> Accumulator:
        """Add n_k x_k and n_k x_k^2."""
        weight = float(reply.rows if self.by == "rows" else 1)
        for name, value in self.of(reply, sent).items():
            exact = value.double()
            _add(accumulator, f"sum {name}", exact * weight)
            _add(accumulator, f"square {name}", exact.square() * weight)
        _add(accumulator, "weight", torch.tensor(weight, dtype=torch.float64))
        return accumulator

    def finish(self, accumulator: Accumulator, state: State) -> Spread:
        """Divide."""
        del state
        weight = float(accumulator.get("weight", 0.0))
        sums = {n.removeprefix("sum "): t for n, t in accumulator.items() if n.startswith("sum ")} if weight else {}
        mean = {name: part / weight for name, part in sums.items()}
        squares = {name: accumulator[f"square {name}"] / weight for name in mean}
        return Spread(mean, {n: (squares[n] - m.square()).clamp(min=0.0) for n, m in mean.items()}, weight)


@dataclass(frozen=True)
class Scalars(Reduction):
    """The weighted mean of one scalar of the replies; None of no reply.

    Attributes:
        name: of the scalar.
        by: a client's weight is its rows, or 1.
    """

    name: str
    by: By = "rows"

    def check(self, expects: Expected) -> None:
        """Refuse a scalar that replies do not have."""
        if expects.scalars is not None and self.name not in expects.scalars:
            raise ConfigError(f"reduction Scalars({self.name!r}): replies have {sorted(expects.scalars)}")

    def add(self, accumulator: Accumulator, reply: Reply, sent: Sent) -> Accumulator:
        """Add n_k s_k and n_k."""
        del sent
        weight = float(reply.rows if self.by == "rows" else 1)
        _add(accumulator, "sum", torch.tensor(float(reply.scalars[self.name]) * weight, dtype=torch.float64))
        _add(accumulator, "weight", torch.tensor(weight, dtype=torch.float64))
        return accumulator

    def finish(self, accumulator: Accumulator, state: State) -> float | None:
        """Divide."""
        del state
        weight = float(accumulator.get("weight", 0.0))
        return float(accumulator["sum"]) / weight if weight else None


@dataclass(frozen=True)
class Grouped(Reduction):
    """One reduction for each class of clients: a mapping from the classes that answered to what their replies became.

    Attributes:
        inner: what becomes of the replies of a class; a linear reduction.
        classes: the class of each client.
    """

    inner: Reduction
    classes: Mapping[int, int]

    def __post_init__(self) -> None:
        if not self.inner.linear:
            raise ConfigError(f"reduction Grouped of {type(self.inner).__name__}: group a linear one, such as Mean")

    def check(self, expects: Expected) -> None:
        """Refuse what the inner reduction refuses."""
        self.inner.check(expects)

    def add(self, accumulator: Accumulator, reply: Reply, sent: Sent) -> Accumulator:
        """Add to the client's class."""
        group = self.classes[reply.client]
        accumulator[str(group)] = self.inner.add(accumulator.get(str(group), {}), reply, sent)
        return accumulator

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Merge class by class."""
        return {**one, **{g: self.inner.merge(one[g], part) if g in one else part for g, part in other.items()}}

    def finish(self, accumulator: Accumulator, state: State) -> dict[int, Any]:
        """Finish each class, in ascending order."""
        return {int(g): self.inner.finish(accumulator[g], state) for g in sorted(accumulator, key=int)}


@dataclass(frozen=True)
class Keep(Reduction):
    """Single replies, to be read by client or in blocks of coordinates, as often as wanted; see ``Kept``.

    They are readable until ``absorb`` returns.

    Attributes:
        of: what of a reply is kept.
    """

    linear: ClassVar[bool] = False
    reveals: ClassVar[str] = "each client's reply"

    of: Made = tensors_of

    def __post_init__(self) -> None:
        named(self.of)

    def check(self, expects: Expected) -> None:
        """Refuse to keep masks that no reply has."""
        _needs_masks(self, expects, self.of)

    def zero(self, spool: Spool) -> Accumulator:
        """Return an empty shelf of the spool."""
        return {"spool": spool, "entries": {}}

    def add(self, accumulator: Accumulator, reply: Reply, sent: Sent) -> Accumulator:
        """Put the reply down."""
        accumulator["entries"][reply.client] = accumulator["spool"].put(self.of(reply, sent))
        return accumulator

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Put one shelf behind the other."""
        return {**one, "entries": {**one["entries"], **other["entries"]}}

    def finish(self, accumulator: Accumulator, state: State) -> Kept:
        """Return the replies."""
        del state
        return Kept(accumulator["spool"], accumulator["entries"])


def named(function: Callable[..., Any] | None) -> None:
    """Refuse a function that cannot be found by its name.

    Raises:
        ConfigError: it is a lambda, lies within another function, or is a partial one.
    """
    name = "" if function is None else getattr(function, "__qualname__", type(function).__qualname__)
    if function is not None and ("<" in name or getattr(function, "__module__", None) in {None, "functools"}):
        raise ConfigError(
            f"a reduction's function must stand in a module under a name, so that it can be found there: {function!r}"
        )


def _needs_masks(reduction: Reduction, expects: Expected, *made: Made | None) -> None:
    if masks_of in made and expects.mask == "none":
        raise ConfigError(
            f"reduction {type(reduction).__name__} is of masks, and the ask expects replies without any: "
            "let them be expected (Ask.expects.mask), or reduce tensors"
        )


def _add(accumulator: Accumulator, name: str, part: torch.Tensor) -> None:
    accumulator[name] = accumulator[name].add_(part) if name in accumulator else part


def _plus(one: Any, part: torch.Tensor) -> torch.Tensor:
    total: torch.Tensor = part if one is None else one.add_(part)
    return total
