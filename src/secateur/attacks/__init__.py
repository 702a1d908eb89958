"""Attacks, found by listing this package: one file each, no registration."""

from __future__ import annotations

from secateur.contract.attack import Attack
from secateur.contract.plugins import find_class, listed

_HELPERS = frozenset({"crowd"})


def names() -> list[str]:
    """Return the names of the attacks in this package, sorted."""
    return [name for name in listed(__path__) if name not in _HELPERS]


def find(name: str) -> type[Attack]:
    """Return the attack class of a module, given by its name in this package or by the dotted path of any module.

    Raises:
        ConfigError: there is no such module, or it does not define exactly one frozen dataclass derived from
            ``Attack``.
    """
    return find_class(
        "attack", name, Attack, package=__name__, known=names(), derived="secateur.contract.attack.Attack"
    )
