"""Suites: a grid of variants, partitions and seeds, and the controls that each variant is compared with."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources, util
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from secateur import methods
from secateur.bandwidth import Bandwidth
from secateur.comparison.crossing import crossed
from secateur.comparison.networks import network
from secateur.data import sources
from secateur.data.shards import Shape, Shards
from secateur.errors import ConfigError, check, unknown
from secateur.methods.kit.composition import Composition
from secateur.methods.kit.personal import Personal
from secateur.pruning.mask import Mask
from secateur.study.options import dotted
from secateur.study.own import located, reached
from secateur.study.study import Study, assign, parse_study, read_toml, split_setting

Control = Literal["dense", "random", "ramped", "shuffled", "narrow"]


class Suite(BaseModel):
    """A comparison as its TOML file describes it.

    Attributes:
        title: the heading, one line.
        source: a data source. The folder or file that it needs is given with ``--data``; it replaces ``{data}`` or is
            appended.
        seeds: the seeds that each variant is run with.
        partitions: the partitions that each variant is run on.
        common: settings of all variants, as ``path = value``.
        variants: the settings of each variant, by its name in tables.
        controls: the controls of each variant. ``dense`` is FedAvg; ``random`` a random mask of the same sparsity;
            ``ramped`` a random mask on the variant's own ramp, if its schedule begins dense; ``shuffled`` a random mask
            with the same number of weights in each layer; ``narrow`` a narrow dense model of the same MACs. Only dense
            ones are made for a variant without a mask, only dense and random ones for personal models.
        target: quality at which costs are reported; 0: 95 % of the dense baseline's final quality (for errors 105 %).
        margin: two means are level if they differ by significantly less than this; 0: by 0.01 of accuracy, or 5 % of
            the other's error. With a margin a suite needs at least two seeds.
        link: the clients' links, for which seconds are predicted unless others are asked for; see
            ``bandwidth.Bandwidth.parse``. Empty: none.
        places: of a crossed suite, the value of each axis for each variant; see ``crossing``.
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
    places: dict[str, dict[str, str]] = Field(default_factory=dict)

    @field_validator("link")
    @classmethod
    def _readable(cls, link: str) -> str:
        if link:
            Bandwidth.parse(link)  # a wrong one fails here, not after all runs
        return link

    @property
    def bandwidth(self) -> Bandwidth | None:
        """Return the network that ``link`` describes."""
        return Bandwidth.parse(self.link) if self.link else None

    def adjusted(
        self, seeds: int | None = None, rounds: int | None = None, partitions: Sequence[str] = (),
        settings: Sequence[str] = (),
    ) -> Suite:  # fmt: skip
        """Return the suite with the changes that a command line asks for.

        Args:
            seeds: number of seeds: the suite's own first, then the integers after its largest.
            rounds: number of rounds.
            partitions: partitions that replace the suite's.
            settings: common settings, as ``path=value``; a variant's own settings take precedence.

        Raises:
            ConfigError: a number is not above 0, or a setting is not written so.
        """
        for name, value in (("--seeds", seeds), ("--rounds", rounds)):
            check(value is None or value >= 1, name=name, value=value, must="be at least 1")
        more = range(max(self.seeds) + 1, max(self.seeds) + 1 + (seeds or 0))
        common = dict(self.common) if rounds is None else {**self.common, "rounds": rounds}
        changes = {
            "seeds": [*self.seeds, *more][: seeds or len(self.seeds)],
            "partitions": list(partitions or self.partitions),
            "common": common | dict(split_setting(setting) for setting in settings),
        }
        return self.model_copy(update=changes).located()

    def located(self) -> Suite:
        """Return the suite with the modules of files of one's own that it names; see ``study.own``."""
        where = located({**self.common, "data.source": self.source})
        changes = {"source": where.pop("data.source"), "common": where}
        return self.model_copy(update={**changes, "variants": {k: located(v) for k, v in self.variants.items()}})


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        partition, variant, seed: the place in the grid.
        control: the kind of control that this is of the variant; empty: the variant itself.
        study: the study that is run. Cells of equal studies share one run.
    """

    partition: str
    variant: str
    seed: int
    study: Study
    control: str = ""


def names() -> list[str]:
    """Return the names of the suites that come with the package."""
    return sorted(path.name.removesuffix(".toml") for path in resources.files("secateur.comparison.suites").iterdir()
                  if path.name.endswith(".toml"))  # fmt: skip


def load(name: str) -> Suite:
    """Return a suite of the package by its name, or a suite from a TOML file.

    Raises:
        ConfigError: there is no such suite, or one of its settings is wrong.
    """
    beside = Path(f"{name}.toml")
    if name.endswith(".toml"):
        values = read_toml(Path(name))
    elif name in names() and beside.is_file():
        raise ConfigError(
            f"{name!r} is a suite of secateur, and {beside} a file here: write {beside} for the file, or compare from "
            "another folder for the suite"
        )
    elif name in names():
        values = tomllib.loads(
            (resources.files("secateur.comparison.suites") / f"{name}.toml").read_text(encoding="utf-8")
        )
    else:
        raise unknown("suite", name, [*names(), "FILE.toml"])
    return parse(values, f"suite {name}")


def parse(values: Mapping[str, Any], name: str) -> Suite:
    """Return a suite of its settings; ``name`` is what it is called in messages.

    Raises:
        ConfigError: one of its settings is wrong.
    """
    try:
        return Suite.model_validate(crossed(values)).located()
    except ValidationError as broken:
        first = broken.errors()[0]
        raise ConfigError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from broken


def chosen(words: Sequence[str], data: str | None = None) -> tuple[Suite, str | None]:
    """Return the suite that a command line asks for, and the folder or file of its data.

    Args:
        words: the name or file of one suite; or methods, each as ``METHOD`` or ``METHOD:PATH=VALUE,PATH=VALUE``.
        data: for a suite the folder or file of its source; for methods a data source, as for ``secateur run``.

    Raises:
        ConfigError: there is no such suite or method, or a variant is given twice.
    """
    if len(words) == 1 and (words[0].endswith(".toml") or words[0] in names()):
        return load(words[0]), data
    source = data or Study().data.source
    known = Study.model_validate({"data": {"source": source}})
    variants: dict[str, dict[str, Any]] = {}
    for word in words:
        method, _, rest = word.partition(":")
        if method.endswith(".toml") or method in names():
            raise ConfigError(f"{word}: a suite is compared by itself; to compare several, name methods")
        method = str(located({"method": method})["method"])
        if "." not in method and method not in methods.names() and util.find_spec(method) is None:
            raise unknown("suite or method", method, [*names(), "FILE.toml", *methods.names()])
        settings = dict(split_setting(setting, word) for setting in rest.split(",") if setting)
        name = named(method, settings)
        if name in variants:
            raise ConfigError(f"{name!r} is compared twice: {word}")
        variants[name] = {"method": word.partition(":")[0], **settings}
    title = f"{', '.join(dict.fromkeys(one['method'] for one in variants.values()))} on {source}"
    return Suite(title=title, source=source, partitions=[known.data.partition], variants=variants).located(), None


def named(method: str, settings: Mapping[str, Any]) -> str:
    """Return a variant's name, with its sparsity in per cent at the end, where tables by sparsity look for it."""
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
    """Return the cells of a suite's variants and of their dense baselines; every study is checked.

    Args:
        suite: the suite.
        data: folder or file of the suite's source.

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
    """Return the training settings that a variant's method recommends, which override the suite's common ones."""
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
    return parse_study(reached(values))


def personal(made: Study) -> bool:
    """Return whether clients use models or masks of their own; only clients' own test rows can score those."""
    method = made.build_method()
    return method.personal or (isinstance(method, Personal) and method.personal_masks)


