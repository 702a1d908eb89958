"""Method options: dotted paths such as ``schedule.sparsity`` into a tree of frozen dataclasses.

A field of a dataclass is an option. A field that holds another dataclass is a slot: its own path selects the slot's
class by name, and longer paths set the fields of that class.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from secateur.aggregation import Aggregator
from secateur.errors import ConfigError, SecateurError, check_verbs, unknown, verbs

Made = typing.TypeVar("Made")

Option = bool | int | float | str


def snake(name: str) -> str:
    """Return the option value of a class name: ``ServerMomentum`` -> ``server_momentum``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@functools.cache  # rooms are listed once; a comparison asks for each of its studies
def choices(slot: type) -> Mapping[str, type]:
    """Return the classes that a slot's type allows, by option value: those of its module with its verbs, or the type.

    Where a slot's type stands at the head of a room, as ``Aggregator`` does, those of all files of the room.

    >>> from secateur.aggregation import Aggregator
    >>> {'fed_adam', 'mean', 'median'} <= set(choices(Aggregator))
    True
    """
    if dataclasses.is_dataclass(slot):
        return {snake(slot.__name__): slot}
    wanted = verbs(slot)
    home = sys.modules[slot.__module__]
    room = [f"{home.__name__}.{info.name}" for info in pkgutil.iter_modules(getattr(home, "__path__", ()))]
    modules = [home, *map(importlib.import_module, room)]
    return {
        snake(name): thing
        for module in modules
        for name, thing in inspect.getmembers(module, inspect.isclass)
        if dataclasses.is_dataclass(thing)
        and not name.startswith("_")
        and thing.__module__ == module.__name__
        and wanted <= set(dir(thing))
        and not inspect.isabstract(thing)
    }


def dotted(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping by dotted path: ``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under their names of today: ``schedule.rewind`` of earlier studies is ``recovery.round``.

    >>> renamed({"schedule": "geometric", "schedule.rewind": 2})
    {'schedule': 'geometric', 'recovery': 'rewind', 'recovery.round': 2}
    """
    now = {path: value for path, value in options.items() if path != "schedule.rewind"}
    if str(options.get("schedule.rewind", -1)) != "-1":  # -1: survivors stayed as they were, which is the default
        now |= {"recovery": "rewind", "recovery.round": options["schedule.rewind"]}
    return now


_LATER: tuple[tuple[str, Option], ...] = (("criterion.merge", "mean"), ("consensus.floor", 0.0))
"""Options that came later than the first runs, with their defaults, which do not rename a run."""


def naming(options: Mapping[str, Option]) -> dict[str, Option]:
    """Return a method's complete options as they enter the hash: under the names that results were first named by.

    >>> naming({"schedule": "geometric", "recovery": "rewind", "recovery.round": 2})
    {'schedule': 'geometric', 'schedule.rewind': 2}
    """
    options = {path: value for path, value in options.items() if (path, value) not in _LATER}
    geometric, recovery = options.get("schedule") == "geometric", options.get("recovery")
    if recovery == "rewind" and geometric:
        earlier: dict[str, Option] = {"schedule.rewind": options["recovery.round"]}
    elif recovery == "fine_tune":
        earlier = {"schedule.rewind": -1} if geometric else {}
    else:
        return dict(options)
    return {path: value for path, value in options.items() if path.split(".")[0] != "recovery"} | earlier


def build(cls: type[Made], options: Mapping[str, Option], elsewhere: Iterable[str] = ()) -> Made:
    """Return ``cls()`` with its options set by path; a slot is set before the options inside it.

    Args:
        cls: a frozen dataclass.
        options: values by path.
        elsewhere: paths of other settings, which an unknown option may have been meant to be.

    Raises:
        ConfigError: an option is unknown, or its value is wrong.
    """
    made: Made = _construct(cls, {}, cls.__name__)
    for path in sorted(options, key=lambda p: (p.count("."), p)):
        if "." not in path and path not in _values(made):
            ends = [one for one in (*flatten(made), *elsewhere) if one.rpartition(".")[2] == path]
            if ends:
                raise ConfigError(f"unknown option of {cls.__name__} {path!r}: did you mean {' or '.join(ends)}?")
        made = _replace(made, path.split("."), options[path], path)
    return made


def _replace(owner: Any, path: list[str], value: Option, full: str) -> Any:
    names = {f.name for f in dataclasses.fields(owner)}
    if path[0] not in names:
        prefix = full.removesuffix(".".join(path))
        raise unknown(f"option of {type(owner).__name__}", prefix + path[0], [prefix + name for name in names])
    hint = _hints(owner.__class__)[path[0]]
    current = getattr(owner, path[0])
    if len(path) > 1:
        if not dataclasses.is_dataclass(current):
            raise ConfigError(f"option {full!r}: {path[0]!r} is a single value and has no {path[1]!r}")
        new = _replace(current, path[1:], value, full)
    elif dataclasses.is_dataclass(current):
        slot = _slot_class(hint, str(value), full)
        new = current if type(current) is slot else _construct(slot, {}, full)
        if isinstance(new, Aggregator) and isinstance(current, Aggregator) and type(current) is not slot:
            new = new.in_place_of(current)
    else:
        try:
            new = _adapter(hint).validate_python(value)
        except ValidationError as broken:
            message = broken.errors()[0]["msg"]
            raise ConfigError(f"{full} = {value!r}: {message[0].lower()}{message[1:]}") from broken
    return _construct(type(owner), {**_values(owner), path[0]: new}, full)


def _construct(cls: type, values: Mapping[str, Any], full: str) -> Any:
    try:
        return cls(**values)
    except TypeError as broken:
        raise ConfigError(f"{full}: {cls.__name__} cannot be made: {broken}") from broken


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
    """Return the types of a dataclass's fields, by name."""
    return typing.get_type_hints(cls)


def _values(owner: Any) -> dict[str, Any]:
    return {f.name: getattr(owner, f.name) for f in dataclasses.fields(owner)}


def _slot_class(slot: type, name: str, full: str) -> type:
    known = choices(slot)
    if name in known:
        return known[name]
    if ":" not in name:
        raise unknown(f"value of {full}", name, known)
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except SecateurError:
        raise
    except Exception as broken:  # importing runs anyone's code
        raise ConfigError(f"{full} = {name!r}: {type(broken).__name__}: {' '.join(str(broken).split())}") from broken
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ConfigError(f"{full} = {name!r}: a slot's value must be a frozen dataclass")
    check_verbs(found, slot, name=f"{full} = {name!r}")
    return found


def flatten(owner: Any, prefix: str = "") -> dict[str, Option]:
    """Return every option of a method by path, classes of slots included; the inverse of ``build``."""
    options: dict[str, Option] = {}
    hints = _hints(owner.__class__)
    for name, value in _values(owner).items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            cls = type(value)
            known = cls in choices(hints[name]).values()
            options[prefix + name] = snake(cls.__name__) if known else f"{cls.__module__}:{cls.__qualname__}"
            options |= flatten(value, f"{prefix}{name}.")
        else:
            options[prefix + name] = value
    return options
