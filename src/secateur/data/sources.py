"""Data sources: a specification such as ``idx:FOLDER`` is loaded as arrays with a training and a test part.

The part before the colon names a format, a module of ``secateur.data.formats``.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from secateur.data import formats, held
from secateur.data.source import DataInfo, Kind, Source
from secateur.data.validate import checked
from secateur.errors import DataError, SecateurError, unknown

__all__ = ["DataInfo", "Kind", "Source", "embedded", "folder_of", "load", "names", "read_options", "recommended"]

Options = TypeVar("Options")


_IDX = "idx:FOLDER with its four files (train-images-idx3-ubyte ...) in FOLDER, or hub:{}"
_CIFAR10 = "cifar10:FOLDER with the files of its binary version in FOLDER, or hub:uoft-cs/cifar10"
_WRITTEN = {
    "mnist": _IDX.format("ylecun/mnist"),
    **dict.fromkeys(("fashionmnist", "fmnist"), _IDX.format("zalando-datasets/fashion_mnist")),
    **dict.fromkeys(("cifar", "cifar10"), _CIFAR10),
    "cifar100": "hub:uoft-cs/cifar100",
    "shakespeare": "text:FILE with the plays in FILE",
    "csv": "table:FILE.csv",
    "parquet": "table:FILE.parquet",
    "npz": "arrays:FILE.npz",
}
"""What to write for data that are called by their own names: letters and figures of the name only."""


def names() -> dict[str, DataInfo]:
    """Return the formats of this package by name, those that need no folder first."""
    infos = {}
    for module in pkgutil.iter_modules(formats.__path__):
        doc = inspect.cleandoc(_format(module.name).__doc__ or "")
        summary, _, rest = doc.partition("\n")
        written, _, text = summary.partition(": ")
        reference = " ".join(rest.partition("Reference: ")[2].split())
        infos[module.name] = DataInfo(written.strip("`"), text, reference)
    return dict(sorted(infos.items(), key=lambda item: (_needs_place(item[1]), item[0])))


def embedded() -> frozenset[str]:
    """Return the names of the formats that read no file of the user's."""
    return frozenset(name for name, info in names().items() if not _needs_place(info))


def recommended(spec: str) -> Mapping[str, Mapping[str, Any]]:
    """Return the settings, by section, that a format recommends where a study does not set them itself."""
    name, _, argument = spec.partition(":")
    if name == held.NAME:
        return held.recommended(argument)
    if name not in {module.name for module in pkgutil.iter_modules(formats.__path__)}:
        return {}
    return getattr(importlib.import_module(f"{formats.__name__}.{name}"), "RECOMMENDED", {})


def _needs_place(info: DataInfo) -> bool:
    return ":" in info.name


def _format(name: str) -> Callable[..., Source]:
    """Return the loader of one of this package's formats."""
    load_format: Callable[..., Source] = importlib.import_module(f"{formats.__name__}.{name}").load
    return load_format


def load(
    spec: str, *, seed: int, whole: bool = True, task: str = "", options: Mapping[str, object] = MappingProxyType({})
) -> Source:
    """Return the data set that a specification names, validated: see ``validate.checked``.

    Args:
        spec: a name of ``names``, with the folder or file that it needs, such as ``digits`` or ``idx:FOLDER``; or your
            own ``module:function:FOLDER``, whose function gets (folder, seed) and returns a ``Source``.
        seed: the seed that draws a test part where the data set has none.
        whole: refuse a data set without a test part; a single node's own rows need none.
        task: what is learnt, where that is not what the loader says.
        options: the fields of the dataclass that a loader's third parameter is annotated with, such as
            ``TableOptions``; a loader with two parameters takes none.

    Raises:
        DataError: unknown format or option, files that are missing or malformed, or arrays that cannot be learnt from.
        MissingExtraError: a package that the format needs is not installed.
    """
    name, _, argument = spec.partition(":")
    known = names()
    if name in known:
        if _needs_place(known[name]) and not argument:
            raise DataError(f"data {spec!r}: say where it is, as {known[name].name}")
        source = _call(_format(name), name, argument, seed, options, task)
    elif name == held.NAME and argument:
        source = _call(held.find(argument).load, name, argument, seed, options, task)
    elif argument:
        source = _load_with(name, *argument.partition(":")[::2], seed, options)
    elif name and Path(spec).expanduser().exists():
        raise DataError(f"data {spec!r} is a path: write what it is before it, such as table:{spec} or images:{spec}")
    elif (usual := _WRITTEN.get("".join(filter(str.isalnum, name.lower())))) is not None:
        raise DataError(f"data {spec!r}: write {usual}")
    else:
        raise unknown("data source", name, known, error=DataError)
    return checked(replace(source, task=task) if task else source, spec, whole=whole)


