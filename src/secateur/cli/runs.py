"""The commands that make one run: ``run`` and ``resume``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from secateur.cli.base import bundled, new_console, warm
from secateur.engines.stopping import going_on
from secateur.errors import NoResultError

if TYPE_CHECKING:
    from secateur.study.runtime import Runtime
    from secateur.study.study import Study

Workers = Annotated[Optional[int], typer.Option(help="Worker processes; default: the machine's cores.")]  # noqa: UP045
Deadline = Annotated[Optional[float], typer.Option(help="Seconds that a round waits for its clients.")]  # noqa: UP045

Relays = Annotated[Optional[int], typer.Option(help="Relays that add up their share of a cohort; default: none.")]  # noqa: UP045


@dataclass(frozen=True)
class RunFlags:
    """The flags of ``run``."""

    method: Annotated[Optional[str], typer.Argument(help="A name of `secateur list`, or your.module")] = None  # noqa: UP045
    data: Annotated[Optional[str], typer.Option(help="digits, table:FILE, idx:FOLDER, hub:NAME ...")] = None  # noqa: UP045
    target: Annotated[Optional[str], typer.Option(help="A table's column to learn")] = None  # noqa: UP045
    site: Annotated[Optional[str], typer.Option(help="A table's column of sites")] = None  # noqa: UP045
    model: Annotated[Optional[str], typer.Option(help="A name of `secateur list`, or module:factory")] = None  # noqa: UP045
    clients: Annotated[Optional[int], typer.Option(help="K")] = None  # noqa: UP045
    partition: Annotated[Optional[str], typer.Option(help="iid, dirichlet:A, pathological:K, natural")] = None  # noqa: UP045
    participation: Annotated[Optional[float], typer.Option(help="C, share of clients in a round")] = None  # noqa: UP045
    rounds: Annotated[Optional[int], typer.Option(help="R")] = None  # noqa: UP045
    seed: Annotated[Optional[int], typer.Option(help="Every random draw comes from it")] = None  # noqa: UP045
    settings: Annotated[Optional[list[str]], typer.Option("--set", help="path=value: training.lr=0.1")] = None  # noqa: UP045
    config: Annotated[Optional[Path], typer.Option(help="A TOML file, such as a run's study.toml")] = None  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="The run's folder; default: runs/METHOD-HASH")] = None  # noqa: UP045
    dense: Annotated[bool, typer.Option(help="Train dense FedAvg too.")] = True
    workers: Workers = None
    deadline: Deadline = None
    relays: Relays = None


@bundled
def run(flags: RunFlags) -> None:
    """Train and prune a model across simulated clients; without arguments: AutoFLIP on handwritten digits."""
    warm(flags.workers)
    from secateur.study.study import assign, parse_study, read_toml  # noqa: PLC0415

    values = read_toml(flags.config) if flags.config is not None else {}
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
    study = parse_study(values)
    _run(study, _runtime(flags.workers, flags.deadline, flags.relays), _folder(study, flags.out), dense=flags.dense)


def resume(
    folder: Path,
    workers: Workers = None,
    deadline: Deadline = None,
    relays: Relays = None,
    accept_changes: Annotated[bool, typer.Option(help="Go on with a changed study, version or method code.")] = False,  # noqa: FBT002
) -> None:
    """Go on with a run that was stopped, from its last completed round."""
    warm(workers)
    from secateur.federation.folder import read_study  # noqa: PLC0415

    study, runtime = read_study(folder, edited=accept_changes), _runtime(workers, deadline, relays)
    _run(study, runtime, folder, dense=(folder / "dense").exists(), accept=accept_changes)


def _run(study: Study, runtime: Runtime, folder: Path, *, dense: bool, accept: bool = False) -> None:
    from secateur.federation import prepare, server  # noqa: PLC0415
    from secateur.federation.folder import read_failure, reserve  # noqa: PLC0415
    from secateur.report.terminal import Display, comparison, failure  # noqa: PLC0415

    console = new_console()
    with prepare.federation(study) as shards, Display(console) as display:
        console.print(f"Run folder: {folder} (if stopped: secateur resume {folder})", highlight=False, soft_wrap=True)
        plan = [(folder, study)] + ([(folder / "dense", study.dense())] if dense else [])
        for place, part in plan:
            server.Run(part, runtime, place, shards)  # a model that does not fit is refused before anything is written
        summaries = []
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
    console.print(comparison(summaries[0], summaries[1] if dense else None))


def _folder(study: Study, out: Path | None) -> Path:
    from secateur.federation.folder import new_folder  # noqa: PLC0415

    return new_folder(study, out)


def _runtime(workers: int | None, deadline: float | None, relays: int | None) -> Runtime:
    from secateur.study.runtime import Runtime  # noqa: PLC0415

    given = {"workers": workers, "relays": relays}
    return Runtime(deadline=deadline, **{name: count for name, count in given.items() if count is not None})
