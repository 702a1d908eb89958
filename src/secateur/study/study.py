"""Study (what defines a result; its hash names the run) and Runtime (what only makes it faster)."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from secateur import methods
from secateur.contract.method import Method
from secateur.data.partition import parse as parse_partition
from secateur.errors import ConfigError, check, unknown
from secateur.learning.batched import Compute
from secateur.learning.optimiser import Training
from secateur.learning.task import find as find_task
from secateur.pruning.discovery import How
from secateur.wire.settings import Wire

Option = bool | int | float | str

_LATER_DATA, _LATER_TRAINING = ("validation_fraction", "task"), ("schedule", "period", "floor")
"""Settings that came later than the first runs; where they have their defaults they do not rename a run."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSection(_Section):
    """Which data, and how it is spread over clients.

    Attributes:
        source: ``digits``, ``idx:FOLDER``, ``cifar10:FOLDER``, ``text:FILE`` or ``hub:NAME``.
        clients: K.
        partition: ``iid``, ``dirichlet:ALPHA``, ``pathological:CLASSES`` or ``natural``.
        test_fraction: share of each client's rows held out as its local test split.
        validation_fraction: share of each client's rows held out for whatever chooses a setting, an epoch or a round;
            figures that are reported are of test rows. 0: none.
        public: training rows that the server has and no client, drawn before the partition; for methods whose
            server trains.
        task: what is learnt, where that is not what the data says of itself: ``classification``, ``regression``, or
            ``module:Class`` of your own (``learning.task``).
    """

    source: str = "digits"
    clients: int = Field(default=20, ge=1, le=1_000_000)
    partition: str = "pathological:2"
    test_fraction: float = Field(default=0.2, ge=0, lt=1)
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    public: int = Field(default=0, ge=0)
    task: str = ""


class ModelSection(_Section):
    """Which model.

    Attributes:
        name: of ``secateur list``, or ``module:factory``.
        init: initial weights; see ``models.initialise``.
        structure: how removable units are found: ``trace`` (our own walk over torch.fx), ``torch_pruning`` (its
            dependency graph, an extra that every client needs), or ``none``, which leaves the model's shape alone.
        options: keywords of the factory.
    """

    name: str = "smallcnn"
    init: Literal["xavier_normal", "xavier_uniform", "kaiming_normal", "torch"] = "xavier_normal"
    structure: How = "trace"
    options: dict[str, Option | tuple[int, ...]] = Field(default_factory=dict)


