"""A second implementation of docs/wire.md in plain Python, a bit at a time; it shares no code with ours."""

import hashlib
import itertools
import math
import struct
import zlib

import zstandard

DTYPES = ("f", "q", "i", "B", "?")
WIDTHS = {"f": 4, "q": 8, "i": 4, "B": 1, "?": 1}


class Cursor:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        assert self.at + count <= len(self.data)
        self.at += count
        return self.data[self.at - count : self.at]

    def numbers(self, form):
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def varint(self):
        number, shift = 0, 0
        while True:
            byte = self.take(1)[0]
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number


class Ans:
    """The stack coder: a 64 bit state, 32 bit words, probabilities of 24 bits."""

    def __init__(self, words):
        self.words = list(words)
        self.state = 0
        while self.words and self.state < 2**32:
            self.state = self.state << 32 | self.words.pop()

    def symbol(self, cumulative):
        quantile = self.state & (2**24 - 1)
        found = max(s for s in range(256) if cumulative[s] <= quantile)
        self.state = (self.state >> 24) * (cumulative[found + 1] - cumulative[found]) + quantile - cumulative[found]
        if self.state < 2**32 and self.words:
            self.state = self.state << 32 | self.words.pop()
        return found


def cumulative(kept, count):
    """Return where each byte's share of the 2^24 begins, when ``kept`` of ``count`` flags are set."""
    p = kept / count

    def powers(base):
        run = list(itertools.accumulate([base] * 9, lambda a, b: a * b))
        return [power / base for power in run]

    set_, clear = powers(p), powers(1 - p)
    shares = [set_[ones] * clear[8 - ones] for ones in (b.bit_count() for b in range(256))]
    total = 0.0
    for share in shares:
        total += share
    scale = (2**24 - 256) / total
    starts, running = [], 0.0
    for symbol, share in enumerate(shares):
        starts.append(int(running * scale) + symbol)
        running += share
    return [*starts, 2**24]


class Runs:
    def __init__(self, section):
        cursor = Cursor(section)
        self.heads = Cursor(cursor.take(cursor.varint()))
        rest = section[cursor.at :]
        self.coder = Ans(struct.unpack(f"<{len(rest) // 4}I", rest))

    def run(self, count):
        (mode,) = self.heads.take(1)
        if mode < 2:
            return [bool(mode)] * count
        size = (count + 7) // 8
        if mode == 2:
            packed = self.heads.take(size)
        else:
            table = cumulative(self.heads.varint(), count)
            packed = [self.coder.symbol(table) for _ in range(size)]
        bits = [bool(byte >> place & 1) for byte in packed for place in range(8)]
        assert not any(bits[count:])
        return bits[:count]


def cells(shape):
    return list(itertools.product(*map(range, shape)))


def read_mask(runs, shape, held):
    """Return a mask as a dict from cell to flag."""
    (form,) = runs.heads.take(1)
    inside = cells(shape)
    if form & 1:
        rows, columns = runs.run(shape[0]), runs.run(shape[1])
        inside = [cell for cell in inside if rows[cell[0]] and columns[cell[1]]]
    mask = dict.fromkeys(cells(shape), False)
    if form & 2:
        kept, pruned = ([cell for cell in inside if held[cell] == flag] for flag in (True, False))
        mask |= dict(zip(kept, runs.run(len(kept)), strict=True))
        return mask | dict(zip(pruned, runs.run(len(pruned)), strict=True))
    return mask | dict(zip(inside, runs.run(len(inside)), strict=True))


