"""The command line: it makes a Study and a Runtime of arguments. Heavy imports wait until a command needs them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar, get_type_hints

import typer

from secateur.errors import NoResultError, SecateurError

if TYPE_CHECKING:
    from rich.console import Console

    from secateur.report.gather import Subject
    from secateur.study.runtime import Runtime
    from secateur.study.study import Study

app = typer.Typer(
    help="Prune neural networks while they train across a federation, and measure what it saves.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip

Flags = TypeVar("Flags")


def _bundled(command: Callable[[Flags], None]) -> Callable[..., None]:
    """Return a command that takes each field of a bundle of flags as a parameter, as typer wants it."""
    hints = get_type_hints(command)
    (bundle,) = [hint for name, hint in hints.items() if name != "return"]
    annotations = get_type_hints(bundle, include_extras=True)

    def flat(**values: Any) -> None:
        command(bundle(**values))

    def parameter(one: Field[Any]) -> inspect.Parameter:
        default = inspect.Parameter.empty if one.default is MISSING else one.default
        either = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Parameter(one.name, either, default=default, annotation=annotations[one.name])

    signature = inspect.Signature([parameter(one) for one in fields(bundle)])
    flat.__signature__ = signature  # type: ignore[attr-defined]
    flat.__name__, flat.__doc__, flat.__annotations__ = command.__name__, command.__doc__, annotations
    return flat


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


@app.command()
@_bundled
def run(flags: RunFlags) -> None:
    """Train and prune a model across simulated clients; without arguments: AutoFLIP on handwritten digits."""
    _warm(flags.workers)
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


@app.command()
def resume(folder: Path, workers: Workers = None, deadline: Deadline = None, relays: Relays = None) -> None:
    """Go on with a run that was stopped, from its last completed round."""
    _warm(workers)
    from secateur.federation.folder import read_study  # noqa: PLC0415

    study = read_study(folder)
    _run(study, _runtime(workers, deadline, relays), folder, dense=(folder / "dense").exists())


@dataclass(frozen=True)
class CompareFlags:
    """The flags of ``compare``."""

    what: Annotated[list[str], typer.Argument(help="quick, FILE.toml, or methods: NAME or NAME:PATH=VALUE,...")]
    out: Annotated[Path, typer.Option(help="The comparison's folder; one that was stopped is gone on with")]
    data: Annotated[Optional[str], typer.Option(help="Folder or file of a suite's data; of methods: as in run")] = None  # noqa: UP045
    partition: Annotated[Optional[list[str]], typer.Option(help="Instead of the suite's; may be repeated")] = None  # noqa: UP045
    seeds: Annotated[Optional[int], typer.Option(help="How many seeds; default: the suite's, or 3")] = None  # noqa: UP045
    rounds: Annotated[Optional[int], typer.Option(help="R")] = None  # noqa: UP045
    settings: Annotated[Optional[list[str]], typer.Option("--set", help="path=value, common to all")] = None  # noqa: UP045
    jobs: Annotated[int, typer.Option(help="Runs at once; default: the machine's cores.")] = 0
    browse: Annotated[bool, typer.Option("--open/--no-open", help="Open the page at the end.")] = True


@app.command()
@_bundled
def compare(flags: CompareFlags) -> None:
    """Run a grid of methods and seeds, each with its controls, and compare them in a table and a page."""
    _warm()
    from secateur.comparison import grid  # noqa: PLC0415
    from secateur.comparison.grid import cell_name, folder_of  # noqa: PLC0415
    from secateur.comparison.suite import chosen  # noqa: PLC0415
    from secateur.report import tables  # noqa: PLC0415
    from secateur.report.formatting import show  # noqa: PLC0415
    from secateur.report.gather import RESULT, comparison_lines  # noqa: PLC0415
    from secateur.report.gather import failed as failure_of  # noqa: PLC0415
    from secateur.report.terminal import Runs  # noqa: PLC0415

    out = flags.out
    suite, place = chosen(flags.what, flags.data)
    wanted, console = suite.adjusted(flags.seeds, flags.rounds, flags.partition or [], flags.settings or []), _console()
    with Runs(console) as display:
        cells = grid.run_suite(wanted, out, data=place, jobs=flags.jobs, report=display.report)
    lines = comparison_lines(wanted, cells, out, wanted.bandwidth)
    tables.write(wanted, cells, lines, out)
    for place, here in tables.by_place(lines).items():
        few = tables.brief(here, here[0].partition, rows=here[0].rows)
        console.print(show(f"{place}, {len(wanted.seeds)} seeds", few))
        console.print(tables.note(here), highlight=False)
    text = f"Written: {out / RESULT}, table.md, table.tex (with every control on a line of its own)"
    console.print(text, highlight=False, soft_wrap=True)
    _page([out], out / "page", browse=flags.browse)
    failed = {cell_name(cell): failed_why for cell in cells if (failed_why := failure_of(folder_of(out, cell.study)))}
    if failed:
        first, why = next(iter(failed.items()))
        raise NoResultError(f"{len(failed)} of {len(cells)} runs have no result, and are in no figure: {first}: {why}")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, or of one comparison")],
    out: Annotated[Optional[Path], typer.Option(help="The page's folder; default: page in the first folder")] = None,  # noqa: UP045
    images: Annotated[bool, typer.Option(help="Write every figure as SVG and PNG too.")] = False,  # noqa: FBT002
    markdown: Annotated[Optional[Path], typer.Option(help="Write comparisons' tables here as NAME.md instead")] = None,  # noqa: UP045
    link: Annotated[Optional[str], typer.Option(help="Predict seconds, e.g. on 10Mbit/s,50ms")] = None,  # noqa: UP045
    watch: Annotated[float, typer.Option(help="Seconds between new pages, until all runs have ended; 0: once.")] = 0.0,
    browse: Annotated[bool, typer.Option("--open/--no-open", help="Open the page.")] = True,  # noqa: FBT002
) -> None:
    """Draw runs, or a comparison, as a page in a folder of its own that needs no network."""
    import time  # noqa: PLC0415

    if markdown is not None:
        from secateur.report import results_page  # noqa: PLC0415

        for folder in folders:
            _console().print(f"Written: {results_page.write(folder, markdown)}", highlight=False, soft_wrap=True)
        return
    target = out or folders[0] / "page"
    live = _page(folders, target, browse=browse, live=watch > 0, link=link)
    while live:
        time.sleep(watch)
        live = _page(folders, target, browse=False, live=True, link=link)
    if images:
        from secateur.report import page  # noqa: PLC0415

        count = len(page.images(target))
        _console().print(f"Written: {count} files in {target / 'figures'}", highlight=False, soft_wrap=True)


@app.command()
def log(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs")],
    to: Annotated[str, typer.Option(help="tensorboard or mlflow")] = "tensorboard",
    store: Annotated[str, typer.Option(help="MLflow's store; default: mlflow.db next to the run")] = "",
    watch: Annotated[float, typer.Option(help="Seconds between looks, until all runs have ended; 0: once.")] = 0.0,
) -> None:
    """Write runs' records to TensorBoard or MLflow, under their own names; what is there already is not repeated."""
    import time  # noqa: PLC0415

    from secateur.report.trackers import log_records  # noqa: PLC0415

    while True:
        logged = [log_records(folder, to, store) for folder in folders]
        _console().print(f"{sum(count for count, _ in logged)} new records in {to}", highlight=False)
        if not watch or all(ended for _, ended in logged):
            return
        time.sleep(watch)


