"""The methods, one file each; the file's name is the method's name, and nothing is registered.

``find("autoflip")`` imports ``secateur.methods.autoflip`` on demand; ``find("their_package.their_module")`` imports a
method of any other package. A name comes from local configuration, never from the wire; if it comes from a Flower run's
configuration, the node's own policy (``flower.policy``) has allowed it.
"""

from __future__ import annotations

import dataclasses
import inspect

from secateur.contract.method import Method
from secateur.contract.plugins import find_class, listed
from secateur.errors import ConfigError


def names() -> list[str]:
    """Return the names of the methods in this package, sorted."""
    return listed(__path__)


def find(name: str) -> type[Method]:
    """Return the method class of a module, given by its name in this package or by the dotted path of any module.

    Raises:
        ConfigError: there is no such module, it cannot be imported, it does not define exactly one frozen dataclass
            derived from ``Method``, or it was written for an earlier contract.
    """
    base: type[Method] = Method  # type: ignore[type-abstract]
    derived = "secateur.Method or secateur.Composition"
    found = find_class("method", name, base, package=__name__, known=names(), derived=derived)
    if "replies" in inspect.signature(found.absorb).parameters:
        raise ConfigError(
            f"method {name!r} was written for the contract of before: absorb(state, replies) is absorb(state, reduced) "
            "now, and the ask says what its replies are reduced to; docs/migration.md shows the change"
        )
    return found


def check_aggregator(name: str) -> None:
    """Refuse a method that does not let a study choose how replies are merged.

    Raises:
        ConfigError: it does not; the text names those that do.
    """
    if not _has_aggregator(name):
        able = ", ".join(other for other in names() if _has_aggregator(other))
        raise ConfigError(f"{name} has no aggregator: it merges replies in a way of its own; {able} have one")


def _has_aggregator(name: str) -> bool:
    return any(option.name == "aggregator" for option in dataclasses.fields(find(name)))  # type: ignore[arg-type]
