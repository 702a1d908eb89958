"""A Flower federation whose links have real rates: seconds and bytes of a round, beside the ledger and the prediction.

    python benchmarks/links.py --out runs/links --json links.json                 # root, iproute2; hours
    python benchmarks/links.py --out runs/links --json links.json --rates 1/1 --runs "dense FedAvg" --repeat 1
    python benchmarks/links.py --out runs/links --json links.json --rates 1/1 1/0.25 --runs TwoCNN --repeat 1
    python benchmarks/links.py --render docs/links.md links.json
    python benchmarks/links.py --out runs/links --stuck                           # what a deadline of 20 s is worth

Each of four SuperNodes has a network namespace of its own, the SuperLink another, and each node's link is held to a
rate by tc (tbf), up and down apart. Bytes are those of the nodes' interfaces. A round takes the median seconds of all
training rounds but the first; Flower's own FedAvg writes down when it ends a round. The prediction is that of
``secateur report --link``, its fixed seconds calibrated on a link of 1 Gbit/s (``--fixed`` gives them). The seconds to
an accuracy are those of all rounds until the test rows are answered so well for the first time; Flower's FedAvg is
given the rounds that our dense one took, with the same model, optimiser and steps. What has been measured already is
read from the JSON file and not measured again.

``--stuck`` makes one node's upload, then another's download crawl, stops a third one's processes and has the fourth
vanish, a round each, and prints the seconds of these rounds. It ends with 1 if one took longer than its deadline and
2 s, or left out another node than that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import flower
import numpy as np
import pages

from secateur.bandwidth import Bandwidth, fixed_of, predict, scores

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "deployment"))

import deploy  # noqa: E402 -- an example, found through the line above

NODES = 4
SERVER = "10.77.0.1"
FAST = "1000/1000"
RATES = ("100/100", "10/10", "1/1")
MODEL = (
    "model.name=mlp model.options.hidden=[512,880] data.clients=4 data.partition=iid rounds=6 participation=1.0 "
    "training.epochs=1 training.lr=0.05 training.momentum=0.9 training.batch_size=16"
)
ACCURACY = 0.9
RUNS = {
    "dense FedAvg": "method=fedavg",
    "FedSparsify 90 %": "method=fedsparsify schedule.sparsity=0.9",
    "FedSparsify 90 %, 8 bits": "method=fedsparsify schedule.sparsity=0.9 wire.values=int8 wire.replies=updates",
    "FedSparsify, channels": "method=fedsparsify schedule.sparsity=0.75 granularity=channel",
    "AutoFLIP": "method=autoflip criterion.explore.epochs=1",
}
LARGE = {
    "TwoCNN": "method=fedavg model.name=twocnn data.source=arrays:{rows} data.clients=4 data.partition=iid rounds=2 "
    "participation=1.0 training.epochs=1 training.lr=0.05"
}
FLOWERS = "Flower's FedAvg"
DEADLINE, CRAWL = 20, 0.05  # seconds; Mbit/s at which 2 MB take 320 s
_TIMED = """

class FedAvg(FedAvg):
    def aggregate_train(self, server_round, replies):
        merged = super().aggregate_train(server_round, replies)
        with open("{file}", "a") as ends:
            ends.write(f"{{time.monotonic()}}\\n")
        return merged

"""


def ip(*command: str) -> None:
    """Run an ``ip`` or ``tc`` command."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")


