"""The commands that read runs' folders: ``report``, ``log`` and ``budget``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli.base import new_console

if TYPE_CHECKING:
    from secateur.bandwidth import Bandwidth
    from secateur.report.gather import Subject


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, or of one comparison")],
    out: Annotated[Path | None, typer.Option(help="The page's folder; default: page in the first folder")] = None,
    images: Annotated[bool, typer.Option(help="Write every figure as SVG and PNG too.")] = False,  # noqa: FBT002
    markdown: Annotated[Path | None, typer.Option(help="Write comparisons' tables here as NAME.md instead")] = None,
    link: Annotated[
        str | None, typer.Option(help="Predict seconds, e.g. on 10Mbit/s,50ms or 20/5Mbit/s,flower:4s")
    ] = None,
    watch: Annotated[float, typer.Option(help="Seconds between new pages, until all runs have ended; 0: once.")] = 0.0,
    browse: Annotated[bool, typer.Option("--open/--no-open", help="Open the page.")] = True,  # noqa: FBT002
) -> None:
    """Draw runs, or a comparison, as a page in a folder of its own that needs no network."""
    import time  # noqa: PLC0415

    if markdown is not None:
        from secateur.report import results_page  # noqa: PLC0415

        for folder in folders:
            new_console().print(f"Written: {results_page.write(folder, markdown)}", highlight=False, soft_wrap=True)
        return
    target = out or folders[0] / "page"
    live = draw(folders, target, browse=browse, live=watch > 0, link=link)
    while live:
        time.sleep(watch)
        live = draw(folders, target, browse=False, live=True, link=link)
    if images:
        from secateur.report import page  # noqa: PLC0415

        count = len(page.images(target))
        new_console().print(f"Written: {count} files in {target / 'figures'}", highlight=False, soft_wrap=True)


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
        new_console().print(f"{sum(count for count, _ in logged)} new records in {to}", highlight=False)
        if not watch or all(ended for _, ended in logged):
            return
        time.sleep(watch)


def budget(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, or of one comparison")],
    megabytes: Annotated[float, typer.Option(help="What one client may carry, both ways, in 10^6 bytes")],
    link: Annotated[
        str | None, typer.Option(help="Predict seconds, e.g. on 10Mbit/s,50ms or 20/5Mbit/s,flower:4s")
    ] = None,
) -> None:
    """Say which of these runs keep every client within a budget of bytes, the best first."""
    from secateur.report import tables  # noqa: PLC0415
    from secateur.report.fitted import Fitted  # noqa: PLC0415
    from secateur.report.gather import gather  # noqa: PLC0415
    from secateur.report.headline import on_link  # noqa: PLC0415

    lines, subjects = gather(folders, _network(link))[1:3]
    _say_failed(subjects)
    _say_unchecked(subjects)
    fits, over = tables.within(lines, megabytes * 1e6)
    if fits:
        told = " ".join(on_link(lines))
        table = tables.budget_table(fits)
        new_console().print(Fitted(f"within {megabytes:g} MB a client", table, drop=("partition",), caption=told))
    names = ", ".join(f"{line.name} ({line.partition})" for line in over)
    new_console().print(f"Over {megabytes:g} MB: {names or 'none'}", highlight=False, soft_wrap=True)


def draw(folders: list[Path], out: Path, *, browse: bool, live: bool = False, link: str | None = None) -> bool:
    """Write the page of some folders; return whether to write it again, ``live`` being asked for and a run going on."""
    import webbrowser  # noqa: PLC0415

    from secateur.report import page  # noqa: PLC0415
    from secateur.report.gather import attacks, gather  # noqa: PLC0415

    title, lines, subjects, ended = gather(folders, _network(link))
    index = page.write(title, lines, subjects, out, attacks=attacks(folders), live=live and not ended)
    console = new_console()
    _say_failed(subjects)
    _say_unchecked(subjects)
    if browse and console.is_terminal:
        webbrowser.open(index.absolute().as_uri())
    console.print(f"Page: {index}", highlight=False, soft_wrap=True)
    return live and not ended


def _network(link: str | None) -> Bandwidth | None:
    """Return the network that a text describes; ``flower:FOLDER`` in it stands for the seconds that a run tells."""
    import re  # noqa: PLC0415

    from secateur.bandwidth import Bandwidth, fixed_of  # noqa: PLC0415
    from secateur.federation.folder import read_records  # noqa: PLC0415

    def told(found: re.Match[str]) -> str:
        folder = Path(found[1].strip()).expanduser()
        return f"flower:{fixed_of(read_records(folder)):.6f}s" if folder.is_dir() else found[0]

    return None if link is None else Bandwidth.parse(re.sub(r"flower:([^;]+)", told, link))


def _say_failed(subjects: Sequence[Subject]) -> None:
    """Print which runs have no result, and why."""
    for subject in subjects:
        if subject.failed:
            text = f"No result, and in no figure: {subject.name}: {subject.failed}"
            new_console().print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _say_unchecked(subjects: Sequence[Subject]) -> None:
    """Print which runs were made before there were digests of their files."""
    from secateur.federation import seals  # noqa: PLC0415

    for subject in subjects:
        if seals.read(subject.folder) is None:
            text = f"{subject.name}: {seals.UNCHECKED}"
            new_console().print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
