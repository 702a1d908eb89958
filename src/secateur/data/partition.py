"""Partitions: rows are split between clients by the partitioners of ``flwr-datasets``."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import math
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch

from secateur.errors import ConfigError, DataError, check, need
from secateur.streams import derive, stream

_SMALLEST = 2
_WRITTEN = "iid, dirichlet:ALPHA, pathological:CLASSES or natural"


def parse(spec: str) -> tuple[str, float]:
    """Return the kind of a partition and its number, 0 if it takes none.

    Raises:
        ConfigError: not one of the four kinds, or a number out of bounds.
    """
    kind, _, text = spec.partition(":")
    try:
        value = float(text) if text else 0.0
    except ValueError:
        value = -1.0
    fits = {
        "iid": not text,
        "natural": not text,
        "dirichlet": 0 < value < math.inf,
        "pathological": value >= 1 and value.is_integer(),
    }
    if not fits.get(kind, False):
        raise ConfigError(f"data.partition = {spec!r}: write {_WRITTEN}, for example dirichlet:0.5 or pathological:2")
    return kind, value


def partition(labels: np.ndarray, ids: np.ndarray | None, spec: str, *, clients: int, seed: int) -> list[np.ndarray]:
    """Return the row numbers of each client, ascending.

    ``natural`` with 0 clients has a client for each id.

    ``iid`` and ``dirichlet`` give every row to one client; with ``dirichlet`` clients differ in size, and have at least
    2 rows each. ``pathological:K`` gives client i the class i mod C and K - 1 random others; rows of a class that no
    client drew are dropped, which happens only with fewer than C clients. ``natural`` gives each client the rows of one
    id; if there are more ids than clients, it drops the rows of the smallest.

    Args:
        labels: class of each row, shape (n,).
        ids: the natural client of each row, or None.
        spec: the partition's specification, see ``parse``.
        clients: number of clients.
        seed: the run's seed.

    Raises:
        DataError: a partition by class of numbers, more clients than rows or ids, clients that would be left empty, or
            a partition that the library cannot make.
    """
    kind, value = parse(spec)
    check(clients >= (kind != "natural"), name="data.clients", value=clients, must="be at least 1", error=DataError)
    if clients > len(labels):
        raise DataError(f"data.clients = {clients}: there are only {len(labels)} training rows to spread")
    if labels.dtype.kind == "f" and kind in {"dirichlet", "pathological"}:
        raise DataError(f"data.partition = {spec!r} is by class, and the data has numbers to learn: use iid or natural")
    order = torch.randperm(len(labels), generator=stream(seed, "partition")).numpy()
    if kind == "natural":
        return _natural(ids, clients)
    rows = [order[part] for part in _split(labels[order], kind, value, clients, seed)]
    empty = [client for client, part in enumerate(rows) if not len(part)]
    if empty:
        raise DataError(
            f"data.partition = {spec!r} leaves {len(empty)} of {clients} clients without rows "
            f"({', '.join(map(str, empty[:5]))}{', ...' if len(empty) > 5 else ''}): "
            "fewer clients or a larger number helps"
        )
    return [np.sort(part) for part in rows]


def _natural(ids: np.ndarray | None, clients: int) -> list[np.ndarray]:
    if ids is None:
        raise DataError(
            "data.partition = 'natural': this data set has no natural client ids; name the column of sites if it is a "
            "table, or use another partition, such as iid"
        )
    values, counts = np.unique(ids, return_counts=True)
    clients = clients or len(values)
    if clients > len(values):
        raise DataError(
            f"data.clients = {clients}: the data set has {len(values)} natural ids; ask for at most that many"
        )
    largest = values[np.argsort(-counts, kind="stable")[:clients]]
    rows = np.flatnonzero(np.isin(ids, largest))
    datasets, partitioners = _libraries()
    made = partitioners.NaturalIdPartitioner(partition_by="id")
    made.dataset = datasets.Dataset.from_dict({"id": ids[rows], "row": rows})
    found = {}
    with _quiet():
        for number in range(clients):
            part = made.load_partition(number)
            found[part["id"][0]] = np.sort(np.array(part["row"]))
    return [found[value] for value in sorted(found)]


def _split(labels: np.ndarray, kind: str, value: float, clients: int, seed: int) -> list[np.ndarray]:
    if kind == "iid":  # the library's parts, whose own way takes a third of a millisecond for each
        return np.array_split(np.arange(len(labels)), clients)
    datasets, partitioners = _libraries()
    draws = derive(seed, "partitioner") % 2**31
    if kind == "dirichlet":
        made = partitioners.DirichletPartitioner(
            clients, "label", value, min_partition_size=_SMALLEST, self_balancing=False, seed=draws
        )
    else:
        made = partitioners.PathologicalPartitioner(
            clients, "label", int(value), class_assignment_mode="first-deterministic", seed=draws
        )
    made.dataset = datasets.Dataset.from_dict({"label": labels, "row": np.arange(len(labels))})
    try:
        with _quiet():
            return [np.array(made.load_partition(client)["row"], dtype=np.int64) for client in range(clients)]
    except (ValueError, IndexError) as broken:
        message = " ".join(str(broken).split())[:200]
        raise DataError(
            f"data.partition = '{kind}:{value:g}' over {clients} clients cannot be made: {message}"
        ) from broken


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library, which warns of each repeated draw and shows its progress on standard error."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _libraries() -> tuple[Any, Any]:
    with _quiet():  # in a notebook its bars ask for a package that draws them
        datasets = need("datasets", package="flwr-datasets")
    datasets.disable_progress_bars()
    return datasets, _partitioners()


@functools.cache
def _partitioners() -> ModuleType:
    """Return ``flwr_datasets.partitioner``, imported without its package, which loads matplotlib and seaborn.

    Those take longer to import than everything else that a first round needs. A later import gets the whole package.
    """
    name, found = "flwr_datasets", importlib.util.find_spec("flwr_datasets")
    if found is not None and name not in sys.modules:
        sys.modules[name] = importlib.util.module_from_spec(found)
        try:
            with contextlib.suppress(ImportError):  # a version whose partitioners need the rest
                return importlib.import_module(f"{name}.partitioner")
        finally:
            _forget(name)
    return need(f"{name}.partitioner", package="flwr-datasets")


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