class Namespaces:
    """A bridge with the server and the nodes in namespaces of their own; removed at the end of the block.

    Args:
        rate: Mbit/s down and up of each node, such as ``10/2``.
    """

    def __init__(self, rate: str) -> None:
        if os.geteuid() or not all(map(shutil.which, ("ip", "tc"))):
            raise SystemExit("network namespaces need root and iproute2 (apt-get install iproute2)")
        self.down, self.up = rate.split("/")

    def __enter__(self) -> Self:
        """Make them."""
        self.__exit__()
        ip("ip", "link", "add", "sec-br", "type", "bridge")
        ip("ip", "addr", "add", "10.77.0.254/24", "dev", "sec-br")
        ip("ip", "link", "set", "sec-br", "up")
        for name, address in [("server", SERVER), *((f"node{k}", f"10.77.0.{10 + k}") for k in range(NODES))]:
            space, outer, inner = f"sec-{name}", f"sec-{name}", "eth0"
            ip("ip", "netns", "add", space)
            ip("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", space)
            ip("ip", "link", "set", outer, "master", "sec-br")
            ip("ip", "link", "set", outer, "up")
            ip("ip", "-n", space, "addr", "add", f"{address}/24", "dev", inner)
            ip("ip", "-n", space, "link", "set", inner, "up")
            ip("ip", "-n", space, "link", "set", "lo", "up")
        for node in range(NODES):
            self.hold(node)
        return self

    def hold(self, node: int, *, down: float | None = None, up: float | None = None) -> None:
        """Hold a node's link to these rates from now on; None: to its own."""
        kept = ("root", "tbf", "burst", "16kb", "latency", "300ms", "rate")
        space = f"sec-node{node}"
        ip("tc", "qdisc", "replace", "dev", space, *kept, f"{down or self.down}mbit")
        inner = ("tc", "qdisc", "replace", "dev", "eth0", *kept, f"{up or self.up}mbit")
        ip("ip", "netns", "exec", space, *inner)

    def __exit__(self, *_: object) -> None:
        """Remove them, and what an earlier measurement left."""
        for name in ("server", *(f"node{k}" for k in range(NODES))):
            # a namespace takes its end of a link with it some time later, but the other end at once
            subprocess.run(["ip", "link", "del", f"sec-{name}"], capture_output=True, check=False)  # noqa: S607
            subprocess.run(["ip", "netns", "del", f"sec-{name}"], capture_output=True, check=False)  # noqa: S607
        subprocess.run(["ip", "link", "del", "sec-br"], capture_output=True, check=False)  # noqa: S607


class Linked(deploy.Deployment):
    """A deployment whose processes run in namespaces."""

    def __init__(self, folder: Path, *, ours: bool) -> None:
        super().__init__(folder, 8000, SERVER)
        self.local = SERVER  # the bridge has an address too
        self.ours, self.rows = ours, folder / "rows.npz"

    def node_command(self, ca: str, key: str, config: str) -> list[str]:
        """Return the command that starts a node: Flower's own command where its own FedAvg is measured."""
        command = super().node_command(ca, key, config)
        return command if self.ours else ["flower-supernode", *command[3:]]

    def command_of(self, name: str, command: list[str]) -> list[str]:
        """Return a command that starts in the namespace of its process."""
        space = name if name.startswith("node") else "server"
        return ["ip", "netns", "exec", f"sec-{space}", *command]

    @staticmethod
    def passed() -> tuple[int, int]:
        """Return the bytes that have passed the nodes' interfaces so far: to them, from them."""
        counts = Path("/sys/class/net")
        names = [f"sec-node{k}" for k in range(NODES)]
        down, up = (
            sum(int((counts / name / "statistics" / f"{way}_bytes").read_text()) for name in names)
            for way in ("tx", "rx")
        )
        return down, up

    def start(self) -> None:
        """Start the nodes, and wait for them."""
        for k in range(NODES):
            state = self.folder / "state" / str(k)
            allowed = f'allow="data.source=arrays:{self.rows}"'
            self.start_node(f"node{k}", f'partition-id={k} num-partitions={NODES} state="{state}" {allowed}')
        self.wait_for_nodes(300)


def ours(here: Linked, out: Path, settings: str, rate: str, fixed: float | None) -> dict[str, Any]:
    """Return the figures of one run of ours."""
    begun = (time.monotonic(), *here.passed())
    run = here.submit(ROOT / "examples" / "digits", out=str(out), link=f"{rate}Mbit/s", set=settings)
    marks = flower.followed(here, begun, out / "rounds.jsonl", 900)
    marks.append((time.monotonic(), *here.passed()))
    flower.ended(here, run)
    rows = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["phase"] == "train"][1:]
    summary = json.loads((out / "summary.json").read_text())
    spent_by_round = itertools.accumulate(row["seconds"] for row in rows)
    found: dict[str, Any] = {
        "round_s": statistics.median(row["seconds"] for row in train),
        "most_s": max(row["seconds"] for row in train),
        "whole_s": marks[-1][0] - marks[0][0],
        "first_s": marks[1][0] - marks[0][0],
        "ledger": sum(row["bytes_down"] + row["bytes_up"] for row in rows) + summary["final"]["evaluate_bytes"],
        "interface": sum(marks[-1][k] - marks[0][k] for k in (1, 2)),
        "accuracy": summary["final"]["accuracy"],
        "curve": [[spent, row.get("accuracy", 0.0)] for spent, row in zip(spent_by_round, rows, strict=True)],
        "fixed_s": fixed_of(rows),
    }
    if fixed is not None:
        network = Bandwidth.parse(f"{rate}Mbit/s,flower:{fixed:.6f}s")
        predicted = predict(rows, network, NODES)
        found["predicted_round_s"] = statistics.median(
            spent.seconds for spent, row in zip(predicted, rows, strict=True) if row in train
        )
        found["predicted_scores_s"] = predict([scores(summary["final"])], network, NODES)[0].seconds
    return found


