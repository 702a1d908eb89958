"""The page: figures and tables of runs in one folder that a browser opens from disk, without a network."""

from __future__ import annotations

import importlib.resources
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from secateur.bandwidth import Links
from secateur.compare.grid import folder_of
from secateur.compare.suite import differences, personal
from secateur.errors import CheckpointError, need
from secateur.federation import checkpoint
from secateur.federation.folder import ROUNDS, STUDY, SUMMARY, read_records, read_study, read_summary
from secateur.report import comparison_figures as beside
from secateur.report import figures
from secateur.report.formats import latex, markdown
from secateur.report.outcomes import outcome
from secateur.report.statistics import Interval
from secateur.report.tables import RESULT, Table, parts, saved, tables
from secateur.report.tables import lines as lines_among
from secateur.report.verdicts import DENSE, OWN, Group, Line, compared
from secateur.study.study import Study

Facts = dict[str, Any]
_WEB = ("index.html", "page.css", "page.js")
_DATA, _RUNS = "data.js", "runs"
_MOST_UNITS, _MOST_INPUTS = 64, 600  # of a mask that is drawn


@dataclass(frozen=True)
class Subject:
    """A single run that the page looks into.

    Attributes:
        name: as in tables, with its seed.
        folder: of the run.
        dense: of the FedAvg run beside it, if there is one.
    """

    name: str
    folder: Path
    dense: Path | None = None


def gathered(folders: Sequence[Path], links: Links | None = None) -> tuple[str, list[Line], list[Subject], bool]:
    """Return a page's title, lines and single runs, and whether all runs have ended.

    Args:
        folders: of runs, or one of a comparison.
        links: what seconds on real links are predicted for; None: those of the comparison's suite, if it names any.

    Raises:
        CheckpointError: a folder holds neither, or a run that has no records yet.
    """
    if len(folders) == 1 and (folders[0] / RESULT).exists():
        out = folders[0]
        suite, cells = saved(out)
        lines = lines_among(suite, cells, out, links or suite.links)
        dense = {(c.partition, c.variant, c.seed): folder_of(out, c.study) for c in cells if c.control == DENSE}
        first = [c for c in cells if not c.control and c.seed == suite.seeds[0]]
        subjects = [
            Subject(f"{c.variant}, {c.partition}, seed {c.seed}", folder_of(out, c.study),
                    dense.get((c.partition, c.variant, c.seed)))
            for c in first
        ]  # fmt: skip
        return suite.title or out.name, lines, subjects, True
    lines = lines_of(folders, links)
    subjects = [Subject(folder.name, folder, folder / "dense") for folder in folders]
    places = [place for folder in folders for place in (folder, folder / "dense") if (place / STUDY).exists()]
    ended = all((place / SUMMARY).exists() for place in places)
    title = folders[0].name if len(folders) == 1 else f"{len(folders)} runs"
    return title, lines, subjects, ended


def lines_of(folders: Sequence[Path], links: Links | None = None) -> list[Line]:
    """Return a line for each method among run folders, with the dense runs beside them; seeds of a study are joined.

    Raises:
        CheckpointError: a folder holds no run, or none of its records.
    """
    places = [place for folder in folders for place in (folder, folder / DENSE)
              if place == folder or (place / ROUNDS).exists()]  # fmt: skip
    studies = {place: read_study(place) for place in places}
    dense = {_key(studies[place]): studies[place] for place in places if place not in folders}
    groups: dict[tuple[str, str, str], Group] = {}
    for folder in folders:
        beside_ = _dense_name(studies[folder / DENSE], dense.values()) if folder / DENSE in studies else ""
        for place, control in ((folder, ""), (folder / DENSE, DENSE)):
            if place in studies:
                study = studies[place]
                one, central = outcome(place, links), not study.build_method().personal
                one = one if central or one.local else replace(one, local=one.quality)  # a personal run that goes on
                name = beside_ if control else f"{study.method} {_key(study)}"
                own = personal(study) and bool(one.local)
                fresh = Group(name, control, {}, beside_, personal=own, central=central)
                group = groups.setdefault((study.data.partition, name, control), fresh)
                group.runs[study.seed] = one
    made: list[Line] = []
    for partition in dict.fromkeys(partition for partition, _, _ in groups):
        here = [group for (where, _, _), group in groups.items() if where == partition]
        made += compared(partition, sorted(here, key=lambda group: group.control != DENSE))
    return made


def _key(study: Study) -> str:
    return study.model_copy(update={"seed": 0}).hash()


def _dense_name(study: Study, among: Iterable[Study]) -> str:
    """Return what a dense twin is called: in what it differs from the others of its partition stands in its name."""
    others = [other for other in among if other.data.partition == study.data.partition]
    return ", ".join(["FedAvg", *differences(study, others)])