def twin(suite: Suite, made: Study) -> Study:
    """Return the dense twin of a variant's study, its baseline; the other controls are derived from it.

    It trains weights with the variant's training settings, or with the suite's common ones if the variant does not
    train weights. Settings that do not change its result are the same for all twins, so that variants can share one.
    """
    settings = {k: v for k, v in suite.common.items() if k.startswith("training.") or k == "evaluate_every"}
    common, dense = _study(settings | {"method": "fedavg"}), made.dense()
    training = made.training if made.build_method().trains_weights else common.training
    sparse = {"aggregator.pruned", "aggregator.then.pruned"}
    options = {path: value for path, value in dense.options.items() if path not in sparse}
    changes = {"training": training, "evaluate_every": common.evaluate_every, "options": options}
    return dense.model_copy(update=changes).complete()


def dense_name(suite: Suite, dense: Study) -> str:
    """Return the name of a dense twin: FedAvg, and its differences to one with the suite's common settings.

    >>> suite = Suite(source="digits", partitions=["iid"], variants={"a": {}}, common={"training.lr": 0.1})
    >>> dense_name(suite, Study(method="fedavg", training={"lr": 0.2}))
    'FedAvg, lr 0.2'
    """
    where = {"data.source": dense.data.source, "data.partition": dense.data.partition, "seed": dense.seed}
    heads = Study.model_fields.keys() - {"method", "options", "code"}
    common = {path: value for path, value in suite.common.items() if path.split(".")[0] in heads}
    plain = _study({**common, **where, "method": "fedavg"})
    return ", ".join(["FedAvg", *differences(dense, [plain])])


