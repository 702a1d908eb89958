"""``secateur.compare``: several methods on a person's own model and rows, each with its controls, over seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from secateur.api import notebook
from secateur.api.given import Given, given
from secateur.api.progress import of_many
from secateur.api.result import Paged, Result, Shown, framed
from secateur.comparison import grid
from secateur.comparison.grid import cell_name, folder_of
from secateur.comparison.suite import Cell, Control, Suite, named, names, parse
from secateur.errors import ConfigError, NoResultError
from secateur.federation.folder import fresh
from secateur.federation.opening import forking
from secateur.report import tables
from secateur.report.gather import RESULT, comparison_lines
from secateur.report.gather import failed as failure_of
from secateur.report.terminal import compared
from secateur.report.verdicts import DENSE, Line
from secateur.study.shorthand import is_option, written_out
from secateur.study.study import split_setting

_CONTROLS: tuple[Control, ...] = ("dense", "random", "ramped", "shuffled", "narrow")


@dataclass(frozen=True)
class Frame:
    """What of ``compare``'s arguments is the comparison's own, beside settings of all its runs."""

    seeds: int | Sequence[int] = 3
    controls: Sequence[str] = _CONTROLS
    partition: str | Sequence[str] = ()
    jobs: int = 0
    progress: bool | None = None
    title: str = ""


class Comparison(Paged):
    """A finished comparison.

    Args:
        suite: what was compared.
        cells: its runs and their controls.
        folder: where they lie.
        held: the objects that its studies name, kept for as long as this is.

    Attributes:
        lines: a line for each method and control, with its figures over seeds.
        failed: what ended the runs that have no result, by their names.

    Raises:
        NoResultError: no run has a result.
    """

    def __init__(self, suite: Suite, cells: Sequence[Cell], folder: Path, *held: object) -> None:
        self.suite, self.cells, self.folder, self._held = suite, cells, folder, held
        reasons = {cell_name(cell): failure_of(folder_of(folder, cell.study)) for cell in cells}
        self.failed = {name: why for name, why in reasons.items() if why}
        if len(self.failed) == len(reasons):
            name, why = next(iter(self.failed.items()))
            raise NoResultError(f"none of {len(reasons)} runs has a result: {name}: {why}")
        self.lines: list[Line] = comparison_lines(suite, cells, folder, suite.bandwidth)

    def table(self) -> Shown:
        """Return quality and costs of each method, with its differences to its controls."""
        shown = list[RenderableType]()
        for place, here in tables.by_place(self.lines).items():
            shown += [compared(place, here, len(self.suite.seeds)), tables.note(here)]
        missing = [f"No result, and in no figure: {name}: {why}" for name, why in self.failed.items()]
        return Shown(*shown, *missing)

    @property
    def records(self) -> Any:
        """Return the complete table, a row for each line: a data frame where pandas is installed, else mappings."""
        places = tables.by_place(self.lines)
        return framed([{"place": place, **row} for place, here in places.items() for row in tables.table(here)])

    def result(self, variant: str, seed: int | None = None, partition: str | None = None) -> Result:
        """Return the result of one run: of the first seed and partition, if these are not given.

        Raises:
            ConfigError: there is no such run.
        """
        for cell in self.cells:
            wanted = (variant, cell.seed if seed is None else seed, partition or cell.partition)
            if (cell.variant, cell.seed, cell.partition, cell.control) == (*wanted, ""):
                return Result(folder_of(self.folder, cell.study), *self._held)
        raise ConfigError(
            f"there is no run of {variant!r}{'' if seed is None else f' with seed {seed}'}: "
            f"the comparison is of {', '.join(self.suite.variants)}, seeds {', '.join(map(str, self.suite.seeds))}"
        )

    def __repr__(self) -> str:
        return f"<comparison of {', '.join(self.suite.variants)}: {len(self.cells)} runs, in {self.folder}>"

    def _repr_html_(self) -> str:
        lines = [line for line in self.lines if line.control in {"", DENSE}]
        points = {line.name: [(line.of("bytes").mean / 1e6, line.score.mean)] for line in lines}
        figure = notebook.figure(points, "MB carried, mean over seeds", lines[0].metric.shown)
        return self.table()._repr_html_() + figure


def compare(
    methods: Iterable[str | Mapping[str, Any]] | Mapping[str, Mapping[str, Any]], model: object = None,
    clients: object = None, test: object = None, *, data: object = None, out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None, **more: Any,
) -> Comparison:  # fmt: skip
    """Run methods on the same rows, from the same weights, over several seeds, each with its controls.

    Controls show what a method's own way of pruning is worth: dense FedAvg, random masks of the same sparsity, and a
    narrow dense model of the same MACs; see ``comparison.suite.Suite``.

    Args:
        methods: names; ``"fedsparsify:sparsity=0.9"``; mappings with ``method`` and its settings; or such mappings by
            the names that tables give them.
        model, clients, test, data: as in ``secateur.run``.
        out: the comparison's folder; default: runs/compare-HASH, with a number if that exists. One that was stopped is
            gone on with.
        settings: settings of all runs, by path.
        more: settings of all runs by the last part of their path, as in ``secateur.run``. And ``seeds`` (how many, or
            which), ``controls`` (of dense, random, ramped, shuffled, narrow), ``partition`` (one or several), ``jobs``
            (runs at once), ``progress`` and ``title``.

    Raises:
        SecateurError: something cannot be used, in one line, before anything is trained; or no run has a result.

    Example:
        >>> import secateur
        >>> found = secateur.compare(["fedsparsify", "prunefl"], "mlp", data="digits", rounds=20)  # doctest: +SKIP
        >>> print(found.table())  # doctest: +SKIP
        >>> found.report(open=True)  # doctest: +SKIP
    """
    frame = Frame(**{one.name: more.pop(one.name) for one in fields(Frame) if one.name in more})
    objects = given(model, clients, test, data)
    suite = _suite(methods, objects, {**(settings or {}), **more}, frame)
    folder = _new(suite) if out is None else _same(suite, Path(out))
    executor = None
    if objects.model is not None:
        start = forking()
        executor = grid.Here() if start is None else grid.in_processes(frame.jobs, start)
    with of_many(frame.progress) as report:
        cells = grid.run_suite(suite, folder, jobs=frame.jobs, report=report, executor=executor)
    made = Comparison(suite, cells, folder, objects.rows.held, objects.model)
    tables.write(suite, cells, made.lines, folder)
    return made


def _suite(methods: Any, objects: Given, shared: Mapping[str, Any], frame: Frame) -> Suite:
    """Return the comparison as a suite."""
    common = dict(objects.settings)
    source, usual = common.pop("data.source", "digits"), common.pop("data.partition", None)
    partitions = [frame.partition] if isinstance(frame.partition, str) else list(frame.partition)
    variants: dict[str, dict[str, Any]] = {}
    for label, method, own in _variants(methods):
        if method in names():
            raise ConfigError(f"{method!r} is a suite, with rows of its own: play it with: secateur compare {method}")
        try:
            paths = written_out(shared, method, objects.more)
            given_ = written_out(own, method, objects.more)
        except ConfigError as broken:
            raise ConfigError(f"{label or method}: {broken}") from broken
        name = label or named(method, {path: _text(value) for path, value in own.items()})
        if name in variants:
            raise ConfigError(f"{name!r} is compared twice")
        common |= {path: _text(value) for path, value in paths.items() if not is_option(path)}
        options = {path: _text(value) for path, value in paths.items() if is_option(path)}
        variants[name] = {"method": method, **options, **{path: _text(value) for path, value in given_.items()}}
    if not variants:
        raise ConfigError("methods is empty: name some, as ['fedsparsify', 'prunefl']")
    if not partitions:
        partitions = [usual or objects.study(next(iter(variants.values()))["method"], {}).data.partition]
    compared = ", ".join(dict.fromkeys(one["method"] for one in variants.values()))
    values = {
        "title": frame.title or f"{compared} on {'rows in memory' if objects.rows.held else source}",
        "source": source, "partitions": partitions, "common": common,
        "seeds": list(range(frame.seeds)) if isinstance(frame.seeds, int) else list(frame.seeds), "variants": variants,
        "controls": list(frame.controls),
    }  # fmt: skip
    return parse(values, "compare")


def _variants(methods: Any) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """Yield the name that somebody gave a variant, or an empty one, its method, and its own settings."""
    if isinstance(methods, str):
        methods = [methods]
    entries = methods.items() if isinstance(methods, Mapping) else (("", one) for one in methods)
    for label, entry in entries:
        if isinstance(entry, str):
            method, _, rest = entry.partition(":")
            yield label, method, dict(split_setting(part, entry) for part in rest.split(",") if part)
        elif isinstance(entry, Mapping) and isinstance(entry.get("method", label or None), str):
            yield label, entry.get("method", label), {k: v for k, v in entry.items() if k != "method"}
        else:
            raise ConfigError(
                f"methods: {entry!r} names no method: write a name, or {{'method': NAME, 'sparsity': 0.9}}"
            )


def _text(value: Any) -> Any:
    """Return a setting as a suite's file has it."""
    value = value.item() if hasattr(value, "item") else value
    return json.dumps(value) if isinstance(value, bool | list | tuple) else value


def _same(suite: Suite, out: Path) -> Path:
    """Return a folder that holds no comparison of other rows, or of another model.

    Raises:
        ConfigError: it does.
    """
    if not (out / RESULT).exists():
        return out
    earlier = parse(json.loads((out / RESULT).read_text("utf-8"))["suite"], str(out / RESULT))
    for what, before, now in (
        ("rows are", earlier.source, suite.source),
        ("the model is", earlier.common.get("model.name"), suite.common.get("model.name")),
    ):
        if before != now:
            raise ConfigError(
                f"out = {str(out)!r} holds a comparison in which {what} {before!r}, now {now!r}: give another folder, "
                "or the same objects (seed a model's weights before it is made)"
            )
    return out


def _new(suite: Suite) -> Path:
    """Return a folder that is not there yet."""
    digest = hashlib.sha256(suite.model_dump_json().encode()).hexdigest()[:8]
    return fresh(Path("runs") / f"compare-{digest}")
