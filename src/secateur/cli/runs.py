"""The commands that make one run: ``run`` and ``resume``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.base import Quiet, begin, bundled, new_console, warm
from secateur.engines.stopping import going_on
from secateur.errors import ConfigError, NoResultError
from secateur.study.usual import METHOD, SOURCE

if TYPE_CHECKING:
    from rich.console import Console

    from secateur.federation.records import Row
    from secateur.study.runtime import Runtime
    from secateur.study.study import Study

Workers = Annotated[int | None, typer.Option(help="Worker processes; default: the machine's cores.")]
Deadline = Annotated[float | None, typer.Option(help="Seconds that a round waits for its clients.")]

Relays = Annotated[int | None, typer.Option(help="Relays that add up their share of a cohort; default: none.")]


@dataclass(frozen=True)
class RunFlags:
    """The flags of ``run``."""

    method: Annotated[str | None, typer.Argument(help="A name of `secateur list`, or your own file or module")] = None
    data: Annotated[str | None, typer.Option(help="digits, table:FILE, idx:FOLDER, hub:NAME ...")] = None
    target: Annotated[str | None, typer.Option(help="A table's column to learn")] = None
    site: Annotated[str | None, typer.Option(help="A table's column of sites")] = None
    model: Annotated[str | None, typer.Option(help="A name of `secateur list`, or your own FILE.py:factory")] = None
    clients: Annotated[int | None, typer.Option(help="K")] = None
    partition: Annotated[str | None, typer.Option(help="iid, dirichlet:A, pathological:K, natural")] = None
    participation: Annotated[float | None, typer.Option(help="C, share of clients in a round")] = None
    rounds: Annotated[int | None, typer.Option(help="R")] = None
    seed: Annotated[int | None, typer.Option(help="Every random draw comes from it")] = None
    settings: Annotated[list[str] | None, typer.Option("--set", help="path=value: training.lr=0.1")] = None
    config: Annotated[Path | None, typer.Option(help="A TOML file, such as a run's study.toml")] = None
    out: Annotated[Path | None, typer.Option(help="The run's folder; default: runs/METHOD-HASH")] = None
    dense: Annotated[bool, typer.Option(help="Train dense FedAvg too.")] = True
    workers: Workers = None
    deadline: Deadline = None
    relays: Relays = None
    quiet: Quiet = False


@dataclass(frozen=True)
class ResumeFlags:
    """The flags of ``resume``."""

    folder: Annotated[Path, typer.Argument(help="The run's folder")]
    workers: Workers = None
    deadline: Deadline = None
    relays: Relays = None
    quiet: Quiet = False
    accept_changes: Annotated[bool, typer.Option(help="Go on with a changed study, version or method code.")] = False


@bundled
def run(flags: RunFlags) -> None:
    """Train and prune a model across simulated clients; without arguments: AutoFLIP on handwritten digits."""
    begin(_headline(flags), quiet=flags.quiet)
    warm(flags.workers)
    study = _study(flags)
    folder = _folder(study, flags.out)
    _run(study, _runtime(flags.workers, flags.deadline, flags.relays), folder, dense=flags.dense, quiet=flags.quiet)


def _headline(flags: RunFlags) -> str:
    """Return what is run in a few words, of the flags alone."""
    if flags.config is not None:
        return " ".join(filter(None, [flags.method, f"as in {flags.config}"]))
    facts = [f"{count} {what}" for count, what in ((flags.clients, "clients"), (flags.rounds, "rounds")) if count]
    return ", ".join([f"{flags.method or METHOD} on {flags.data or SOURCE}", *facts])


def _study(flags: RunFlags) -> Study:
    from secateur.study.own import reached  # noqa: PLC0415
    from secateur.study.study import assign, parse_study, read_toml  # noqa: PLC0415

    _refuse_a_run(flags.method)
    values: dict[str, Any] = {}
    if flags.config is not None:
        values = reached(read_toml(flags.config), flags.config.parent)
    given = {
        "method": flags.method, "data.source": flags.data, "model.name": flags.model,
        "data.clients": flags.clients, "rounds": flags.rounds, "data.partition": flags.partition,
        "participation": flags.participation, "seed": flags.seed, "data.target": flags.target, "data.site": flags.site,
    }  # fmt: skip
    for path, value in given.items():
        if value is not None:
            assign(values, f"{path}={value}")
    for setting in flags.settings or []:
        assign(values, setting)
    return parse_study(reached(values))


def _refuse_a_run(method: str | None) -> None:
    """Refuse a run's folder, or one of several runs, in the place of a method.

    Raises:
        ConfigError: it is one; the text says what to type.
    """
    from secateur.federation.folder import STUDY, runs_in  # noqa: PLC0415

    folder = Path(method or "")
    found = [folder] if method and (folder / STUDY).exists() else runs_in(folder) if method and folder.is_dir() else []
    if found:
        raise ConfigError(f"{method} is no method but a folder with a run: go on with it by secateur resume {found[0]}")


@bundled
def resume(flags: ResumeFlags) -> None:
    """Go on with a run that was stopped, from its last completed round."""
    begin(f"going on with {flags.folder}", quiet=flags.quiet)
    warm(flags.workers)
    from secateur.federation.folder import DENSE, read_study  # noqa: PLC0415

    study = read_study(flags.folder, edited=flags.accept_changes)
    runtime, dense = _runtime(flags.workers, flags.deadline, flags.relays), (flags.folder / DENSE).exists()
    _run(study, runtime, flags.folder, dense=dense, quiet=flags.quiet, accept=flags.accept_changes)


def _run(study: Study, runtime: Runtime, folder: Path, *, dense: bool, quiet: bool, accept: bool = False) -> None:
    from secateur.federation.folder import DENSE  # noqa: PLC0415
    from secateur.report.terminal import comparison, last_line  # noqa: PLC0415

    console = new_console(quiet=quiet)
    plan = [(folder, study)] + ([(folder / DENSE, study.dense())] if dense else [])
    summaries = _summaries(plan, runtime, console, accept=accept)
    console.print(comparison(summaries[0], summaries[1] if dense else None))
    new_console().print(last_line(summaries[0], folder), highlight=False, soft_wrap=True)


def _summaries(plan: Sequence[tuple[Path, Study]], runtime: Runtime, console: Console, *, accept: bool) -> list[Row]:
    """Make the runs of a plan one after the other; return their summaries."""
    from secateur.federation import prepare, server  # noqa: PLC0415
    from secateur.federation.folder import read_failure, reserve  # noqa: PLC0415
    from secateur.report.terminal import Display, comparison, failure  # noqa: PLC0415

    folder, study = plan[0]
    with prepare.federation(study) as shards, Display(console) as display:
        console.print(f"Run folder: {folder} (if stopped: secateur resume {folder})", highlight=False, soft_wrap=True)
        for place, part in plan:
            server.Run(part, runtime, place, shards)  # a model that does not fit is refused before anything is written
        summaries: list[Row] = []
        try:
            with going_on(f"secateur resume {folder}"):
                for place, part in plan:
                    reserve(place, part)
                for place, part in plan:
                    watch = display.watch(part.method if place == folder else "dense fedavg", part.rounds)
                    summaries.append(server.resume(place, runtime, shards=shards, watch=watch, accept=accept))
        except NoResultError:
            if summaries:  # the dense twin has none
                console.print(comparison(summaries[0], None))
            if (told := read_failure(plan[len(summaries)][0])) is not None:
                console.print(failure(told))
            raise
    return summaries


def _folder(study: Study, out: Path | None) -> Path:
    from secateur.federation.folder import new_folder  # noqa: PLC0415

    return new_folder(study, out)


def _runtime(workers: int | None, deadline: float | None, relays: int | None) -> Runtime:
    from secateur.study.runtime import Runtime  # noqa: PLC0415

    given = {"workers": workers, "relays": relays}
    return Runtime(deadline=deadline, **{name: count for name, count in given.items() if count is not None})
