"""A Study: every setting that defines a run's result.

It is read from TOML files and from settings of the form ``path=value``; its hash names the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from secateur import guards, methods
from secateur.contract.guard import Guard, check_together
from secateur.contract.method import Method
from secateur.data import partition, sources
from secateur.errors import ConfigError, check
from secateur.learning.compute import Compute
from secateur.learning.optimiser import Training
from secateur.learning.task import find as find_task
from secateur.study.attack import Hostile
from secateur.study.faults import config_error
from secateur.study.options import Option, build, dotted, flatten, naming, renamed
from secateur.study.own import relative
from secateur.study.sections import DataSection, ModelSection, Section
from secateur.study.usual import METHOD
from secateur.wire.settings import Wire

_BOUNDS, _NORMS, _ON = "bounds", "norms", "on"

_LATER_DATA = ("validation_fraction", "task", "target", "site", "options")
_LATER_TRAINING = ("schedule", "period", "floor")
_LATER_COMPUTE, _LATER_WIRE = ("precision", "tf32"), ("packing", "count", "sample")
"""Settings that came later than the first runs; where they have their defaults they do not rename a run."""


class Study(Section):
    """Every setting that defines a run's result; two runs of equal studies give equal bits.

    Attributes:
        method: a name of ``secateur list``, or the dotted path of your own module.
        seed: the seed of every random draw.
        rounds: R, the number of rounds (T in FedSparsify).
        participation: C, the share of clients that take part in a round.
        quorum: the share of the asked clients whose replies an exchange needs, at least one reply; a reply of a client
            without training rows does not count. With fewer, other clients are asked in the place of these; after
            three times in a row the run ends.
        evaluate_every: rounds between evaluations on the server's test set; the last round is always evaluated.
        compute: how clients' steps are computed; with its defaults results do not depend on the machine's speed-ups.
        guards: the guards between clients' messages and the sum, by name, each with its options by path; ``bounds``
            always runs, first at the client and last at the server. ``NAME.on = false`` leaves a guard out.
        attack: what hostile clients do, in a simulation: ``name[:share][,parameter=value...]``, such as ``alie:0.3``;
            empty: all clients are honest. The share of the clients that attack, by default 0.2, is drawn from the seed.
        options: method options by path, such as ``schedule.sparsity``; the path of a slot selects its class.
        code: the folders in which modules of one's own are found, see ``own``; not a part of what names a result.

    Raises:
        ConfigError: a setting is unknown or wrong; the text names it, and the nearest known name.
    """

    method: str = METHOD
    seed: int = Field(default=0, ge=0)
    rounds: int = Field(default=60, ge=1)
    participation: float = Field(default=0.5, gt=0, le=1)
    quorum: float = Field(default=0.0, ge=0, le=1)
    evaluate_every: int = Field(default=1, ge=1)
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    training: Training = Training()
    wire: Wire = Wire()
    compute: Compute = Compute()
    guards: dict[str, dict[str, Option]] = {_BOUNDS: {}}  # noqa: RUF012 -- a field of pydantic, which copies it
    attack: str = ""
    options: dict[str, Option] = Field(default_factory=dict)
    code: tuple[str, ...] = ()

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, values: Any, handler: ModelWrapValidatorHandler[Study]) -> Study:
        """Refuse whatever could not be run, in one line, as soon as a study is made."""
        try:
            made = handler(values)
        except ValidationError as broken:
            raise config_error(broken, cls) from broken
        partition.parse(made.data.partition)
        if made.data.task:
            find_task(made.data.task)
        held = made.data.test_fraction + made.data.validation_fraction
        check(held < 1, name="data.test_fraction + data.validation_fraction", value=held, must="be below 1")
        made.build_method()
        made.build_guards()
        return made

    @model_validator(mode="before")
    @classmethod
    def _as_recommended(cls, values: Any) -> Any:
        """Fill in what the data and the method recommend and the study does not set itself."""
        sections = ("data", "model", "training")
        if not isinstance(values, Mapping) or not all(isinstance(values.get(s, {}), Mapping) for s in sections):
            return values
        method = values.get("method", cls.model_fields["method"].default)
        source = values.get("data", {}).get("source", DataSection.model_fields["source"].default)
        if not isinstance(method, str) or not isinstance(source, str):
            return values
        usual = sources.recommended(source)
        filled = {section: {**usual[section], **values.get(section, {})} for section in usual}
        training = {**filled.get("training", {}), **methods.find(method).recommended, **values.get("training", {})}
        return {**values, **filled, "training": training}

    @field_validator("options", mode="before")
    @classmethod
    def _by_path(cls, given: Any) -> Any:
        """Read options by path, under their names of today."""
        return renamed(dotted(given)) if isinstance(given, Mapping) else given

    @field_validator("guards", mode="before")
    @classmethod
    def _by_guard(cls, given: Any) -> Any:
        """Read options by guard, let the bounds always stand, and leave out what is not ``on``."""
        if not isinstance(given, Mapping):
            return given
        kept = {name: options for name, options in by_guard(given).items() if _on(name, options)}
        return {_BOUNDS: {}} | {name: {k: v for k, v in o.items() if k != _ON} for name, o in kept.items()}

    @field_validator("attack")
    @classmethod
    def _whole_attack(cls, text: str) -> str:
        """Write every parameter of the attack out."""
        return str(Hostile.parse(text)) if text else ""

    def build_attack(self) -> Hostile | None:
        """Return what hostile clients do; None: all are honest.

        Raises:
            ConfigError: there is no such attack, or a parameter is wrong.
        """
        return Hostile.parse(self.attack) if self.attack else None

    def build_guards(self) -> list[Guard]:
        """Return the guards with their options set, in their order at a client.

        Raises:
            ConfigError: as ``build_method`` does.
        """
        made = [build(guards.find(name), options) for name, options in self.guards.items()]
        check_together(made)
        return made

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
        if any(path.split(".")[0] == "aggregator" for path in self.options):
            methods.check_aggregator(self.method)
        return build(methods.find(self.method), self.options, _elsewhere())

    def complete(self) -> Study:
        """Return the study with every option of its method written out, so that defaults may change later."""
        return self.model_copy(update={"options": flatten(self.build_method())})

    def hash(self) -> str:
        """Return 8 hexadecimal digits that name the study's result."""
        # a setting that was added later must not change the hash of studies that leave it at its default
        usual = {name for name in _LATER_COMPUTE if getattr(self.compute, name) == getattr(Compute, name)}
        later: dict[str, Any] = {"code": True, "compute": True if self.compute == Compute() else usual}
        if self.guards == {_BOUNDS: {}}:
            later["guards"] = True
        for name in ("quorum", "attack"):
            if not getattr(self, name):
                later[name] = True
        later["data"] = {name for name in _LATER_DATA if not getattr(self.data, name)}
        for section, given, kind, names in (
            ("training", self.training, Training, _LATER_TRAINING),
            ("wire", self.wire, Wire, _LATER_WIRE),
        ):
            later[section] = {name for name in names if getattr(given, name) == getattr(kind, name)}
        values = self.complete().model_dump(mode="json", exclude=later)
        text = json.dumps({**values, "options": naming(self._named(values["options"]))}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def _named(self, options: dict[str, Option]) -> dict[str, Option]:
        """Return a method's options without those of its ``later`` ones that have their defaults."""
        method = methods.find(self.method)
        usual = flatten(method()) if method.later else {}
        changed = {path.split(".")[0] for path, value in options.items() if usual.get(path) != value}
        return {p: v for p, v in options.items() if p.split(".")[0] not in method.later - changed}

    def dense(self) -> Study:
        """Return the study's dense twin: FedAvg with the same aggregator, all else equal.

        The training settings that a method recommends for learning something other than weights go back to their
        defaults, as the twin learns weights.
        """
        aggregator = {k: v for k, v in self.complete().options.items() if k.split(".")[0] == "aggregator"}
        method, training = self.build_method(), self.training
        if not method.trains_weights:
            usual = Training()
            training = dataclasses.replace(training, **{name: getattr(usual, name) for name in method.recommended})
        return self.model_copy(update={"method": "fedavg", "options": aggregator, "training": training}).complete()

    def to_toml(self, folder: Path | None = None) -> str:
        """Return the complete study as TOML; for a file in ``folder`` with ``code``, relative to it."""
        values = self.complete().model_dump(mode="json", exclude={"code"})
        code = {} if folder is None or not self.code else {"code": relative(self.code, folder)}
        return tomli_w.dumps({**code, **values})


def _on(name: str, options: Mapping[str, Any]) -> bool:
    """Return whether a guard is to run."""
    said = str(options.get(_ON, True)).lower()
    if said not in {"true", "false"} or (name == _BOUNDS and said == "false"):
        raise ConfigError(
            f"guards.{name}.on = {options.get(_ON)!r}: "
            + ("bounds always run" if said == "false" else "write true or false")
        )
    return said == "true"


def where_nobody_is_known(values: dict[str, Any]) -> dict[str, Any]:
    """Return a study's settings with the guard that bounds what one client can do, unless they speak of it themselves.

    It is on by default where clients are others' machines, and not in a simulation. It becomes part of the study.
    """
    given = values.get("guards", {})
    if not isinstance(given, Mapping) or _NORMS in by_guard({str(path): value for path, value in given.items()}):
        return values
    return {**values, "guards": {**given, _NORMS: {}}}


def by_guard(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options of each guard by its name: ``bounds.rows`` is option ``rows`` of guard ``bounds``.

    Of ``their.module.option``, which names no guard of the package, all but the last part is the module.
    """
    found: dict[str, dict[str, Any]] = {}
    for path, value in given.items():
        if isinstance(value, Mapping):
            found.setdefault(path, {}).update(dotted(value))
            continue
        ours = path.partition(".")[0] in guards.names() or path.count(".") == 1
        name, _, option = path.partition(".") if ours else path.rpartition(".")
        found.setdefault(name, {})[option] = value
    return found


def parse_study(values: Mapping[str, Any]) -> Study:
    """Return the study of a nested mapping of settings, validated with its method and partition.

    Raises:
        ConfigError: a setting is unknown or wrong; the text names it, and the nearest known name.
    """
    return Study.model_validate(values)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the nested mapping of a TOML file.

    Raises:
        ConfigError: there is no such file, or it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as broken:
        raise ConfigError(f"config {path}: {broken.strerror or broken}; give the path of a TOML file") from broken
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as broken:
        raise ConfigError(f"config {path} is not valid TOML: {broken}") from broken


def split_setting(setting: str, where: str = "--set") -> tuple[str, str]:
    """Split ``path=value`` into path and value; ``where`` names its origin in the error.

    Raises:
        ConfigError: there is no ``=``, or nothing before it.
    """
    path, equals, value = setting.partition("=")
    if not equals or not path:
        raise ConfigError(f"{where} {setting!r}: write it as path=value, for example schedule.sparsity=0.5")
    return path, value


def assign(values: dict[str, Any], setting: str) -> None:
    """Set one ``path=value`` in a nested mapping of a study's settings.

    Paths that the study does not have, unlike ``training.lr`` or ``rounds``, are options of the method.
    """
    path, value = split_setting(setting)
    literal = path.startswith(("model.", "data.options.")) and path.partition(".")[2] not in ModelSection.model_fields
    put(values, path, _literal(value) if literal else value)


def put(values: dict[str, Any], path: str, value: Any) -> None:
    """Set the value of one path in a nested mapping of a study's settings; see ``assign``.

    Raises:
        ConfigError: the path leads into a setting that is a single value already.
    """
    head, _, rest = path.partition(".")
    fields = Study.model_fields
    inner = head == "model" and rest and rest not in ModelSection.model_fields
    if inner or (head == "data" and rest.startswith("options.")):
        _at(values, head, "options")[rest.removeprefix("options.")] = value
    elif head in fields and head != "options":
        section = _at(values, head) if rest else values
        section[rest or head] = value
    else:
        _at(values, "options")[path.removeprefix("options.")] = value


def _at(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the mapping under some names of a nested mapping, made where there is none."""
    for depth, name in enumerate(names, start=1):
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            where = ".".join(names[:depth])
            raise ConfigError(f"{where} = {str(values)[:80]!r} is a single value, and settings below it are given too")
    return values


def _elsewhere() -> list[str]:
    """Return the paths of the settings of a study's sections, such as ``training.lr``."""
    made = {"data": [*DataSection.model_fields], "model": [*ModelSection.model_fields]}
    made |= {"training": [*Training.__dataclass_fields__], "wire": [*Wire.__dataclass_fields__]}
    return [f"{section}.{name}" for section, names in made.items() for name in names]


def _literal(text: str) -> Any:
    """Return an option's text as a number, boolean or list if it is one, else as text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, more digits than Python reads, or brackets without end
        return text
    return tuple(value) if isinstance(value, list) else value
