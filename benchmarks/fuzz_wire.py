"""Throw mutated payloads at the decoder: each must decode to what the receiver accepts, or raise WireError.

    python benchmarks/fuzz_wire.py --payloads 700000 --said 300000

Valid payloads of every form and format are flipped, cut, stretched, spliced and lied to; in nine of ten the checksum
is made right again, so that what lies behind it is reached. Whatever else than WireError comes out, takes more memory
than the receiver's template justifies, or takes longer than five seconds, is printed as hex and ends the run with 1.
``--said`` does the same to what reads greetings, failures, policies and settings on Flower (``fuzz_said.py``).
"""

from __future__ import annotations

import argparse
import collections
import random
import resource
import signal
import struct
import sys
import time
import tracemalloc
import zlib
from dataclasses import dataclass
from functools import partial

import torch

from secateur.errors import WireError
from secateur.wire.carried import Group
from secateur.wire.codec import decode, encode, lost, part_sizes
from secateur.wire.head import context_of
from secateur.wire.message import Expected, Masks, Message, Spec
from secateur.wire.values import FORMATS

SECONDS = 5.0
FIXED_BYTES = 400_000  # a decoder's tables, a traceback, the objects of a small message
PER_BYTE = 40  # of template and payload; a mask alone takes a byte a bit, and int32 symbols
ADDRESS_SPACE = 8 << 30

SHAPES = {"conv": (8, 4, 3, 3), "fc": (10, 24), "bias": (10,), "count": (), "none": (0, 5), "flags": (7,)}
DTYPES = {"count": torch.int64, "flags": torch.bool}
SPECS = {name: Spec(shape, DTYPES.get(name, torch.float32)) for name, shape in SHAPES.items()}
BASE = Group({"frozen": torch.linspace(-1, 1, 40).reshape(8, 5)})
SCALARS = {"phase": "train", "round": 7, "loss": 0.25, "done": True}


@dataclass(frozen=True)
class Case:
    """A valid payload and the receiver that it is meant for."""

    payload: bytes
    expected: Expected


def draw_masks(seed: int) -> tuple[Masks, Masks]:
    """Return a mask with dead units, and one that a receiver may hold: it keeps all of the first and more."""
    generator = torch.Generator().manual_seed(seed)
    held = {n: torch.rand(SHAPES[n], generator=generator) < 0.6 for n in ("conv", "fc", "bias", "none")}
    mask = {n: m & (torch.rand(m.shape, generator=generator) < 0.7) for n, m in held.items()}
    mask["conv"][2:5] = False
    mask["fc"][:, 6:] = False
    return mask, held


def draw_tensors(mask: Masks, seed: int) -> dict[str, torch.Tensor]:
    """Return values for ``SPECS``, zero where the mask prunes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in SPECS.items():
        value = torch.randn(spec.shape, generator=generator)
        value = value > 0 if spec.dtype == torch.bool else value.to(spec.dtype)
        tensors[name] = torch.where(mask[name], value, 0.0) if name in mask else value
    return tensors


def corpus() -> list[Case]:
    """Return payloads of every mask form and value format, with strict and with lenient receivers."""
    cases = []
    scalars = {name: type(value) for name, value in SCALARS.items()}
    for n, values in enumerate(FORMATS):
        mask, held = draw_masks(n)
        tensors = draw_tensors(mask, n)
        masked, dense = Message(tensors, mask, SCALARS), Message(draw_tensors({}, n), None, SCALARS)
        for template in (None, SPECS):
            for known in (None, held, mask):
                data = encode(masked, values=values, known=known, template=template, seed=n)
                cases.append(Case(data, Expected(SPECS, "required", frozenset(mask), known, scalars=scalars)))
                cases.append(Case(data, Expected(SPECS, "optional", known=held, within=True, optional=True)))
            data = encode(dense, values=values, template=template, context=77)
            cases.append(Case(data, Expected(SPECS, context=77, scalars=scalars)))
            holds = Expected(SPECS, context=77, scalars=scalars, holds=frozenset([BASE.digest]))
            for carried in (False, True):
                group = BASE.named(carried=carried)
                cases.append(Case(encode(dense, values=values, template=template, context=77, group=group), holds))
        for tensors in (False, True):
            answer = lost(data, tensors=tensors)
            cases.append(Case(answer, Expected(SPECS, "same", known=mask, context=context_of(data))))
    long = {"w": torch.arange(70_000.0)}  # long enough for zstd and its sample
    cases.append(Case(encode(Message(long)), Expected({"w": Spec((70_000,))})))
    return cases


def mutate(draw: random.Random, data: bytes, other: bytes) -> bytes:
    """Return the payload with one to four things wrong with it."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        at = draw.randrange(len(out) + 1)
        size = draw.choice((1, 1, 2, 4, 8, draw.randrange(64)))
        match draw.randrange(8):
            case 0 | 1 if at < len(out):
                out[at] ^= 1 << draw.randrange(8)
            case 2:
                out[at : at + size] = draw.randbytes(size)
            case 3:
                del out[at : at + size]
            case 4:
                out[at:at] = draw.randbytes(size)
            case 5:
                out[at : at + size] = draw.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"\x01")) * size
            case 6:
                place = draw.randrange(len(other))
                out[at : at + size] = other[place : place + size]
            case _:
                out = out[:at] if draw.random() < 0.2 else out + out[at : at + size]
        if not out:
            out = bytearray(data[:1])
    return mend(draw, bytes(out))