def differences(dense: Study, others: Sequence[Study]) -> list[str]:
    """Return the settings in which a dense study differs from others, the seed aside, in words such as ``lr 0.01``."""
    facts = _facts(dense)
    return [
        str(value).replace("_", " ") if path == "options.aggregator" else f"{path.rpartition('.')[2]} {value}"
        for path, value in facts.items()
        if any(value != _usual(path, facts, _facts(other)) for other in others)
    ]


def _usual(path: str, facts: Mapping[str, Any], other: Mapping[str, Any]) -> Any:
    """Return the value of another study; for an option of an aggregator that it does not use, the default."""
    slot = "options.aggregator"
    if not path.startswith(f"{slot}.") or facts[slot] == other.get(slot):
        return other.get(path)
    chosen_ = Study(method=facts["method"], options={"aggregator": facts[slot]})
    return chosen_.complete().options.get(path.removeprefix("options."))


def _facts(made: Study) -> dict[str, Any]:
    """Return every setting of a study by its path, with the seed set to 0."""
    return dotted(made.complete().model_copy(update={"seed": 0}).model_dump())


def _source(source: str, data: str | None) -> str:
    if data is None and ("{data}" in source or source in sources.names().keys() - sources.embedded()):
        raise ConfigError(f"this suite reads {source}: say where that is with --data")
    return source.replace("{data}", data or "") if "{data}" in source else f"{source}:{data}" if data else source


def controls(suite: Suite, cell: Cell, mask: Mask | None, final: Mapping[str, Any], shards: Shards) -> list[Cell]:
    """Return the controls of a variant whose run has ended; none where nothing is pruned.

    Args:
        suite: the suite, which says what controls there are.
        cell: the variant's cell.
        mask: the mask of its shipped model.
        final: the part ``final`` of its summary, with the MACs for the narrow model and the sparsity of personal ones.
        shards: the rows, which give the shapes of the model's inputs and outputs.
    """
    made, base = cell.study, twin(suite, cell.study)
    shared = {k: v for k, v in made.options.items() if k.split(".")[0] == "aggregator"}
    options: dict[str, tuple[str, dict[str, Any]]] = {}
    if personal(made):
        sparsity = float(final.get("local_sparsity", 0.0))
        options = {"random": ("random", _at_once(sparsity))} if sparsity else {}
    elif mask and not all(bool(kept.all()) for kept in mask.values()):
        sized = network(made.model.model_dump_json(), Shape.of(shards))
        counts = [int(mask[name].sum()) if name in mask else size for name, size in sized.weights.items()]
        sparsity = 1 - sum(counts) / sum(sized.weights.values())
        given = {"allocation": "given", "allocation.kept": ",".join(map(str, counts))}
        options = {"random": ("random", _at_once(sparsity)), "shuffled": ("random", {**_at_once(sparsity), **given})}
        if ramp := _ramp(made, sparsity):
            options["ramped"] = ("random", ramp)
        if sized.macs:
            width = min(sized.macs, key=lambda width: abs(sized.macs[width] - float(final["macs"])))
            options["narrow"] = ("narrow", {"width": width})
    return [
        Cell(cell.partition, cell.variant, cell.seed, _changed(base, options[name], shared), name)
        for name in suite.controls
        if name in options
    ]


def _at_once(sparsity: float) -> dict[str, Any]:
    return {"schedule": "one_shot", "schedule.at": 0, "schedule.sparsity": sparsity}


def _ramp(made: Study, sparsity: float) -> dict[str, Any]:
    """Return the options of the variant's schedule, ending at the sparsity that was reached; empty without a ramp.

    A schedule that decides by something else how much goes, such as by the weights, has none for a random mask.
    """
    method = made.build_method()
    if not isinstance(method, Composition) or "schedule.sparsity" not in made.options:
        return {}
    if method.schedule.due(0, made.rounds):
        return {}
    ramp = {path: value for path, value in made.options.items() if path.split(".")[0] == "schedule"}
    start = {path: min(float(value), sparsity) for path, value in ramp.items() if path == "schedule.initial"}
    return {**ramp, **start, "schedule.sparsity": sparsity}


def _changed(base: Study, what: tuple[str, dict[str, Any]], shared: Mapping[str, Any]) -> Study:
    method, options = what
    given = options if method == "narrow" else {**options, **shared}
    return base.model_copy(update={"method": method, "options": given}).complete()
