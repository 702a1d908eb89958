"""The page: figures and tables of runs, written as a folder that a browser opens from disk without a network."""

from __future__ import annotations

import importlib.resources
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.errors import need
from secateur.federation import checkpoint, seals
from secateur.federation.folder import ROUNDS, STUDY, SUMMARY, read_failure, read_records, read_summary
from secateur.federation.records import by_reason, listing
from secateur.learning.metrics import metric_of
from secateur.report import comparison_figures, hostile, run_figures
from secateur.report.figure_lines import figure_line
from secateur.report.formatting import latex, markdown
from secateur.report.gather import Subject
from secateur.report.headline import headline
from secateur.report.hostile import Standing
from secateur.report.tables import FURTHER, Table, by_place, tables
from secateur.report.verdicts import DENSE, Line

Facts = dict[str, Any]
_WEB = ("index.html", "page.css", "theme.js", "figures.js", "tables.js", "page.js")
_DATA, _RUNS = "data.js", "runs"
_MOST_UNITS, _MOST_INPUTS = 64, 600  # size of the part of a mask that is drawn


def write(
    title: str, lines: Sequence[Line], subjects: Iterable[Subject], out: Path, *,
    attacks: Sequence[Standing] = (), live: bool = False,
) -> Path:  # fmt: skip
    """Write the page into ``out`` and return its index.html.

    Args:
        title: the heading.
        lines: the lines of the comparison's tables and figures.
        subjects: the runs that are shown one by one.
        out: the page's folder, made if it is missing; an older page in it is replaced.
        attacks: what a comparison of rules under attacks came to, which is shown instead of the lines.
        live: the page reloads itself every few seconds.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    script = Path(str(need("plotly", extra="report").__file__)).parent / "package_data" / "plotly.min.js"
    out.mkdir(parents=True, exist_ok=True)
    if not (out / script.name).exists():
        shutil.copyfile(script, out / script.name)
    for name in _WEB:
        text = (importlib.resources.files("secateur.report") / "web" / name).read_text(encoding="utf-8")
        checkpoint.write(out / name, text.encode())
    (out / _RUNS).mkdir(exist_ok=True)
    names: dict[str, str] = {}
    failed: dict[str, str] = {}
    for number, subject in enumerate(subjects):  # a script for each, which the page loads when it is chosen
        names[f"{number}.js"] = subject.name
        failed |= {subject.name: subject.failed} if subject.failed else {}
        _put(out / _RUNS / f"{number}.js", f"window.SECATEUR.runs[{number}].facts", subject_data(subject))
    for older in {path.name for path in (out / _RUNS).iterdir()} - set(names):
        (out / _RUNS / older).unlink()
    facts = contents(title, lines, names.values(), live=live)
    facts |= {"parts": [attack_data(attacks)]} if attacks else {}
    _put(out / _DATA, "window.SECATEUR", facts | {"failed": list(failed.items())})
    return out / "index.html"


def _put(path: Path, name: str, facts: Facts) -> None:
    checkpoint.write(path, f"{name} = {json.dumps(facts, allow_nan=False)};\n".encode())


def read(path: Path) -> Facts:
    """Return the data that a script in a page's folder holds."""
    return dict(json.loads(path.read_text("utf-8").partition(" = ")[2].rstrip(";\n")))


def contents(title: str, lines: Sequence[Line], names: Iterable[str], *, live: bool = False) -> Facts:
    """Return the data of the page without that of single runs; JSON can hold it.

    Args:
        title: the heading.
        lines: the lines of the comparison's tables and figures.
        names: the names of the single runs; the data of the nth is in the script ``runs/n.js``.
        live: the page reloads itself every few seconds.
    """
    places = [
        {
            "name": place,
            "seeds": max(len(line.runs) for line in here),
            "tables": [_table_data(one) for one in tables(here)],
            "headline": headline(here),
            "figures": comparison_figures.all_figures([figure_line(line) for line in here]),
        }
        for place, here in by_place(lines).items()
    ]
    return {"title": title, "live": live, "parts": places, "runs": [{"name": name} for name in names]}


