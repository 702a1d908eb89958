"""The methods, one file each; the file's name is the method's name, and nothing is registered.

``find("autoflip")`` imports ``secateur.methods.autoflip`` on demand; ``find("their_package.their_module")`` imports a
method of any other package. A name comes from local configuration, never from the wire; if it comes from a Flower run's
configuration, the node's own policy (``flower.policy``) has allowed it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil

from secateur.contract.method import Method
from secateur.errors import ConfigError, unknown


def names() -> list[str]:
    """Return the names of the methods in this package, sorted."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.ispkg)


def find(name: str) -> type[Method]:
    """Return the method class of a module, given by its name in this package or by the dotted path of any module.

    Raises:
        ConfigError: there is no such module, it cannot be imported, it does not define exactly one frozen dataclass
            derived from ``Method``, or it was written for an earlier contract.
    """
    if name in names():
        path = f"{__name__}.{name}"
    elif "." in name or importlib.util.find_spec(name) is not None:
        path = name
    else:
        raise unknown("method", name, names())
    try:
        module = importlib.import_module(path)
    except ImportError as broken:
        moved = "; docs/migration.md says where it lies now" if str(broken.name).startswith("secateur") else ""
        raise ConfigError(f"method {name!r} cannot be imported: {broken}{moved}") from broken
    classes = [
        thing
        for _, thing in inspect.getmembers(module, inspect.isclass)
        if issubclass(thing, Method) and thing.__module__ == module.__name__
    ]
    if len(classes) != 1 or not dataclasses.is_dataclass(classes[0]):
        raise ConfigError(
            f"method {name!r}: its module must define exactly one frozen dataclass derived from "
            f"secateur.Method or secateur.Composition, found {[c.__name__ for c in classes]}"
        )
    if "replies" in inspect.signature(classes[0].absorb).parameters:
        raise ConfigError(
            f"method {name!r} was written for the contract of before: absorb(state, replies) is absorb(state, reduced) "
            "now, and the ask says what its replies are reduced to; docs/migration.md shows the change"
        )
    return classes[0]
