"""Guards, found by listing this package: one file each, no registration."""

from __future__ import annotations

from secateur.contract.guard import Guard
from secateur.contract.plugins import find_class, listed


def names() -> list[str]:
    """Return the names of the guards in this package, sorted."""
    return listed(__path__)


def find(name: str) -> type[Guard]:
    """Return the guard class of a module, given by its name in this package or by the dotted path of any module.

    Raises:
        ConfigError: there is no such module, or it does not define exactly one frozen dataclass derived from ``Guard``.
    """
    return find_class("guard", name, Guard, package=__name__, known=names(), derived="secateur.contract.guard.Guard")
