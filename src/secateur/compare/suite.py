"""Suites: a grid of methods, settings and seeds; and for each cell the controls that it has to beat."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from secateur import cost, methods
from secateur.bandwidth import Links
from secateur.data.shards import Shape, Shards
from secateur.errors import ConfigError, check, unknown
from secateur.federation.client import example, make_model, make_setting
from secateur.methods.kit.composition import Composition
from secateur.methods.kit.personal import Personal
from secateur.methods.narrow import Narrow
from secateur.pruning.mask import Mask
from secateur.pruning.schedule import Never, PQIndex
from secateur.pruning.structure import plan, sizes
from secateur.study.study import ModelSection, Study, assign, pair, read, study

Control = Literal["dense", "random", "ramped", "shuffled", "narrow"]


class Suite(BaseModel):
    """What is compared.

    Attributes:
        title: one line.
        source: a data source; where it wants a folder or a file, that is given with ``--data``, in the place of
            ``{data}`` or at the end.
        seeds: each variant is run with each of them.
        partitions: each variant is run on each of them.
        common: settings of all variants, as ``path = value``.
        variants: settings of each, by the name that it has in tables.
        controls: what each is set beside: FedAvg; a random mask of the same sparsity; one on the same ramp, where the
            variant's schedule begins dense; one of the same counts a layer; a narrow dense model of the same MACs. All
            but the first are only made for what has a mask; for personal models, FedAvg and a random mask.
        target: quality whose costs are told; 0: 95 % of what the FedAvg beside a line ends with (for errors 105 %).
        margin: two means are level where their difference is shown to be smaller; 0: 0.01 of accuracy, and 5 % of the
            other's error. A margin that is given asks for a verdict, which takes two seeds.
        link: the clients' links by kind, for which seconds are predicted where no other are asked for; see
            ``report.links``. Empty: none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = ""
    source: str
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    partitions: list[str] = Field(min_length=1)
    common: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    controls: list[Control] = ["dense", "random", "ramped", "shuffled", "narrow"]
    target: float = 0.0
    margin: float = Field(default=0.0, ge=0)
    link: str = ""

    @field_validator("link")
    @classmethod
    def _readable(cls, link: str) -> str:
        if link:
            Links.parse(link)  # a wrong one fails here, not after all runs
        return link

    @property
    def links(self) -> Links | None:
        """Return what ``link`` says."""
        return Links.parse(self.link) if self.link else None

    def adjusted(
        self, seeds: int | None = None, rounds: int | None = None, partitions: Sequence[str] = (),
        settings: Sequence[str] = (),
    ) -> Suite:  # fmt: skip
        """Return the suite with what the command line says.

        Args:
            seeds: how many: the suite's first, then the integers that follow its largest.
            rounds: R, for a shorter look.
            partitions: in the place of the suite's.
            settings: ``path=value``, of all variants that do not say otherwise themselves.

        Raises:
            ConfigError: a number is not above 0, or a setting is not written so.
        """
        for name, value in (("--seeds", seeds), ("--rounds", rounds)):
            check(value is None or value >= 1, name=name, value=value, must="be at least 1")
        more = range(max(self.seeds) + 1, max(self.seeds) + 1 + (seeds or 0))
        common = dict(self.common) if rounds is None else {**self.common, "rounds": rounds}
        return self.model_copy(
            update={
                "seeds": [*self.seeds, *more][: seeds or len(self.seeds)],
                "partitions": list(partitions or self.partitions),
                "common": common | dict(pair(setting) for setting in settings),
            }
        )


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        partition, seed: where.
        variant: what.
        control: which control of the variant this is; empty: the variant itself.
        study: what is run. Cells of equal studies share one run.
    """

    partition: str
    variant: str
    seed: int
    study: Study
    control: str = ""


def names() -> list[str]:
    """Return the suites that come with the package."""
    return sorted(path.name.removesuffix(".toml") for path in resources.files("secateur.compare.suites").iterdir()
                  if path.name.endswith(".toml"))  # fmt: skip


def load(name: str) -> Suite:
    """Read a suite by its name or from a TOML file.

    Raises:
        ConfigError: there is none, or a setting of it is wrong; one line.
    """
    if name.endswith(".toml"):
        values = read(Path(name))
    elif name in names():
        values = tomllib.loads(
            (resources.files("secateur.compare.suites") / f"{name}.toml").read_text(encoding="utf-8")
        )
    else:
        raise unknown("suite", name, [*names(), "FILE.toml"])
    try:
        return Suite.model_validate(values)
    except ValidationError as broken:
        first = broken.errors()[0]
        raise ConfigError(f"suite {name}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from broken


def chosen(words: Sequence[str], data: str | None = None) -> tuple[Suite, str | None]:
    """Return what a command line compares, and the folder or file of its data.

    Args:
        words: a suite by its name or file; or methods, each with settings of its own, as
            ``METHOD`` or ``METHOD:PATH=VALUE,PATH=VALUE``.
        data: folder or file of the suite's source; beside methods a source as ``secateur run`` takes it.

    Raises:
        ConfigError: there is no such suite or method, or two words say the same.
    """
    if len(words) == 1 and (words[0].endswith(".toml") or words[0] in names()):
        return load(words[0]), data
    known = Study()
    variants: dict[str, dict[str, Any]] = {}
    for word in words:
        method, _, rest = word.partition(":")
        if method.endswith(".toml") or method in names():
            raise ConfigError(f"{word}: a suite is compared by itself; beside others name methods alone")
        if "." not in method and method not in methods.names():
            raise unknown("suite or method", method, [*names(), "FILE.toml", *methods.names()])
        settings = dict(pair(setting, word) for setting in rest.split(",") if setting)
        name = _named(method, settings)
        if name in variants:
            raise ConfigError(f"{name!r} is compared twice: {word}")
        variants[name] = {"method": method, **settings}
    source = data or known.data.source
    title = f"{', '.join(dict.fromkeys(one['method'] for one in variants.values()))} on {source}"
    return Suite(title=title, source=source, partitions=[known.data.partition], variants=variants), None


def _named(method: str, settings: Mapping[str, str]) -> str:
    """Return a variant's name; a sparsity stands at its end, in per cent, as tables by sparsity want it."""
    words, end = [method.rpartition(".")[2]], ""
    for path, value in settings.items():
        last = path.rpartition(".")[2]
        try:
            share = f"{100 * float(value):.4g} %" if last in {"sparsity", "target"} else ""
        except ValueError:
            share = ""
        words += [] if share else [f"{last}={value}"]
        end = share or end
    return " ".join([", ".join(words), end]).strip()


