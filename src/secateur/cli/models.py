"""The commands ``export``, ``predict`` and ``list``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.base import new_console
from secateur.errors import unknown


def export(
    folder: Path,
    to: Annotated[str, typer.Option(help="onnx, torch, safetensors or executorch")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="Where to; default: RUN/export")] = None,
) -> None:
    """Write a finished run's model without the units that were cut out, checked against the masked one; with a card."""
    from rich.markdown import Markdown  # noqa: PLC0415

    from secateur.export.export import export as write  # noqa: PLC0415

    card = write(folder, to, out)
    new_console().print(Markdown(card.markdown()))
    new_console().print(f"Written: {(out or folder / 'export') / card.file}, card.md, card.json", highlight=False)


def predict(
    source: Annotated[Path, typer.Argument(help="A finished run's folder, or an exported .onnx file")],
    data: Annotated[Path, typer.Option(help="New rows: CSV or Parquet; .npz with x; a folder of images")],
    out: Annotated[Path | None, typer.Option(help="Write predictions here; default: print them")] = None,
) -> None:
    """Predict for new rows, in the target's own words or unit; columns are found by their names."""
    from secateur.export.predict import predict as answer  # noqa: PLC0415

    found = answer(source, data)
    for remark in found.remarks:
        sys.stderr.write(f"{remark}\n")
    if out is None:
        sys.stdout.write(found.csv())
        return
    found.write(out)
    new_console().print(f"Written: {len(found.values)} predictions in {out}", highlight=False, soft_wrap=True)


def list_(
    name: Annotated[str, typer.Argument(help="One of them: its options, their defaults and its paper")] = "",
    markdown: Annotated[bool, typer.Option(help="Print Markdown tables.")] = False,  # noqa: FBT002
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,  # noqa: FBT002
) -> None:
    """Show methods, slot values, guards, data, models and suites, each with one line; or one of them in full."""
    from secateur.comparison import known, suite  # noqa: PLC0415
    from secateur.report import listing  # noqa: PLC0415
    from secateur.study import catalogue  # noqa: PLC0415

    console = new_console()
    if name:
        found = [*catalogue.details(name), *known.details(name)]
        if not found:
            raise unknown("name", name, [*catalogue.names(), *suite.names()])
        if as_json:
            sys.stdout.write(listing.details_json(found))
        else:
            listing.show_details(found, console)
        return
    kinds = {**catalogue.catalogue(), "suites": known.entries()}
    if markdown or as_json:
        sys.stdout.write(listing.to_markdown(kinds) if markdown else listing.to_json(kinds))
    else:
        listing.show(kinds, console)
