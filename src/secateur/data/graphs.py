"""Graphs as rows: each row is a node of a random graph with the neighbourhood that two graph convolutions see."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from secateur.errors import need
from secateur.streams import derive, stream

COMMUNITIES, CLASSES, FEATURES, NEIGHBOURS = 10, 5, 16, 16
_NODES = 160  # of a community
_LIKE, _UNLIKE = 0.12, 0.02  # chance of an edge to a node of the same class, of another, within a community
_NOISE = 3.0


def communities(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows, classes and communities of the nodes of a stochastic block model.

    A block is the nodes of one class in one community. Each community draws its proportions of classes uniformly.
    Features are the mean of the class with noise. Odd and even communities have different means, so that there are two
    kinds of client. There are no edges between communities: no client sees another's nodes.

    Returns:
        rows (n, 16, 32) float32, see ``neighbourhood``; classes (n,) int64; community of each (n,) int64.
    """
    nx = need("networkx", package="networkx")
    draw = stream(seed, "communities")
    exponential = -torch.rand(COMMUNITIES, CLASSES, generator=draw, dtype=torch.float64).clamp(min=1e-12).log()
    shares = exponential / exponential.sum(1, keepdim=True)
    sizes = (shares * _NODES).round().clamp(min=1).int().numpy()
    means = torch.randn(2, CLASSES, FEATURES, generator=draw).numpy()
    rows, classes, homes = [], [], []
    for home in range(COMMUNITIES):
        chances = np.where(np.eye(CLASSES, dtype=bool), _LIKE, _UNLIKE)
        graph = nx.stochastic_block_model(
            sizes[home].tolist(), chances.tolist(), seed=derive(seed, "edges", home) % 2**31
        )
        kinds = np.repeat(np.arange(CLASSES), sizes[home])
        features = means[home % 2][kinds] + _NOISE * torch.randn(len(kinds), FEATURES, generator=draw).numpy()
        edges = {node: sorted(graph.neighbors(node)) for node in graph}
        rows += [neighbourhood(edges, features, node) for node in range(len(kinds))]
        classes.append(kinds)
        homes.append(np.full(len(kinds), home))
    return np.stack(rows), np.concatenate(classes).astype(np.int64), np.concatenate(homes).astype(np.int64)


def neighbourhood(edges: Mapping[int, Iterable[int]], features: np.ndarray, node: int) -> np.ndarray:
    """Return the neighbourhood of a node within two steps, at most 16 nodes: (16, features + 16) float32.

    The node itself comes first, then the nearest. Each row has a node's features and its row of the adjacency matrix
    with self-loops; unused rows are 0.
    """
    order, far = [node], {node: 0}
    waiting = deque(order)
    while waiting and len(order) < NEIGHBOURS:
        here = waiting.popleft()
        for other in edges[here]:
            if other not in far and far[here] < 2 and len(order) < NEIGHBOURS:
                far[other] = far[here] + 1
                order.append(other)
                waiting.append(other)
    place = {other: at for at, other in enumerate(order)}
    found = np.zeros((NEIGHBOURS, features.shape[1] + NEIGHBOURS), np.float32)
    found[: len(order), : features.shape[1]] = features[order]
    for other, at in place.items():
        found[at, features.shape[1] + at] = 1
        for further in edges[other]:
            if further in place:
                found[at, features.shape[1] + place[further]] = 1
    return found
