"""The command ``compare``: a grid of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.base import Quiet, begin, bundled, new_console, warm
from secateur.cli.report import draw
from secateur.engines.stopping import going_on
from secateur.errors import NoResultError


@dataclass(frozen=True)
class CompareFlags:
    """The flags of ``compare``."""

    what: Annotated[list[str], typer.Argument(help="quick, FILE.toml, or methods: NAME or NAME:PATH=VALUE,...")]
    out: Annotated[Path, typer.Option(help="The comparison's folder; one that was stopped is gone on with")]
    data: Annotated[str | None, typer.Option(help="Folder or file of a suite's data; of methods: as in run")] = None
    partition: Annotated[list[str] | None, typer.Option(help="Instead of the suite's; may be repeated")] = None
    seeds: Annotated[int | None, typer.Option(help="How many seeds; default: the suite's, or 3")] = None
    rounds: Annotated[int | None, typer.Option(help="R")] = None
    settings: Annotated[list[str] | None, typer.Option("--set", help="path=value, common to all")] = None
    jobs: Annotated[int, typer.Option(help="Runs at once; default: the machine's cores.")] = 0
    browse: Annotated[bool, typer.Option("--open/--no-open", help="Open the page at the end.")] = True
    quiet: Quiet = False


@bundled
def compare(flags: CompareFlags) -> None:
    """Run a grid of methods and seeds, each with its controls, and compare them in a table and a page."""
    begin(f"comparing {', '.join(flags.what)}", quiet=flags.quiet)
    warm()
    from secateur.comparison import grid  # noqa: PLC0415
    from secateur.comparison.grid import cell_name, folder_of  # noqa: PLC0415
    from secateur.comparison.known import shadowed  # noqa: PLC0415
    from secateur.comparison.suite import chosen  # noqa: PLC0415
    from secateur.report import hostile, tables  # noqa: PLC0415
    from secateur.report.fitted import Fitted  # noqa: PLC0415
    from secateur.report.gather import RESULT, attacks, comparison_lines  # noqa: PLC0415
    from secateur.report.gather import failed as failure_of  # noqa: PLC0415
    from secateur.report.terminal import Runs, compared  # noqa: PLC0415

    out, console = flags.out, new_console(quiet=flags.quiet)
    for remark in shadowed(flags.what):
        console.print(remark, style="yellow", highlight=False, markup=False, soft_wrap=True)
    suite, place = chosen(flags.what, flags.data)
    wanted = suite.adjusted(flags.seeds, flags.rounds, flags.partition or [], flags.settings or [])
    with Runs(console) as display, going_on("the same command again"):
        cells = grid.run_suite(wanted, out, data=place, jobs=flags.jobs, report=display.report)
    lines = comparison_lines(wanted, cells, out, wanted.bandwidth)
    tables.write(wanted, cells, lines, out)
    if found := attacks([out]):
        for title, _, rows in hostile.sections(found):
            console.print(Fitted(title, rows))
        console.print("\n".join(hostile.sentences(found)), highlight=False)
    for place, here in () if found else tables.by_place(lines).items():
        console.print(compared(place, here, len(wanted.seeds)))
        console.print(tables.note(here), highlight=False)
    text = f"Written: {out / RESULT}, table.md, table.tex (with every control on a line of its own)"
    console.print(text, highlight=False, soft_wrap=True)
    draw([out], out / "page", browse=flags.browse)
    failed = {cell_name(cell): failed_why for cell in cells if (failed_why := failure_of(folder_of(out, cell.study)))}
    if failed:
        first, why = next(iter(failed.items()))
        raise NoResultError(f"{len(failed)} of {len(cells)} runs have no result, and are in no figure: {first}: {why}")
