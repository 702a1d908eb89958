"""Guards, found by listing this package: one file each, no registration."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil

from secateur.contract.guard import Guard
from secateur.errors import ConfigError, unknown


def names() -> list[str]:
    """Return the names of the guards in this package, sorted."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.ispkg)


def find(name: str) -> type[Guard]:
    """Return the guard class of a module, given by its name in this package or by the dotted path of any module.

    Raises:
        ConfigError: there is no such module, or it does not define exactly one frozen dataclass derived from ``Guard``.
    """
    known = names()
    if name not in known and "." not in name and importlib.util.find_spec(name) is None:
        raise unknown("guard", name, known)
    try:
        module = importlib.import_module(f"{__name__}.{name}" if name in known else name)
    except ImportError as broken:
        raise ConfigError(f"guard {name!r} cannot be imported: {broken}") from broken
    classes = [
        thing
        for _, thing in inspect.getmembers(module, inspect.isclass)
        if issubclass(thing, Guard) and thing.__module__ == module.__name__
    ]
    if len(classes) != 1 or not dataclasses.is_dataclass(classes[0]):
        raise ConfigError(
            f"guard {name!r}: its module must define exactly one frozen dataclass derived from "
            f"secateur.contract.guard.Guard, found {[c.__name__ for c in classes]}"
        )
    return classes[0]
