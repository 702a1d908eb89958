"""Accuracy, bytes and MACs of the methods on real data: runs a suite and writes its table.

    python benchmarks/results.py fashion --data FOLDER --out runs/fashion --json fashion.json
    python benchmarks/results.py cifar --data FOLDER --out runs/cifar --json cifar.json
    python benchmarks/results.py --render docs/results.md fashion.json cifar.json

Runs that are already in ``--out`` are not repeated, so a suite that was stopped goes on where it was.
``--quick`` does a few rounds of one seed, to see that everything works. The table's figures are written
into the page between the markers ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` by ``--render``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from secateur import run as runs
from secateur import standings
from secateur.config import Runtime, assign, study
from secateur.report.standing import markdown
from secateur.report.terminal import amount, size

HERE = Path(__file__).parent


def cases(suite: dict[str, Any], data: str, *, quick: bool) -> list[tuple[str, str, int, dict[str, Any]]]:
    """Return (partition, variant, seed, study values) for each run of a suite."""
    found = []
    for seed in [0] if quick else suite["seeds"]:
        for partition in suite["partitions"]:
            for variant, settings in suite["variants"].items():
                values: dict[str, Any] = {}
                for path, value in {**suite["common"], **settings}.items():
                    assign(values, f"{path}={value}")
                assign(values, f"data.source={suite['source']}:{data}")
                assign(values, f"data.partition={partition}")
                assign(values, f"seed={seed}")
                if quick:
                    assign(values, "rounds=3")
                    if values["method"] == "autoflip":
                        assign(values, "criterion.explore.epochs=1")
                found.append((partition, variant, seed, values))
    return found


def play(name: str, data: str, out: Path, *, workers: int, quick: bool) -> list[dict[str, Any]]:
    """Run what is missing in ``out`` and return one row for each run."""
    suite = tomllib.loads((HERE / f"{name}.toml").read_text())
    rows = []
    for partition, variant, seed, values in cases(suite, data, quick=quick):
        made = study(values)
        folder = out / partition.replace(":", "-") / variant / f"seed{seed}"
        runs.reserve(folder, made)
        if (folder / runs.SUMMARY).exists():
            summary = json.loads((folder / runs.SUMMARY).read_text())
        else:
            with runs.federation(made) as shards:
                summary = runs.resume(folder, Runtime(workers=workers), shards=shards)
        rows.append(
            {"suite": name, "partition": partition, "variant": variant, "seed": seed, **figures(folder, summary)}
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def figures(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one run: quality, bytes and MACs, exploration on its own."""
    records = [json.loads(line) for line in (folder / runs.ROUNDS).read_text().splitlines()]
    accuracy = [r["accuracy"] for r in records if "accuracy" in r]
    phases, final = summary["phases"], summary["final"]
    train, explore = phases["train"], {}
    for phase, costs in phases.items():
        if phase != "train":  # exploration, or scores
            explore = {
                key: explore.get(key, 0) + value for key, value in costs.items() if isinstance(value, int | float)
            }
    local = final["local"]
    upload, curve = 0, []
    for record in records:
        upload += record["bytes_up"]
        if "accuracy" in record:
            curve.append([upload, record["accuracy"]])
    carried = [r["bytes_down"] + r["bytes_up"] for r in records if r["phase"] == "train"]
    seconds = [r["client_seconds"] for r in records if r["phase"] == "train"]
    return {
        "rounds": train["asks"],
        "accuracy_last10": statistics.mean(accuracy[-10:]),
        "accuracy_final": final["accuracy"],
        "accuracy_local": statistics.mean(local) if local else 0.0,
        "accuracy_lowest_tenth": statistics.mean(local[: max(1, len(local) // 10)]),
        "sparsity": final["sparsity"],
        "sparsity_all": final["sparsity_all"],
        "sparsity_used": final.get("local_sparsity", final["sparsity"]),
        "bytes_down": sum(costs["bytes_down"] for costs in phases.values()),
        "bytes_up": upload,
        "server_macs": train.get("server_macs", 0),
        "bytes": train["bytes_down"] + train["bytes_up"],
        "bytes_explore": explore.get("bytes_down", 0) + explore.get("bytes_up", 0),
        "macs": final["macs"],
        "macs_physical": final["macs_physical"],
        "macs_dense": final["macs_dense"],
        "train_macs": train["train_macs"],
        "train_macs_explore": explore.get("train_macs", 0),
        "train_macs_physical": train.get("train_macs_physical", train["train_macs"]),
        "widths": {name: [w["accuracy"], w["macs_physical"]] for name, w in final.get("widths", {}).items()},
        "seconds_first": statistics.median(seconds[:10]),
        "seconds_last": statistics.median(seconds[-10:]),
        "bytes_first": statistics.median(carried[:10]),
        "bytes_last": statistics.median(carried[-10:]),
        "client_seconds": train["client_seconds"],
        "client_seconds_explore": explore.get("client_seconds", 0.0),
        "curve": accuracy[:: max(1, len(accuracy) // 20)],
        "uploads": curve,
        "method": summary["method"],
        "asked": _asked(records),
        "traffic": _traffic(records, final),
        "kept": _kept(folder),
        "parameters_physical": final["parameters_physical"] / final["parameters_dense"],
    }


def _asked(records: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Return for each phase how often clients were asked, how many of them, and rows that they processed."""
    found: dict[str, dict[str, int]] = {}
    for record in records:
        phase = found.setdefault(record["phase"], {"asks": 0, "clients": 0, "rows": 0})
        phase["asks"] += 1
        phase["clients"] += len(record["clients"])
        phase["rows"] += record["processed"]
    return found


def _traffic(records: list[dict[str, Any]], final: dict[str, Any]) -> dict[str, float]:
    """Return the mean size of a training message, by direction and part, as a share of the dense fp32 model."""
    train = [record for record in records if record["phase"] == "train"]
    messages = sum(len(record["clients"]) for record in train)
    return {
        f"{way}_{part}": sum(record[way].get(part, 0) for record in train) / messages / (4 * final["parameters_dense"])
        for way in ("down", "up")
        for part in ("values", "mask")
    }


def _kept(folder: Path) -> float:
    """Return the mean size in bytes of what a client keeps between rounds; 0 where none keeps anything."""
    sizes = [path.stat().st_size for path in (folder / "clients").glob("*.state")]
    return statistics.mean(sizes) if sizes else 0.0


def _spread(values: list[float], shown: Any) -> str:
    """Return mean ± standard deviation; the mean alone where nothing varies."""
    mean = str(shown(statistics.mean(values)))
    return mean if len(set(values)) == 1 else f"{mean} ± {shown(statistics.stdev(values))}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


COLUMNS: dict[str, tuple[str, Callable[[float], object]]] = {
    "accuracy_last10": ("accuracy %, last 10 evaluations", _percent),
    "accuracy_final": ("shipped model %", _percent),
    "accuracy_lowest_tenth": ("lowest tenth of clients %", _percent),
    "sparsity": ("sparsity %", _percent),
    "bytes": ("bytes, rounds", size),
    "bytes_explore": ("bytes, exploration or scores", size),
    "macs": ("MACs", amount),
    "macs_physical": ("MACs, units removed", amount),
    "train_macs": ("training MACs", amount),
    "train_macs_explore": ("+ exploration", amount),
}
MORE: dict[str, tuple[str, Callable[[float], object]]] = {
    "accuracy_local": ("on clients' own rows %", _percent),
    "accuracy_equal_upload": ("accuracy % at the least upload of the table", _percent),
    "accuracy_twice_upload": ("at twice that", _percent),
    "sparsity_used": ("sparsity %", _percent),
    "bytes_down": ("bytes down", size),
    "bytes_up": ("bytes up", size),
    "server_macs": ("+ server", amount),
    "train_macs_physical": ("training MACs, units removed", amount),
    "bytes_first": ("bytes a round, first ten", size),
    "bytes_last": ("last ten", size),
    "seconds_first": ("client seconds a round, first ten", "{:.1f}".format),
    "seconds_last": ("last ten", "{:.1f}".format),
    "client_seconds": ("client seconds, rounds", "{:.0f}".format),
    "client_seconds_explore": ("client seconds, exploration", "{:.0f}".format),
}


def render(rows: list[dict[str, Any]], columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """Return one Markdown table for each partition: mean ± standard deviation over seeds."""
    parts, known = [], COLUMNS | MORE
    for partition in dict.fromkeys(r["partition"] for r in rows):
        here = [r for r in rows if r["partition"] == partition]
        if any(column.endswith("_upload") for column in columns):
            here = at_upload(here)
        parts.append(f"**{partition}**, {len({r['seed'] for r in here})} seed(s), {here[0]['rounds']} rounds\n")
        parts.append(f"| method | {' | '.join(known[c][0] for c in columns)} |\n|" + "---|" * (1 + len(columns)))
        for variant in dict.fromkeys(r["variant"] for r in here):
            of = [r for r in here if r["variant"] == variant]
            cells = [_spread([float(r[c]) for r in of], known[c][1]) for c in columns]
            fewer = f" ({len(of)} of the seeds)" if len(of) < len({r["seed"] for r in here}) else ""
            parts.append(f"| {variant}{fewer} | {' | '.join(cells)} |")
        parts += ["", *_widths(here)]
    return "\n".join(parts)


def at_upload(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with their accuracy at the least upload among variants, and at twice that; seed by seed."""
    made = []
    for row in rows:
        limit = min(r["uploads"][-1][0] for r in rows if r["seed"] == row["seed"])
        reached = [[a for up, a in row["uploads"] if up <= k * limit] for k in (1, 2)]
        one, two = ((found or [0.0])[-1] for found in reached)
        made.append({**row, "accuracy_equal_upload": one, "accuracy_twice_upload": two})
    return made


def _widths(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of the narrower models that the shipped ones hold, for each variant that has them."""
    lines: list[str] = []
    for variant in dict.fromkeys(r["variant"] for r in rows if r.get("widths")):
        of = [r for r in rows if r["variant"] == variant]
        lines += [f"| {variant}: width | accuracy % | MACs |", "|---|---|---|"]
        whole = {"1": [[r["accuracy_final"], r["macs_physical"]] for r in of]}
        for width, told in (whole | {w: [r["widths"][w] for r in of] for w in of[0]["widths"]}).items():
            lines.append(f"| {width} | {_spread([a for a, _ in told], _percent)} | {amount(told[0][1])} |")
        lines.append("")
    return lines


def insert(page: Path, name: str, table: str) -> None:
    """Put a table between its markers in a page.

    Raises:
        SystemExit: the page has no such markers.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    head, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} has no place for {name!r}: {begin} and {end} are looked for")
    page.write_text(f"{head}{begin}\n{table}{end}{tail}", encoding="utf-8")


def write(page: Path, rows: list[dict[str, Any]]) -> None:
    """Put each suite's table between its markers in a page."""
    for name in dict.fromkeys(r["suite"] for r in rows):
        suite = tomllib.loads((HERE / f"{name}.toml").read_text())
        table = render([r for r in rows if r["suite"] == name], suite.get("columns", tuple(COLUMNS)))
        insert(page, name, about(suite.get("paper", {})) + table)


SHOWN = (
    "method", "accuracy %", "MAE", "own rows", "to dense", "to random", "to shuffled", "to narrow", "sparsity %",
    "bytes", "client seconds", "MACs", "MACs, units removed",
)  # fmt: skip


MANY = 24  # variants
GRIDS = (
    ("quality", "Quality of the shipped model; r, s, n: better than its random, layer-shuffled, narrow control"),
    ("local", "On clients' own test rows, with the models that they themselves use"),
    ("bytes", "Bytes, both ways, all phases"),
)


def compared(folder: Path) -> str:
    """Return the tables of a comparison's folder: a line for each variant; of many, tables by sparsity."""
    suite, cells = standings.saved(folder)
    found = standings.lines(suite, cells, folder)
    parts = []
    for partition in suite.partitions:
        head = f"**{partition}**, {len(suite.seeds)} seed(s), {cells[0].study.rounds} rounds"
        grids = [(title, standings.by_sparsity(found, partition, figure)) for figure, title in GRIDS]
        if len(suite.variants) > MANY and grids[0][1]:
            parts.append(f"{head}\n\n" + "\n".join(f"*{title}*\n\n{markdown(rows)}" for title, rows in grids))
        else:
            parts.append(f"{head}\n\n{markdown(standings.brief(found, partition, SHOWN))}")
    return "\n".join(parts)


def about(paper: dict[str, str]) -> str:
    """Return what a suite says of the paper whose setting it is: claim, setting, what was cut."""
    return "".join(f"- *{name.replace('_', ' ')}*: {text}\n" for name, text in paper.items()) + ("\n" if paper else "")


def main() -> None:
    """Run or render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "suite",
        nargs="*",
        help="the name of a .toml beside this file, such as papers/feddst; with --render: the JSON files of "
        "suites, and folders that secateur compare wrote, whose names are those of the page's markers",
    )
    parser.add_argument("--data", help="folder of the data set")
    parser.add_argument("--out", type=Path, help="where run folders go")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--workers", type=int, default=Runtime().workers)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--render", type=Path, metavar="PAGE")
    given = parser.parse_args()
    if given.render:
        paths = [Path(path) for path in given.suite]
        for folder in (path for path in paths if path.is_dir()):
            insert(given.render, folder.name, compared(folder))
        write(given.render, [row for path in paths if path.is_file() for row in json.loads(path.read_text())])
        return
    if len(given.suite) != 1 or not given.data or not given.out:
        parser.error("give one suite, --data and --out")
    rows = play(given.suite[0], given.data, given.out, workers=given.workers, quick=given.quick)
    print(render(rows))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
