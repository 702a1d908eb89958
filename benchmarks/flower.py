"""Bytes on the sockets of a Flower deployment, and the time of a message, beside secateur's ledger and Flower's FedAvg.

    python benchmarks/flower.py --out runs/flower --json flower.json
    python benchmarks/flower.py --render docs/flower.md flower.json

Starts a SuperLink and four SuperNodes with TLS on loopback (examples/deployment). Each node reaches the SuperLink
through a proxy that counts what passes, encryption and all; the count is read when a round ends. ``--quick``: two
rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

import pages

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "deployment"))

import deploy  # noqa: E402 -- an example, found through the line above

NODES = 4


class Proxy:
    """Passes connections on to a port of this machine and counts the bytes of both directions."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.up = self.down = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            theirs, _ = self._server.accept()
            try:
                ours = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                theirs.close()
                continue
            for source, sink, name in ((theirs, ours, "up"), (ours, theirs, "down")):
                threading.Thread(target=self._pass, args=(source, sink, name), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, name: str) -> None:
        try:
            while data := source.recv(65536):
                setattr(self, name, getattr(self, name) + len(data))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            source.close()
            sink.close()


Mark = tuple[float, int, int]
"""A moment, and the bytes that had passed until then, to the nodes and from them."""


class Counting(Protocol):
    """A deployment that counts what passes."""

    folder: Path

    def passed(self) -> tuple[int, int]:
        """Return the bytes so far: to the nodes, from the nodes."""


class Watched(deploy.Deployment):
    """A deployment whose nodes go through a proxy each."""

    def __enter__(self) -> Self:
        """Start the SuperLink, the proxies and the nodes, and wait until all are connected."""
        self.start_superlink()
        self.proxies = [Proxy(self.port) for _ in range(NODES)]
        direct = self.port
        for k, proxy in enumerate(self.proxies):
            self.port = proxy.port  # where the node is told to go; its certificate is the same
            config = f'partition-id={k} num-partitions={NODES} state="{self.folder / "state" / str(k)}"'
            self.start_node(f"node{k}", config)
        self.port = direct
        while not all(self.online(f"node{k}") for k in range(NODES)):
            time.sleep(1)
        return self

    def passed(self) -> tuple[int, int]:
        """Return the bytes so far: to the nodes, from the nodes."""
        return sum(p.down for p in self.proxies), sum(p.up for p in self.proxies)


def measure(here: Watched, app: Path, path: Path | None, **settings: Any) -> list[dict[str, float]]:
    """Run an app; return bytes and seconds of each of its exchanges, whose ends are the lines of ``path``.

    None: of the whole run.
    """
    begun = (time.monotonic(), *here.passed())
    run = here.submit(app, **settings)
    marks = [begun] if path is None else followed(here, begun, path, 120)
    ended(here, run)
    if path is None:
        marks.append((time.monotonic(), *here.passed()))
    return [
        {"seconds": b[0] - a[0], "socket_down": b[1] - a[1], "socket_up": b[2] - a[2]}
        for a, b in itertools.pairwise(marks)
    ]


def followed(here: Counting, begun: Mark, path: Path, patience: float) -> list[Mark]:
    """Return the beginning of a run and a mark for every line that came to ``path``, once the run has its summary."""
    marks = [begun]
    while not (path.parent / "summary.json").exists():
        lines = len(path.read_text().splitlines()) if path.exists() else 0
        if lines >= len(marks):
            marks.append((time.monotonic(), *here.passed()))
        if time.monotonic() > marks[-1][0] + patience:
            raise SystemExit(f"{path}: nothing happens; see {here.folder}")
        time.sleep(0.05)
    return marks


def ended(here: deploy.Deployment, run: str) -> None:
    """Wait for the end of a run, which must be a good one."""
    status = here.wait(run)
    if status != "finished:completed":
        raise SystemExit(f"run {run}: {status}; see {here.folder}")


def idle(here: Watched, seconds: float = 12.0) -> tuple[float, float]:
    """Return what passes in a second when no run is on: heartbeats and polls, down and up."""
    before = here.passed()
    time.sleep(seconds)
    after = here.passed()
    return (after[0] - before[0]) / seconds, (after[1] - before[1]) / seconds


