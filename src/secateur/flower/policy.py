"""What a run's configuration may name on a node: judged by its strings alone, before anything is imported or opened.

The configuration comes from whoever starts the run. Of itself a node takes the methods, slot values, models and loaders
of this package, and opens no place but its own ``data`` folder; a node without one takes data that need no place. All
else, the node's owner has named: ``allow`` in the node configuration, or ``SECATEUR_ALLOW`` in the environment, holds
settings as they stand in a run's ``set``, such as ``data.source=my_package.loaders:read model.name=my_models:net``.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from secateur import data, methods, models
from secateur.data import embedded
from secateur.errors import ConfigError
from secateur.learning.task import TASKS
from secateur.study import study as config

ALLOW = "allow"
ENVIRONMENT = "SECATEUR_ALLOW"
Named = tuple[str, str]


def allowed(text: str) -> frozenset[Named]:
    """Return the settings that an owner's text allows, each with the value that it may have.

    Raises:
        ConfigError: the text is no list of settings.
    """
    try:
        settings = shlex.split(text)
    except ValueError as broken:
        raise ConfigError(f"{ALLOW} = {text!r}: {broken}; write settings with spaces between them") from broken
    found: list[Named] = []
    for setting in settings:
        config.pair(setting, ALLOW)
        values: dict[str, Any] = {}
        config.assign(values, setting)
        found += _named(values)
    return frozenset(found)


def refused(values: Mapping[str, Any], owners: Collection[Named], *, own: bool) -> list[Named]:
    """Return the settings that name what neither this package has nor the owner has allowed.

    Args:
        values: a study's settings, as ``config.assign`` enters them.
        owners: what ``allowed`` returned.
        own: the node has data of its own.
    """
    return [
        (path, value) for path, value in _named(values) if not _ours(path, value, own) and (path, value) not in owners
    ]


def _named(values: Mapping[str, Any]) -> Iterator[Named]:
    """Yield the settings whose value can name code or a place."""
    if "method" in values:
        yield "method", str(values["method"])
    for section, name in (("model", "name"), ("data", "source"), ("data", "task")):
        held = values.get(section)
        if isinstance(held, Mapping) and name in held:
            yield f"{section}.{name}", str(held[name])
    options = values.get("options")
    if isinstance(options, Mapping):
        yield from ((str(path), str(value)) for path, value in options.items())


def _ours(path: str, value: str, own: bool) -> bool:  # noqa: FBT001 -- private
    if path == "method":
        return value in methods.names()
    if path == "model.name":
        return value in models.names()
    if path == "data.source":
        return value in (data.names() if own else embedded.NAMES)
    if path == "data.task":
        return not value or value in TASKS
    return ":" not in value  # a slot's class of anyone's own is module:Class
