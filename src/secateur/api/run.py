"""``secateur.run``: one study of a person's own model and rows, or of named ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from secateur.api.given import Given, given
from secateur.api.progress import of_runs
from secateur.api.result import Result
from secateur.errors import ConfigError
from secateur.federation import prepare, server
from secateur.federation.folder import DENSE, STUDY, SUMMARY, new_folder, read_study, reserve
from secateur.federation.opening import OpenEngine, forking, open_local
from secateur.study.options import dotted
from secateur.study.runtime import Runtime
from secateur.study.study import Study

_SHOWN = 3


@dataclass(frozen=True)
class Ways:
    """What of ``run``'s arguments changes no bit of a result, beside whether dense FedAvg runs too."""

    progress: bool | None = None
    workers: int | None = None
    deadline: float | None = None
    dense: bool = False


def run(
    method: str = "autoflip", model: object = None, clients: object = None, test: object = None, *,
    data: object = None, out: str | Path | None = None, settings: Mapping[str, Any] | None = None, **named: Any,
) -> Result:  # fmt: skip
    """Train and prune a model across simulated clients; return the result.

    It works in a script, in a notebook and from standard input, without ``if __name__ == "__main__":``. A model and
    rows that are objects stay as they are: the run works on copies, in processes that are forked from this one where
    that is safe (Linux without a GPU), else in this one.

    Args:
        method: a name of ``secateur list``, or the dotted path of your own.
        model: a ``torch.nn.Module``, whose weights are what training begins with, for every seed; a class or a function
            that makes one, without arguments or as ``make(input_shape, outputs)``, whose weights each seed draws anew;
            or a name of ``secateur list``; None: a small default. ``init="xavier_normal"`` draws the weights of either
            anew.
        clients: the rows of each client, ``[(x, y), ...]`` or ``{"site": (x, y), ...}``, as arrays, tensors, lists or
            data sets of torch, or as data frames (with ``target="column"``); or how many clients share ``data``.
        test: ``(x, y)`` of the server's test set; None: a seeded fifth of all rows.
        data: ``(x, y)`` to be divided between clients (``partition="dirichlet:0.5"``; default iid); a data frame, with
            ``site="column"``; or the name of a data source, such as ``"digits"`` or ``"table:file.csv"``.
        out: the run's folder; default: runs/METHOD-HASH, with a number if that exists. A folder with a run of the same
            study and objects is gone on with, and the result of a finished one returned.
        settings: settings by path, as ``{"schedule.sparsity": 0.9}``.
        named: settings too, by the last part of their path where it is that of one path: ``rounds=20``, ``lr=0.1``,
            ``sparsity=0.9``, ``seed=1``. And ``progress`` (a bar: True, False, or by itself in a terminal or a
            notebook), ``workers`` (processes; 0: train in this one), ``deadline`` (seconds of a round), and ``dense``
            (whether dense FedAvg is trained beside it, for comparison).

    Raises:
        SecateurError: something cannot be used, in one line, before anything is trained; or the run ended without a
            result.

    Example:
        >>> import secateur
        >>> from sklearn.datasets import load_digits
        >>> x, y = load_digits(return_X_y=True)
        >>> result = secateur.run("fedsparsify", "mlp", 10, data=(x / 16, y), rounds=20, sparsity=0.9)  # doctest: +SKIP
        >>> result.score, result.sparsity, result.model, result.folder  # doctest: +SKIP
    """
    ways = Ways(**{one.name: named.pop(one.name) for one in fields(Ways) if one.name in named})
    objects = given(model, clients, test, data)
    study = objects.study(method, {**(settings or {}), **named})
    folder = _folder(study, None if out is None else Path(out))
    kept = (objects.rows.held, objects.model)
    plan = [(folder, study)] + ([(folder / DENSE, study.dense())] if ways.dense else [])
    if not all((place / SUMMARY).exists() for place, _ in plan):
        _play(plan, objects, ways)
    return Result(folder, *kept)


def _play(plan: list[tuple[Path, Study]], objects: Given, ways: Ways) -> None:
    """Make the runs of some folders, as far as they are not there yet."""
    runtime, open_engine = _engine(objects, ways)
    with prepare.federation(plan[0][1]) as shards, of_runs(ways.progress) as watch:
        for place, part in plan:
            server.Run(part, runtime, place, shards)  # what does not fit is refused before anything is written
        for place, part in plan:
            reserve(place, part)
            name = part.method if place == plan[0][0] else "dense fedavg"
            server.resume(
                place, runtime, shards=shards, watch=watch(name, part.rounds), open_engine=open_engine
            )  # fmt: skip


def _engine(objects: Given, ways: Ways) -> tuple[Runtime, OpenEngine]:
    """Return how fast, and by which processes, clients are served: by those that have the model, if it is an object."""
    counted = {} if ways.workers is None else {"workers": ways.workers}
    runtime = Runtime(deadline=ways.deadline, **counted)
    if objects.model is None:
        return runtime, open_local
    start = forking()
    if start is None:
        return Runtime(workers=0, deadline=ways.deadline), open_local
    return runtime, partial(open_local, start=start)


def _folder(study: Study, out: Path | None) -> Path:
    """Return the folder of a study's run, which may hold the beginning of it.

    Raises:
        ConfigError: it holds something else.
    """
    if out is None or not (out / STUDY).exists():
        if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"out = {str(out)!r} is not empty, and holds no run: give another folder")
        return new_folder(study, out)
    earlier = read_study(out)
    if earlier.hash() != study.hash():
        raise ConfigError(f"out = {str(out)!r} holds another run: {_differences(earlier, study)}; give another folder")
    return out


def _differences(earlier: Study, study: Study) -> str:
    before, now = (dotted(one.complete().model_dump(mode="json")) for one in (earlier, study))
    paths = [path for path in {**before, **now} if before.get(path) != now.get(path)]
    told = [f"{path.removeprefix('options.')} was {before.get(path)!r}, is {now.get(path)!r}" for path in paths]
    if any(str(now.get(path)).startswith("memory:") for path in paths):
        told.append("objects are the same if their code and every number are: seed a model's weights before it is made")
    return "; ".join([*told[:_SHOWN], *([f"and {len(told) - _SHOWN} more"] if len(told) > _SHOWN else [])])
