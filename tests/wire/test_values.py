"""How surviving values travel."""

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import WireError
from secateur.wire import values
from secateur.wire.codec import decode, encode, part_sizes
from secateur.wire.message import Expected, Message, Spec
from secateur.wire.reader import Reader, varint
from wire.drawing import messages


def normal(count, seed=0, scale=1.0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale


def part(flat, dims=2, name="w"):
    return values.Part(name, dims, np.asarray(flat, np.float32))


def round_trip(parts, fmt, seed=0):
    data = b"".join(values.write(parts, fmt, seed).buffers)
    reader = Reader(data)
    back = values.read(reader, [p.values.size for p in parts], [p.dims for p in parts], fmt)
    assert reader.left == 0
    return back, len(data)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=50), st.integers(0, 2))
def test_fp32_is_lossless_to_the_bit(flat, dims):
    (back,), _ = round_trip([part(flat, dims)], "fp32")
    assert back.tobytes() == np.asarray(flat, np.float32).tobytes()


@pytest.mark.parametrize(("fmt", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_formats_round_to_nearest(fmt, dtype):
    w = normal(100)
    back = decode(encode(Message({"w": w}), values=fmt), Expected({"w": Spec((100,))}))
    assert torch.equal(back.tensors["w"], w.to(dtype).float())


def test_a_value_beyond_the_format_is_refused_at_the_sender():
    with pytest.raises(WireError, match=r"'w'.*fp16.*as bf16 or fp32"):
        encode(Message({"v": torch.tensor([1.0]), "w": torch.tensor([1e6])}), values="fp16")
    encode(Message({"w": torch.tensor([1e6])}), values="bf16")
    with pytest.raises(WireError, match=r"'w'.*bf16.*as fp32"):
        encode(Message({"w": torch.tensor([3.4e38])}), values="bf16")
    with pytest.raises(WireError, match=r"'w' holds NaN"):
        encode(Message({"w": torch.tensor([[torch.nan]])}), values="int8")


def test_int8_by_hand():
    """Scale = largest magnitude / 127; multiples of it are exact, whatever is drawn."""
    flat = np.array([254.0, -254.0, 2.0, 0.0, -100.0], np.float32)
    for seed in range(5):
        (back,), size = round_trip([part(flat)], "int8", seed)
        assert back.tolist() == flat.tolist()
        assert size == 4 + 4 * 1 + 1 + 5  # scale; four empty planes; one of five bytes
    (zeros,), _ = round_trip([part(np.zeros(3))], "int8")
    assert zeros.tolist() == [0, 0, 0]


def test_int8_rounds_up_as_often_as_it_must():
    """1.25 steps: a quarter of the draws goes up, and each is one of the two neighbours."""
    flat = np.full(40_001, 1.25, np.float32)
    flat[0] = 127
    (back,), _ = round_trip([part(flat)], "int8", seed=4)
    assert set(back[1:].tolist()) == {1.0, 2.0}
    assert abs(back[1:].mean() - 1.25) < 4 * 0.433 / 200
    (again,), _ = round_trip([part(flat)], "int8", seed=4)
    (other,), _ = round_trip([part(flat)], "int8", seed=5)
    assert again.tobytes() == back.tobytes() != other.tobytes()


def test_int8_leaves_vectors_and_numbers_alone():
    w, b, s = normal(12).reshape(3, 4), normal(3, 1), torch.tensor(0.1234)
    message = Message({"w": w, "b": b, "s": s})
    back = decode(encode(message, values="int8"), Expected.of(message.tensors))
    assert torch.equal(back.tensors["b"], b)
    assert torch.equal(back.tensors["s"], s)
    assert (back.tensors["w"] - w).abs().max() <= w.abs().max() / 127


def test_exponents_of_trained_weights_shrink():
    """Normal values need few exponents: the top plane shrinks, and nothing grows by more than a byte a plane."""
    for scale in (1e-3, 1.0):
        _, size = round_trip([part(normal(100_000, scale=scale))], "fp32")
        assert size < 0.87 * 400_000
    noise = np.random.default_rng(0).integers(0, 2**23, 100_000).astype(np.uint32) | np.uint32(0x3F800000)
    _, size = round_trip([part(noise.view(np.float32))], "fp32")
    assert size < 0.80 * 400_000
    _, size = round_trip([part(normal(3))], "fp32")
    assert size == 4 * (1 + 3)


def payload_of_frames(*frames):
    return b"".join(b"\x01" + varint(len(frame)) + frame for frame in frames)


def test_bombs_are_refused_before_they_unfold():
    """A frame says what it unfolds to; what says another size, or nothing, is not opened."""
    good = zstandard.ZstdCompressor().compress(bytes(1000))
    bomb = zstandard.ZstdCompressor().compress(bytes(50_000_000))
    assert len(bomb) < 5000
    stream = zstandard.ZstdCompressor().compressobj()
    silent = stream.compress(bytes(50_000_000)) + stream.flush()
    liar = bytearray(zstandard.ZstdCompressor().compress(bytes(2000)))
    liar[5:7] = (1000 - 256).to_bytes(2, "little")  # the frame's content size field
    assert values.read(Reader(payload_of_frames(good, good, good, good)), [1000], [1], "fp32")[0].tolist() == [0] * 1000
    for frame in (bomb, silent, bytes(liar), good[:-3], good + b"x", b""):
        with pytest.raises(WireError, match="frame"):
            values.read(Reader(payload_of_frames(frame, good, good, good)), [1000], [1], "fp32")


@pytest.mark.parametrize(
    ("scale", "says"), [(-1.0, "negative"), (float("nan"), "NaN"), (float("inf"), "inf"), (3e38, "beyond")]
)
def test_hostile_scales(scale, says):
    data = bytearray(b"".join(values.write([part([127.0, 1.0])], "int8", 0).buffers))
    data[:4] = np.float32(scale).tobytes()
    with pytest.raises(WireError, match=says):
        values.read(Reader(bytes(data)), [2], [2], "int8")


@settings(deadline=None, max_examples=150)
@given(messages(), st.sampled_from(values.FORMATS), st.booleans())
def test_round_trips_of_every_format_form_and_dtype(drawn, fmt, by_hash):
    message, held = drawn
    template = Expected.of(message.tensors).tensors if by_hash else None
    data = encode(message, values=fmt, known=held, template=template, seed=1)
    back = decode(data, Expected.of(message.tensors, mask="optional", known=held))
    assert back.scalars == message.scalars
    assert list(back.tensors) == list(message.tensors)
    assert (back.mask is None) == (message.mask is None)
    assert all(torch.equal(back.mask[n], m) for n, m in (message.mask or {}).items())
    for name, tensor in message.tensors.items():
        got = back.tensors[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        if fmt == "fp32" or tensor.dtype != torch.float32:
            assert got.numpy().tobytes() == tensor.numpy().tobytes()
        elif tensor.numel():
            step = {"fp16": 2**-10, "bf16": 2**-7, "int8": 1 / 127}[fmt]
            assert (got - tensor).abs().max() <= step * tensor.abs().max()
    assert sum(part_sizes(data).values()) == len(data)
    # what was decoded travels on without further loss
    if fmt != "int8":
        again = decode(encode(back, values=fmt), Expected.of(back.tensors, mask="optional"))
        assert all(torch.equal(again.tensors[n], t) for n, t in back.tensors.items())
