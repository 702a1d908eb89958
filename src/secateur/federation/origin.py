"""What a run is made of, as its checkpoint remembers it: the study, the version of this package, the method's code."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import secateur
from secateur.federation import seals
from secateur.study.study import Study

PACKAGE = "secateur"
_ROOMS = tuple(f"{PACKAGE}.{room}." for room in ("methods", "aggregation", "guards", "attacks"))
"""Where methods and their parts are; the version tells about the rest of the package."""

_INSTALLED = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}

Origin = Mapping[str, Any]
"""The hash of a study, the version of this package and, by module, the digest of the method's code."""


def origin(study: Study) -> Origin:
    """Return what a run of a study is made of."""
    return {
        "study": study.hash(),
        "version": secateur.__version__,
        "code": {name: seals.digest(path.read_bytes()) for name, path in sorted(code(study).items())},
    }


def changes(before: Origin, now: Origin) -> list[str]:
    """Return what differs between two origins, each in a few words."""
    changed = []
    if before["study"] != now["study"]:
        changed.append(f"the study (it was {before['study']}, it is {now['study']})")
    if before["version"] != now["version"]:
        changed.append(f"the version of secateur (it was {before['version']}, it is {now['version']})")
    old, new = before["code"], now["code"]
    modules = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if modules and before["study"] == now["study"]:  # another method is other code
        changed.append(f"the code of {', '.join(modules)}")
    return changed


def code(study: Study) -> dict[str, Path]:
    """Return the files of the modules that a study's method, guards, attack, model and task are written in, by name.

    Of this package these are the modules of methods and their parts; of anyone else's code, all that they import and
    that is not installed.
    """
    found: dict[str, Path] = {}
    named = {name.partition(":")[0] for name in (study.model.name, study.data.task) if ":" in name}
    parts = [study.build_method(), *study.build_guards(), study.build_attack()]
    waiting = sorted(named | {kind.__module__ for part in parts for kind in _kinds(part)})
    while waiting:
        name = waiting.pop()
        path = _file(name) if name not in found and _ours(name) else None
        if path is not None:
            found[name] = path
            waiting += [other for other in _imported(name, path, path.stat().st_mtime_ns) if _own(other)]
    return found


def _kinds(part: object) -> Iterator[type]:
    """Yield the classes that an object, and what its fields hold, are made of."""
    yield from type(part).__mro__
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        for one in dataclasses.fields(part):
            value = getattr(part, one.name)
            for inner in value if isinstance(value, tuple | list) else (value,):
                yield from _kinds(inner)


def _ours(name: str) -> bool:
    """Return whether a module may hold a part of a method."""
    top = name.partition(".")[0]
    return name.startswith(_ROOMS) if top == PACKAGE else top not in sys.stdlib_module_names and top != "torch"


def _own(name: str) -> bool:
    """Return whether a module is of this package, or a file of somebody's own, which is of no installed package."""
    if not _ours(name) or name.startswith(f"{PACKAGE}."):
        return _ours(name)
    path = _file(name)
    return path is not None and not any(path.is_relative_to(place) for place in _INSTALLED)


def _file(name: str) -> Path | None:
    """Return the source file of a module; None if it has none."""
    module = sys.modules.get(name)
    try:
        spec = getattr(module, "__spec__", None) or importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    text = getattr(module, "__file__", None) or (spec.origin if spec is not None else None)
    path = Path(text) if text and text.endswith(".py") else None
    return path if path is not None and path.is_file() else None


@functools.lru_cache(maxsize=1024)
def _imported(name: str, path: Path, changed: int) -> frozenset[str]:
    """Return the modules that a module imports, wherever in its file; and the names that it imports from them."""
    del changed  # a part of the key: an edited file is read again
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            where = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(where, package) if node.level else where
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return frozenset(names)
