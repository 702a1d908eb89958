"""The page of methods: what each asks of a client, what travels, what it saves, what is claimed, what we measured.

    python benchmarks/method_page.py densities.json > docs/methods.md

The figures come from the rows that ``results.py densities`` wrote, the words from the methods' own docstrings.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from secateur import methods
from secateur.report.terminal import size

HEAD = """# Methods

Made by `python benchmarks/method_page.py` from the runs of `benchmarks/densities.toml` (Fashion-MNIST, TwoCNN, 30
rounds; a spread is that of the seeds that were run) and from the methods' files. Where a method has a sparsity,
figures are those at 90 %. The whole table, at 50, 90 and 95 %, is in [results](results.md). Papers are named for
reference only: the code is written from their formulas.
"""


def chosen(rows: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """Return a method's rows: those at 90 % where there are such, else those of its first variant."""
    own = [row for row in rows if row["method"] == method]
    at_90 = [row for row in own if "90 %" in row["variant"]]
    return at_90 or [row for row in own if row["variant"] == own[0]["variant"]]


def mean(rows: list[dict[str, Any]], *path: str) -> float:
    """Return the mean over seeds of a figure, by its path."""
    found = []
    for row in rows:
        value: Any = row
        for key in path:
            value = value.get(key, 0) if isinstance(value, dict) else value[key]
        found.append(float(value))
    return statistics.mean(found)


def spread(rows: list[dict[str, Any]], key: str) -> str:
    """Return mean and standard deviation in per cent."""
    values = [100 * row[key] for row in rows]
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def percent(value: float) -> str:
    """Return a share in per cent, to two digits where it is small."""
    return f"{100 * value:.0f}" if value >= 0.1 else f"{100 * value:.2g}"


def asked(rows: list[dict[str, Any]]) -> str:
    """Return what is asked besides training, and how much work that is against training."""
    parts = []
    train = mean(rows, "asked", "train", "rows")
    for phase in sorted({p for row in rows for p in row["asked"]} - {"train"}):
        count, extra = mean(rows, "asked", phase, "clients"), mean(rows, "asked", phase, "rows")
        parts.append(f"{phase}: {count:.0f} requests, {percent(extra / train)} % of the rows of training")
    if mean(rows, "server_macs"):
        parts.append(f"the server computes {percent(mean(rows, 'server_macs') / mean(rows, 'train_macs'))} % as much")
    return "; ".join(parts) or "nothing"


def travels(rows: list[dict[str, Any]], way: str) -> str:
    """Return a training message's values and mask, against the dense model."""
    values, mask = (mean(rows, "traffic", f"{way}_{part}") for part in ("values", "mask"))
    return f"{percent(values)} + {percent(mask)}"


def claims(name: str) -> str:
    """Return what a method's file says of its paper's figures."""
    text = inspect.getdoc(sys.modules[methods.find(name).__module__]) or ""
    for mark in ("\nNot reproduced:", "\nReproduced"):
        if mark in text:
            return " ".join(text.partition(mark)[2].partition("\n\n")[0].split()).removeprefix(":").strip()
    return ""


def reference(name: str) -> str:
    """Return the paper, and how it is known."""
    text = inspect.getdoc(sys.modules[methods.find(name).__module__]) or ""
    found = text.partition("\nReference: ")[2]
    for mark in ("\nDepartures:", "\nReproduced", "\nNot reproduced"):
        found = found.partition(mark)[0]
    return " ".join(found.split())


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page."""
    dense = chosen(rows, "fedavg")
    lines = [HEAD, "## What is asked, what travels, what is saved\n"]
    lines.append(
        "Down and up: values + mask of a training message, in per cent of the dense fp32 model, mean over rounds. "
        "Bytes and training MACs: all phases, against FedAvg. Weights: parameters left when dead units are cut out, of "
        "the shipped model. Kept: what a client keeps between rounds.\n"
    )
    lines.append(
        "| method | variant | asked besides training | down | up | bytes % | training MACs % | weights % | kept |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|")
    known = [name for name in methods.names() if any(row["method"] == name for row in rows)]
    for name in known:
        own = chosen(rows, name)
        carried, whole = (mean(of, "bytes_down") + mean(of, "bytes_up") for of in (own, dense))
        macs = (mean(own, "train_macs") + mean(own, "train_macs_explore")) / mean(dense, "train_macs")
        cells = [
            f"`{name}`", own[0]["variant"], asked(own), travels(own, "down"), travels(own, "up"),
            percent(carried / whole), percent(macs), percent(mean(own, "parameters_physical")),
            size(mean(own, "kept")) if mean(own, "kept") else "nothing",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["\n## What is claimed, what we measured\n"]
    lines.append(
        "Server: accuracy on the server's test set; own: mean over clients' own test rows, with their own model.\n"
    )
    lines.append(
        "| method | the paper's claim, or what we know of it | server % | own % | reference |\n|---|---|---|---|---|"
    )
    for name in methods.names():
        own = chosen(rows, name) if name in known else []
        cells = [spread(own, "accuracy_final"), spread(own, "accuracy_local")] if own else ["not run", "not run"]
        lines.append(f"| `{name}` | {claims(name)} | {' | '.join(cells)} | {reference(name)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="the JSON file of results.py densities")
    print(page(json.loads(parser.parse_args().rows.read_text())), end="")


if __name__ == "__main__":
    main()
