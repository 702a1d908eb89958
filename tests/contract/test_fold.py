"""Folding: whoever joins which neighbours, and in whatever order, the expression that comes out is the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.contract.fold import ARITY, Fold, Node, nodes


def fours(parts):
    """Join neighbours four by four until one is left, as the docstring says; None stands for no part."""
    while len(parts) > 1:
        groups = [[p for p in parts[start : start + 4] if p is not None] for start in range(0, len(parts), 4)]
        parts = [None if not group else group[0] if len(group) == 1 else f"({'+'.join(group)})" for group in groups]
    return parts[0]


class Written:
    """A fold that writes down what it joined."""

    def __init__(self, total):
        self.fold = Fold(total, self.join)

    def join(self, sums, part):
        mine = [] if sums is None else sums
        return [*mine, closed(part)]


def closed(part):
    """Return a part as one term: a list of terms in brackets, but a single one as it is."""
    if isinstance(part, str):
        return part
    return part[0] if len(part) == 1 else f"({'+'.join(part)})"


@st.composite
def splits(draw):
    """Draw a cohort, who of it is missing, and a cut into runs of neighbours."""
    total = draw(st.integers(1, 90))
    missing = draw(st.sets(st.integers(0, total - 1), max_size=total))
    cuts = sorted(draw(st.sets(st.integers(1, total), max_size=8)) | {total})
    return total, missing, list(zip([0, *cuts], cuts, strict=False))


@given(splits(), st.randoms(use_true_random=False))
def test_no_split_and_no_order_changes_the_expression(split, order):
    total, missing, runs = split
    leaves = [None if k in missing else f"x{k}" for k in range(total)]
    parts = []
    for start, end in runs:
        for node in nodes(start, end - start, total):
            inner = Written(min(node.most, total - node.first))
            for place in range(min(node.most, total - node.first)):
                inner.fold.put(Node(0, place), leaves[node.first + place])
            found = inner.fold.result()
            parts.append((node, None if found is None else closed(found)))
    assert sorted(k for node, _ in parts for k in range(node.first, min(total, node.first + node.most))) == list(
        range(total)
    )
    order.shuffle(parts)
    whole = Written(total)
    for node, part in parts:
        whole.fold.put(node, part)
    found = whole.fold.result()
    assert (None if found is None else closed(found)) == fours(leaves)
    assert whole.fold.waiting == 0


def test_nodes_are_the_largest_that_fit():
    assert list(nodes(0, 64, 100)) == [Node(3, 0)]
    assert list(nodes(64, 36, 100)) == [Node(3, 1)]
    assert list(nodes(64, 35, 100)) == [Node(2, 4), Node(2, 5), Node(0, 96), Node(0, 97), Node(0, 98)]
    assert list(nodes(3, 6, 100)) == [Node(0, 3), Node(1, 1), Node(0, 8)]
    assert list(nodes(96, 1, 97)) == [Node(2, 6)]
    assert list(nodes(0, 3, 3)) == [Node(1, 0)]
    assert list(nodes(0, 1, 1)) == [Node(0, 0)]


def test_what_cannot_be_joined_is_refused():
    fold = Fold(3, lambda sums, part: part if sums is None else sums + part)
    with pytest.raises(ValueError, match="some leaves are missing"):
        fold.result()
    for place in (2, 0):
        fold.put(Node(0, place), 1)
        with pytest.raises(ValueError, match="was added before"):
            fold.put(Node(0, place), 1)
    for node in (Node(0, 3), Node(2, 0)):
        with pytest.raises(ValueError, match="none of a tree with 3 leaves"):
            fold.put(node, 1)
    fold.put(Node(0, 1), 1)
    assert fold.result() == 3
    with pytest.raises(ValueError, match="was added before"):
        fold.put(Node(0, 1), 1)


def test_memory_holds_a_few_sums_whatever_the_cohort():
    held = []
    fold = Fold(1000, lambda sums, part: part if sums is None else sums + part)
    for place in range(1000):
        fold.put(Node(0, place), 1)
        held.append(sum(siblings.sum is not None for siblings in fold._open.values()) + fold.waiting)
    assert fold.result() == 1000
    assert max(held) == 5  # levels of a tree of four with a thousand leaves
    assert ARITY == 4
