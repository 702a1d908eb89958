"""The catalogue: what can be named in a study, each with one line, its paper and its options."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from secateur import attacks, data, guards, methods, models
from secateur.data import sources
from secateur.methods.kit.composition import Composition
from secateur.study.options import choices, dotted, flatten


@dataclass(frozen=True)
class Entry:
    """An entry of the catalogue: its name, one line on it, and its paper."""

    name: str
    summary: str
    reference: str


@dataclass(frozen=True)
class Setting:
    """An option of an entry: its path as behind ``--set``, its default, and one line on it."""

    path: str
    default: Any
    summary: str


@dataclass(frozen=True)
class Detail:
    """What there is to say of one entry.

    Attributes:
        kind: what it is: ``methods``, the name of a slot, ``guards``, ``attacks``, ``data`` or ``models``.
        entry: its name, one line and paper.
        options: its options.
        recommended: settings that it brings along where a study does not set them itself, by path.
    """

    kind: str
    entry: Entry
    options: list[Setting]
    recommended: dict[str, Any]


def catalogue() -> dict[str, list[Entry]]:
    """Return the entries by kind, read from the docstrings of methods, slots, guards, sources, models and attacks."""
    kinds = {"methods": [_method(name) for name in methods.names()]}
    for slot, classes in _slots().items():
        kinds[slot] = [entry(name, cls) for name, cls in classes.items()]
    kinds["guards"] = [entry(name, guards.find(name)) for name in guards.names()]
    for kind, source in (("data", data.names()), ("models", models.names())):
        kinds[kind] = [Entry(info.name, info.summary, info.reference) for info in source.values()]
    kinds["attacks"] = [_attack(name) for name in attacks.names()]
    return kinds


def details(name: str) -> list[Detail]:
    """Return what there is to say of a name; there may be several of one name, such as a method and a criterion."""
    found = []
    if name in methods.names():
        method = methods.find(name)
        usual = {f"training.{path}": value for path, value in method.recommended.items()}
        found.append(Detail("methods", _method(name), _options(method), usual))
    for slot, classes in _slots().items():
        if name in classes:
            found.append(Detail(slot, entry(name, classes[name]), _options(classes[name], f"{slot}."), {}))
    if name in guards.names():
        guard = guards.find(name)
        found.append(Detail("guards", entry(name, guard), _options(guard, f"guards.{name}."), {}))
    if name in attacks.names():
        attack = attacks.find(name)
        found.append(Detail("attacks", _attack(name), _options(attack), {}))
    if name in data.names():
        info, kind = data.names()[name], sources.options_kind(name)
        usual = dotted(sources.recommended(name))
        options = [] if kind is None else _options(kind, "data.options.")
        found.append(Detail("data", Entry(info.name, info.summary, info.reference), options, usual))
    if name.lower() in models.names():
        one = models.names()[name.lower()]
        found.append(Detail("models", Entry(one.name, one.summary, one.reference), _arguments(name.lower()), {}))
    return found


def names() -> list[str]:
    """Return every name that ``details`` knows."""
    slots = [name for classes in _slots().values() for name in classes]
    return sorted({*methods.names(), *slots, *guards.names(), *attacks.names(), *data.names(), *models.names()})


def entry(name: str, thing: object) -> Entry:
    """Return the entry of whatever has a docstring with a first line and, perhaps, a reference."""
    text = inspect.cleandoc(thing.__doc__ or "")
    reference = text.partition("\nReference: ")[2].partition("\n\n")[0]
    for mark in ("\nDepartures:", "\nReproduced", "\nNot reproduced", "\nAttributes:"):
        reference = reference.partition(mark)[0]
    return Entry(name, text.partition("\n")[0], " ".join(reference.split()))


def _slots() -> dict[str, dict[str, type]]:
    hints = typing.get_type_hints(Composition)
    return {slot.name: dict(choices(hints[slot.name])) for slot in fields(Composition)}


def _method(name: str) -> Entry:
    return entry(name, sys.modules[methods.find(name).__module__])


def _attack(name: str) -> Entry:
    return entry(name, sys.modules[attacks.find(name).__module__])


def _options(cls: type, prefix: str = "") -> list[Setting]:
    """Return the options of a class with its defaults, those inside its slots included."""
    made = cls()
    return [Setting(prefix + path, default, _told(made, path)) for path, default in flatten(made).items()]


def _told(owner: Any, path: str) -> str:
    """Return the line on an option, from the docstring of the class that has it."""
    head, _, rest = path.partition(".")
    return _told(getattr(owner, head), rest) if rest else _lines(type(owner)).get(head, "")


def _lines(cls: type) -> Mapping[str, str]:
    """Return what the docstrings of a class and its bases say of attributes: the first sentence, by name."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= attributes(base.__doc__ or "") if dataclasses.is_dataclass(base) else {}
    return found


def attributes(text: str) -> dict[str, str]:
    """Return the first sentence on each name under ``Attributes:`` or ``Args:`` of a docstring."""
    found: dict[str, str] = {}
    part = re.search(r"^(?:Attributes|Args):\n((?:[ ]{4}.*\n?|\n)+)", inspect.cleandoc(text), re.MULTILINE)
    for block in re.split(r"^[ ]{4}(?=\S)", part[1] if part else "", flags=re.MULTILINE):
        heads, colon, told = block.partition(": ")
        words = " ".join(told.split())
        sentence = re.match(r".*?(?<!e\.g)(?<!i\.e)[.](?=\s|$)", words)
        if colon:
            found |= {head.strip(" `"): sentence[0] if sentence else words for head in heads.split(",")}
    return found


def _arguments(name: str) -> list[Setting]:
    """Return the keyword arguments of a model's factory."""
    factory: Callable[..., Any] = models.find(name)
    told = attributes(factory.__doc__ or "") | attributes(factory.__init__.__doc__ or "")
    whole = (factory.__init__.__doc__ or "").partition("\n")[0]
    given = list(inspect.signature(factory).parameters.values())[2:]
    return [Setting(f"model.{one.name}", one.default, told.get(one.name, whole)) for one in given]