def cells(suite: Suite, data: str | None = None) -> list[Cell]:
    """Return the runs of a suite's variants, and of FedAvg beside them; every study is checked.

    Args:
        suite: what is compared.
        data: folder or file for the suite's source.

    Raises:
        ConfigError: a setting is unknown or out of bounds, or a method cannot be compared with it (the text names the
            variant); or a verdict is asked of one seed.
    """
    if suite.margin and len(suite.seeds) < 2:
        raise ConfigError(f"margin = {suite.margin:g} asks for a verdict, which one seed cannot give: take two or more")
    found = []
    for seed in suite.seeds:
        for partition in suite.partitions:
            for variant, settings in suite.variants.items():
                where = {"data.source": _source(suite.source, data), "data.partition": partition, "seed": seed}
                try:
                    made = _checked({**suite.common, **_recommended(suite, settings), **settings, **where}, settings)
                    found.append(Cell(partition, variant, seed, made.complete()))
                    if "dense" in suite.controls:
                        found.append(Cell(partition, variant, seed, twin(suite, made), "dense"))
                except ConfigError as broken:
                    raise ConfigError(f"variant {variant!r}: {broken}") from broken
    return found


def _recommended(suite: Suite, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a variant's method wants its scores trained: the suite's common settings are for weights."""
    method = str(settings.get("method", suite.common.get("method", Study().method)))
    return {f"training.{name}": value for name, value in methods.find(method).recommended.items()}


def _checked(given: Mapping[str, Any], settings: Mapping[str, Any]) -> Study:
    made = _study(given)
    method = made.build_method()
    own = {"training.optimiser", "training.lr"} & settings.keys()
    if not (method.trains_weights or method.recommended or own):
        raise ConfigError(
            f"{made.method} is a method without recommended settings for its optimiser, and the suite's are for "
            "weights: give the variant training.optimiser and training.lr"
        )
    if personal(made) and not made.data.test_fraction:
        raise ConfigError(
            f"{made.method} ends with a model for each client, compared on clients' own test rows: data.test_fraction "
            "= 0 leaves none"
        )
    return made


def _study(settings: Mapping[str, Any]) -> Study:
    values: dict[str, Any] = {}
    for path, value in settings.items():
        assign(values, f"{path}={value}")
    return study(values)


def personal(made: Study) -> bool:
    """Return whether clients use models or masks of their own, which only their own test rows can score."""
    method = made.build_method()
    return method.personal or (isinstance(method, Personal) and method.personal_masks)


def twin(suite: Suite, made: Study) -> Study:
    """Return the dense study beside a variant's; the other controls are made of it.

    It trains weights: as the variant does, or by the suite's common settings where the variant learns something else.
    What changes nothing in it, such as how often it is looked at, is common to all, so that variants share it.
    """
    settings = {k: v for k, v in suite.common.items() if k.startswith("training.") or k == "evaluate_every"}
    common, dense = _study(settings | {"method": "fedavg"}), made.dense()
    training = made.training if made.build_method().trains_weights else common.training
    options = {path: value for path, value in dense.options.items() if path != "aggregator.pruned"}
    changes = {"training": training, "evaluate_every": common.evaluate_every, "options": options}
    return dense.model_copy(update=changes).complete()


def dense_name(suite: Suite, dense: Study) -> str:
    """Return what a dense twin is called: FedAvg, and in what it differs from one with the suite's common settings.

    >>> suite = Suite(source="digits", partitions=["iid"], variants={"a": {}}, common={"training.lr": 0.1})
    >>> dense_name(suite, Study(method="fedavg", training={"lr": 0.2}))
    'FedAvg, lr 0.2'
    """
    where = {"data.source": dense.data.source, "data.partition": dense.data.partition, "seed": dense.seed}
    heads = Study.model_fields.keys() - {"method", "options"}
    common = {path: value for path, value in suite.common.items() if path.split(".")[0] in heads}
    plain = _study({**common, **where, "method": "fedavg"})
    return ", ".join(["FedAvg", *differences(dense, [plain])])


def differences(dense: Study, others: Sequence[Study]) -> list[str]:
    """Return in what a dense study differs from others but for its seed, in words such as ``lr 0.01``."""
    facts = _facts(dense)
    return [
        str(value).replace("_", " ") if path == "options.aggregator" else f"{path.rpartition('.')[2]} {value}"
        for path, value in facts.items()
        if any(value != _usual(path, facts, _facts(other)) for other in others)
    ]


def _usual(path: str, facts: Mapping[str, Any], other: Mapping[str, Any]) -> Any:
    """Return what another study has; of another aggregator's options, their defaults."""
    slot = "options.aggregator"
    if not path.startswith(f"{slot}.") or facts[slot] == other.get(slot):
        return other.get(path)
    chosen_ = Study(method=facts["method"], options={"aggregator": facts[slot]})
    return chosen_.complete().options.get(path.removeprefix("options."))


def _facts(made: Study) -> dict[str, Any]:
    """Return every setting of a complete study by its path; the seed is the same for all."""
    return _flat(made.complete().model_copy(update={"seed": 0}).model_dump())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _source(source: str, data: str | None) -> str:
    if data is None and ("{data}" in source or source in {"idx", "cifar10", "text", "hub"}):
        raise ConfigError(f"this suite reads {source}: say where that is with --data")
    return source.replace("{data}", data or "") if "{data}" in source else f"{source}:{data}" if data else source


def controls(suite: Suite, cell: Cell, mask: Mask | None, final: Mapping[str, Any], shards: Shards) -> list[Cell]:
    """Return the controls of a variant that has ended with ``mask``; none where nothing is pruned.

    Args:
        suite: says which.
        cell: the variant's.
        mask: of the shipped model.
        final: of its summary: the MACs that the narrow model is given, the mean sparsity of personal models.
        shards: the rows, for the shape of a model.
    """
    made, base = cell.study, twin(suite, cell.study)
    shared = {k: v for k, v in made.options.items() if k.split(".")[0] == "aggregator"}
    options: dict[str, tuple[str, dict[str, Any]]] = {}
    if personal(made):
        sparsity = float(final.get("local_sparsity", 0.0))
        options = {"random": ("random", _at_once(sparsity))} if sparsity else {}
    elif mask and not all(bool(kept.all()) for kept in mask.values()):
        network = _network(made.model.model_dump_json(), Shape.of(shards))
        counts = [int(mask[name].sum()) if name in mask else size for name, size in network.weights.items()]
        sparsity = 1 - sum(counts) / sum(network.weights.values())
        given = {"allocation": "given", "allocation.kept": ",".join(map(str, counts))}
        options = {"random": ("random", _at_once(sparsity)), "shuffled": ("random", {**_at_once(sparsity), **given})}
        if ramp := _ramp(made, sparsity):
            options["ramped"] = ("random", ramp)
        if network.macs:
            width = min(network.macs, key=lambda width: abs(network.macs[width] - float(final["macs"])))
            options["narrow"] = ("narrow", {"width": width})
    return [
        Cell(cell.partition, cell.variant, cell.seed, _changed(base, options[name], shared), name)
        for name in suite.controls
        if name in options
    ]


def _at_once(sparsity: float) -> dict[str, Any]:
    return {"schedule": "one_shot", "schedule.at": 0, "schedule.sparsity": sparsity}


def _ramp(made: Study, sparsity: float) -> dict[str, Any]:
    """Return the options of a schedule that begins dense, up to the sparsity that was reached; else nothing.

    How much ``PQIndex`` prunes follows from the weights, so that a random mask has no such ramp.
    """
    method = made.build_method()
    if not isinstance(method, Composition) or isinstance(method.schedule, Never | PQIndex):
        return {}
    if method.schedule.level(0, made.rounds):
        return {}
    ramp = {path: value for path, value in made.options.items() if path.split(".")[0] == "schedule"}
    start = {path: min(float(value), sparsity) for path, value in ramp.items() if path == "schedule.initial"}
    return {**ramp, **start, "schedule.sparsity": sparsity}


def _changed(base: Study, what: tuple[str, dict[str, Any]], shared: Mapping[str, Any]) -> Study:
    method, options = what
    given = options if method == "narrow" else {**options, **shared}
    return base.model_copy(update={"method": method, "options": given}).complete()


@dataclass(frozen=True)
class _Network:
    """The entries of each prunable weight, and the MACs at each width in 64ths, none where units cannot be removed."""

    weights: Mapping[str, int]
    macs: Mapping[float, int]


@functools.lru_cache
def _network(section: str, shape: Shape) -> _Network:
    """Return what controls need of a model; hundreds of variants share it, and tracing takes a second."""
    made = Study(model=ModelSection.model_validate_json(section))
    model, inputs = make_model(made, shape), example(shape)
    setting, uses = make_setting(made, model, 1, inputs), cost.uses(model, inputs)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def macs(width: float) -> int:
        narrow = Narrow(width)
        mask = narrow.mask(setting, narrow.leading(setting, width))
        return cost.physical(uses, sizes(shapes, plan(mask, setting.layout.groups)))

    steps = [step / 64 for step in range(1, 65)] if setting.layout.layers else []
    weights = {name: setting.specs[name].size for name in setting.layout.names("weight")}
    return _Network(weights, {width: macs(width) for width in steps})
