"""The catalogue: methods, slot values, data sources, models and attacks, each with one line and its paper."""

from __future__ import annotations

import inspect
import sys
import typing
from dataclasses import dataclass, fields

from secateur import attacks, data, methods, models
from secateur.methods.kit.composition import Composition
from secateur.study.options import choices


@dataclass(frozen=True)
class Entry:
    """An entry of the catalogue: its name, one line on it, and its paper."""

    name: str
    summary: str
    reference: str


def catalogue() -> dict[str, list[Entry]]:
    """Return the entries by kind, read from the docstrings of methods, slots, sources, models and attacks."""
    kinds = {"methods": [_method(name) for name in methods.names()]}
    hints = typing.get_type_hints(Composition)
    for slot in fields(Composition):
        kinds[slot.name] = [_entry(name, cls) for name, cls in choices(hints[slot.name]).items()]
    for kind, source in (("data", data.names()), ("models", models.names())):
        kinds[kind] = [Entry(info.name, info.summary, info.reference) for info in source.values()]
    kinds["attacks"] = [_entry(name, sys.modules[attacks.find(name).__module__]) for name in attacks.names()]
    return kinds


def _method(name: str) -> Entry:
    return _entry(name, sys.modules[methods.find(name).__module__])


def _entry(name: str, thing: object) -> Entry:
    text = inspect.cleandoc(thing.__doc__ or "")
    reference = text.partition("\nReference: ")[2].partition("\n\n")[0]
    for mark in ("\nDepartures:", "\nReproduced", "\nNot reproduced"):
        reference = reference.partition(mark)[0]
    return Entry(name, text.partition("\n")[0], " ".join(reference.split()))
