"""What the wire takes for trained masks, beside the entropy bound and other encodings, and how fast it is.

    python benchmarks/wire.py --data path/to/fashion-mnist --out runs/wire --json wire.json
    python benchmarks/wire.py --quick
    python benchmarks/wire.py --render docs/wire.md wire.json

The models of ``suites/masks.toml`` are trained first, unless they are in ``--out`` already; without ``--data`` and with
``--quick`` on the embedded digits. Every encoding gets the same tensors; ours is decoded and compared. All on one
thread. A ratio is the whole payload, header and all, over: surviving values x 4 bytes, plus (fresh mask)
the entropy of each tensor's mask at its density. Float32 values may be packed below 4 bytes, so a ratio can be
below 1; ``unpacked`` counts the values at 4 bytes each, which leaves mask and framing alone to judge.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pages
import torch
import zstandard
from numpy.typing import NDArray

from secateur import models
from secateur.comparison import grid
from secateur.comparison.suite import load
from secateur.federation import checkpoint
from secateur.wire import masks
from secateur.wire.codec import Outgoing, decode, part_sizes
from secateur.wire.entropy import entropy
from secateur.wire.message import Expected, Message, Tensors
from secateur.wire.reader import varint

HERE = Path(__file__).parent
QUICK = ("TwoCNN, FedSparsify 50 %", "TwoCNN, FedSparsify 90 %", "TwoCNN, FedSparsify 99 %", "TwoCNN, AutoFLIP T_p 0.5")
Array = NDArray[Any]


def train(out: Path, data: str | None, *, quick: bool, jobs: int) -> Iterator[tuple[str, Message]]:
    """Yield the final model of each run under its mask; runs that are in ``out`` are not repeated."""
    suite = load(str(HERE / "suites" / "masks.toml"))
    if quick:
        suite = suite.model_copy(update={"variants": {name: suite.variants[name] for name in QUICK}})
    if data is None:
        settings = ["data.clients=10", "participation=0.5"]
        suite = suite.model_copy(update={"source": "digits"}).adjusted(rounds=4 if quick else 15, settings=settings)
    for cell in grid.run_suite(suite, out, data=data, jobs=jobs):
        weights, mask, _ = checkpoint.shipped(grid.folder_of(out, cell.study))
        yield cell.variant, Message(weights, mask)


def gaussian(density: float) -> Message:
    """Return ResNet-18 with Gaussian weights, those of largest magnitude kept: what speed is measured on."""
    generator = torch.Generator().manual_seed(0)
    model = models.build("resnet18", input_shape=(3, 32, 32), outputs=10)
    tensors = {n: torch.randn(t.shape, generator=generator) * 0.05 for n, t in model.state_dict().items()}
    weights = [n for n, t in tensors.items() if t.dim() > 1]
    flat = torch.cat([tensors[n].abs().reshape(-1) for n in weights])
    least = flat.kthvalue(max(1, round((1 - density) * flat.numel()))).values
    mask = {n: tensors[n].abs() > least for n in weights}
    return Message({n: t.masked_fill(~mask[n], 0.0) if n in mask else t for n, t in tensors.items()}, mask)


def arrays(message: Message) -> list[tuple[Array, Array]]:
    """Return (values, flags) of each tensor; a tensor without a mask keeps everything."""
    mask = message.mask or {}
    return [(t.numpy(), mask[n].numpy() if n in mask else np.ones(t.shape, bool)) for n, t in message.tensors.items()]


def bounds(message: Message) -> tuple[float, float]:
    """Return the bytes of the surviving values, and of the masks at the entropy of their densities."""
    kept = [(int(flags.sum()), flags.size) for _, flags in arrays(message)]
    return 4.0 * sum(k for k, _ in kept), sum(entropy(k, n) for k, n in kept)


def _dense(tensors: list[tuple[Array, Array]]) -> bytes:
    return b"".join(values.tobytes() for values, _ in tensors)


def _bitmap(tensors: list[tuple[Array, Array]]) -> bytes:
    return b"".join(np.packbits(flags).tobytes() + values[flags].tobytes() for values, flags in tensors)


def _csr(tensors: list[tuple[Array, Array]]) -> bytes:
    """Row pointers and columns of 32 bits, a row an output unit."""
    out = []
    for values, flags in tensors:
        rows = flags.reshape(flags.shape[0], -1)
        pointers = np.concatenate([[0], np.cumsum(rows.sum(1))]).astype(np.int32)
        out.append(pointers.tobytes() + np.nonzero(rows)[1].astype(np.int32).tobytes() + values[flags].tobytes())
    return b"".join(out)


def _gaps(tensors: list[tuple[Array, Array]]) -> bytes:
    """Distances between survivors as varints."""
    out = []
    for values, flags in tensors:
        gaps = np.diff(np.flatnonzero(flags), prepend=-1) - 1
        out.append(b"".join(varint(int(gap)) for gap in gaps) + values[flags].tobytes())
    return b"".join(out)


def _zstd(tensors: list[tuple[Array, Array]], level: int = 3) -> bytes:
    return zstandard.ZstdCompressor(level=level).compress(_dense(tensors))


PEERS: dict[str, Callable[[list[tuple[Array, Array]]], bytes]] = {
    "dense": _dense, "bitmap": _bitmap, "csr": _csr, "gaps": _gaps, "zstd": _zstd,
    "zstd19": lambda tensors: _zstd(tensors, 19),
}  # fmt: skip


def clock(action: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of an action, after one that does not count."""
    action()
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        action()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def measure(case: str, message: Message, repeats: int, values: str = "fp32") -> dict[str, Any]:
    """Return one row: sizes against the bound, and the speed of both ends in MB of dense fp32 a second."""
    tensors, mask = message.tensors, message.mask
    specs = Expected.of(tensors).tensors
    dense = sum(4 * t.numel() for t in tensors.values())
    surviving, entropies = bounds(message)
    row: dict[str, Any] = {"case": case, "values": values, "dense_bytes": dense, "density": surviving / dense}
    for kind, known in (("fresh", None), ("known", mask)):
        wanted = Expected(specs, "optional", known=known)

        def send(known: Tensors | None = known) -> bytes:
            return Outgoing(message, values=values, template=specs).bytes(known)

        payload = send()
        arrived = decode(payload, wanted)
        if values == "fp32" and not all(torch.equal(t, arrived.tensors[n]) for n, t in tensors.items()):
            raise SystemExit(f"{case}: what was decoded is not what was sent")
        parts = part_sizes(payload)
        width = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}[values]
        bound = surviving / 4 * width + (entropies if kind == "fresh" else 0)
        there, back = clock(send, repeats), clock(lambda: decode(payload, wanted), repeats)  # noqa: B023
        row |= {
            f"bytes_{kind}": len(payload),
            f"ratio_to_bound_{kind}": len(payload) / bound,
            f"unpacked_{kind}": (len(payload) - parts["values"] + surviving / 4 * width) / bound,
            f"mask_bytes_{kind}": parts["mask"],
        }
        row |= {f"{name}{'' if kind == 'fresh' else '_known'}": dense / 1e6 / seconds for name, seconds in (
            ("encode_mb_s", there), ("decode_mb_s", back), ("both_mb_s", there + back))}  # fmt: skip
    return row


