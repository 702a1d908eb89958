"""The page of methods: what each asks of a client, what travels, what it saves, what is claimed, what we measured.

    python benchmarks/method_page.py runs/fashion > docs/methods.md

The figures come from a comparison's folder, as ``secateur compare`` writes it; the words from the methods' own
docstrings.
"""

from __future__ import annotations

import argparse
import inspect
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur import methods
from secateur.comparison.grid import folder_of
from secateur.comparison.suite import Cell
from secateur.report.formatting import percent, plain, size, spread
from secateur.report.gather import read_comparison
from secateur.report.outcomes import Outcome, PhaseCost, outcome
from secateur.report.statistics import interval
from secateur.report.verdicts import DENSE
from secateur.study.study import Study

HEAD = """# Methods

Made by `python benchmarks/method_page.py {folder}` from the comparison *{title}* ({seeds} seeds; ± is half a 95 %
interval by Student's t) and from the methods' files. Where a method has a sparsity, figures are those at 90 %, else
those of its first variant. The complete tables are linked from [results](results.md). Papers are named for reference
only: the code is written from their formulas.
"""
COSTS = """## What is asked, what travels, what is saved

On {partition}. Training: what a method recommends where it learns something other than weights; what learns weights is
trained alike. Down and up: values + mask of a training message, in per cent of the dense fp32 model, mean over rounds.
Bytes and training MACs: all phases, in per cent of the dense FedAvg baseline. Left: parameters of the shipped
model when dead units are cut out. Kept: what a client keeps between rounds.
"""
CLAIMS = """## What is claimed, what we measured

Server: {metric} on the server's test rows; own: mean over clients' own test rows, each with the model that it uses. A
method whose clients have models of their own ships none that the server could test.
"""
MARKS = ("Reproduced", "Not reproduced", "Not shown")
_CLAIM = re.compile(rf"^(?:{'|'.join(MARKS)})\b.*?(?=^\s*$|^(?:{'|'.join(MARKS)})\b|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Measured:
    """The runs of one method's variant on one partition, and of the dense FedAvg baseline, by seed."""

    variant: str
    study: Study
    runs: Sequence[Outcome]
    dense: Sequence[Outcome]

    def mean(self, figure: Callable[[Outcome], float]) -> float:
        """Return the mean over seeds."""
        return interval([figure(one) for one in self.runs]).mean

    def ratio(self, figure: Callable[[Outcome], float]) -> str:
        """Return a figure in per cent of dense; nothing where no FedAvg was run beside it."""
        whole = sum(figure(one) for one in self.dense) / max(1, len(self.dense))
        return share(self.mean(figure) / whole) if whole else ""


def measured(cells: Sequence[Cell], partition: str, out: Path) -> dict[str, Measured]:
    """Return for each method its runs at 90 %, else of its first variant; FedAvg as most variants have it beside."""
    here = [cell for cell in cells if cell.partition == partition]
    twins = {(cell.variant, cell.seed): cell.study for cell in here if cell.control == DENSE}
    chosen: dict[str, str] = {}
    for cell in here:
        at_90 = cell.variant.endswith(" 90 %") and not chosen.get(cell.study.method, "").endswith(" 90 %")
        if not cell.control and (cell.study.method not in chosen or at_90):
            chosen[cell.study.method] = cell.variant
    found = {}
    for method, variant in chosen.items():
        own = [cell for cell in here if cell.variant == variant and not cell.control]
        beside = [twins[variant, cell.seed] for cell in own if (variant, cell.seed) in twins]
        found[method] = Measured(variant, own[0].study, _read(out, [cell.study for cell in own]), _read(out, beside))
    if "fedavg" not in found and twins:
        named = {(_unseeded(study), study.seed): study for study in twins.values()}
        common = Counter(_unseeded(study) for study in twins.values()).most_common(1)[0][0]
        studies = [study for (name, _), study in named.items() if name == common]
        runs = _read(out, studies)
        found["fedavg"] = Measured("FedAvg", studies[0], runs, runs)
    return found


def _unseeded(study: Study) -> str:
    return study.model_copy(update={"seed": 0}).hash()


def _read(out: Path, studies: Sequence[Study]) -> list[Outcome]:
    return [outcome(folder_of(out, study)) for study in studies]


def share(value: float) -> str:
    """Return a share in per cent, to two digits where it is small."""
    return f"{100 * value:.0f}" if value >= 0.1 else f"{100 * value:.2g}"


def trained(of: Measured) -> str:
    """Return how the variant trains what its method recommends a training of its own for."""
    names = methods.find(of.study.method).recommended
    return ", ".join(f"{name} {getattr(of.study.training, name)}" for name in names) or "as weights"


def asked(of: Measured) -> str:
    """Return what is asked besides training, and how much work that is against training."""
    parts = []
    rows = of.mean(lambda one: one.spent("rows", train=True))
    for phase in sorted({phase for one in of.runs for phase in one.phases} - {"train"}):
        spent = [one.phases.get(phase, PhaseCost()) for one in of.runs]
        count, extra = (statistics.fmean(getattr(one, figure) for one in spent) for figure in ("clients", "rows"))
        parts.append(f"{phase}: {count:.0f} requests, {share(extra / rows)} % of the rows of training")
    if server := of.mean(lambda one: one.server_macs):
        work = of.mean(lambda one: one.spent("macs", train=True))
        parts.append(f"the server computes {share(server / work)} % as much")
    return "; ".join(parts) or "nothing"


def travels(of: Measured, way: str) -> str:
    """Return a training message's values and mask, against the dense model."""
    parts = [statistics.fmean(one.traffic[f"{way}_{part}"] for one in of.runs) for part in ("values", "mask")]
    return " + ".join(map(share, parts))


def words(name: str) -> str:
    """Return the docstring of a method's file."""
    return inspect.getdoc(sys.modules[methods.find(name).__module__]) or ""


def claims(name: str) -> str:
    """Return what a method's file says of its paper's figures: every part that begins with one of ``MARKS``."""
    return " ".join(" ".join(part.split()) for part in _CLAIM.findall(words(name)))


def reference(name: str) -> str:
    """Return the paper, and how it is known."""
    found = words(name).partition("\nReference: ")[2]
    for mark in ("Departures:", *MARKS):
        found = found.partition(f"\n{mark}")[0]
    return " ".join(found.split())


def quality(of: Measured | None) -> list[str]:
    """Return quality on the server's rows and on clients' own."""
    if of is None:
        return ["not run", "not run"]
    shown = percent if of.runs[0].metric.share else plain
    own, server = (spread(interval([getattr(one, name) for one in of.runs]), shown) for name in ("local", "quality"))
    return ["ships none" if of.study.build_method().personal else server, own]


def costs(found: Mapping[str, Measured]) -> list[str]:
    """Return the rows of the first table."""
    heads = ["method", "variant", "training", "asked besides training", "down", "up", "bytes %", "training MACs %"]
    heads += ["left %", "kept"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name in methods.names():
        if of := found.get(name):
            kept = of.mean(lambda one: one.state_bytes)
            cells = [
                f"`{name}`", of.variant, trained(of), asked(of), travels(of, "down"), travels(of, "up"),
                of.ratio(lambda one: one.bytes), of.ratio(lambda one: sum(p.macs for p in one.phases.values())),
                share(of.mean(lambda one: one.parameters_left)), size(kept) if kept else "nothing",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(out: Path) -> str:
    """Return the page.

    Raises:
        CheckpointError: ``out`` holds no finished comparison.
    """
    suite, cells = read_comparison(out)
    found = {partition: measured(cells, partition, out) for partition in suite.partitions}
    first = found[suite.partitions[0]]
    metric = next(iter(first.values())).runs[0].metric.name
    lines = [HEAD.format(folder=f"runs/{out.resolve().name}", title=suite.title, seeds=len(suite.seeds))]
    lines += [COSTS.format(partition=suite.partitions[0]), *costs(first), "", CLAIMS.format(metric=metric)]
    heads = [f"{where}, {partition}" for partition in suite.partitions for where in ("server", "own")]
    lines += [f"| method | what is claimed, and what of it we can say | {' | '.join(heads)} | reference |"]
    lines += ["|" + "---|" * (3 + len(heads))]
    for name in methods.names():
        figures = [cell for partition in suite.partitions for cell in quality(found[partition].get(name))]
        lines.append(f"| `{name}` | {claims(name)} | {' | '.join(figures)} | {reference(name)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="a folder that secateur compare wrote")
    print(page(parser.parse_args().comparison), end="")


if __name__ == "__main__":
    main()
