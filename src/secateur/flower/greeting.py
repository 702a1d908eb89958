"""Greetings: what a node says of itself before it takes part, read into a bounded type.

Nothing of a greeting is used before all of it is as it must be. What a node says of its rows is taken from no single
node: the server goes by what most of them say (``most_say``).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import secateur
from secateur.data.shards import Shape
from secateur.errors import EngineError, SecateurError, plain
from secateur.federation.client import Participant
from secateur.federation.records import listing
from secateur.flower.messages import About
from secateur.wire import head

MOST_CLIENTS = 1_000_000
_MOST_FACTS, _LARGEST_SIZE, _MOST_SIZES = 32, 2**20, 8
_SHOWN = 120  # characters of a fact in an error

_Hex = Annotated[str, Field(max_length=128, pattern=r"^([0-9a-f]{2})*$")]
_Size = Annotated[int, Field(ge=1, le=_LARGEST_SIZE)]


class Rows(BaseModel):
    """What a node says of its rows and its model; it must be the same at all nodes.

    Attributes:
        inputs: the shape of one row.
        outputs: the number of classes, or 1.
        kind, scale, task, classes: those of ``data.Source``.
        model: a hash of the names, shapes and types of the model's tensors.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    inputs: Annotated[list[_Size], Field(max_length=_MOST_SIZES)]
    outputs: _Size
    kind: Literal["image", "tokens", "tabular"]
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    task: Annotated[str, Field(max_length=200)]
    model: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    classes: Annotated[str, Field(pattern=r"^([0-9a-f]{16})?$")]

    @property
    def told(self) -> tuple[object, ...]:
        """Return what is said of the rows alone."""
        return tuple(self.inputs), self.outputs, self.kind, self.scale, self.task, self.classes

    @property
    def shape(self) -> Shape:
        """Return the shape of the rows."""
        return Shape(tuple(self.inputs), self.outputs, self.kind, self.scale, self.task, classes=self.classes)


class Greeting(BaseModel):
    """What a node says of itself.

    Attributes:
        client: the number of its client.
        own: whether it has data of its own.
        holds: of a node with a table, whether it holds the schema that the server asked for; None: it has no table.
        key, proof: the public key of the node, and its signature of the server's challenge; see ``keys``.
        rows: what it says of its rows; None of a node with a table, whose rows are made by a schema later.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    client: Annotated[int, Field(ge=0, lt=MOST_CLIENTS)]
    own: bool
    holds: bool | None = None
    key: _Hex = ""
    proof: _Hex = ""
    rows: Rows | None = None

    @property
    def data(self) -> str:
        """Return what kind of data the node has, in words."""
        return "a table" if self.rows is None else "rows of its own" if self.own else "simulated"


class GreetingError(SecateurError):
    """A greeting is of another form; its text says how, in one bounded line."""


def read(about: Mapping[str, Any]) -> Greeting:
    """Return the greeting that a node's facts are.

    Raises:
        GreetingError: they are none.
    """
    if len(about) > _MOST_FACTS:
        raise GreetingError(f"its introduction holds {len(about)} facts; {_MOST_FACTS} at most")
    given = dict(about)
    version, spoken = given.pop("secateur", ""), given.pop("wire", None)
    if spoken != head.VERSION or isinstance(spoken, bool):
        raise GreetingError(
            f"it has secateur {_shown(version)} (wire version {_shown(spoken)}), this server "
            f"{secateur.__version__} ({head.VERSION}): install the same on both"
        )
    facts = {name: given.pop(name) for name in Rows.model_fields if name in given}
    if facts or "holds" not in given:
        given["rows"] = facts
    try:
        return Greeting.model_validate(given)
    except ValidationError as broken:
        first = broken.errors(include_url=False, include_context=False, include_input=False)[0]
        where = plain(".".join(str(part) for part in first["loc"] if part != "rows"), _SHOWN)
        what = f"its introduction lacks {where!r}, or it is of another type or beyond its bounds"
        raise GreetingError(f"{what}: {plain(first['msg'], _SHOWN)}") from None


def _shown(said: object) -> str:
    if isinstance(said, str):
        return plain(said, 40)
    return str(said) if isinstance(said, int) and abs(said) < 2**63 else "unknown"


def facts_of(participant: Participant) -> About:
    """Return what a participant's node says of its rows and its model."""
    shape, specs = Shape.of(participant.shards), participant.setting.specs
    text = ";".join(f"{name} {specs[name].shape} {specs[name].dtype}" for name in sorted(specs))
    return {
        "inputs": list(shape.input_shape), "outputs": shape.outputs, "kind": shape.kind, "scale": float(shape.scale),
        "task": shape.task, "model": hashlib.sha256(text.encode()).hexdigest()[:16], "classes": shape.classes,
    }  # fmt: skip


def about_this() -> About:
    """Return what this side says of the package."""
    return {"secateur": secateur.__version__, "wire": head.VERSION}


def unlike(said: Rows | None, ours: Rows) -> str | None:
    """Return how a node's rows or model differ from what is expected; None: they do not."""
    if said is None:
        return "it says nothing of its rows"
    name = next((name for name in Rows.model_fields if getattr(said, name) != getattr(ours, name)), None)
    if name is None:
        return None
    what = "digest of the names of classes" if name == "classes" else name
    shown, expected = (plain(str(getattr(rows, name)), _SHOWN) for rows in (said, ours))
    return f"its {what} is {shown}, {expected} is expected (another model or other data)"


def most_say(said: Mapping[int, object], what: str) -> Any:
    """Return what more clients say than say anything else.

    Args:
        said: what each client says.
        what: that they speak of, for the error.

    Raises:
        EngineError: two things are said by equally many, so that a single node would decide.
    """
    counts = Counter(said.values()).most_common(2)
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        views = [(view, sorted(who for who, told in said.items() if told == view)) for view, _ in counts]
        one, other = (f"{plain(str(view), _SHOWN)} ({listing(who)})" for view, who in views)
        raise EngineError(
            f"the nodes disagree on {what}, and no view has more of them than the other: {one}, or {other}; mend the "
            "wrong ones' data or configuration"
        )
    return counts[0][0]