@app.command()
def budget(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, or of one comparison")],
    megabytes: Annotated[float, typer.Option(help="What one client may carry, both ways, in 10^6 bytes")],
    link: Annotated[Optional[str], typer.Option(help="Predict seconds, e.g. on 10Mbit/s,50ms")] = None,  # noqa: UP045
) -> None:
    """Say which of these runs keep every client within a budget of bytes, the best first."""
    from secateur.bandwidth import Bandwidth  # noqa: PLC0415
    from secateur.report import tables  # noqa: PLC0415
    from secateur.report.formatting import show  # noqa: PLC0415
    from secateur.report.gather import (  # noqa: PLC0415
        gather,
    )

    lines, subjects = gather(folders, Bandwidth.parse(link) if link else None)[1:3]
    _say_failed(subjects)
    fits, over = tables.within(lines, megabytes * 1e6)
    if fits:
        _console().print(show(f"within {megabytes:g} MB a client", tables.budget_table(fits)))
    names = ", ".join(f"{line.name} ({line.partition})" for line in over)
    _console().print(f"Over {megabytes:g} MB: {names or 'none'}", highlight=False, soft_wrap=True)


def _page(folders: list[Path], out: Path, *, browse: bool, live: bool = False, link: str | None = None) -> bool:
    """Write the page of some folders; return whether to write it again, ``live`` being asked for and a run going on."""
    import webbrowser  # noqa: PLC0415

    from secateur.bandwidth import Bandwidth  # noqa: PLC0415
    from secateur.report import page  # noqa: PLC0415
    from secateur.report.gather import gather  # noqa: PLC0415

    title, lines, subjects, ended = gather(folders, Bandwidth.parse(link) if link else None)
    index = page.write(title, lines, subjects, out, live=live and not ended)
    console = _console()
    _say_failed(subjects)
    if browse and console.is_terminal:
        webbrowser.open(index.absolute().as_uri())
    console.print(f"Page: {index}", highlight=False, soft_wrap=True)
    return live and not ended