def write(title: str, lines: Sequence[Line], subjects: Iterable[Subject], out: Path, *, live: bool = False) -> Path:
    """Write the page into ``out`` and return its index.html.

    Args:
        title: its heading.
        lines: of the tables and of the figures that compare.
        subjects: single runs to look into.
        out: made if it is not there; what it holds of an older page is replaced.
        live: the page loads itself anew every few seconds.

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
    for number, subject in enumerate(subjects):  # each is read when it is looked at: there may be hundreds
        names[f"{number}.js"] = subject.name
        _put(out / _RUNS / f"{number}.js", f"window.SECATEUR.runs[{number}].facts", subject_facts(subject))
    for older in {path.name for path in (out / _RUNS).iterdir()} - set(names):
        (out / _RUNS / older).unlink()
    _put(out / _DATA, "window.SECATEUR", contents(title, lines, names.values(), live=live))
    return out / "index.html"


def _put(path: Path, name: str, facts: Facts) -> None:
    checkpoint.write(path, f"{name} = {json.dumps(facts, allow_nan=False)};\n".encode())


def read(path: Path) -> Facts:
    """Return what a script of a page's folder holds."""
    return dict(json.loads(path.read_text("utf-8").partition(" = ")[2].rstrip(";\n")))


def contents(title: str, lines: Sequence[Line], names: Iterable[str], *, live: bool = False) -> Facts:
    """Return what the page shows beside single runs, as JSON holds it.

    Args:
        title: its heading.
        lines: of the tables and of the figures that compare.
        names: of the single runs; what is shown of the nth is in the script ``runs/n.js``.
        live: the page loads itself anew every few seconds.
    """
    told = [
        {
            "name": place,
            "seeds": max(len(line.runs) for line in here),
            "tables": [_tabled(one) for one in tables(here)],
            "figures": beside.compared([drawn(line) for line in here]),
        }
        for place, here in parts(lines).items()
    ]
    return {"title": title, "live": live, "parts": told, "runs": [{"name": name} for name in names]}


def _tabled(one: Table) -> Facts:
    rows = one.rows
    controls = [line.control not in {"", DENSE} for line in one.lines] or [False] * len(rows)
    return {
        "title": one.title, "note": one.note, "columns": list(rows[0]), "rows": [list(row.values()) for row in rows],
        "controls": controls, "markdown": markdown(rows), "latex": latex(rows),
    }  # fmt: skip


def drawn(line: Line) -> beside.Drawn:
    """Return a line as figures draw it: on clients' own rows only what was scored there on the way has curves."""
    own = line.rows == OWN
    scored = not (own and line.central)
    curves = {axis: [getattr(one, axis) for one in line.runs.values()] if scored else [] for axis in beside.AXES}
    shipped = Interval(0.0, 0.0, len(line.runs)) if own else line.of("size")
    return beside.Drawn(
        line.name, line.variant, line.control, line.metric, curves, line.score, line.of("bytes"), line.of("seconds"),
        shipped, line.of("sparsity"), line.of("lowest"), line.of("local"), line.of("local_sparsity"), dict(line.apart),
        line.front, line.family, line.better, own,
    )  # fmt: skip


def subject_facts(subject: Subject) -> Facts:
    """Return what the page shows of a single run."""
    folder = subject.folder
    rows = read_records(folder)
    summary = _summary(folder)
    final = summary.get("final", {})
    left = [
        [str(row["round"]), row["phase"], str(entry["client"]), entry["reason"]]
        for row in rows
        for entry in row["left_out"]
    ]
    found = [
        figures.layers(rows, _sizes(folder)),
        figures.traffic(rows),
        *(figures.histogram(name, of) for name, of in final.get("histograms", {}).items()),
        figures.clients(final.get("local", []), _summary(subject.dense).get("final", {}).get("local", [])),
        figures.mask(*_mask(folder)),
    ]
    return {
        "name": subject.name,
        "figures": [figure for figure in found if figure],
        "left_out": left,
        "lost": [[str(row["round"]), str(k)] for row in rows for k in row.get("lost_state", [])],
        "remarks": summary.get("remarks", []),
        "study": (folder / STUDY).read_text("utf-8"),
    }


def _summary(folder: Path | None) -> Facts:
    return (folder and read_summary(folder)) or {}


def _shipped(folder: Path) -> Mapping[str, torch.Tensor]:
    try:
        return checkpoint.shipped(folder)[1]
    except CheckpointError:  # not finished yet
        return {}


def _sizes(folder: Path) -> dict[str, int]:
    return {name: mask.numel() for name, mask in _shipped(folder).items()}


def _mask(folder: Path) -> tuple[str, list[list[int]]]:
    """Return the mask of a convolution (else of the first matrix) as rows of 0 and 1, one for each filter."""
    masks = {name: mask for name, mask in _shipped(folder).items() if mask.dim() >= 2}
    if not masks:
        return "", []
    convolutions = [name for name, mask in masks.items() if mask.dim() > 2]
    name = convolutions[min(1, len(convolutions) - 1)] if convolutions else next(iter(masks))
    return name, masks[name].flatten(1)[:_MOST_UNITS, :_MOST_INPUTS].int().tolist()


def images(folder: Path) -> list[Path]:
    """Write every figure of a page's folder as SVG and PNG into its ``figures``; return the files.

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