def theirs(here: Linked, folder: Path) -> dict[str, Any]:
    """Return the figures of Flower's own FedAvg with the same model."""
    app, file = folder / "flower", folder / "flower-rounds"
    shutil.copytree(ROOT / "examples" / "quickstart", app)
    flower.same_model(app, '"mlp", options={"hidden": (512, 880)}')
    server = app / "quickstart" / "server_app.py"
    head, _, rest = server.read_text().partition("\napp = ")
    server.write_text(f"import time\n{head}{_TIMED.format(file=file)}app = {rest}")
    before, began, rounds = here.passed(), time.monotonic(), 4
    run = here.submit(app, **{"num-server-rounds": rounds})
    ends: list[float] = []
    while len(ends) < rounds:  # to ask Flower would take its time
        ends = [float(line) for line in file.read_text().splitlines()] if file.exists() else []
        if time.monotonic() > (ends or [began])[-1] + 900:
            raise SystemExit(f"Flower's FedAvg: nothing happens; see {here.folder}")
        time.sleep(0.5)
    flower.ended(here, run)
    after = here.passed()
    spent = [b - a for a, b in itertools.pairwise(ends)]
    return {
        "round_s": statistics.median(spent), "whole_s": time.monotonic() - began, "first_s": ends[0] - began,
        "interface": sum(after) - sum(before),
    }  # fmt: skip


def measure(given: argparse.Namespace) -> None:
    """Measure what is not in the JSON file yet."""
    rows: list[dict[str, Any]] = json.loads(given.json.read_text()) if given.json.exists() else []
    done = {(row["rate"], row["run"], row["repetition"]) for row in rows}
    fixed = given.fixed
    for rate in [*([] if fixed else [FAST]), *given.rates]:
        for repetition in range(1 if rate == FAST else given.repeat):
            names = ["dense FedAvg"] if rate == FAST else given.runs
            todo = [name for name in names if (rate, name, repetition) not in done]
            if todo:
                rows += _at(
                    given.out / f"{rate.replace('/', '-')}-{repetition}",
                    rate,
                    repetition,
                    todo,
                    fixed,
                    given.json,
                    rows,
                )
        if rate == FAST:
            fixed = next(row["fixed_s"] for row in rows if row["rate"] == FAST)
    print(render(rows))