def _say_failed(subjects: Sequence[Subject]) -> None:
    """Print which runs have no result, and why."""
    for subject in subjects:
        if subject.failed:
            text = f"No result, and in no figure: {subject.name}: {subject.failed}"
            _console().print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


@app.command()
def export(
    folder: Path,
    to: Annotated[str, typer.Option(help="onnx, torch, safetensors or executorch")] = "onnx",
    out: Annotated[Optional[Path], typer.Option(help="Where to; default: RUN/export")] = None,  # noqa: UP045
) -> None:
    """Write a finished run's model, physically slim, checked against the masked one; with a card."""
    from rich.markdown import Markdown  # noqa: PLC0415

    from secateur.export.export import export as write  # noqa: PLC0415

    card = write(folder, to, out)
    _console().print(Markdown(card.markdown()))
    _console().print(f"Written: {(out or folder / 'export') / card.file}, card.md, card.json", highlight=False)


@app.command(name="list")
def list_(markdown: Annotated[bool, typer.Option(help="Print Markdown tables.")] = False) -> None:  # noqa: FBT002
    """Show the methods, criteria, data sets and models, each with one line and its paper."""
    from secateur.report import listing  # noqa: PLC0415
    from secateur.study.catalogue import catalogue  # noqa: PLC0415

    listing.show(catalogue(), _console(), markdown=markdown)


def _run(study: Study, runtime: Runtime, folder: Path, *, dense: bool) -> None:
    from secateur.federation import prepare, server  # noqa: PLC0415
    from secateur.federation.folder import read_failure, reserve  # noqa: PLC0415
    from secateur.report.terminal import Display, comparison, failure  # noqa: PLC0415

    console = _console()
    with prepare.federation(study) as shards, Display(console) as display:
        console.print(f"Run folder: {folder} (if stopped: secateur resume {folder})", highlight=False, soft_wrap=True)
        plan = [(folder, study)] + ([(folder / "dense", study.dense())] if dense else [])
        for place, part in plan:
            server.Run(part, runtime, place, shards)  # a model that does not fit is refused before anything is written
        for place, part in plan:
            reserve(place, part)
        summaries = []
        try:
            for place, part in plan:
                name = part.method if place == folder else "dense fedavg"
                summaries.append(server.resume(place, runtime, shards=shards, watch=display.watch(name, part.rounds)))
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


def _warm(workers: int | None = None) -> None:
    """Start the workers' imports, so that they run while this process does its own."""
    if workers != 0:
        from secateur.engines.workers import warm  # noqa: PLC0415

        warm()


def _console() -> Console:
    from rich.console import Console  # noqa: PLC0415

    return Console()


def main() -> None:
    """Run the command line. An error that a user can mend is one line on stderr, with exit code 2."""
    try:
        app()
    except SecateurError as error:
        sys.stderr.write(f"secateur: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("secateur: stopped; go on with: secateur resume FOLDER\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
