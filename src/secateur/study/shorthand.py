"""Settings by the last part of their path: ``lr`` is ``training.lr`` where no other path ends in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from secateur import methods
from secateur.errors import ConfigError, unknown
from secateur.study.options import build, dotted, flatten
from secateur.study.study import Study

_SLOTTED = frozenset({"method", "guards", "options"})


def written_out(settings: Mapping[str, Any], method: str, more: Iterable[str] = ()) -> dict[str, Any]:
    """Return settings by their full paths.

    Args:
        settings: values by path (``schedule.sparsity``), by section (``training={"lr": 0.1}``), or by the last part of
            a path, where it is that of one path only.
        method: the method whose options they may be.
        more: further paths that there are, such as the options of a data source.

    Raises:
        ConfigError: a name is of no path, or of several; the text names the nearest, or all of them.
    """
    flat = dotted(settings)
    given = {path: value for path, value in flat.items() if "." in path or path in Study.model_fields}
    short = {name: value for name, value in flat.items() if name not in given}
    if not short:
        return given
    slots = {path.removeprefix("options."): value for path, value in given.items() if is_option(path)}
    bare = flatten(methods.find(method)())
    slots |= {name: value for name, value in short.items() if name in bare and isinstance(value, str)}
    known = [*_study_paths(), *more, *flatten(build(methods.find(method), slots))]
    for name, value in short.items():
        ends = [path for path in known if path.rpartition(".")[2] == name]
        if name in known:
            ends = [name]
        if len(ends) > 1:
            raise ConfigError(f"{name} = {value!r} may be {' or '.join(sorted(ends))}: write the whole path")
        if not ends:
            raise unknown("setting", name, {path.rpartition(".")[2] for path in known})
        if given.setdefault(ends[0], value) is not value:
            raise ConfigError(f"{name} = {value!r} and {ends[0]} = {given[ends[0]]!r} are one setting: give it once")
    return given


def is_option(path: str) -> bool:
    """Return whether a path is one of a method, rather than a setting of the study itself."""
    return path.startswith("options.") or path.partition(".")[0] not in Study.model_fields


def _study_paths() -> list[str]:
    """Return the paths of a study's own settings, without those of its method."""
    made = Study(method="fedavg")
    paths = []
    for name in Study.model_fields.keys() - _SLOTTED:
        section = getattr(made, name)
        inner: Iterable[str] = (
            type(section).model_fields
            if isinstance(section, BaseModel)
            else getattr(section, "__dataclass_fields__", ())
        )
        paths += [f"{name}.{field}" for field in inner if field != "options"] or [name]
    return paths
