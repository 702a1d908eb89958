"""Surviving values as bytes: fp32 without loss, fp16 and bf16 rounded to nearest, int8 rounded stochastically.

All values of one width are one array, split into byte planes. A float is first rotated left by one bit, so that its
exponent fills the top plane. Trained weights have few different exponents, so that zstd shrinks this plane to a
fraction. Planes that do not shrink are sent raw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from secateur.errors import NotFiniteError, WireError
from secateur.wire.reader import Reader, varint

Values = Literal["fp32", "fp16", "bf16", "int8"]
FORMATS: tuple[Values, ...] = ("fp32", "fp16", "bf16", "int8")
Floats = NDArray[np.float32]

_RAW, _ZSTD = 0, 1
_LEVEL = 1
_SAMPLE = 16384
_STRETCH = 1 << 18
# planes of weights hardly repeat: a table of matches that stays in the fastest cache finds what there is to find, twice
# as fast as the level's own and no larger
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(
    _LEVEL, hash_log=6, min_match=7, window_log=17, write_checksum=False
)
_PACKER = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
_HALVES: dict[Values, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
_LARGEST = np.float32(127)


def beyond(tensors: Mapping[str, torch.Tensor], most: float) -> str | None:
    """Return the name of the first float tensor with NaN or a magnitude above ``most``; None: there is none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = (float(end) for end in tensor.aminmax())
            if not -most <= low <= high <= most:
                return name
    return None


LARGEST: dict[Values, float] = {
    "fp32": float(np.finfo(np.float32).max), "fp16": 65504.0,
    "bf16": float(torch.finfo(torch.bfloat16).max), "int8": float(np.finfo(np.float32).max),
}  # fmt: skip
"""The largest magnitude that each format carries."""


def quantised(dims: int) -> bool:
    """Return whether tensors of this many dimensions are quantised to int8.

    Biases, scales and running statistics stay fp32: they are few, and sensitive to rounding.
    """
    return dims >= 2


@dataclass(frozen=True)
class Part:
    """The surviving values of one tensor, flat, and its number of dimensions."""

    name: str
    dims: int
    values: Floats


@dataclass(frozen=True)
class Written:
    """Values as bytes.

    Attributes:
        buffers: the bytes, in pieces.
        finite: whether all values are finite.
    """

    buffers: Sequence[bytes | memoryview]
    finite: bool


def write(parts: Sequence[Part], values: Values, seed: int, *, packs: bool = True) -> Written:
    """Return the surviving values of some float tensors as bytes.

    Args:
        parts: the values of each tensor.
        values: the format.
        seed: the seed of stochastic rounding; int8 only.
        packs: whether planes that shrink are packed.

    Raises:
        WireError: a value is beyond what the format can hold.
    """
    if values == "int8":
        return Written(_write_int8(parts, seed, packs=packs), finite=True)
    flat = np.concatenate([np.zeros(0, np.float32), *(part.values for part in parts)])
    with np.errstate(over="ignore", invalid="ignore"):
        # a sum is finite only if all that is summed is; the other way round it may overflow
        finite = bool(np.isfinite(flat.sum())) or bool(np.isfinite(flat).all())
    if values == "fp32":
        return Written(_planes(flat.view(np.uint32), packs=packs), finite)
    rounded = torch.from_numpy(flat).to(_HALVES[values])
    if bool((rounded.isinf() & ~torch.from_numpy(flat).isinf()).any()):
        wider = "bf16 or fp32" if values == "fp16" else "fp32"
        bad = next(part for part in parts if _beyond(part.values, _HALVES[values]))
        raise WireError(f"tensor {bad.name!r} has a value beyond {values}'s range; send it as {wider} (wire.values)")
    return Written(_planes(rounded.view(torch.int16).numpy().view(np.uint16), packs=packs), finite)


def _beyond(flat: Floats, dtype: torch.dtype) -> bool:
    exact = torch.from_numpy(flat)
    return bool((exact.to(dtype).isinf() & ~exact.isinf()).any())


def _write_int8(parts: Sequence[Part], seed: int, *, packs: bool) -> list[bytes | memoryview]:
    """Return scales (fp32, one a tensor), the tensors that stay fp32, then the rounded ones.

    Rounding: QSGD's, Alistarh et al., arXiv 1610.02132, section 3, with the largest magnitude in place of the norm:
    q = floor(127 w / max|w| + u), u uniform in [0, 1), so that the mean of q max|w| / 127 is w.
    """
    generator = torch.Generator().manual_seed(seed)
    scales, exact, rounded = [], [np.zeros(0, np.float32)], [np.zeros(0, np.int8)]
    for part in parts:
        flat = part.values
        if not quantised(part.dims):
            exact.append(flat)
            continue
        largest = np.abs(flat).max(initial=0)
        if not np.isfinite(largest):
            raise WireError(f"tensor {part.name!r} holds NaN or infinity, which int8 cannot say; see wire.values")
        scale = np.float32(largest / _LARGEST)
        scales.append(scale)
        noise = torch.rand(flat.size, generator=generator).numpy()
        steps = np.zeros_like(flat) if scale == 0 else np.floor(flat / scale + noise)
        rounded.append(np.clip(steps, -_LARGEST, _LARGEST).astype(np.int8))
    return [
        np.array(scales, "<f4").tobytes(),
        *_planes(np.concatenate(exact).view(np.uint32), packs=packs),
        *_planes(np.concatenate(rounded).view(np.uint8), packs=packs),
    ]


