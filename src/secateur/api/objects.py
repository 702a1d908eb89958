"""Rows as people have them: arrays, lists, tensors, data sets of torch, for each client or to be divided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from secateur.data.held import Held, HeldArrays, HeldTables
from secateur.errors import ConfigError, DataError

Pair = tuple[np.ndarray, np.ndarray]
_PAIR = 2
_MOST_NAMES = 20
_HOW = (
    "give clients=[(x, y), ...], one pair for each client, or data=(x, y) with clients=20 and partition='dirichlet:0.5'"
)


@dataclass(frozen=True)
class Rows:
    """Rows of a federation, as a study names them.

    Attributes:
        settings: the study's settings that follow from them, by path.
        held: the rows themselves; None where the study names a data source.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    held: Held | None = None


def rows_of(clients: object, test: object, data: object) -> Rows:
    """Return the rows that somebody gives, held for as long as the result is kept.

    Args:
        clients: the rows of each client, in a list or by the names of sites; or how many clients share ``data``.
        test: the server's test rows; None: a seeded fifth of all rows, drawn evenly from the classes.
        data: rows that are divided between clients, or the name of a data source; None: digits, or ``clients``. Rows
            may be data frames of pandas too, whose column to learn is ``data.target``.

    Raises:
        ConfigError: they are given in two ways, or in none that is known.
        DataError: rows do not fit together.
    """
    count = None if clients is None or isinstance(clients, Iterable) else _whole(clients)
    number = {} if count is None else {"data.clients": count}
    if data is None and (clients is None or count is not None):
        data = "digits" if test is None else _nothing(test)
    if isinstance(data, str):
        if isinstance(clients, Iterable) or test is not None:
            raise ConfigError(
                f"data = {data!r} has training and test rows of its own: leave out clients' rows and test"
            )
        return Rows({"data.source": data, **number})
    if data is not None and isinstance(clients, Iterable):
        raise ConfigError(f"rows are given twice, as data and as clients: {_HOW}")
    if _is_frame(data) or (data is None and any(map(_is_frame, _values(clients)))):
        return _tables(clients, test, data, number)
    if data is not None:
        pairs, remarks = [pair(data, "data")], tuple[str, ...]()
        settings: dict[str, Any] = {"data.partition": "iid", **number}
    else:
        pairs, remarks = _of_clients(cast("Iterable[object]", clients))
        settings = {"data.partition": "natural", "data.clients": len(pairs)}
    held = HeldArrays(_together(pairs, test, natural=data is None), remarks)
    return Rows({"data.source": held.source, **settings}, held)


def _tables(clients: object, test: object, data: object, number: Mapping[str, Any]) -> Rows:
    """Return data frames as rows: their columns become inputs by a schema on which the sites agree."""
    if test is not None:
        raise ConfigError("test goes with arrays: of data frames each site holds out test rows of its own")
    names = list(map(str, clients)) if isinstance(clients, Mapping) else [f"{k}" for k in range(len(_values(clients)))]
    frames = {"data": data} if data is not None else dict(zip(names, _values(clients), strict=True))
    for name, frame in frames.items():
        if not _is_frame(frame):
            raise DataError(f"client {name} is {_described(frame)}, others are data frames: give all in one form")
    held = HeldTables(frames)
    settings = {"data.partition": "iid", **number} if number else {"data.partition": "natural"}
    settings |= {"data.clients": len(frames)} if data is None else {}
    return Rows({"data.source": held.source, **settings}, held)


def _is_frame(given: object) -> bool:
    """Return whether something is a table of pandas."""
    return type(given).__module__.partition(".")[0] == "pandas" and hasattr(given, "columns")


def _values(clients: object) -> list[Any]:
    if _is_frame(clients) or not isinstance(clients, Iterable):
        return []
    return list(clients.values()) if isinstance(clients, Mapping) else list(clients)


def pair(given: object, where: str) -> Pair:
    """Return inputs and targets as two arrays of one length.

    Args:
        given: ``(x, y)``, or a data set of torch whose items are ``(x, y)``; it is read once, so that transforms that
            draw at random are drawn once.
        where: what it is called in messages.

    Raises:
        DataError: it is neither, or its parts are of different lengths.
    """
    if isinstance(given, torch.utils.data.IterableDataset):
        raise DataError(
            f"{where} is a {type(given).__name__}, which has no length: give a data set with items by number"
        )
    if isinstance(given, torch.utils.data.DataLoader):
        given = given.dataset
    if isinstance(given, torch.utils.data.Dataset):
        given = _read(given, where)
    if not isinstance(given, tuple | list) or len(given) != _PAIR:
        raise DataError(f"{where} is {_described(given)}, and (x, y) is expected: {_HOW}")
    x, y = (array(part, f"{where}, {name}") for part, name in zip(given, "xy", strict=True))
    if not x.ndim or not y.ndim:
        raise DataError(f"{where} holds single numbers, and (x, y) is expected, two arrays with a row for each example")
    if len(x) != len(y):
        raise DataError(f"{where}: x has {len(x)} rows, y has {len(y)}; each row needs both")
    if not len(x):
        raise DataError(f"{where} has no rows: leave it out, or give it some")
    return x, y


