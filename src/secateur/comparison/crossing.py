"""Crossed suites: variants that are the product of a few axes, such as method x rule x attack.

A suite's file says what each value of an axis sets, and which values are crossed:

    [variants]
    FedAvg = { method = "fedavg" }

    [axes.rule]
    mean = {}
    median = { aggregator = "median" }

    [axes.attack]
    none = {}
    ALIE = { attack = "alie:0.2" }

    [[crosses]]
    variant = ["FedAvg"]
    rule = ["mean", "median"]
    attack = ["none", "ALIE"]

An axis that a cross leaves out has all its values there. What several crosses have in common is run once.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from secateur.errors import ConfigError, unknown

VARIANT = "variant"
"""The axis of the suite's own variants."""

_AXES, _CROSSES, _VARIANTS, _PLACES = "axes", "crosses", "variants", "places"


def crossed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a suite's file with its crosses written out, as ``variants`` and their ``places``.

    Args:
        values: the file's values; without ``axes`` they are returned as they are.

    Raises:
        ConfigError: a cross names no axis or value that there is, or two values set one path differently.
    """
    given = dict(values)
    axes, crosses = given.pop(_AXES, None), given.pop(_CROSSES, None)
    if axes is None and crosses is None:
        return given
    if not isinstance(axes, Mapping) or not isinstance(given.get(_VARIANTS), Mapping) or not crosses:
        raise ConfigError("a crossed suite has [variants], [axes.NAME] and at least one [[crosses]]")
    known: dict[str, Mapping[str, Any]] = {VARIANT: given[_VARIANTS], **axes}
    variants: dict[str, dict[str, Any]] = {}
    places: dict[str, dict[str, str]] = {}
    for cross in crosses:
        for chosen in itertools.product(*_chosen(cross, known).values()):
            place = dict(zip(known, chosen, strict=True))
            name = ", ".join(chosen)
            variants[name], places[name] = _settings(place, known), place
    return {**given, _VARIANTS: variants, _PLACES: places}


def _chosen(cross: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the values of each axis in a cross."""
    for axis in cross:
        if axis not in known:
            raise unknown("axis of the suite", axis, known)
    found = {axis: list(cross.get(axis, values)) for axis, values in known.items()}
    for axis, names in found.items():
        for name in names:
            if name not in known[axis]:
                raise unknown(f"value of axis {axis!r}", str(name), known[axis])
    return found


def _settings(place: Mapping[str, str], known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the values of all axes set together."""
    settings: dict[str, Any] = {}
    for axis, name in place.items():
        for path, value in known[axis][name].items():
            if settings.get(path, value) != value:
                raise ConfigError(f"{axis} {name!r} sets {path} = {value!r}, and another axis sets {settings[path]!r}")
            settings[path] = value
    return settings
