"""The commands ``export``, ``predict`` and ``list``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from secateur.cli.base import new_console


def export(
    folder: Path,
    to: Annotated[str, typer.Option(help="onnx, torch, safetensors or executorch")] = "onnx",
    out: Annotated[Optional[Path], typer.Option(help="Where to; default: RUN/export")] = None,  # noqa: UP045
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
    out: Annotated[Optional[Path], typer.Option(help="Write predictions here; default: print them")] = None,  # noqa: UP045
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


def list_(markdown: Annotated[bool, typer.Option(help="Print Markdown tables.")] = False) -> None:  # noqa: FBT002
    """Show the methods, criteria, data sets and models, each with one line and its paper."""
    from secateur.report import listing  # noqa: PLC0415
    from secateur.study.catalogue import catalogue  # noqa: PLC0415

    listing.show(catalogue(), new_console(), markdown=markdown)