def _call(
    loader: Callable[..., Source], name: str, argument: str, seed: int, options: Mapping[str, object], task: str = ""
) -> Source:
    """Call a loader with the options that it takes, and with what is learnt, if they have it.

    Raises:
        DataError: it takes no such option, or not such a value.
    """
    kind = _kind(loader)
    if kind is None:
        if options:
            raise DataError(
                f"data option {next(iter(options))!r}: data {name!r} takes no options, nor names of columns"
            )
        return loader(argument, seed)
    if task in {"classification", "regression"} and "task" in get_type_hints(kind):
        options = {"task": task, **options}
    return loader(argument, seed, read_options(kind, options, name))


def read_options(kind: type[Options], options: Mapping[str, object], name: str) -> Options:
    """Return a loader's options of what a study says of its data.

    Args:
        kind: the dataclass of the options.
        options: values by field, numbers also as text.
        name: of the data, for messages.

    Raises:
        DataError: there is no such option, or it takes no such value.
    """
    hints = get_type_hints(kind)
    strange = next((option for option in options if option not in hints), None)
    if strange is not None:
        raise unknown(f"option of data {name}", strange, hints, error=DataError)
    given = {option: _as(hints[option], value) for option, value in options.items()}
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as broken:
        first = broken.errors()[0]
        path, wrong = ".".join(map(str, first["loc"])), first["msg"]
        raise DataError(f"data option {path} = {first['input']!r}: {wrong[0].lower()}{wrong[1:]}") from broken


def _kind(loader: Callable[..., Source]) -> type[Any] | None:
    """Return the dataclass of the options that a loader takes; None: it takes none."""
    third = list(inspect.signature(loader).parameters)[2:3]
    kind = get_type_hints(loader).get(third[0]) if third else None
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def options_of(spec: str) -> frozenset[str]:
    """Return the names of the options that a format of this package, or rows that are held here, take."""
    name, _, argument = spec.partition(":")
    if name != held.NAME and name not in names():
        return frozenset()
    kind = _kind(held.find(argument).load if name == held.NAME else _format(name))
    return frozenset(get_type_hints(kind)) if kind else frozenset()


def options_kind(name: str) -> type[Any] | None:
    """Return the dataclass of the options that a format of this package takes; None: it takes none."""
    return _kind(_format(name))


def _as(hint: object, value: object) -> object:
    """Return an option's value as text, or a tuple of texts where its type is one, for pydantic to make numbers of."""
    if get_origin(hint) is tuple:
        return tuple(map(str, value)) if isinstance(value, tuple | list) else (str(value),)
    return str(value)


def _load_with(module: str, function: str, folder: str, seed: int, options: Mapping[str, object]) -> Source:
    """Return what a user's own loader returns; an error of any kind is raised as a DataError that names the loader."""
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name != module.partition(".")[0]:
            raise DataError(f"data {module}:{function}: {missing}") from missing
        raise unknown("data source", module, names(), error=DataError) from missing
    except SecateurError:
        raise
    except Exception as broken:  # importing runs anyone's code
        raise DataError(f"data {module}:{function}: importing {module} failed: {_line(broken)}") from broken
    try:
        source = _call(getattr(loaded, function), f"{module}:{function}", folder, seed, options)
    except SecateurError:
        raise
    except (Exception, SystemExit) as broken:
        raise DataError(f"data {module}:{function}: {_line(broken)}") from broken
    if not isinstance(source, Source):
        raise DataError(f"data {module}:{function} returned {type(source).__name__}, not a secateur.data.Source")
    return source


def _line(broken: BaseException) -> str:
    return f"{type(broken).__name__}: {' '.join(str(broken).split())}"


def folder_of(argument: str, name: str) -> Path:
    """Return the folder that the argument of a format names.

    Raises:
        DataError: there is no such folder.
    """
    folder = Path(argument).expanduser()
    if not folder.is_dir():
        raise DataError(f"data {name}:{argument}: there is no such folder")
    return folder