def array(given: object, where: str) -> np.ndarray:
    """Return an array, a tensor, a series or nested lists as an array.

    Raises:
        DataError: they are no array.
    """
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = given.float() if given.dtype == torch.bfloat16 else given
    try:
        found = np.asarray(given)
    except (ValueError, TypeError, RuntimeError) as broken:
        line = " ".join(str(broken).split())[:150]
        raise DataError(f"{where} is no array ({line}): give rows of one length") from broken
    if found.dtype.kind == "O" and found.size and all(isinstance(word, str) for word in found.flat):
        return found.astype(np.str_)
    return found


def _of_clients(clients: Iterable[object]) -> tuple[list[Pair], tuple[str, ...]]:
    """Return each client's rows, and a remark on which client is which site."""
    named = isinstance(clients, Mapping)
    entries = _values(clients)
    if not entries:
        raise DataError(f"clients is empty: {_HOW}")
    names = [str(name) for name in clients] if named else [str(number) for number in range(len(entries))]
    pairs = [pair(entry, f"client {name}") for entry, name in zip(entries, names, strict=True)]
    for (x, y), name in zip(pairs, names, strict=True):
        if x.shape[1:] != pairs[0][0].shape[1:]:
            raise DataError(
                f"client {name} has rows of shape {x.shape[1:]}, client {names[0]} of {pairs[0][0].shape[1:]}: "
                "give all the same"
            )
        if (y.dtype.kind == "U") != (pairs[0][1].dtype.kind == "U"):
            raise DataError(
                f"of clients {names[0]} and {name} one has words as labels, the other numbers: give one kind"
            )
    shown = ", ".join(f"{number} {name}" for number, name in enumerate(names[:_MOST_NAMES]))
    return pairs, (f"clients are {shown}{', ...' if len(names) > _MOST_NAMES else ''}",) if named else ()


def _together(pairs: Sequence[Pair], test: object, *, natural: bool) -> dict[str, np.ndarray]:
    """Return all rows as arrays of the format ``arrays``."""
    x, y = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    ids = {"ids": np.repeat(np.arange(len(pairs)), [len(part) for _, part in pairs])} if natural else {}
    if test is None:
        return {"x": x, "y": y, **ids}
    x_test, y_test = pair(test, "test")
    if x_test.shape[1:] != x.shape[1:]:
        raise DataError(f"test has rows of shape {x_test.shape[1:]}, the clients of {x.shape[1:]}: give all the same")
    return {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test, **ids}


def _read(given: torch.utils.data.Dataset[Any], where: str) -> tuple[object, object]:
    """Return the items of a data set of torch as two arrays."""
    if type(given) is torch.utils.data.TensorDataset and len(given.tensors) == _PAIR:
        return given.tensors[0], given.tensors[1]
    if not isinstance(given, Sized) or not len(given):
        raise DataError(f"{where}, a {type(given).__name__}, has no rows")
    items = [given[number] for number in range(len(given))]
    strange = next(
        (n for n, item in enumerate(items) if not isinstance(item, tuple | list) or len(item) != _PAIR), None
    )
    if strange is not None:
        raise DataError(
            f"{where}, item {strange} of the {type(given).__name__} is {_described(items[strange])}, not (x, y)"
        )
    x, y = ([array(item[part], where) for item in items] for part in range(_PAIR))
    odd = next((number for number, row in enumerate(x) if row.shape != x[0].shape), None)
    if odd is not None:
        raise DataError(f"{where}, item {odd} has shape {x[odd].shape}, item 0 has {x[0].shape}: give all the same")
    return np.stack(x), np.stack(y)


def _whole(clients: object) -> int:
    if isinstance(clients, bool) or not isinstance(clients, int | np.integer):
        raise ConfigError(f"clients is {_described(clients)}: {_HOW}")
    return int(clients)


def _nothing(test: object) -> object:
    raise ConfigError(f"test is {_described(test)}, and nobody has training rows: {_HOW}")


def _described(given: object) -> str:
    shape = getattr(given, "shape", None)
    if shape is not None:
        return f"a {type(given).__name__} of shape {tuple(shape)}"
    size = f" of {len(given)}" if isinstance(given, Sized) and not isinstance(given, str) else ""
    return f"a {type(given).__name__}{size}"
