"""Code of one's own: files and modules that a study names, and the folders in which they are found again.

A setting names code by a module (``my_method``, ``nets:net``) or by a file (``./my_method.py``, ``./nets.py:net``). A
file becomes the module that it is, and the folder from which it is imported is kept in the study as ``code``, so that
workers, a resumed run and an export find it. In a run's ``study.toml`` these folders are relative to the run's own.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from secateur import attacks, methods
from secateur.data import sources
from secateur.errors import ConfigError, near
from secateur.study.options import dotted

_FILE = ".py"
_SECTIONS, _NAMING = ("data", "model", "options"), ("data.source", "data.task", "model.name")
Place = tuple[MutableMapping[str, Any], str, str]


def reached(values: Mapping[str, Any], base: Path | None = None) -> dict[str, Any]:
    """Return a study's nested settings with files as modules and ``code`` complete, and make both importable.

    Folders are added at the end of ``sys.path``, so that a file of one's own never stands in for an installed module.

    Args:
        values: the settings, which may name files, relative to the current folder.
        base: what the folders of ``code`` are relative to, such as a run's folder; None: the current folder.

    Raises:
        ConfigError: a folder or a file is not there, or another module of the file's name is found before it.
    """
    made = copy.deepcopy(dict(values))
    code = [_folder(text, base or Path.cwd()) for text in _listed(made.pop("code", ()))]
    for place in code:
        _importable(place)
    code += _resolved(_places(made), code if base else [])
    return {**made, "code": [str(place) for place in dict.fromkeys(code)]} if code else made


def located(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by path as ``reached`` returns nested ones; folders are then one text, as in ``PYTHONPATH``.

    Raises:
        ConfigError: as ``reached`` does.
    """
    made = dict(settings)
    code = [_folder(text, Path.cwd()) for text in _listed(made.pop("code", ()))]
    code += _resolved([(made, path, path) for path, value in made.items() if _may_be_own(path, str(value))], [])
    return {**made, "code": os.pathsep.join(dict.fromkeys(map(str, code)))} if code else made


def relative(code: Sequence[str], folder: Path) -> list[str]:
    """Return the folders of ``code`` as a study's file in ``folder`` has them: relative to it, where they can be."""
    found = []
    for place in code:
        try:
            found.append(os.path.relpath(place, folder.absolute()))
        except ValueError:  # another drive
            found.append(place)
    return found


def _resolved(places: Iterable[Place], held: Sequence[Path]) -> list[Path]:
    """Put modules in the place of files, and return the folders that modules of one's own are found in.

    Args:
        places: where settings may name code of one's own.
        held: the folders in which all of it was found before; a module that is found nowhere has gone from there.
    """
    code, here = [], Path.cwd()
    _importable(here)
    for owner, key, path in list(places):
        head, colon, rest = str(owner[key]).partition(":")
        top = head.partition(".")[0]
        if head.endswith(_FILE):
            module, place = _module(Path(head).expanduser(), f"{path} = {owner[key]!r}")
            owner[key] = module + colon + rest
            code.append(place)
        elif held and top.isidentifier() and importlib.util.find_spec(top) is None:
            raise ConfigError(
                f"{path} = {owner[key]!r}: there is no module {top!r} in {', '.join(map(str, held))} any more, "
                "where this study's own code was found; put it back"
            )
        elif _lies_in(here, top):
            code.append(here)
    return code


def _listed(code: object) -> list[str]:
    return code.split(os.pathsep) if isinstance(code, str) else [str(one) for one in code]  # type: ignore[attr-defined]


def _folder(text: str, base: Path) -> Path:
    place = Path(os.path.normpath(base.absolute() / Path(text).expanduser()))
    if not place.is_dir():
        raise ConfigError(
            f"code = {text!r}: there is no folder {place}, in which this study's own code was found; put it back, or "
            "write where it lies now"
        )
    return place


def _importable(place: Path) -> None:
    if str(place) not in sys.path:
        sys.path.append(str(place))


def _places(values: MutableMapping[str, Any]) -> Iterator[Place]:
    """Yield where nested settings may name code of one's own: the mapping, the key, and the path for an error."""
    for key, value in values.items():
        if key not in _SECTIONS:
            yield from [(values, key, key)] if _may_be_own(key, str(value)) else []
        elif isinstance(value, MutableMapping):
            for path, one in dotted(value).items():
                if _may_be_own(f"{key}.{path}", str(one)):
                    yield *_within(value, path), f"{key}.{path}".removeprefix("options.")


def _within(values: MutableMapping[str, Any], path: str) -> tuple[MutableMapping[str, Any], str]:
    """Return the nested mapping in which the last part of a path stands, and that part."""
    head, dot, rest = path.partition(".")
    return (values, path) if path in values or not dot else _within(values[head], rest)


def _may_be_own(path: str, text: str) -> bool:
    """Return whether a setting's value may name a module or file that is not of this package."""
    head = text.partition(":")[0]
    if path == "method":
        return text not in methods.names()
    if path == "attack":
        return head.partition(",")[0] not in attacks.names()
    if path.partition(".")[0] in {"data", "model"} and path not in _NAMING:
        return False
    return head.endswith(_FILE) or (":" in text and not (path == "data.source" and head in sources.names()))


def _module(file: Path, what: str) -> tuple[str, Path]:
    """Return the module's name of a file, dotted where it lies in a package, and the folder to import it from."""
    if not file.is_file():
        like = [] if not file.parent.is_dir() else [one.name for one in file.parent.glob(f"*{_FILE}")]
        raise ConfigError(f"{what}: there is no file {file}{near(file.name, like)}")
    file = file.absolute()
    parts, place = [file.stem], Path(os.path.normpath(file.parent))
    while (place / "__init__.py").exists():
        parts, place = [place.name, *parts], place.parent
    wrong = next((part for part in parts if not part.isidentifier()), None)
    if wrong is not None:
        raise ConfigError(f"{what}: {wrong!r} is no name that Python can import; rename it, such as my_method.py")
    _importable(place)
    if not _lies_in(place, parts[0]):
        found = importlib.util.find_spec(parts[0])
        other = getattr(found, "origin", None) or "Python itself"
        raise ConfigError(f"{what}: a module {parts[0]!r} is found before it, in {other}; rename the file")
    return ".".join(parts), place


def _lies_in(place: Path, top: str) -> bool:
    """Return whether the module or package ``top`` is imported from a folder."""
    if not top.isidentifier():
        return False
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    if spec.submodule_search_locations is not None:
        return any(Path(one).absolute().parent == place for one in spec.submodule_search_locations)
    return spec.has_location and Path(str(spec.origin)).absolute().parent == place