def profile(message: Message, repeats: int) -> dict[str, float]:
    """Return the milliseconds of what a known mask needs: the steps of both ends, and copies to hold them against."""
    pairs = [(v, f) for v, f in arrays(message) if v.ndim]
    sent = [values[flags] for values, flags in pairs]
    flat = np.concatenate(sent)
    specs = Expected.of(message.tensors).tensors
    wanted = Expected(specs, "optional", known=message.mask)
    payload = Outgoing(message, template=specs).bytes(message.mask)

    def scatter() -> None:
        for (values, flags), part in zip(pairs, sent, strict=True):
            np.place(np.zeros(values.shape, np.float32), flags, part)

    steps: dict[str, Callable[[], object]] = {
        "copy of the surviving values": flat.copy,
        "gather them from the tensors": lambda: [np.compress(f.reshape(-1), v.reshape(-1)) for v, f in pairs],
        "scatter them into new tensors": scatter,
        "name the mask (BLAKE2b of its bitmap)": lambda: masks.digest(message.mask or {}),
        "checksum of the payload": lambda: zlib.crc32(payload),
        "encode": lambda: Outgoing(message, template=specs).bytes(message.mask),
        "decode": lambda: decode(payload, wanted),
    }
    return {name: 1e3 * clock(step, repeats) for name, step in steps.items()}


