"""The settings in a Flower run configuration: those of its study, and those of its server."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from secateur.errors import ConfigError
from secateur.study.study import Study, assign, parse_study, where_nobody_is_known

_LONGEST = 300  # characters of a text in an error
_SERVERS = ("out", "deadline", "wait", "link")


def study_of(run_config: Mapping[str, Any]) -> tuple[Study, dict[str, Any]]:
    """Return the study of a Flower run configuration, and the settings of the server.

    Raises:
        ConfigError: a setting is unknown or out of bounds.
    """
    study = parse_study(settings_of(run_config))
    if not study.data.clients:
        raise ConfigError("data.clients: say how many nodes there are, such as data.clients=4")
    return study, {name: run_config[name] for name in _SERVERS if run_config.get(name)}


def settings_of(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the study's settings as nested mappings, without importing or opening anything that they name."""
    values: dict[str, Any] = {}
    for path, value in run_config.items():
        if path not in {*_SERVERS, "set"}:
            assign(values, f"{path}={value}")
    more = str(run_config.get("set", ""))
    try:
        settings = shlex.split(more)
    except ValueError as broken:
        raise ConfigError(f"set = {more[:_LONGEST]!r}: {broken}; write settings with spaces between them") from broken
    for setting in settings:
        assign(values, setting)
    return where_nobody_is_known(values)
