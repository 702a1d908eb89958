"""The catalogue of methods, slots, data and models, printed in a terminal or as Markdown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.console import Console

from secateur.report.fitted import Fitted
from secateur.study.catalogue import Detail


class Listed(Protocol):
    """An entry of the catalogue."""

    @property
    def name(self) -> str:
        """The name to type."""

    @property
    def summary(self) -> str:
        """One line on it."""

    @property
    def reference(self) -> str:
        """Its paper."""


def to_markdown(kinds: Mapping[str, Sequence[Listed]]) -> str:
    """Return one Markdown table for each kind."""
    parts = []
    for kind, entries in kinds.items():
        rows = [f"| `{e.name}` | {e.summary} | {e.reference} |" for e in entries]
        parts.append(f"## {kind.capitalize()}\n\n| name | what it is | reference |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def to_json(kinds: Mapping[str, Sequence[Listed]]) -> str:
    """Return the kinds as JSON: a list of entries for each."""
    found = {kind: [{"name": e.name, "summary": e.summary, "reference": e.reference} for e in entries]
             for kind, entries in kinds.items()}  # fmt: skip
    return json.dumps(found, indent=1) + "\n"


def show(kinds: Mapping[str, Sequence[Listed]], console: Console) -> None:
    """Print the catalogue."""
    for kind, entries in kinds.items():
        rows = [{_NAME: e.name, _WHAT: e.summary, _PAPER: e.reference} for e in entries]
        console.print(Fitted(kind, rows, drop=(_PAPER,), words=(_WHAT, _PAPER)), "")


def show_details(details: Sequence[Detail], console: Console) -> None:
    """Print what there is to say of one name: what it is, its paper, what it recommends, and its options."""
    for one in details:
        lines = [f"{one.entry.name} ({_KINDS.get(one.kind, one.kind)}): {one.entry.summary}"]
        lines += [f"Reference: {one.entry.reference}"] if one.entry.reference else []
        lines += [f"Recommends, unless set: {path} = {value}" for path, value in one.recommended.items()]
        for line in lines:
            console.print(line, highlight=False, markup=False)
        rows = [{"--set": o.path, "default": shown(o.default), _WHAT: o.summary} for o in one.options]
        if rows:
            console.print(Fitted("", rows, drop=(_WHAT,), words=(_WHAT,)))
        console.print()


def details_json(details: Sequence[Detail]) -> str:
    """Return what there is to say of one name as JSON: a list, as a method and a slot's value may share a name."""
    return json.dumps([dataclasses.asdict(one) for one in details], indent=1, default=str) + "\n"


def shown(default: object) -> str:
    """Return a default as it is typed: lower-case truth, and what is empty as an empty text."""
    return str(default).lower() if isinstance(default, bool) else f"{default}"


_NAME, _WHAT, _PAPER = "name", "what it is", "reference"
_KINDS = {
    "methods": "method",
    "guards": "guard",
    "models": "model",
    "suites": "suite",
    "data": "data",
    "attacks": "attack",
}
