"""Products of two values: matrix products and ``einsum``, of which attention is made."""

from __future__ import annotations

import string
from collections.abc import Sequence

import torch

from secateur.errors import ModelError
from secateur.pruning.following.walk import Call, Walk, follows, places
from secateur.pruning.units import Flow


@follows("matmul", "rmatmul", "bmm", "mm", "mv", "dot")
def product(walk: Walk, call: Call) -> Flow | None:
    """Follow a matrix product, batched or not."""
    one, other = call.args[0], call.args[1] if len(call.args) > 1 else call.kwargs.get("other", call.kwargs.get("mat2"))
    if call.name == "rmatmul":
        one, other = other, one
    if one.dim() < 2 or other.dim() < 2:
        raise ModelError("")
    width = max(one.dim(), other.dim()) - 2
    batch = string.ascii_lowercase[3 : 3 + width]
    left, right = (batch[width + 2 - part.dim() :] for part in (one, other))
    return _product(walk, call, (one, other), (f"{left}ab", f"{right}bc"), f"{batch}ac")


@follows("einsum")
def einsum(walk: Walk, call: Call) -> Flow | None:
    """Follow an ``einsum`` of two values whose equation names each dimension."""
    equation, *values = call.args
    values = list(values[0]) if len(values) == 1 and isinstance(values[0], (list, tuple)) else values
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters = tuple(inputs.split(","))
    if not arrow or "." in equation or len(values) != 2 or any(len(set(part)) < len(part) for part in letters):
        raise ModelError("")
    return _product(walk, call, (values[0], values[1]), (letters[0], letters[1]), output)


def _product(
    walk: Walk, call: Call, values: tuple[torch.Tensor, torch.Tensor], letters: tuple[str, str], output: str
) -> Flow | None:
    if any(walk.name(value) is not None for value in values):
        raise ModelError("a weight is read outside of a layer")
    return contracted(walk, [walk.flow(value) for value in values], letters, output, call.value.shape)


def contracted(
    walk: Walk, flows: Sequence[Flow | None], letters: tuple[str, str], output: str, shape: Sequence[int]
) -> Flow | None:
    """Return the flow of a product of two values, whose dimensions and the product's have letters.

    Units that lie along a dimension that both sides keep (heads) are the same units on both sides. Those that lie along
    a dimension that is summed are the same on both sides too, and end there.

    Args:
        walk: the walk.
        flows: those of both values.
        letters: a letter for each dimension of each value.
        output: the letters of the product's dimensions; the others are summed.
        shape: the product's shape.

    Raises:
        ModelError: its units cannot be followed.
    """
    shared = set(letters[0]) & set(letters[1])
    for flow, part, other, its in zip(flows, letters, reversed(flows), reversed(letters), strict=True):
        lying = [part[place] for place in places(walk, flow)]
        if flow is not None and len(lying) > 1:
            walk.units.heads.append(flow.along(part.index(_unit(lying, shared, output, walk, other, its)), walk.units))
    for letter in sorted(shared - set(output)):
        _ended(walk, flows, letters, letter)
    found: list[tuple[str, torch.Tensor, bool]] = []
    for flow, part in zip(flows, letters, strict=True):
        lying = [part[place] for place in places(walk, flow)]
        if flow is not None and lying:
            if lying[0] not in output and lying[0] not in shared:
                raise ModelError("")
            found += [(lying[0], flow.along(part.index(lying[0]), walk.units), flow.zero)] if lying[0] in output else []
    if not found:
        return None
    if len({letter for letter, _, _ in found}) > 1:
        raise ModelError("its rows and its columns are units")
    for _, labels, _ in found[1:]:
        walk.units.join(found[0][1], labels)
    view = [1] * len(output)
    view[output.index(found[0][0])] = -1
    labels = walk.units.roots(found[0][1]).view(view).expand(tuple(shape))
    return Flow(labels, any(zero for _, _, zero in found))


def _unit(lying: Sequence[str], shared: set[str], output: str, walk: Walk, other: Flow | None, its: str) -> str:
    """Return the dimension along which units lie that lie along several: heads, unless the other side has none.

    Args:
        lying: the dimensions along which they lie.
        shared, output: the dimensions of both sides, and of the product.
        walk, other, its: the walk, the flow of the other side, and its dimensions.
    """
    beside = {its[place] for place in places(walk, other)}
    kept = [letter for letter in lying if letter in output]
    ended = [letter for letter in lying if letter in shared and letter not in output and letter in beside]
    heads = [letter for letter in kept if letter in shared]
    if ended and not beside.intersection(heads):
        return ended[0]
    if not kept:
        raise ModelError("")
    return (heads or kept)[0]


def _ended(walk: Walk, flows: Sequence[Flow | None], letters: tuple[str, str], letter: str) -> None:
    """Join the units of both sides that a sum runs over."""
    known: list[tuple[bool, torch.Tensor]] = []
    for flow, part in zip(flows, letters, strict=True):
        place = part.index(letter)
        if flow is not None and place in places(walk, flow):
            known.append((flow.zero, flow.along(place, walk.units)))
    if not known:
        return
    if len(known) < 2 or len(known[0][1]) != len(known[1][1]):
        raise ModelError("it meets what has no such units")
    walk.units.join(known[0][1], known[1][1])
    if not any(zero for zero, _ in known):
        raise ModelError("it is not zero where it is summed")