def ours(here: Watched, name: str, settings: str, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of one of our runs of the digits app: socket beside ledger."""
    out = here.folder / name
    path = out / "rounds.jsonl"
    more = {"out": str(out), "set": f"{settings} rounds={rounds}"}
    found = measure(here, ROOT / "examples" / "digits", path, **more)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {"run": name, "exchange": f"{row['phase']} {row['round']}", "ledger_down": row["bytes_down"],
         "ledger_up": row["bytes_up"], **passed}
        for row, passed in zip(rows, found, strict=False)
    ]  # fmt: skip


def theirs(here: Watched, name: str, rounds: int, change: Callable[[Path], None]) -> dict[str, Any]:
    """Return the row of the quickstart app after a change to it, a mean round of the whole run."""
    app = here.folder / "apps" / "".join(c if c.isalnum() else "-" for c in name)
    shutil.copytree(ROOT / "examples" / "quickstart", app)
    change(app)
    (whole,) = measure(here, app, None, **{"num-server-rounds": rounds})
    return {"run": name, "exchange": f"mean of {rounds} rounds", **{k: v / rounds for k, v in whole.items()}}


def unchanged(app: Path) -> None:
    """Leave the app as it is: Flower's FedAvg."""
    del app


def sparsified(app: Path) -> None:
    """Apply the diff of docs/flower.md."""
    diff = (app / "fedsparsify.diff").read_bytes()
    subprocess.run(["patch", "-p1", "--quiet"], input=diff, cwd=app, check=True)  # noqa: S607


def same_model(app: Path, model: str = '"smallcnn"') -> None:
    """Give Flower's FedAvg a model of ours, the digits app's by default, and no evaluation, as our rounds have none."""
    with (app / "quickstart" / "task.py").open("a") as task:
        task.write("\n\nfrom secateur.models import build\n\n\ndef Net():\n")
        task.write(f"    return build({model}, input_shape=(1, 8, 8), outputs=10)\n")
    server = app / "quickstart" / "server_app.py"
    lines = server.read_text().replace("FedAvg()", "FedAvg(fraction_evaluate=0.0)").splitlines()
    server.write_text("\n".join(line for line in lines if "print(" not in line) + "\n")


def render(rows: list[dict[str, Any]]) -> str:
    """Return the table: each exchange's bytes, and what the difference is made of."""
    lines = ["| run | exchange | ledger, down | on sockets | ledger, up | on sockets | seconds |", "|---" * 7 + "|"]
    for row in rows:
        cells = [row.get(k) for k in ("ledger_down", "socket_down", "ledger_up", "socket_up")]
        shown = " | ".join("" if c is None else f"{c:,.0f}" for c in cells)
        lines.append(f"| {row['run']} | {row['exchange']} | {shown} | {row.get('seconds', 0):.1f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, or render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", type=Path, help="with --render: the JSON file")
    parser.add_argument("--out", type=Path, default=Path("runs/flower"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--render", type=Path, metavar="PAGE")
    given = parser.parse_args()
    if given.render:
        pages.insert(given.render, "flower", render(json.loads(given.rows.read_text())))
        return
    shutil.rmtree(given.out, ignore_errors=True)
    rounds = 2 if given.quick else 4
    with Watched(given.out) as here:
        down, up = idle(here)
        rows = [{"run": "no run", "exchange": "a second", "socket_down": down, "socket_up": up, "seconds": 1.0}]
        for name, settings in (
            ("dense FedAvg", "method=fedavg"),
            ("AutoFLIP", "method=autoflip criterion.explore.epochs=2"),
        ):
            rows += ours(here, name, settings, rounds)
        rows += [
            theirs(here, "Flower's FedAvg, the same model", rounds, same_model),
            theirs(here, "quickstart, Flower's FedAvg", rounds, unchanged),
            theirs(here, "quickstart, FedSparsify 90 %", rounds, sparsified),
        ]
    print(render(rows))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
