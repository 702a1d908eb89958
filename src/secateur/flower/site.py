"""A site's own configuration: what its owner lets a run do on this node, and what a request may cost.

It stands in ``--node-config``, or in a TOML file: ``secateur.toml`` in the node's data folder, or the one that
``policy="..."`` in ``--node-config`` names. Nothing that comes over the wire can change it.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from secateur import data, methods, models
from secateur.contract.ask import EVALUATE, TRAIN
from secateur.errors import SecateurError, plain, unknown
from secateur.federation.agreement import PHASE
from secateur.flower.asked import RESIDENT
from secateur.flower.codes import RefusedError
from secateur.flower.policy import ENVIRONMENT, FILE, Named, allowed
from secateur.study.study import read_toml

POLICY = "policy"
"""The key in ``--node-config`` that names another file than the one in the data folder."""

Answer = Literal["train", "evaluate", "explore", "statistics"]
_LONGEST = 1_000  # characters of an error
_FLOWERS = ("partition-id", "num-partitions")
_MOST = "most"
_LIKE = 0.8  # a key in --node-config that is this near to one of ours is taken for a slip, not for another app's
_Count = Annotated[int, Field(ge=1)]


class Most(BaseModel):
    """The most that one request may cost.

    Attributes:
        epochs: passes over this node's rows, of all trainings that the request asks for.
        rows: rows that are processed, over all epochs, gradients and evaluations.
        seconds: from the request to the reply.
        bytes: of the request.
        parameters: numbers that the run's model holds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: _Count = 1_000
    rows: _Count = 1_000_000_000
    seconds: Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)] = 86_400.0
    bytes: _Count = 2**30
    parameters: _Count = 2**28


class Site(BaseModel):
    """What the owner of a node says.

    Attributes:
        data: the folder of the node's own rows; None: it has none.
        state: the folder of what outlives a restart; None: Flower's Context keeps it.
        base: whether frozen tensors that the server sends are ``taken``, or the node takes its ``own`` only.
        sources, methods, models: the names of this package's own that a run may ask for; empty: all of them.
        allow: settings that a run may make beyond this package's own, such as ``model.name=my_models:net``.
        answers: the kinds of requests that are answered: ``train``, ``evaluate``, ``statistics`` of a table's columns,
            and ``explore`` for whatever else a method asks.
        most: what a request may cost.
        resident: whether a process stays between messages (``resident``); said in ``--node-config`` only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str | None = None
    state: str | None = None
    base: Literal["taken", "own"] = "taken"
    sources: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    answers: tuple[Answer, ...] = get_args(Answer)
    most: Most = Most()
    resident: bool = True

    @field_validator("sources", "methods", "models")
    @classmethod
    def _known(cls, names: tuple[str, ...], info: Any) -> tuple[str, ...]:
        known = {"sources": data.names, "methods": methods.names, "models": models.names}[info.field_name]()
        strange = next((name for name in names if name not in known), None)
        if strange is not None:
            raise ValueError(f"{unknown(info.field_name[:-1], strange, known)}; what is not ours is named in allow")
        return names

    @property
    def owners(self) -> frozenset[Named]:
        """Return the settings beyond this package's own that a run may make."""
        return allowed(shlex.join(self.allow))

    @property
    def only(self) -> Mapping[str, tuple[str, ...]]:
        """Return the package's own values that a setting may have, where not all of them are taken."""
        listed = {"data.source": self.sources, "method": self.methods, "model.name": self.models}
        return {path: names for path, names in listed.items() if names}

    @property
    def folder(self) -> Path | None:
        """Return the node's folder of state."""
        return None if self.state is None else Path(self.state).expanduser()

    def answering(self, phase: str) -> None:
        """Refuse a request of a kind that is not answered.

        Raises:
            RefusedError: the owner lets none of this phase be answered.
        """
        kind = {TRAIN: "train", EVALUATE: "evaluate", PHASE: "statistics"}.get(phase, "explore")
        if kind not in self.answers:
            raise RefusedError(
                "answers", f"a request of phase {phase[:40]!r}: this node does not answer {kind!r}", kind
            )


def site_of(node_config: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Site:
    """Return what the owner of a node says, in its configuration and its file.

    Raises:
        RefusedError: it cannot be read, or not in one way; the text names the key, and the nearest known one.
    """
    try:
        given = _of_node(node_config)
        path = _file(given, node_config.get(POLICY))
        if path is not None:
            given = _joined(given, read_toml(path), path)
        beyond = environment.get(ENVIRONMENT, "")
        site = Site.model_validate({**given, "allow": (*given.get("allow", ()), *_texts(beyond, "allow"))})
        _ = site.owners
    except ValidationError as broken:
        raise RefusedError("policy", _line(broken)) from broken
    except RefusedError:
        raise
    except (SecateurError, OSError, ValueError) as broken:  # a path that cannot be one
        raise RefusedError("policy", f"this node's configuration: {plain(str(broken), _LONGEST)}") from broken
    return site


def _of_node(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of ours in ``--node-config``; those of other apps are left alone."""
    given: dict[str, Any] = {}
    known = [*Site.model_fields, POLICY, *_FLOWERS]
    for key, value in config.items():
        head, _, rest = key.partition(".")
        if head == _MOST and rest:
            given.setdefault(_MOST, {})[rest] = value
        elif key in Site.model_fields:
            given[key] = _texts(value, key) if _listed(key) else str(value)
        elif key not in known and difflib.get_close_matches(key, known, n=1, cutoff=_LIKE):
            raise unknown("key in --node-config", key, known)
    return given


def _listed(key: str) -> bool:
    return key in {"sources", "methods", "models", "allow", "answers"}


def _texts(value: object, key: str) -> tuple[str, ...]:
    """Return a list that is written as one text, with spaces between its parts."""
    try:
        return tuple(shlex.split(str(value)))
    except ValueError as broken:
        raise RefusedError(
            "policy", f"{key} = {value!r}: {broken}; write its parts with spaces between them"
        ) from broken


def _file(given: Mapping[str, Any], named: object) -> Path | None:
    """Return the file of the owner's, if there is one."""
    beside = Path(given["data"]).expanduser() / FILE if "data" in given else None
    if beside is not None and not beside.exists():
        beside = None
    if named is None:
        return beside
    path = Path(str(named)).expanduser()
    if beside is not None and beside.resolve() != path.resolve():
        raise RefusedError("policy", f"there are two policies, {path} and {beside}: keep one of them")
    return path


def _joined(given: Mapping[str, Any], more: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what ``--node-config`` and a file say together."""
    if RESIDENT in more:
        raise RefusedError(
            "policy", f"{RESIDENT} is set in {path}: it is looked for in --node-config alone, say it there"
        )
    twice = next((key for key in more if key in given and more[key] != given[key]), None)
    if twice is not None:
        raise RefusedError("policy", f"{twice} is set in --node-config and in {path}: say it once")
    return {**given, **more}


def _line(broken: ValidationError) -> str:
    """Return the first fault of an owner's configuration as one line."""
    first = broken.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section = Most if first["loc"][0] == _MOST else Site
        return f"this node's configuration: {unknown('key', str(first['loc'][-1]), section.model_fields)}"
    told = first["msg"].removeprefix("Value error, ")
    return f"this node's configuration: {where} = {first['input']!r}: {told[0].lower()}{told[1:]}"
