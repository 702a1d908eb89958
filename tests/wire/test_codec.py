"""The codec: round trips, exact lengths, and nothing but WireError for what does not fit."""

import hashlib
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import WireError
from secateur.wire.codec import decode, encode, part_sizes
from secateur.wire.message import Expected, Message, Spec

DTYPES = {torch.float32: 4, torch.int64: 8, torch.int32: 4, torch.uint8: 1, torch.bool: 1}


def sealed(data):
    """Recompute the checksum, so that what lies behind it is reached."""
    return data[:8] + struct.pack("<I", zlib.crc32(data[12:], zlib.crc32(data[:8]))) + data[12:]


def equal(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


@st.composite
def messages(draw):
    """Messages of every dtype, densities 0 to 1, empty and 0-d tensors."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    tensors, mask = {}, {}
    for n in range(draw(st.integers(0, 3))):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        dtype = draw(st.sampled_from(list(DTYPES)))
        value = torch.randn(shape, generator=g) * 3
        tensor = (
            value > 0 if dtype == torch.bool else value.abs().to(dtype) if dtype == torch.uint8 else value.to(dtype)
        )
        if draw(st.booleans()):
            mask[f"t{n}"] = torch.rand(shape, generator=g) < draw(st.sampled_from([0.0, 0.3, 1.0]))
            tensor = torch.where(mask[f"t{n}"], tensor, torch.zeros((), dtype=dtype))
        tensors[f"t{n}"] = tensor
    scalars = draw(
        st.dictionaries(
            st.text(min_size=1, max_size=8),
            st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(max_size=9)),
            max_size=3,
        )
    )
    return Message(tensors, mask if draw(st.booleans()) or mask else None, scalars)


@settings(deadline=None, max_examples=150)
@given(messages(), st.booleans())
def test_round_trip(message, known):
    held = message.mask if known else None
    data = encode(message, known=held)
    back = decode(data, Expected.of(message.tensors, mask="optional", known=held))
    assert back.scalars == message.scalars
    assert list(back.tensors) == list(message.tensors)
    assert all(equal(back.tensors[n], t) for n, t in message.tensors.items())
    assert (back.mask is None) == (message.mask is None)
    if message.mask:
        assert all(equal(back.mask[n], m) for n, m in message.mask.items())
    assert encode(message, known=held) == data
    assert sum(part_sizes(data).values()) == len(data)


def test_lengths_by_hand():
    w = torch.arange(10.0)
    mask = torch.tensor([True, False] * 5)
    frame = 12 + 2 + 4  # header, count of scalars, count of tensors
    entry = 2 + 1 + 3 + 4 + 8  # name length, name, form/dtype/dims, one dimension, count of values
    assert len(encode(Message({"w": w}))) == frame + entry + 40
    assert len(encode(Message({"w": w}), values="fp16")) == frame + entry + 20
    masked = Message({"w": torch.where(mask, w, 0.0)}, {"w": mask})
    assert len(encode(masked)) == frame + entry + 2 + 20
    assert len(encode(masked, known={"w": mask.clone()})) == frame + entry + 16 + 20
    assert part_sizes(encode(masked)) == {"values": 20, "mask": 2, "framing": frame + entry}
    assert part_sizes(encode(masked, known={"w": mask})) == {"values": 20, "mask": 16, "framing": frame + entry}
    # a scalar's value never changes the length
    lengths = {len(encode(Message({}, None, {"s": value}))) for value in (0.0, 1e-300, -123456.789)}
    assert lengths == {frame + 1 + 1 + 1 + 8}


def test_bytes_by_hand():
    """The layout of docs/wire.md, written out: a second implementation could start from this."""
    mask = torch.tensor([[True, False], [False, True]])
    message = Message({"w": torch.tensor([[1.0, 0.0], [0.0, -2.0]]), "n": torch.tensor(7)}, {"w": mask}, {"t": 3})
    body = b"\x01\x00" + b"\x01t" + b"i" + (3).to_bytes(8, "little")  # one scalar
    body += b"\x02\x00\x00\x00"  # two tensors
    body += b"\x01\x00w" + b"\x02\x00\x02" + b"\x02\x00\x00\x00" * 2 + (2).to_bytes(8, "little")
    body += bytes([0b1001]) + b"\x00\x00\x80\x3f" + b"\x00\x00\x00\xc0"  # bitmap, then 1.0 and -2.0
    body += b"\x01\x00n" + b"\x00\x01\x00" + (1).to_bytes(8, "little") + (7).to_bytes(8, "little")
    head = b"SCTR" + b"\x01\x02\x00\x00"
    expected = head + zlib.crc32(head + body).to_bytes(4, "little") + body
    assert encode(message) == expected
    digest = hashlib.blake2b(b"w(2, 2)" + bytes([0b1001]), digest_size=16).digest()
    assert encode(message, known={"w": mask})[12:28] == digest


def test_known_mask_of_a_model_costs_sixteen_bytes():
    g = torch.Generator().manual_seed(0)
    mask = {f"t{n}": torch.rand(1000, generator=g) < 0.1 for n in range(5)}
    tensors = {n: torch.where(m, torch.ones(1000), 0.0) for n, m in mask.items()}
    assert part_sizes(encode(Message(tensors, mask), known=mask))["mask"] == 16
    assert part_sizes(encode(Message(tensors, mask)))["mask"] == 5 * 125
    changed = mask | {"t0": ~mask["t0"]}
    assert part_sizes(encode(Message(tensors, mask), known=changed))["mask"] == 5 * 125


def test_negative_zero_is_canonical_where_pruned_and_kept_where_not():
    mask = torch.tensor([False, True])
    back = decode(
        encode(Message({"w": torch.tensor([-0.0, -0.0])}, {"w": mask})), Expected({"w": Spec((2,))}, "optional")
    )
    assert torch.signbit(back.tensors["w"]).tolist() == [False, True]


@pytest.mark.parametrize(("values", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_formats_round_to_nearest(values, dtype):
    w = torch.randn(100, generator=torch.Generator().manual_seed(0))
    back = decode(encode(Message({"w": w}), values=values), Expected({"w": Spec((100,))}))
    assert torch.equal(back.tensors["w"], w.to(dtype).float())


def test_fp16_overflow_is_refused_at_the_sender():
    with pytest.raises(WireError, match="'w'.*fp16.*as bf16 or fp32"):
        encode(Message({"w": torch.tensor([1e6])}), values="fp16")
    encode(Message({"w": torch.tensor([1e6])}), values="bf16")
    with pytest.raises(WireError, match="'w'.*bf16.*as fp32"):
        encode(Message({"w": torch.tensor([3.4e38])}), values="bf16")


def test_parameters_can_be_sent_as_they_are():
    w = torch.ones(2, requires_grad=True)
    assert encode(Message({"w": w})) == encode(Message({"w": torch.ones(2)}))


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (Message({"w": torch.zeros(1, dtype=torch.float64)}), "float64"),
        (Message({"w": torch.zeros(2)}, {"w": torch.ones(3, dtype=torch.bool)}), "mask of 'w'"),
        (Message({"w": torch.zeros(2)}, {"w": torch.ones(2)}), "mask of 'w'"),
        (Message({"w": torch.zeros(2)}, {"v": torch.ones(2, dtype=torch.bool)}), "'v', which is not"),
        (Message({}, None, {"s": None}), "scalar 's'"),
        (Message({}, None, {"": 1}), "scalar ''"),
        (Message({}, None, {"s": 2**63}), "64 bits"),
        (Message({}, None, {"s": "x" * 70000}), "70000 bytes"),
        (Message({}, None, {"\ud800": 1}), "name of scalar.*UTF-8"),
        (Message({}, None, {"s": "\ud800"}), "text of scalar 's'.*UTF-8"),
        (Message({"\ud800": torch.zeros(1)}), "name of tensor.*UTF-8"),
        (Message({"x" * 70000: torch.zeros(1)}), "name of 70000 bytes"),
    ],
)
def test_what_cannot_be_sent(message, says):
    with pytest.raises(WireError, match=says):
        encode(message)


W = {"w": Spec((3,))}
MASK = {"w": torch.tensor([True, False, True])}
FULL = Message({"w": torch.tensor([1.0, 2.0, 3.0])})
MASKED = Message({"w": torch.tensor([1.0, 0.0, 3.0])}, MASK)
HEAD = 12 + 2 + 4 + 2 + 1  # where the tensor's form stands in a message without scalars


def refused(data, expected, says):
    with pytest.raises(WireError, match=says):
        decode(data, expected)


def edit(data, at, new):
    return sealed(data[:at] + new + data[at + len(new) :])


def test_headers():
    data = encode(FULL)
    refused(b"", Expected(W), "ends within the header")
    refused(b"XXXX" + data[4:], Expected(W), "not a secateur payload")
    refused(edit(data, 4, b"\x02"), Expected(W), "version 2.*update")
    refused(data[:-1] + bytes([data[-1] ^ 1]), Expected(W), "checksum")
    refused(edit(data, 5, b"\x03"), Expected(W), "unknown mask form")
    refused(edit(data, 6, b"\x03"), Expected(W), "unknown mask form or value")
    refused(edit(data, 7, b"\x01"), Expected(W), "unknown mask form or value")
    refused(sealed(data + b"x"), Expected(W), "1 bytes after")
    refused(sealed(data[:-4]), Expected(W), "ends within the values")


def test_tensors():
    data = encode(FULL)
    refused(data, Expected({}), "1 tensors announced, 0 expected")
    refused(data, Expected({"v": Spec((3,))}), "'w' is not expected")
    refused(data, Expected({"w": Spec((4,))}), r"\(3,\) arrived")
    refused(data, Expected({"w": Spec((3,), torch.int64)}), "int64")
    refused(data, Expected({**W, "v": Spec((1,))}), "'v' is missing")
    assert decode(data, Expected({**W, "v": Spec((1,))}, optional=True)).tensors.keys() == {"w"}
    refused(edit(data, HEAD + 1, b"\x09"), Expected(W), "unknown dtype")
    refused(edit(data, HEAD, b"\x02"), Expected(W), "form does not fit")
    refused(edit(data, HEAD + 3 + 4, b"\x02"), Expected(W), "2 values announced")
    refused(edit(data, HEAD - 1, b"\xff"), Expected(W), "not UTF-8")
    twice = sealed(data[:14] + struct.pack("<I", 2) + data[18:] + data[18:])
    refused(twice, Expected({**W, "v": Spec((1,))}), "comes twice")
    for bad in (torch.nan, torch.inf):
        refused(encode(Message({"w": torch.tensor([1.0, bad, 0.0])})), Expected(W), "NaN or infinity")
    flag = encode(Message({"b": torch.tensor([True])}))
    refused(edit(flag, len(flag) - 1, b"\x02"), Expected({"b": Spec((1,), torch.bool)}), "no truth values")


def test_masks():
    fresh, known = encode(MASKED), encode(MASKED, known=MASK)
    refused(fresh, Expected(W), "no fresh mask")
    refused(fresh, Expected(W, "optional", frozenset()), "no fresh mask")
    refused(fresh, Expected(W, "same", known=MASK), "no fresh mask")
    refused(known, Expected(W, "optional"), "does not hold")
    refused(known, Expected(W, "same", known={"w": ~MASK["w"]}), "does not hold")
    refused(known, Expected(W, "none", known=MASK), "none is accepted")
    refused(encode(FULL), Expected(W, "required"), "required and none came")
    refused(encode(FULL), Expected(W, "same", known=MASK), "required and none came")
    refused(
        fresh, Expected(W, "required", known={"w": torch.tensor([True, True, False])}, within=True), "pruned already"
    )
    assert decode(fresh, Expected(W, "required", frozenset("w"), {"w": MASK["w"] | True}, within=True)).mask
    assert decode(known, Expected(W, "same", known=MASK)).mask is MASK
    bits = len(fresh) - 8 - 1
    refused(edit(fresh, bits, b"\x0d"), Expected(W, "optional"), "beyond its tensor")
    refused(edit(fresh, bits, b"\x07"), Expected(W, "optional"), "2 values announced")
    bare = encode(Message(FULL.tensors, {}))
    refused(bare, Expected(W, "required", frozenset("w")), r"covers \[\], \['w'\] must")
    refused(bare, Expected(W, "none"), "none is accepted")
    refused(bare, Expected(W, "same", known=MASK), "another mask")
    # a payload that claims the known mask must not slip values in where that mask prunes
    dense = encode(Message(FULL.tensors, {}), known={})
    with_hash = encode(MASKED, known=MASK)
    smuggled = sealed(with_hash[:28] + dense[28:])
    refused(smuggled, Expected(W, "same", known=MASK), "form does not fit")
    other = Message({"w": MASKED.tensors["w"], "v": torch.ones(1)}, {**MASK, "v": torch.ones(1, dtype=torch.bool)})
    renamed = encode(other, known=other.mask)
    data = renamed[:12] + with_hash[12:28] + renamed[28:]
    refused(sealed(data), Expected({**W, "v": Spec((1,))}, "same", known=MASK), "known mask does not cover")


def test_a_tensor_that_a_fresh_mask_leaves_out_is_a_mask_that_keeps_everything():
    """Otherwise a client brings pruned weights back by not naming them in its mask."""
    both = {"w": Spec((3,)), "v": Spec((1,))}
    v = {"v": torch.ones(1, dtype=torch.bool)}
    data = encode(Message({"w": torch.ones(3), "v": torch.ones(1)}, v))
    refused(data, Expected(both, "optional", known={**MASK, **v}, within=True), "'w' keeps what is pruned already")
    for open_ in (Expected(both, "optional", known={**MASK, **v}), Expected(both, "optional", known=v, within=True)):
        assert decode(data, open_).mask.keys() == {"v"}
    nothing_pruned = {"w": MASK["w"] | True, **v}
    assert decode(data, Expected(both, "optional", known=nothing_pruned, within=True)).mask.keys() == {"v"}


def test_the_known_mask_comes_with_all_its_tensors():
    """The mask of a message never names a tensor that the message does not have."""
    bare = encode(MASKED, known=MASK)[:28] + struct.pack("<HI", 0, 0)
    refused(sealed(bare), Expected(W, "optional", known=MASK, optional=True), "covers 'w', which did not come")


def test_part_sizes_of_what_was_never_encoded():
    data = encode(FULL)
    for bad, says in (
        (edit(data, HEAD, b"\x07"), "unknown form"),
        (edit(data, HEAD, b"\x02"), "unknown form"),  # a bitmap in a payload that has no mask
        (edit(data, HEAD + 1, b"\x09"), "unknown form or dtype"),
        (sealed(data + b"xx"), "2 bytes after"),
        (sealed(data[:-1]), "ends within"),
        (data[:-1], "checksum"),
    ):
        with pytest.raises(WireError, match=says):
            part_sizes(bad)


def test_part_sizes_counts_whatever_decode_accepts():
    wanted = {f"s{n}": int for n in range(70)}
    data = encode(Message({}, None, dict.fromkeys(wanted, 1)))
    assert len(decode(data, Expected({}, scalars=wanted)).scalars) == 70
    assert part_sizes(data) == {"values": 0, "mask": 0, "framing": len(data)}


def test_scalars():
    data = encode(Message({}, None, {"b": True, "i": 1, "f": 0.5, "s": "x"}))
    wanted = {"b": bool, "i": int, "f": float, "s": str}
    assert decode(data, Expected({}, scalars=wanted)).scalars == {"b": True, "i": 1, "f": 0.5, "s": "x"}
    refused(data, Expected({}, scalars={"b": bool}), "4 scalars announced")
    refused(data, Expected({}, scalars={**wanted, "i": float}), "expected")
    refused(edit(data, 14 + 3, b"\x02"), Expected({}), "no truth value")
    refused(edit(data, 14 + 2, b"?"), Expected({}), "unknown type")
    refused(edit(data, 14 + 1, b"\xff"), Expected({}), "not UTF-8")
    refused(edit(data, 14 + 4 + 1, b"b"), Expected({}), "comes twice")
    nameless = data[:12] + struct.pack("<H", 1) + b"\x00b\x01" + struct.pack("<I", 0)
    refused(sealed(nameless), Expected({}), "without a name")
    many = encode(Message({}, None, {f"s{n}": n for n in range(65)}))
    refused(many, Expected({}), "65 scalars announced")
    text = encode(Message({}, None, {"s": "x"}))
    refused(edit(text, 14 + 3, struct.pack("<I", 70000)), Expected({}), "70000 bytes, at most")


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_mutations_raise_wire_error_or_decode(data):
    payload = bytearray(
        encode(data.draw(st.sampled_from([FULL, MASKED, Message(W_TENSORS, None, {"i": 1, "s": "abc"})])))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload)))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip" and at < len(payload):
            payload[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del payload[at : at + data.draw(st.integers(1, 8))]
        else:
            payload[at:at] = data.draw(st.binary(max_size=8))
    mutated = bytes(payload)
    if len(mutated) > 12 and data.draw(st.booleans()):
        mutated = sealed(mutated)
    try:
        part_sizes(mutated)
    except WireError:
        with pytest.raises(WireError):
            decode(mutated, Expected(W, "optional", known=MASK, optional=True))
    try:
        message = decode(mutated, Expected(W, "optional", known=MASK, optional=True))
    except WireError:
        return
    assert all(t.shape == (3,) and t.isfinite().all() for t in message.tensors.values())
    assert (message.mask or {}).keys() <= message.tensors.keys()


W_TENSORS = {"w": torch.tensor([0.5, -1.0, 2.0])}


def test_a_bomb_allocates_nothing():
    """A header that announces 2^60 values is refused by its shape, before any of them is read."""
    data = bytearray(encode(FULL))
    data[HEAD + 3 : HEAD + 7] = struct.pack("<I", 2**32 - 1)
    data[HEAD + 7 : HEAD + 15] = struct.pack("<Q", 2**60)
    refused(sealed(bytes(data)), Expected(W), "expected")
