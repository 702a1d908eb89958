"""The policy of a node: which settings of a run it accepts, judged by their text before anything is imported or opened.

Whoever starts a run writes its configuration. By default a node accepts the methods, slot values, guards, models and
data formats of this package, and opens only its own ``data`` folder; one without it accepts only data without files.
Its owner can list fewer of them, and can allow more settings, written as in a run's ``set``, such as
``data.source=my_package.loaders:read model.name=my_models:net``; see ``site``.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from secateur import attacks, data, guards, methods, models
from secateur.data.sources import embedded
from secateur.errors import ConfigError
from secateur.learning.task import TASKS
from secateur.study.study import assign, by_guard, split_setting

ALLOW, FILE = "allow", "secateur.toml"
ENVIRONMENT = "SECATEUR_ALLOW"
Named = tuple[str, str]


def allowed(text: str) -> frozenset[Named]:
    """Return the settings that an owner's text allows, each with its value.

    Raises:
        ConfigError: the text is not a list of settings.
    """
    try:
        settings = shlex.split(text)
    except ValueError as broken:
        raise ConfigError(f"{ALLOW} = {text!r}: {broken}; write settings with spaces between them") from broken
    found: list[Named] = []
    for setting in settings:
        split_setting(setting, ALLOW)
        values: dict[str, Any] = {}
        assign(values, setting)
        found += _named(values)
    return frozenset(found)


def refused(
    values: Mapping[str, Any], owners: Collection[Named], *, own: bool,
    only: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> list[Named]:  # fmt: skip
    """Return the settings that are refused: they are neither of this package nor allowed by the owner.

    Args:
        values: a study's settings, as ``study.assign`` enters them.
        owners: the settings that the owner allows, see ``allowed``.
        own: whether the node has data of its own.
        only: the only values of this package's that a setting may have, by the setting.
    """
    return [
        (path, value)
        for path, value in _named(values)
        if (path, value) not in owners and not (_ours(path, value, own) and value in only.get(path, {value}))
    ]


def _named(values: Mapping[str, Any]) -> Iterator[Named]:
    """Yield the settings whose value can name code or files."""
    if "method" in values:
        yield "method", str(values["method"])
    for section, name in (("model", "name"), ("data", "source"), ("data", "task")):
        held = values.get(section)
        if isinstance(held, Mapping) and name in held:
            yield f"{section}.{name}", str(held[name])
    guarded = values.get("guards")
    if isinstance(guarded, Mapping):
        yield from (("guards", name) for name in by_guard({str(path): value for path, value in guarded.items()}))
    if values.get("attack"):
        yield "attack", str(values["attack"]).partition(",")[0].partition(":")[0].strip()
    options = values.get("options")
    if isinstance(options, Mapping):
        yield from ((str(path), str(value)) for path, value in options.items())


def _readable() -> frozenset[str]:
    """Return the formats that read a folder or a file, and those that read none; not those that ask a network."""
    local = (name for name, info in data.names().items() if "FOLDER" in info.name or "FILE" in info.name)
    return embedded() | frozenset(local)


def _ours(path: str, value: str, own: bool) -> bool:  # noqa: FBT001 -- private
    if path == "data.source":
        return value in (_readable() if own else embedded())
    if path == "data.task":
        return not value or value in TASKS
    rooms = {"method": methods.names, "model.name": models.names, "guards": guards.names, "attack": attacks.names}
    # a slot's class of anyone's own is module:Class
    return value in rooms[path]() if path in rooms else ":" not in value