class Study(_Section):
    """Everything that defines a run's result; two runs of equal studies give equal bits.

    Attributes:
        method: a name of ``secateur list``, or the dotted path of your own module.
        seed: every random draw comes from it.
        rounds: R (T in FedSparsify).
        participation: C, the share of clients in each round.
        evaluate_every: rounds between evaluations on the server's test set; the last is always evaluated.
        compute: how clients' steps are computed; its defaults give bits that no machine's speed-up changes.
        options: method options by path, such as ``schedule.sparsity``; a slot's own name selects its class.
    """

    method: str = "autoflip"
    seed: int = Field(default=0, ge=0)
    rounds: int = Field(default=60, ge=1)
    participation: float = Field(default=0.5, gt=0, le=1)
    evaluate_every: int = Field(default=1, ge=1)
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    training: Training = Training()
    wire: Wire = Wire()
    compute: Compute = Compute()
    options: dict[str, Option] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _as_recommended(cls, values: Any) -> Any:
        """Train as the method recommends wherever the study says nothing else."""
        if not isinstance(values, Mapping) or not isinstance(values.get("training", {}), Mapping):
            return values
        method = values.get("method", cls.model_fields["method"].default)
        if not isinstance(method, str):
            return values
        return {**values, "training": {**methods.find(method).recommended, **values.get("training", {})}}

    @field_validator("training")
    @classmethod
    def _over_rounds(cls, training: Training, info: ValidationInfo) -> Training:
        """Let a schedule that goes over all rounds know how many there are."""
        return training.over(info.data.get("rounds", 1))

    def build_method(self) -> Method:
        """Return the method with its options set.

        Raises:
            ConfigError: unknown method, option or slot value; a value of the wrong type or out of bounds.
        """
        return build(methods.find(self.method), self.options)

    def complete(self) -> Study:
        """Return the study with every option of its method written out, so that defaults may change later."""
        return self.model_copy(update={"options": flatten(self.build_method())})

    def hash(self) -> str:
        """Return 8 hexadecimal digits that name the result."""
        # a section that came later must not rename the runs that were made without it
        later: dict[str, Any] = {"compute": True} if self.compute == Compute() else {}
        later["data"] = {name for name in _LATER_DATA if not getattr(self.data, name)}
        later["training"] = {
            name for name in _LATER_TRAINING if getattr(self.training, name) == getattr(Training, name)
        }
        text = json.dumps(self.complete().model_dump(mode="json", exclude=later), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def dense(self) -> Study:
        """Return the dense study to be trained beside: FedAvg with the same aggregator, all else equal.

        Where the method learns something other than weights, its optimiser is not for weights: what it recommends
        goes back to the defaults.
        """
        aggregator = {k: v for k, v in self.complete().options.items() if k.split(".")[0] == "aggregator"}
        method, training = self.build_method(), self.training
        if not method.trains_weights:
            usual = Training()
            training = dataclasses.replace(training, **{name: getattr(usual, name) for name in method.recommended})
        return self.model_copy(update={"method": "fedavg", "options": aggregator, "training": training}).complete()

    def to_toml(self) -> str:
        """Return the complete study as TOML."""
        return tomli_w.dumps(self.complete().model_dump(mode="json"))


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What never changes a bit of the result.

    Attributes:
        workers: worker processes, one thread each; 0 trains inside the server process.
        deadline: seconds that a round waits for its clients; None waits for all. Who is late is left out,
            named and recorded (the one setting here that can be seen in a result: set it where clients can
            fail to answer).
        state_budget: bytes of client state kept in memory before it is spilled to disk.
    """

    workers: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    deadline: float | None = None
    state_budget: int = 256 * 2**20

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"workers = {self.workers} must be 0 or more")
        if self.deadline is not None and self.deadline <= 0:
            raise ConfigError(f"deadline = {self.deadline} must be above 0 seconds")


def study(values: Mapping[str, Any]) -> Study:
    """Validate a nested mapping into a Study, its method and partition included.

    Raises:
        ConfigError: one line that names the setting, what is wrong and the nearest known name.
    """
    given = dict(values)
    if isinstance(given.get("options"), Mapping):
        given["options"] = _flat(given["options"])
    try:
        made = Study.model_validate(given)
    except ValidationError as broken:
        raise _worded(broken) from broken
    parse_partition(made.data.partition)
    if made.data.task:
        find_task(made.data.task)
    held = made.data.test_fraction + made.data.validation_fraction
    check(held < 1, name="data.test_fraction + data.validation_fraction", value=held, must="be below 1")
    made.build_method()
    return made


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested TOML tables of options as dotted paths."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def read(path: Path) -> dict[str, Any]:
    """Read a TOML configuration file into a nested mapping.

    Raises:
        ConfigError: there is no such file, or it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as broken:
        raise ConfigError(f"config {path}: {broken.strerror or broken}; give the path of a TOML file") from broken
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as broken:
        raise ConfigError(f"config {path} is not valid TOML: {broken}") from broken


def pair(setting: str, where: str = "--set") -> tuple[str, str]:
    """Split ``path=value``; ``where`` it was read stands in the error.

    Raises:
        ConfigError: it is not written so.
    """
    path, equals, value = setting.partition("=")
    if not equals or not path:
        raise ConfigError(f"{where} {setting!r}: write it as path=value, for example schedule.sparsity=0.5")
    return path, value


def assign(values: dict[str, Any], setting: str) -> None:
    """Enter one ``path=value`` of the command line into a nested mapping.

    ``training.lr=0.1`` and ``rounds=5`` go to the study; every other path is an option of the method.
    """
    path, value = pair(setting)
    head, _, rest = path.partition(".")
    fields = Study.model_fields
    if head == "model" and rest and rest not in ModelSection.model_fields:
        values.setdefault("model", {}).setdefault("options", {})[rest.removeprefix("options.")] = _literal(value)
    elif head in fields and head != "options":
        section = values.setdefault(head, {}) if rest else values
        section[rest or head] = value
    else:
        values.setdefault("options", {})[path.removeprefix("options.")] = value


def _literal(text: str) -> Option | tuple[int, ...]:
    """Return a model option as number, truth value or list of integers where it reads as one."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return tuple(value) if isinstance(value, list) else value


def _worded(broken: ValidationError) -> ConfigError:
    first = broken.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        section: Any = Study
        for part in first["loc"][:-1]:
            section = section.model_fields[str(part)].annotation
        known = section.model_fields if hasattr(section, "model_fields") else section.__dataclass_fields__
        return typing.cast("ConfigError", unknown("setting", str(first["loc"][-1]), known))
    return ConfigError(f"{path} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}")


# ---- method options: dotted paths into a tree of frozen dataclasses


def snake(name: str) -> str:
    """Return a class name as an option value: ``ServerMomentum`` -> ``server_momentum``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def choices(slot: type) -> dict[str, type]:
    """Return the classes that fit a slot's type by option value: those of its module, or itself.

    >>> from secateur.aggregation.steps import Aggregator
    >>> sorted(choices(Aggregator))
    ['fed_adagrad', 'fed_adam', 'fed_yogi', 'mean', 'server_momentum']
    """
    if dataclasses.is_dataclass(slot):
        return {snake(slot.__name__): slot}
    wanted = {name for name in vars(slot) if not name.startswith("_")}
    found = inspect.getmembers(sys.modules[slot.__module__], inspect.isclass)
    return {
        snake(name): thing
        for name, thing in found
        if dataclasses.is_dataclass(thing)
        and not name.startswith("_")
        and thing.__module__ == slot.__module__
        and wanted <= set(dir(thing))
        and not inspect.isabstract(thing)
    }


def build(cls: type[Method], options: Mapping[str, Option]) -> Method:
    """Return ``cls()`` with options set by path; slot names first, so that order does not matter."""
    method: Method = _construct(cls, {}, cls.__name__)
    for path in sorted(options, key=lambda p: (p.count("."), p)):
        changed: Method = _replace(method, path.split("."), options[path], path)
        method = changed
    return method


def _replace(owner: Any, path: list[str], value: Option, full: str) -> Any:
    names = {f.name for f in dataclasses.fields(owner)}
    if path[0] not in names:
        prefix = full.removesuffix(".".join(path))
        raise unknown(f"option of {type(owner).__name__}", prefix + path[0], [prefix + name for name in names])
    hint = typing.get_type_hints(type(owner))[path[0]]
    current = getattr(owner, path[0])
    if len(path) > 1:
        if not dataclasses.is_dataclass(current):
            raise ConfigError(f"option {full!r}: {path[0]!r} is a single value and has no {path[1]!r}")
        new = _replace(current, path[1:], value, full)
    elif dataclasses.is_dataclass(current):
        slot = _slot_class(hint, str(value), full)
        new = current if type(current) is slot else _construct(slot, {}, full)
    else:
        try:
            new = TypeAdapter(hint).validate_python(value)
        except ValidationError as broken:
            message = broken.errors()[0]["msg"]
            raise ConfigError(f"{full} = {value!r}: {message[0].lower()}{message[1:]}") from broken
    return _construct(type(owner), {**_values(owner), path[0]: new}, full)


def _construct(cls: type, values: Mapping[str, Any], full: str) -> Any:
    try:
        return cls(**values)
    except TypeError as broken:
        raise ConfigError(f"{full}: {cls.__name__} cannot be made: {broken}") from broken


def _values(owner: Any) -> dict[str, Any]:
    return {f.name: getattr(owner, f.name) for f in dataclasses.fields(owner)}


def _slot_class(slot: type, name: str, full: str) -> type:
    known = choices(slot)
    if name in known:
        return known[name]
    if ":" not in name:
        raise unknown(f"value of {full}", name, known)
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as broken:
        raise ConfigError(f"{full} = {name!r}: {broken}") from broken
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ConfigError(f"{full} = {name!r}: a slot's value must be a frozen dataclass")
    return found


def flatten(owner: Any, prefix: str = "") -> dict[str, Option]:
    """Return every option of a method by path, slot classes included; ``build`` reads it back."""
    options: dict[str, Option] = {}
    hints = typing.get_type_hints(type(owner))
    for name, value in _values(owner).items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            cls = type(value)
            known = cls in choices(hints[name]).values()
            options[prefix + name] = snake(cls.__name__) if known else f"{cls.__module__}:{cls.__qualname__}"
            options |= flatten(value, f"{prefix}{name}.")
        else:
            options[prefix + name] = value
    return options