def attack_data(found: Sequence[Standing]) -> Facts:
    """Return the part of a page that shows rules under attacks."""
    made = [Table(title, note, rows, []) for title, note, rows in hostile.sections(found)]
    return {
        "name": "rules and attacks", "seeds": max(one.made for one in found),
        "tables": [_table_data(one) for one in made],
        "headline": {"sentences": hostile.sentences(found), "figure": {}}, "figures": [hostile.heat(found)],
    }  # fmt: skip


def _table_data(one: Table) -> Facts:
    rows = one.rows
    controls = [line.control not in {"", DENSE} for line in one.lines] or [False] * len(rows)
    return {
        "title": one.title, "note": one.note, "columns": list(rows[0]), "rows": [list(row.values()) for row in rows],
        "few": [not one.lines or column not in FURTHER for column in rows[0]],
        "controls": controls, "markdown": markdown(rows), "latex": latex(rows),
    }  # fmt: skip


def subject_data(subject: Subject) -> Facts:
    """Return the data that the page shows of a single run."""
    folder = subject.folder
    rows = read_records(folder) if (folder / ROUNDS).exists() or not subject.failed else []
    summary = _summary(folder)
    final = summary.get("final", {})
    left = [
        [group["reason"], str(group["requests"]), listing(group["clients"])]
        for group in by_reason([entry for row in rows for entry in row["left_out"]])
    ]
    candidates = [
        run_figures.layers(rows, _sizes(folder)),
        run_figures.traffic(rows) if rows else {},
        run_figures.relayed(rows),
        *(run_figures.histogram(name, of) for name, of in final.get("histograms", {}).items()),
        run_figures.clients(
            final.get("local", []), _summary(subject.dense).get("final", {}).get("local", []), metric_of(final)
        ),
        run_figures.mask(*_mask(folder)),
    ]
    return {
        "name": subject.name,
        "figures": [figure for figure in candidates if figure],
        "failed": subject.failed,
        "left_out": left,
        "lost": [[str(row["round"]), str(k)] for row in rows for k in row.get("lost_state", [])],
        "remarks": [*summary.get("remarks", []), *([] if seals.read(folder) else [seals.UNCHECKED])],
        "study": (folder / STUDY).read_text("utf-8"),
    }


def _summary(folder: Path | None) -> Facts:
    return (folder and (read_summary(folder) or read_failure(folder))) or {}


def _shipped(folder: Path) -> Mapping[str, torch.Tensor]:
    return checkpoint.shipped(folder)[1] if (folder / SUMMARY).exists() else {}


def _sizes(folder: Path) -> dict[str, int]:
    return {name: mask.numel() for name, mask in _shipped(folder).items()}


def _mask(folder: Path) -> tuple[str, list[list[int]]]:
    """Return the name and mask of a convolution, or else of the first matrix, as a row of 0 and 1 for each filter."""
    masks = {name: mask for name, mask in _shipped(folder).items() if mask.dim() >= 2}
    if not masks:
        return "", []
    convolutions = [name for name, mask in masks.items() if mask.dim() > 2]
    name = convolutions[min(1, len(convolutions) - 1)] if convolutions else next(iter(masks))
    return name, masks[name].flatten(1)[:_MOST_UNITS, :_MOST_INPUTS].int().tolist()


def images(folder: Path) -> list[Path]:
    """Write every figure of a page as SVG and PNG into the folder ``figures`` of the page's folder; return the files.

    Raises:
        MissingExtraError: kaleido is not installed.
    """
    kaleido = need("kaleido", extra="report")
    parts = read(folder / _DATA)["parts"]
    parts += [read(folder / _RUNS / f"{number}.js") for number in range(len(read(folder / _DATA)["runs"]))]
    target = folder / "figures"
    jobs: list[Facts] = []
    target.mkdir(exist_ok=True)
    for part in parts:
        for figure in part["figures"]:
            for view in figure["views"]:
                words = [part["name"], figure["id"], view["name"]]
                stem = "-".join("".join(c if c.isalnum() else "-" for c in word) for word in words if word)
                room = {"title": {"text": figure["title"]}, "margin": {**view["layout"]["margin"], "t": 60}}
                spec = {"data": view["data"], "layout": {**view["layout"], **room}}
                jobs += [{"fig": spec, "path": str(target / f"{stem}.{kind}")} for kind in ("svg", "png")]
    kaleido.write_fig_from_object_sync(jobs, cancel_on_error=True)
    return [Path(str(job["path"])) for job in jobs]