def _at(
    folder: Path,
    rate: str,
    repetition: int,
    todo: list[str],
    fixed: float | None,
    file: Path,
    before: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Measure some runs at one rate, each kept in the file as soon as it is there."""
    rows: list[dict[str, Any]] = []
    for own in (False, True):
        names = [name for name in todo if (name != FLOWERS) == own]
        if not names:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        with Namespaces(rate), Linked(folder, ours=own) as here:
            here.start()
            images(here.rows)
            for name in names:
                out = folder / "runs" / re.sub(r"\W+", "-", name)
                settings = f"{MODEL} {RUNS[name]}" if name in RUNS else LARGE.get(name, "").format(rows=here.rows)
                found = ours(here, out, settings, rate, fixed) if own else theirs(here, folder)
                rows.append({"rate": rate, "run": name, "repetition": repetition, **found})
                file.write_text(json.dumps([*before, *rows], indent=1))
                print(rows[-1], flush=True)
    return rows


def images(file: Path) -> None:
    """Write images of 28 x 28 in ten classes, each a pattern under noise: rows for a model that needs them so large."""
    draw = np.random.default_rng(0)
    patterns, labels = draw.normal(size=(10, 1, 28, 28)), np.arange(600) % 10
    x = (patterns[labels] + draw.normal(size=(600, 1, 28, 28))).astype(np.float32)
    np.savez(file, x=x, y=labels)


def stuck(folder: Path) -> int:
    """Let one node after the other hang in a round, each in its way; print these rounds; return 1 if one was bad."""
    shutil.rmtree(folder, ignore_errors=True)
    out = folder / "run"
    file = out / "rounds.jsonl"
    with Namespaces("100/100") as net, Linked(folder, ours=True) as here:
        here.start()
        settings = f"{MODEL} method=fedavg rounds=8"
        here.submit(ROOT / "examples" / "digits", out=str(out), deadline=DEADLINE, set=settings)

        def paused(sign: int) -> None:
            for process in subprocess.run(
                ["ip", "netns", "pids", "sec-node2"], capture_output=True, text=True, check=True  # noqa: S607
            ).stdout.split():  # fmt: skip
                os.kill(int(process), sign)

        def gone() -> None:
            ip("ip", "link", "set", "sec-node3", "down")
            here.stop("node3", signal.SIGKILL)

        # before a round, by its number: what is done, and which client that leaves out
        faults: dict[int, tuple[Callable[[], None], int | None]] = {
            2: (lambda: net.hold(0, up=CRAWL), 0),
            3: (lambda: net.hold(0), None),
            4: (lambda: net.hold(1, down=CRAWL), 1),
            5: (lambda: net.hold(1), None),
            6: (lambda: paused(signal.SIGSTOP), 2),
            7: (lambda: paused(signal.SIGCONT), None),
            8: (gone, 3),
        }
        done, failed = 0, 0
        while done < max(faults):
            rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            if len(rows) == done:
                time.sleep(0.02)
                continue
            done, row = len(rows), rows[-1]
            _, hung = faults.get(done, (None, None))
            left = [entry["client"] for entry in row["left_out"]]
            # the round after a fault may be late too: its node still carries what it was stuck in
            bad = row["seconds"] > DEADLINE + 2 or (hung is not None and left != [hung])
            failed |= bad
            reasons = [entry["reason"] for entry in row["left_out"]]
            print(
                f"round {done}: {row['seconds']:.2f} s, left out {left} {reasons}{'  BAD' if bad else ''}", flush=True
            )
            if done + 1 in faults:
                faults[done + 1][0]()
    return failed


def render(rows: list[dict[str, Any]]) -> str:
    """Return the table: medians over repetitions, with least and most."""
    titles = ["Mbit/s, down/up", "run", "seconds a round", "predicted", "interface ÷ ledger", "first round"]
    titles += [f"seconds to {100 * ACCURACY:.0f} %", "accuracy"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    taken = max((_rounds(row) for row in rows if row["run"] == "dense FedAvg"), default=0)
    for rate in dict.fromkeys(row["rate"] for row in rows):
        for name in dict.fromkeys(row["run"] for row in rows if row["rate"] == rate):
            some = [row for row in rows if (row["rate"], row["run"]) == (rate, name)]
            shares = [row["interface"] / row["ledger"] for row in some if "ledger" in row]
            if name == FLOWERS:
                until = [row["round_s"] * taken for row in some]
            else:
                until = [row["curve"][_rounds(row) - 1][0] for row in some if _rounds(row)]
            told = [] if name in LARGE else some  # two rounds say nothing of accuracy
            cells = [
                _spread([row["round_s"] for row in some], "{:.1f}"),
                _spread([row["predicted_round_s"] for row in some if "predicted_round_s" in row], "{:.1f}"),
                _spread(shares, "{:.2f}"), _spread([row["first_s"] for row in some], "{:.0f}"),
                "" if name in LARGE else _spread(until, "{:.0f}") or "not reached",
                _spread([100 * row["accuracy"] for row in told if "accuracy" in row], "{:.1f}"),
            ]  # fmt: skip
            lines.append(f"| {rate} | {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _rounds(row: dict[str, Any]) -> int:
    """Return in which exchange a run first answers so well; 0: in none."""
    return next((k for k, (_, accuracy) in enumerate(row["curve"], start=1) if (accuracy or 0) >= ACCURACY), 0)


def _spread(values: list[float], form: str) -> str:
    if not values:
        return ""
    middle = form.format(statistics.median(values))
    return f"{middle} ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else middle


def main() -> None:
    """Measure, or render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", type=Path, help="with --render: the JSON file")
    parser.add_argument("--out", type=Path, default=Path("runs/links"))
    parser.add_argument("--json", type=Path, default=Path("links.json"))
    parser.add_argument("--rates", nargs="+", default=list(RATES), help="Mbit/s down and up, such as 10/2")
    parser.add_argument("--runs", nargs="+", default=[FLOWERS, *RUNS], choices=[FLOWERS, *RUNS, *LARGE])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--fixed", type=float, help="the fixed seconds of an exchange; default: measured first")
    parser.add_argument("--render", type=Path, metavar="PAGE")
    parser.add_argument("--stuck", action="store_true")
    given = parser.parse_args()
    if given.stuck:
        raise SystemExit(stuck(given.out / "stuck"))
    if given.render:
        pages.insert(given.render, "links", render(json.loads(given.rows.read_text())))
        return
    measure(given)


if __name__ == "__main__":
    main()