COLUMNS = {
    "case": "case", "density": "density", "dense_bytes": "dense", "bytes_fresh": "fresh", "bytes_known": "known",
    "ratio_to_bound_fresh": "fresh ÷ bound", "ratio_to_bound_known": "known ÷ bound",
    "unpacked_fresh": "fresh, unpacked", "unpacked_known": "known, unpacked",
    "bitmap": "bitmap", "csr": "CSR", "gaps": "gaps", "zstd": "zstd -3", "zstd19": "zstd -19",
}  # fmt: skip
SPEEDS = {
    "case": "case", "values": "values", "ratio_to_bound_fresh": "fresh ÷ bound", "encode_mb_s": "encode, fresh",
    "decode_mb_s": "decode, fresh", "both_mb_s": "both, fresh", "encode_mb_s_known": "encode, known",
    "decode_mb_s_known": "decode, known", "both_mb_s_known": "both, known",
}  # fmt: skip


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if value < 10 else f"{value:,.0f}"


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Return rows as a Markdown table."""
    lines = [f"| {' | '.join(columns.values())} |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_shown(row[key]) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def render(rows: list[dict[str, Any]]) -> str:
    """Return the tables of sizes, of speeds, and of where the time goes."""
    trained, speed = [r for r in rows if "csr" in r], [r for r in rows if "both_mb_s" in r and "csr" not in r]
    steps = next(r for r in rows if "steps" in r)
    return "\n".join([
        "Bytes:\n", table(trained, COLUMNS), "\nMB of dense fp32 a second, one thread, medians:\n",
        table(trained + speed, SPEEDS), "\nMilliseconds, ResNet-18 at 90 %, mask known, one thread, medians:\n",
        table([{"step": k, "ms": v} for k, v in steps["steps"].items()], {"step": "step", "ms": "ms"}), "",
    ])  # fmt: skip


def collect(out: Path, data: str | None, *, quick: bool, jobs: int) -> Iterator[dict[str, Any]]:
    """Yield all rows."""
    repeats = 5 if quick else 15
    for case, message in train(out, data, quick=quick, jobs=jobs):
        sizes = {name: len(peer(arrays(message))) for name, peer in PEERS.items()}
        yield measure(case, message, repeats) | sizes
    for sparsity in (0.5, 0.9, 0.99):
        message = gaussian(1 - sparsity)
        for values in ("fp32", "bf16", "int8") if sparsity == 0.9 else ("fp32",):
            row = measure(f"ResNet-18, Gaussian {100 * sparsity:.0f} %", message, 3 if quick else 9, values)
            steps = {"steps": profile(message, 3 if quick else 9)} if (sparsity, values) == (0.9, "fp32") else {}
            yield row | steps


def main() -> None:
    """Measure, or render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", type=Path, help="with --render: the JSON file")
    parser.add_argument("--data", help="folder of Fashion-MNIST; default: the embedded digits")
    parser.add_argument("--out", type=Path, default=Path("runs/wire"), help="where run folders go")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--jobs", type=int, default=0, help="models trained at once; default: the cores")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--render", type=Path, metavar="PAGE")
    given = parser.parse_args()
    if given.render:
        pages.insert(given.render, "wire", render(json.loads(given.rows.read_text())))
        return
    torch.set_num_threads(1)
    out = given.out / ("quick" if given.quick else "digits" if given.data is None else "data")
    data = None if given.quick else given.data
    rows = []
    for row in collect(out, data, quick=given.quick, jobs=given.jobs):
        print(json.dumps(row), flush=True)
        rows.append(row)
    print(render(rows))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
