"""The error tree, and the helpers that word an error.

SecateurError                  anything a user can mend; the command line prints it as one line, exit code 2
├── ConfigError                a setting is unknown or out of bounds; raised before any training
├── DataError                  a data set or a partition cannot be used
├── ModelError                 a model cannot be built, or cannot serve what was asked of it
├── WireError                  a payload does not fit what its receiver expects; costs the sender its place
├── CheckpointError            a checkpoint or run folder is missing, damaged, or could not be written
├── EngineError                clients could not be started or reached at all
├── NoResultError              a run came to its end without a result; its records are kept
│   ├── NobodyTrainedError     too few clients could train, for the reason that the text names
│   └── DivergedError          the model that came of it is not usable: its loss has grown beyond all bounds
└── MissingExtraError          an optional package is not installed
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class SecateurError(Exception):
    """Base of every error a user can mend; its text says what was wrong, where, and what to do."""


class ConfigError(SecateurError):
    """A setting is unknown or out of bounds."""


class DataError(SecateurError):
    """A data set or a partition cannot be used."""


class ModelError(SecateurError):
    """A model cannot be built, or cannot serve what was asked of it."""


class WireError(SecateurError):
    """A payload does not fit what its receiver expects."""


class NotFiniteError(WireError):
    """A payload holds NaN or infinity where a number is expected."""


class MaskNotHeldError(WireError):
    """A payload refers to a mask that its receiver does not hold; the sender must send the whole mask."""


class TensorsNotHeldError(WireError):
    """A payload names tensors that its receiver does not hold; the sender must send them in the message."""


class CheckpointError(SecateurError):
    """A checkpoint or run folder is missing, damaged, or could not be written."""


class EngineError(SecateurError):
    """Clients could not be started or reached at all."""


class NoResultError(SecateurError):
    """A run came to its end without a result; its records are kept."""


class NobodyTrainedError(NoResultError):
    """Too few clients could train: the text names the most frequent reason."""


class DivergedError(NoResultError):
    """The model that came of a run is not usable: its loss has grown beyond all bounds."""


class MissingExtraError(SecateurError):
    """An optional package is not installed."""


def check(
    condition: bool,  # noqa: FBT001 -- reads as an assertion
    *,
    name: str,
    value: object,
    must: str,
    error: type[SecateurError] = ConfigError,
) -> None:
    """Raise ``error`` with name, value and bound unless ``condition`` holds.

    >>> check(0.3 < 1, name="schedule.sparsity", value=0.3, must="be below 1")
    """
    if not condition:
        raise error(f"{name} = {value!r} must {must}")


def verbs(slot: type) -> frozenset[str]:
    """Return the public names that a slot's class defines: what is asked of whatever fills the slot."""
    return frozenset(name for name in vars(slot) if not name.startswith("_"))


def check_verbs(found: type, slot: type, *, name: str) -> None:
    """Refuse a class that lacks verbs of the slot it is to fill.

    Args:
        found: what somebody has written.
        slot: the class that says what is asked of it.
        name: of the slot.
    """
    lacking = verbs(slot) - set(dir(found)) | getattr(found, "__abstractmethods__", frozenset())
    if lacking:
        missing = ", ".join(map(repr, sorted(lacking)))
        raise ConfigError(
            f"{name}: {found.__name__} lacks {missing} of {slot.__name__}; derive it from {slot.__module__}."
            f"{slot.__name__}, and write what has no default there"
        )


def unknown(kind: str, name: str, choices: Iterable[str], *, error: type[SecateurError] = ConfigError) -> SecateurError:
    """Return (not raise) an error that names the unknown thing, the nearest known one, and all choices.

    >>> str(unknown("model", "twocn", ["mlp", "twocnn"]))
    "unknown model 'twocn': did you mean 'twocnn'? (known: mlp, twocnn)"
    """
    known = sorted(choices)
    return error(f"unknown {kind} {name!r}{near(name, known) or ':'} (known: {', '.join(known)})")


def near(name: str, choices: Iterable[str]) -> str:
    """Return the nearest of some names as the end of a sentence; empty: none is near.

    >>> near("twocn", ["mlp", "twocnn"])
    ": did you mean 'twocnn'?"
    """
    found = difflib.get_close_matches(name, list(choices), n=1)
    return f": did you mean {found[0]!r}?" if found else ""


def plain(text: str, most: int) -> str:
    r"""Return somebody else's text as one printable line of at most ``most`` characters, and dots where it is cut.

    White space becomes single spaces; whatever else is not printable, such as what moves a terminal's cursor or turns
    the direction of writing, is written as an escape.

    >>> plain("a  b" + chr(27) + "[2J", 40)
    'a b\\x1b[2J'
    """
    line = " ".join(text[: 4 * most].split())
    escaped = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line[: most + 1])
    whole = len(escaped) <= most and len(text) <= 4 * most
    return escaped if whole else f"{escaped[:most]}..."


def install(extra: str, *, upgrade: bool = False) -> str:
    """Return what to type to have an extra of this package, in a clone and from a release.

    >>> install("hub")
    "pip install '.[hub]' in a clone of secateur; from a release: pip install 'secateur-fl[hub]'"
    """
    pip = "pip install --upgrade" if upgrade else "pip install"
    return f"{pip} '.[{extra}]' in a clone of secateur; from a release: {pip} 'secateur-fl[{extra}]'"


def need(module: str, *, extra: str = "", package: str = "") -> ModuleType:
    """Import an optional ``module`` where it is used.

    Args:
        module: what is imported.
        extra: of this package, that brings it; or
        package: that brings it, where an installation without dependencies left it out.

    Raises:
        MissingExtraError: it is not installed; the text says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        line = install(extra) if extra else f"pip install '{package}'"
        raise MissingExtraError(f"this needs {missing.name!r}, which is not installed: {line}") from missing