def digest(held):
    """Return a mask's name; ``held``: by tensor name, (shape, dict from cell to flag)."""
    text = b""
    for name in sorted(held):
        shape, flags = held[name]
        bits = [flags[cell] for cell in cells(shape)] + [False] * 7
        text += f"{name}{shape}".encode()
        text += bytes(sum(bits[8 * n + k] << k for k in range(8)) for n in range((len(bits)) // 8))
    return hashlib.blake2b(text, digest_size=16).digest()


def planes(cursor, count, width):
    """Return unsigned numbers that were rotated left by one bit and split into byte planes."""
    columns = []
    for _ in range(width):
        if cursor.take(1) == b"\0":
            columns.append(cursor.take(count))
        else:
            columns.append(zstandard.ZstdDecompressor().decompress(cursor.take(cursor.varint())))
    words = [sum(column[n] << 8 * place for place, column in enumerate(columns)) for n in range(count)]
    return [word >> 1 | (word & 1) << (8 * width - 1) for word in words] if width > 1 else words


def half(word, kind):
    if kind == 1:
        return struct.unpack("<e", struct.pack("<H", word))[0]
    return struct.unpack("<f", struct.pack("<I", word << 16))[0]


def single(words):
    return [struct.unpack("<f", struct.pack("<I", word))[0] for word in words]


def read_values(cursor, form, counts, dims):
    """Return the values of the float tensors, a list for each."""
    if form == 0:
        flat = single(planes(cursor, sum(counts), 4))
    elif form < 3:
        flat = [half(word, form) for word in planes(cursor, sum(counts), 2)]
    else:
        rough = [d >= 2 for d in dims]
        scales = iter(cursor.numbers("f" * sum(rough)))
        exact = iter(single(planes(cursor, sum(c for c, r in zip(counts, rough, strict=True) if not r), 4)))
        steps = iter(planes(cursor, sum(c for c, r in zip(counts, rough, strict=True) if r), 1))
        out = []
        for count, is_rough in zip(counts, rough, strict=True):
            scale = next(scales) if is_rough else 0.0
            signed = [
                (step - 256 if step > 127 else step) for step in itertools.islice(steps, count if is_rough else 0)
            ]
            out.append([s * scale for s in signed] if is_rough else list(itertools.islice(exact, count)))
        return out
    rest = iter(flat)
    return [list(itertools.islice(rest, count)) for count in counts]


def read_scalars(cursor):
    found = {}
    for _ in range(cursor.numbers("H")[0]):
        name = cursor.take(cursor.take(1)[0]).decode()
        tag = cursor.take(1).decode()
        found[name] = (
            cursor.take(cursor.numbers("I")[0]).decode()
            if tag == "s"
            else cursor.numbers({"b": "?", "i": "q", "f": "d"}[tag])[0]
        )
    return found


def read_specs(cursor):
    specs = {}
    for _ in range(cursor.varint()):
        name = cursor.take(cursor.varint()).decode()
        dtype, dims = cursor.take(2)
        specs[name] = (DTYPES[dtype], tuple(cursor.varint() for _ in range(dims)))
    return specs


TYPES = {"f": "torch.float32", "q": "torch.int64", "i": "torch.int32", "B": "torch.uint8", "?": "torch.bool"}


def known(data, specs):
    """Return the digest of the tensors that a message names, and their values (by name a dict of cells) if it has them.

    ``specs``: by name (dtype letter, shape).
    """
    cursor = Cursor(data)
    form = cursor.numbers("4sBBBBIIIQ")[3]
    assert form & 8
    if form & 3 in (1, 3):
        cursor.take(16)
    name, size = cursor.take(16), cursor.varint()
    if not size:
        return name, None
    _, mask, tensors = decode(cursor.take(size))
    assert mask is None
    text = b""
    for tensor in sorted(specs):
        letter, shape = specs[tensor]
        values = [tensors[tensor][cell] for cell in cells(shape)]
        text += f"{tensor} {shape} {TYPES[letter]};".encode() + struct.pack(f"<{len(values)}{letter}", *values)
    assert hashlib.blake2b(text, digest_size=16).digest() == name
    return name, tensors


def decode(data, template=None, held=None):
    """Return scalars, masks (None or by name a dict of cells) and values (by name a dict of cells).

    ``template``: by name (dtype letter, shape), for payloads that name their tensors by a hash.
    """
    cursor = Cursor(data)
    magic, version, kind, form, fmt, crc, _, mask_size, values_size = cursor.numbers("4sBBBBIIIQ")
    assert (magic, version, kind) == (b"SCTR", 2, 0)
    assert crc == zlib.crc32(data[:8] + data[12:])
    known, by_hash, form = form & 8, form & 4, form & 3
    referred = cursor.take(16) if form in (1, 3) else None
    assert referred is None or referred == digest(held)
    if known:
        cursor.take(16)
        cursor.take(cursor.varint())
    scalars = read_scalars(cursor)
    if by_hash:
        cursor.take(8)
    specs = dict(sorted(template.items())) if by_hash else read_specs(cursor)
    masks = None
    if form == 1:
        masks = {name: flags for name, (_, flags) in held.items()}
    elif form:
        runs = Runs(cursor.take(mask_size - (16 if form == 3 else 0)))
        masks = {}
        for (name, (_, shape)), here in zip(specs.items(), runs.run(len(specs)), strict=True):
            if here:
                masks[name] = read_mask(runs, shape, (held or {}).get(name, (None, None))[1])
        assert runs.coder.state == 0
        assert not runs.coder.words
    assert len(data) - cursor.at == values_size
    return scalars, masks, _tensors(cursor, specs, masks or {}, fmt)


def _tensors(cursor, specs, masks, fmt):
    where = {name: [c for c in cells(shape) if masks.get(name, {}).get(c, True)] for name, (_, shape) in specs.items()}
    floats = [name for name, (dtype, _) in specs.items() if dtype == "f"]
    parts = read_values(cursor, fmt, [len(where[n]) for n in floats], [len(specs[n][1]) for n in floats])
    values = dict(zip(floats, parts, strict=True))
    for name, (dtype, _) in specs.items():
        if dtype != "f":
            values[name] = cursor.numbers(dtype * len(where[name])) if where[name] else []
    assert cursor.at == len(cursor.data)
    assert all(math.prod(shape) == len(cells(shape)) for _, shape in specs.values())
    return {
        name: dict.fromkeys(cells(shape), 0) | dict(zip(where[name], values[name], strict=True))
        for name, (_, shape) in specs.items()
    }