def mend(draw: random.Random, data: bytes) -> bytes:
    """Make the size of the values fit what is there, often, and the checksum, nearly always."""
    if len(data) < 28:
        return data
    if draw.random() < 0.5:
        change = len(data) - draw.randrange(28, len(data) + 1)
        data = data[:20] + struct.pack("<Q", change) + data[28:] if draw.random() < 0.2 else data
    if draw.random() < 0.9:
        crc = zlib.crc32(data[12:], zlib.crc32(data[:8]))
        data = data[:8] + struct.pack("<I", crc) + data[12:]
    return data


def stretch(draw: random.Random, case: Case, data: bytes) -> bytes:
    """Carry a change of length over into the header, so that the reader gets beyond the sizes."""
    change = len(data) - len(case.payload)
    if not change or len(data) < 28 or draw.random() < 0.3:
        return data
    (size,) = struct.unpack_from("<Q", case.payload, 20)
    data = data[:20] + struct.pack("<Q", max(0, size + change)) + data[28:]
    return data[:8] + struct.pack("<I", zlib.crc32(data[12:], zlib.crc32(data[:8]))) + data[12:]


def accepted(message: Message, expected: Expected) -> bool:
    """Whether a message is what the receiver asked for, looked at without the decoder's help."""
    specs = expected.tensors
    names = message.tensors.keys() == specs.keys() or (expected.optional and message.tensors.keys() <= specs.keys())
    shapes = all(tuple(t.shape) == specs[n].shape and t.dtype == specs[n].dtype for n, t in message.tensors.items())
    finite = all(bool(t.isfinite().all()) for t in message.tensors.values() if t.dtype == torch.float32)
    mask = message.mask or {}
    zero = all(n in message.tensors and not bool(message.tensors[n][~m].any()) for n, m in mask.items())
    allowed = (
        message.mask is None if expected.mask == "none" else expected.mask == "optional" or message.mask is not None
    )
    if expected.within and message.mask is not None:
        known = expected.known or {}
        allowed &= all(
            not bool((mask.get(n, known[n] | True) & ~known[n]).any()) for n in known if n in message.tensors
        )
    told = {n: type(v) for n, v in message.scalars.items()}
    return names and shapes and finite and zero and allowed and expected.scalars in (None, told)


def hit(data: bytes, expected: Expected) -> str:
    """Decode one payload; return "decoded" or "refused".

    Raises:
        AssertionError: the decoder let something through, or took more memory than it may.
    """
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
        message = decode(data, expected)
    except WireError:
        outcome = "refused"
    else:
        outcome = "decoded"
        if not accepted(message, expected):
            raise AssertionError("the decoder let through what the receiver does not accept")
        if sum(part_sizes(data).values()) != len(data):
            raise AssertionError("the parts of a payload that decodes do not add up")
    _, peak = tracemalloc.get_traced_memory()
    template = sum(spec.size * 8 for spec in expected.tensors.values())
    if peak - before > FIXED_BYTES + PER_BYTE * (template + len(data)):
        raise AssertionError(f"{peak - before} bytes were allocated for a template of {template} bytes")
    return outcome


def _hang(_number: int, _frame: object) -> None:
    raise TimeoutError(f"decoding took longer than {SECONDS} s")


def fuzz(payloads: int, seed: int) -> collections.Counter[str]:
    """Decode so many mutated payloads; return how many were decoded and how many refused.

    Raises:
        SystemExit: one of them did something else; it is printed.
    """
    draw, cases = random.Random(seed), corpus()
    found: collections.Counter[str] = collections.Counter()
    signal.signal(signal.SIGALRM, _hang)
    tracemalloc.start()
    begun = time.monotonic()
    try:
        for n in range(payloads):
            case = cases[draw.randrange(len(cases))] if n % 50 else cases[-1]
            data = mutate(draw, case.payload, draw.choice(cases).payload)
            data = stretch(draw, case, data)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                found[hit(data, case.expected)] += 1
            except Exception as wrong:
                print(f"payload {n} of seed {seed}: {wrong!r}\n{data.hex()}", file=sys.stderr)
                raise SystemExit(1) from wrong
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if (n + 1) % 50_000 == 0:
                print(f"{n + 1} payloads, {dict(found)}, {time.monotonic() - begun:.0f} s", flush=True)
    finally:
        tracemalloc.stop()
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payloads", type=int, default=700_000)
    parser.add_argument("--said", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    # what tracemalloc does not see (a coder's own buffers) hits this wall
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, resource.getrlimit(resource.RLIMIT_AS)[1]))
    print(f"done: {dict(fuzz(given.payloads, given.seed))}", flush=True)
    if given.said:
        import fuzz_said  # noqa: PLC0415 -- needs Flower

        signal.signal(signal.SIGVTALRM, _hang)  # seconds of this process: files are written, and the machine is shared
        guard = partial(signal.setitimer, signal.ITIMER_VIRTUAL, SECONDS)
        print(f"done: {dict(fuzz_said.fuzz(given.said, given.seed, guard))}")
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


if __name__ == "__main__":
    main()
