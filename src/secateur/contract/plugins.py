"""Classes that are found by listing a package, or by the dotted path of anyone's module; nothing is registered."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterable
from typing import TypeVar

from secateur.errors import ConfigError, SecateurError, unknown

Base = TypeVar("Base")


def listed(places: Iterable[str]) -> list[str]:
    """Return the names of the modules in a package's folders, sorted; packages within it are left out."""
    return list(_listed(tuple(places)))


@functools.cache
def _listed(places: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(info.name for info in pkgutil.iter_modules(places) if not info.ispkg))


def find_class(kind: str, name: str, base: type[Base], *, package: str, known: list[str], derived: str) -> type[Base]:
    """Return the one class derived from ``base`` in a module of the package, or in any module by its dotted path.

    Args:
        kind: what is looked for, for the error's text.
        name: of a module.
        base: the class that it derives from.
        package: where the modules called ``known`` are.
        known: the names of the package's modules.
        derived: what to derive from, for the error's text.

    Raises:
        ConfigError: there is no such module, it cannot be imported, or it does not define exactly one frozen dataclass
            derived from ``base``.
    """
    if name not in known and "." not in name and importlib.util.find_spec(name) is None:
        raise unknown(kind, name, known)
    try:
        module = importlib.import_module(f"{package}.{name}" if name in known else name)
    except ImportError as broken:
        moved = "; docs/migration.md says where it lies now" if str(broken.name).startswith("secateur") else ""
        raise ConfigError(f"{kind} {name!r} cannot be imported: {broken}{moved}") from broken
    except SecateurError:
        raise
    except Exception as broken:  # importing runs anyone's code
        text = f"{type(broken).__name__}: {' '.join(str(broken).split())}"
        raise ConfigError(f"{kind} {name!r}: importing it failed: {text}") from broken
    classes = [
        thing
        for _, thing in inspect.getmembers(module, inspect.isclass)
        if issubclass(thing, base) and thing.__module__ == module.__name__
    ]
    if len(classes) != 1 or not dataclasses.is_dataclass(classes[0]):
        raise ConfigError(
            f"{kind} {name!r}: its module must define exactly one frozen dataclass derived from {derived}, "
            f"found {[c.__name__ for c in classes]}"
        )
    return classes[0]
