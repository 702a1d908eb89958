"""Read the folders of runs, or of one comparison, into the lines that tables and pages show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from secateur.bandwidth import Bandwidth
from secateur.comparison.grid import RUNS, cell_name, folder_of
from secateur.comparison.suite import Cell, Suite, dense_name, differences, personal
from secateur.errors import CheckpointError
from secateur.federation import seals
from secateur.federation.folder import FAILED, FAILURE, ROUNDS, STUDY, SUMMARY, read_failure, read_study
from secateur.report import hostile
from secateur.report.outcomes import outcome
from secateur.report.verdicts import DENSE, Group, Line, compare_groups
from secateur.study.study import Study

RESULT = "comparison.json"


@dataclass(frozen=True)
class Subject:
    """A single run that has a part of the page to itself.

    Attributes:
        name: its name in tables, with its seed.
        folder: the run's folder.
        dense: the folder of its dense FedAvg run, if there is one.
        failed: what ended it without a result; empty: nothing did.
    """

    name: str
    folder: Path
    dense: Path | None = None
    failed: str = ""


class Gathered(NamedTuple):
    """Everything that a page shows.

    Attributes:
        title: the heading: the suite's title, or the run's name.
        lines: one line for each method and each control; runs without a result are in none of them.
        subjects: the runs that are shown one by one, among them all that have no result.
        ended: no run is still going.
    """

    title: str
    lines: list[Line]
    subjects: list[Subject]
    ended: bool


def gather(folders: Sequence[Path], bandwidth: Bandwidth | None = None) -> Gathered:
    """Read some folders of runs, or the folder of one comparison.

    Args:
        folders: the folders of runs, or that of a comparison alone.
        bandwidth: the network on which seconds are predicted; None: the one that the comparison's suite names, if any.

    Raises:
        CheckpointError: a folder holds neither a run nor a comparison, or a run that has no records yet.
    """
    if len(folders) == 1 and (folders[0] / RESULT).exists():
        out = folders[0]
        suite, cells = read_comparison(out)
        lines = comparison_lines(suite, cells, out, bandwidth or suite.bandwidth)
        dense = {(c.partition, c.variant, c.seed): folder_of(out, c.study) for c in cells if c.control == DENSE}
        honest = [name for name in suite.variants if hostile.is_honest(suite.places.get(name, {}))]
        first = [c for c in cells if not c.control and c.seed == suite.seeds[0] and c.variant in honest]
        known = {folder_of(out, c.study) for c in first}
        others = {place: c for c in cells if failed(place := folder_of(out, c.study)) and place not in known}
        subjects = [
            Subject(cell_name(c), folder_of(out, c.study), dense.get((c.partition, c.variant, c.seed)),
                    failed(folder_of(out, c.study)))
            for c in first
        ]  # fmt: skip
        subjects += [Subject(cell_name(c), place, None, failed(place)) for place, c in others.items()]
        return Gathered(suite.title or out.name, lines, subjects, ended=True)
    lines = run_lines(folders, bandwidth)
    places = [place for folder in folders for place in (folder, folder / DENSE) if (place / STUDY).exists()]
    twins = [place for place in places if place not in folders and failed(place)]
    subjects = [Subject(folder.name, folder, folder / DENSE, failed(folder)) for folder in folders]
    subjects += [Subject(f"{place.parent.name}, dense", place, None, failed(place)) for place in twins]
    ended = all((place / SUMMARY).exists() or (place / FAILURE).exists() for place in places)
    title = folders[0].name if len(folders) == 1 else f"{len(folders)} runs"
    return Gathered(title, lines, subjects, ended)


def attacks(folders: Sequence[Path]) -> list[hostile.Standing]:
    """Return what a comparison of rules under attacks came to; empty for any other folders."""
    if len(folders) != 1 or not (folders[0] / RESULT).exists():
        return []
    suite, cells = read_comparison(folders[0])
    return hostile.standings(suite, cells, folders[0]) if hostile.shows(suite) else []


def failed(folder: Path) -> str:
    """Return what ended a run without a result; empty: nothing did."""
    failure = read_failure(folder)
    return "" if failure is None else str(failure[FAILED])


def comparison_lines(suite: Suite, cells: Sequence[Cell], out: Path, bandwidth: Bandwidth | None = None) -> list[Line]:
    """Return the lines of a finished comparison, partition by partition, each variant before its controls."""
    lines: list[Line] = []
    for partition in suite.partitions:
        every = [cell for cell in cells if cell.partition == partition]
        names, here = _dense_names(suite, every), [c for c in every if not failed(folder_of(out, c.study))]
        dense = {cell.variant: names[_key(cell.study)] for cell in every if cell.control == DENSE}
        own = {cell.variant for cell in every if not cell.control and personal(cell.study)}
        groups: dict[tuple[str, str], Group] = {}
        for cell in here:
            name = dense[cell.variant] if cell.control == DENSE else cell.variant
            fresh = Group(name, cell.control, {}, dense.get(cell.variant, ""),
                          personal=cell.variant in own and cell.control != DENSE,
                          central=not cell.study.build_method().personal)  # fmt: skip
            group = groups.setdefault((name, cell.control), fresh)
            group.runs[cell.seed] = outcome(folder_of(out, cell.study), bandwidth)
        order = [*sorted(set(names.values()), key=lambda name: name != "FedAvg"), *suite.variants]
        ordered = sorted(groups.values(), key=lambda g: (g.control != DENSE, order.index(g.variant), g.control != ""))
        lines += compare_groups(partition, ordered, target=suite.target, margin=suite.margin)
    return lines


def _key(study: Study) -> str:
    """Return a hash of a study that leaves out its seed."""
    return study.model_copy(update={"seed": 0}).hash()


def _dense_names(suite: Suite, cells: Sequence[Cell]) -> dict[str, str]:
    """Return a name for each dense twin, by the hash of its study; twins that differ get different names."""
    names: dict[str, str] = {}
    for cell in cells:
        if cell.control == DENSE and (key := _key(cell.study)) not in names:
            name = dense_name(suite, cell.study)
            names[key] = f"{name}, {key}" if name in names.values() else name
    return names


def run_lines(folders: Sequence[Path], bandwidth: Bandwidth | None = None) -> list[Line]:
    """Return a line for each method among run folders and for each dense twin; seeds of one study share a line.

    Raises:
        CheckpointError: a folder holds no run, or a run without records.
    """
    places = [place for folder in folders for place in (folder, folder / DENSE)
              if not failed(place) and (place == folder or (place / ROUNDS).exists())]  # fmt: skip
    studies = {place: read_study(place) for place in places}
    dense = {_key(studies[place]): studies[place] for place in places if place not in folders}
    groups: dict[tuple[str, str, str], Group] = {}
    for folder in folders:
        baseline = _dense_name(studies[folder / DENSE], dense.values()) if folder / DENSE in studies else ""
        for place, control in ((folder, ""), (folder / DENSE, DENSE)):
            if place in studies:
                study = studies[place]
                one, central = outcome(place, bandwidth), not study.build_method().personal
                one = (
                    one if central or one.local else replace(one, local=one.quality)
                )  # an unfinished run has no clients' scores yet
                name = baseline if control else f"{study.method} {_key(study)}"
                own = personal(study) and bool(one.local)
                fresh = Group(name, control, {}, baseline, personal=own, central=central)
                group = groups.setdefault((study.data.partition, name, control), fresh)
                group.runs[study.seed] = one
    lines: list[Line] = []
    for partition in dict.fromkeys(partition for partition, _, _ in groups):
        here = [group for (where, _, _), group in groups.items() if where == partition]
        lines += compare_groups(partition, sorted(here, key=lambda group: group.control != DENSE))
    return lines


def _dense_name(study: Study, among: Iterable[Study]) -> str:
    """Return the name of a dense twin, which says in what it differs from the others of its partition."""
    others = [other for other in among if other.data.partition == study.data.partition]
    return ", ".join(["FedAvg", *differences(study, others)])


def read_comparison(out: Path) -> tuple[Suite, list[Cell]]:
    """Return the suite and the cells of a comparison that was written into ``out``.

    Raises:
        CheckpointError: ``out`` holds no finished comparison.
    """
    path = out / RESULT
    if not path.exists():
        raise CheckpointError(f"{out} holds no finished comparison: {path} is missing")
    facts: dict[str, Any] = seals.document(out, RESULT)
    cells = [Cell(**{**cell, "study": read_study(out / RUNS / cell["study"])}) for cell in facts["cells"]]
    return Suite.model_validate(facts["suite"]), cells