def read(
    reader: Reader, counts: Sequence[int], dims: Sequence[int], values: Values, infinite: Sequence[bool] = ()
) -> list[Floats]:
    """Return the values of each tensor as fp32.

    Args:
        reader: where they begin.
        counts: how many each tensor has.
        dims: of each tensor.
        values: the format.
        infinite: whether each tensor's values may be infinite; fp32 only. Empty: none's.

    Raises:
        WireError: values are missing, NaN or infinite.
    """
    if values == "int8":
        parts = _read_int8(reader, counts, dims)
    else:
        checked = values != "fp32" or not any(infinite)
        flat = _floats(reader, sum(counts), values, checked=checked)
        parts = np.split(flat, np.cumsum(counts)[:-1]) if counts else []
        for part, unbounded in zip(parts, infinite, strict=True) if not checked else ():
            _check(part, infinite=unbounded)
    return parts


def _floats(reader: Reader, count: int, values: Values, *, checked: bool = True) -> Floats:
    if values == "fp32":
        flat = _unplanes(reader, count, np.uint32).view(np.float32)
    else:
        halves = torch.from_numpy(_unplanes(reader, count, np.uint16).view(np.int16))
        flat = halves.view(_HALVES[values]).float().numpy()
    if checked:
        _check(flat)
    return flat


def _check(flat: Floats, *, infinite: bool = False) -> None:
    if np.isnan(flat).any() if infinite else not np.isfinite(flat).all():
        raise NotFiniteError("the values hold NaN or infinity")


def _read_int8(reader: Reader, counts: Sequence[int], dims: Sequence[int]) -> list[Floats]:
    rough = [quantised(d) for d in dims]
    scales = np.frombuffer(reader.take(4 * sum(rough), "the scales"), "<f4").astype(np.float32)
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise WireError("a scale is negative, NaN or infinity")
    exact = _floats(reader, sum(c for c, r in zip(counts, rough, strict=True) if not r), "fp32")
    steps = _unplanes(reader, sum(c for c, r in zip(counts, rough, strict=True) if r), np.uint8).view(np.int8)
    parts, at, next_exact, next_scale = [], 0, 0, 0
    for count, is_rough in zip(counts, rough, strict=True):
        if is_rough:
            with np.errstate(over="ignore"):
                part = steps[at : at + count] * scales[next_scale]
            if not np.isfinite(part).all():
                raise WireError("a scale is beyond fp32's range")
            at, next_scale = at + count, next_scale + 1
        else:
            part = exact[next_exact : next_exact + count]
            next_exact += count
        parts.append(part)
    return parts


def unpacked_size(count: int) -> int:
    """Return the bytes of ``count`` fp32 values that are not packed."""
    return 4 * (1 + count)


def _planes(words: NDArray[Any], *, packs: bool) -> list[bytes | memoryview]:
    """Return unsigned words as byte planes, lowest byte first, each raw or as a zstd frame, whichever is shorter.

    The words are overwritten.
    """
    width = words.itemsize
    if width > 1:
        _rotate(words, left=1)
    table = words.astype(words.dtype.newbyteorder("<"), copy=False).view(np.uint8).reshape(-1, width)
    out: list[bytes | memoryview] = []
    for place in range(width):
        plane = np.ascontiguousarray(table[:, place])
        frame = _shrink(plane) if packs else None
        out += [bytes([_RAW]), plane.data] if frame is None else [bytes([_ZSTD]), varint(len(frame)), frame]
    return out


def _rotate(words: NDArray[Any], *, left: int) -> None:
    """Rotate the bits of each word in place, stretch by stretch, which needs no second array of the same size."""
    kind, right = words.dtype.type, 8 * words.itemsize - left
    for start in range(0, words.size, _STRETCH):
        part = words[start : start + _STRETCH]
        low = part >> kind(right)
        part <<= kind(left)
        part |= low


def _shrink(plane: NDArray[np.uint8]) -> bytes | None:
    """Return the plane as a zstd frame; None if that does not make a sample of it, or all of it, shorter."""
    if plane.size > 4 * _SAMPLE and len(_PACKER.compress(plane[:_SAMPLE].data)) > 0.98 * _SAMPLE:
        return None
    frame = _PACKER.compress(plane.data)
    return frame if len(frame) + len(varint(len(frame))) < plane.size else None


def _unplanes(reader: Reader, count: int, dtype: type[np.unsignedinteger]) -> NDArray[Any]:
    width = np.dtype(dtype).itemsize
    table = np.empty((count, width), np.uint8)
    for place in range(width):
        table[:, place] = _plane(reader, count)
    words = table.reshape(-1).view(np.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False)
    if width > 1:
        _rotate(words, left=8 * width - 1)
    return words


def _plane(reader: Reader, count: int) -> NDArray[np.uint8]:
    how = reader.byte("the values")
    if how == _RAW:
        return np.frombuffer(reader.take(count, "the values"), np.uint8)
    if how != _ZSTD:
        raise WireError(f"the values: unknown packing {how}")
    frame = reader.take(reader.varint("the values"), "the values")
    try:
        # the frame's own word for its size is what would be allocated
        announced = zstandard.get_frame_parameters(frame).content_size
        if announced != count:
            raise WireError(f"the values: a frame of {announced} bytes where {count} are expected")
        opener = zstandard.ZstdDecompressor(max_window_size=max(count, 1024))  # ours never need a larger one
        plane = opener.decompress(frame, max_output_size=count, allow_extra_data=False)
    except zstandard.ZstdError as broken:
        raise WireError(f"the values: a damaged frame ({broken})") from None
    if len(plane) != count:
        raise WireError(f"the values: a frame of {len(plane)} bytes where {count} are expected")
    return np.frombuffer(plane, np.uint8)
