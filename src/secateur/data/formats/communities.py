"""A random graph of communities."""

from __future__ import annotations

from secateur.data import graphs
from secateur.data.hold import hold_out
from secateur.data.sources import Source


def load(argument: str, seed: int) -> Source:
    """`communities`: nodes of a random graph with their neighbourhoods; the 10 communities are natural ids.

    Reference: stochastic block model of networkx; stands in for the subgraphs of FED-PUB, arXiv 2206.10206
    """
    del argument
    x, y, ids = graphs.communities(seed)
    train, test = hold_out(y, seed)
    return Source("communities", x[train], y[train], x[test], y[test], ids[train], graphs.CLASSES, "tabular", 1.0)
