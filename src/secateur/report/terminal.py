"""Progress and results of runs in a terminal: a live line for each phase, and a table at the end."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from secateur.federation.folder import FAILED
from secateur.federation.records import BELOW, EMPTIED, by_reason, emptied, listing
from secateur.federation.removal import remarks_on_units
from secateur.learning.metrics import metric_of
from secateur.report import tables
from secateur.report.fairness import worst_tenth
from secateur.report.fitted import Fitted
from secateur.report.formatting import amount, size
from secateur.report.verdicts import Line

Row = Mapping[str, Any]


class _Live:
    """A display that is redrawn while a block runs; without a terminal it draws nothing."""

    def __init__(self, console: Console, *columns: ProgressColumn) -> None:
        self.console = console
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> Self:
        """Start to draw."""
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        self.progress.stop()


class Display(_Live):
    """Live progress of one or more runs; without a terminal, one plain line for each tenth of the rounds."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            console, TextColumn("{task.description}"), BarColumn(bar_width=8), MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"), TimeRemainingColumn(compact=True), TextColumn("left"),
        )  # fmt: skip

    def watch(self, name: str, rounds: int) -> Callable[[Row], None]:
        """Return the callback that shows the events of a run of ``rounds`` rounds under ``name``."""
        tasks: dict[str, TaskID] = {}
        sent = {"bytes": 0}
        gone: list[str] = []

        def task(phase: str, total: int) -> TaskID:
            if phase not in tasks:
                label = name if phase == "train" else f"{name} [dim]{phase}[/dim]"
                tasks[phase] = self.progress.add_task(label, total=total, facts="")
            return tasks[phase]

        def on(event: Row) -> None:
            if event["event"] == "remark":
                self.console.print(f"{name}: {event['text']}", highlight=False, markup=False)
            elif event["event"] == "reply" and event["phase"] != "train":
                asked = task(event["phase"], event["total"])
                self.progress.update(asked, completed=event["done"], facts="clients")
            elif event["event"] == "row":
                sent["bytes"] += event["bytes_down"] + event["bytes_up"]
                facts = _facts(event, sent["bytes"])
                if event["phase"] == "train":
                    self.progress.update(task("train", rounds), completed=event["round"], facts=facts)
                self._plain(name, event, facts, rounds)
                for remark in emptied(layer for layer in event.get(EMPTIED, []) if layer not in gone):
                    self.console.print(f"{name} round {event['round']}: {remark}", style="yellow", markup=False)
                gone[:] = event.get(EMPTIED, [])

        return on

    def _plain(self, name: str, event: Row, facts: str, rounds: int) -> None:
        done = event["round"]
        if not self.console.is_terminal and (event["phase"] != "train" or done % max(1, rounds // 10) == 0):
            place = f"round {done}/{rounds}" if event["phase"] == "train" else event["phase"]
            self.console.print(f"{name} {place}: {facts}", highlight=False, soft_wrap=True)
        for group in by_reason(event["left_out"]):
            text = f"{name} round {done}: {listing(group['clients'])} left out: {group['reason']}"
            self.console.print(text, style="yellow", markup=False)  # a client's own words, which may hold brackets
        if BELOW in event:
            text = (
                f"{name} round {done}: fewer replies counted than the {event[BELOW]} needed: nothing is learnt from it"
            )
            self.console.print(text, style="yellow", markup=False)


class Runs(_Live):
    """Live progress of many runs, in rounds; without a terminal, one plain line for each tenth of them."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            console, TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rounds"),
            TimeRemainingColumn(compact=True), TextColumn("left"),
        )  # fmt: skip
        self._task = self.progress.add_task("runs", total=None)
        self._tenth = -1

    def report(self, runs: int, of: int, rounds: int, of_rounds: int) -> None:
        """Show how many runs and rounds are done, of all that are known so far."""
        self.progress.update(self._task, description=f"{runs}/{of} runs", completed=rounds, total=of_rounds)
        tenth = 10 * rounds // max(1, of_rounds)
        if not self.console.is_terminal and tenth != self._tenth:
            self._tenth = tenth
            self.console.print(f"{runs}/{of} runs, {rounds}/{of_rounds} rounds", highlight=False)


def _facts(row: Row, sent: int) -> str:
    metric = metric_of(row)
    quality = f"{metric.shown} {row[metric.name]:.3f} " if metric.name in row else ""
    quality += f"validation {row['validation']:.3f} " if "validation" in row else ""
    return f"{quality}sparsity {row['sparsity']:.2f} {size(sent)}"


def comparison(summary: Row, dense: Row | None) -> Fitted:
    """Return the table at the end of a run, with a column for its dense twin where there is one."""
    final = summary["final"]
    said = [*emptied(final.get(EMPTIED, [])), *remarks_on_units(final), *_left_out(summary)]
    worst = _WORST.format(metric_of(summary["final"]).name)
    others = {} if dense is None else {name: number for name, number, _ in _lines(dense)}
    rows = []
    for label, value, shown in _lines(summary):
        cells = {"": label, summary["method"]: shown(value)}
        if dense is not None:
            twin = others.get(label)
            cells[_DENSE] = "" if twin is None else shown(twin)
            cells[_RATIO] = f"{value / twin:.3f}" if twin else ""
        rows.append(cells)
    title = f"{summary['method']}, study {summary['study']}"
    return Fitted(title, rows, drop=(_RATIO,), ends={worst, *_SECTIONS}, caption="\n".join(said))


_DROP = ("client seconds", "to narrow", "to shuffled", "to ramped", "to random", "to dense")
"""The columns of a comparison that go where a terminal has no room for all, the first first."""


def compared(place: str, lines: Sequence[Line], seeds: int) -> Fitted:
    """Return the table of one place of a comparison: quality, differences to controls, and costs of each variant."""
    rows = tables.brief(lines, lines[0].partition, rows=lines[0].rows)
    return Fitted(f"{place}, {seeds} seed{'s' if seeds > 1 else ''}", rows, drop=_DROP)


def last_line(summary: Row, folder: Path) -> str:
    """Return a run's result in one line: quality, sparsity, bytes both ways, and where it lies."""
    final, metric = summary["final"], metric_of(summary["final"])
    local = final["local"]
    quality = final.get(metric.name, statistics.mean(local) if local else None)
    sent = sum(costs["bytes_down"] + costs["bytes_up"] for costs in summary["phases"].values())
    facts = [f"sparsity {final['sparsity']:.3f}", size(sent), str(folder)]
    return f"{summary['method']}: " + ", ".join(
        [*([] if quality is None else [f"{metric.name} {quality:.4f}"]), *facts]
    )


def failure(summary: Row) -> Group:
    """Return what is shown of a run without a result: what ended it, then who was left out why, and what was spent."""
    head = Text(f"{summary['method']}, study {summary['study']}: no result: {summary[FAILED]}", style="bold")
    if not summary["phases"]:
        return Group(head)
    rows = [{"": text, "spent": ""} for text in _left_out(summary)]
    rows += [{"": label, "spent": shown(value)} for label, value, shown in _costs(summary["phases"])]
    return Group(head, Fitted("", rows))


_DENSE, _RATIO = "dense FedAvg", "ratio"
_WORST = "local {}, worst tenth"
_SECTIONS = {
    "sparsity of all parameters",
    "MACs, units removed",
    "bytes down, total",
    "bytes, local scores at the end",
}


def _lines(summary: Row) -> list[tuple[str, float, Callable[[float], str]]]:
    final, phases = summary["final"], summary["phases"]
    plain: Callable[[float], str] = "{:.4f}".format
    seconds: Callable[[float], str] = "{:.1f} s".format
    higher, metric = (main := metric_of(final)).higher, main.name
    where = "the server's test set" if final.get("central", True) else "clients' test rows"
    lines = [(f"{metric} on {where}", final[metric], plain)] if metric in final else []
    if "validation" in final:
        lines += [(f"{metric} on validation rows, to choose by", final["validation"], plain)]
    local = final["local"]
    if local:
        worst = worst_tenth(local, lower_is_better=not higher)
        lines += [(f"local {metric} on test rows, mean over clients", statistics.mean(local), plain)]
        lines += [(_WORST.format(metric), worst, plain)]
    lines += [(f"{metric}, width {name}", part[metric], plain) for name, part in final.get("widths", {}).items()]
    lines += [("sparsity of clients' own models", final["local_sparsity"], plain)] if "local_sparsity" in final else []
    lines += [
        ("sparsity of prunable weights", final["sparsity"], plain),
        ("sparsity of all parameters", final["sparsity_all"], plain),
        *([("sparsity of units", final["sparsity_units"], plain)] if "sparsity_units" in final else []),
        ("MACs, surviving weights", final["macs"], amount),
        ("MACs, units removed", final["macs_physical"], amount),
    ]
    lines += _costs(phases)
    relayed = summary.get("relayed", {})
    lines += [(f"bytes {way}, server and relays", relayed[way], size) for way in ("down", "up") if relayed]
    lines.append(("bytes, local scores at the end", final["evaluate_bytes"], size))
    for phase, costs in phases.items():
        lines.append((f"client seconds, {phase}", costs["client_seconds"], seconds))
    lines.append(("client seconds, total", sum(costs["client_seconds"] for costs in phases.values()), seconds))
    for phase, costs in phases.items():
        lines.append((f"training MACs, surviving weights, {phase}", costs["train_macs"], amount))
        lines.append((f"training MACs, units removed, {phase}", costs["train_macs_physical"], amount))
    for costs in phases.values():
        if "server_macs" in costs:
            lines.append(("the server's own work, seconds", costs["server_seconds"], seconds))
            lines.append(("the server's own work, MACs", costs["server_macs"], amount))
    return lines


def _left_out(summary: Row) -> list[str]:
    return [
        f"{listing(group['clients'])} left out of {group['requests']} exchanges: {group['reason']}"
        for group in summary.get("reasons", [])  # a run that was made before they were recorded has none
    ]


def _costs(phases: Mapping[str, Row]) -> list[tuple[str, float, Callable[[float], str]]]:
    lines: list[tuple[str, float, Callable[[float], str]]] = []
    for direction in ("down", "up"):
        for phase, costs in phases.items():
            lines.append((f"bytes {direction}, {phase}", costs[f"bytes_{direction}"], size))
        total = sum(costs[f"bytes_{direction}"] for costs in phases.values())
        lines.append((f"bytes {direction}, total", total, size))
    return lines
