"""The codec: round trips, exact lengths, and nothing but WireError for what does not fit."""

import hashlib
import struct
import zlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import MaskNotHeldError, WireError
from secateur.wire.codec import decode, encode, is_lost, lost, part_sizes, with_scalar
from secateur.wire.entropy import entropy
from secateur.wire.head import context_of
from secateur.wire.message import Expected, Message, Spec
from wire.drawing import messages


def sealed(data):
    """Recompute the checksum, so that what lies behind it is reached."""
    return data[:8] + struct.pack("<I", zlib.crc32(data[12:], zlib.crc32(data[:8]))) + data[12:]


def equal(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


@settings(deadline=None, max_examples=150)
@given(messages(), st.booleans())
def test_round_trip(drawn, known):
    message, held = drawn
    held = message.mask if known else held
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


HEADER = 28


def test_lengths_by_hand():
    w = torch.arange(10.0)
    mask = torch.tensor([True, False] * 5)
    names = 1 + 1 + 1 + 1 + 1 + 1  # count, name length, name, dtype, dims, one dimension
    frame = HEADER + 2 + names
    assert len(encode(Message({"w": w}))) == frame + 4 * (1 + 10)  # four planes too short to be shrunk
    assert len(encode(Message({"w": w}), values="fp16")) == frame + 2 * (1 + 10)
    masked = Message({"w": torch.where(mask, w, 0.0)}, {"w": mask})
    fresh = 1 + 1 + 1 + 1 + 2  # length of heads; covered: all; form; raw; 10 bits
    assert part_sizes(encode(masked)) == {"values": 4 * (1 + 5), "mask": fresh, "framing": frame}
    assert part_sizes(encode(masked, known={"w": mask.clone()})) == {"values": 24, "mask": 16, "framing": frame}
    by_hash = encode(masked, known={"w": mask}, template={"w": Spec((10,))})
    assert part_sizes(by_hash) == {"values": 24, "mask": 16, "framing": HEADER + 2 + 8}
    # a scalar's value never changes the length
    lengths = {len(encode(Message({}, None, {"s": value}))) for value in (0.0, 1e-300, -123456.789)}
    assert lengths == {HEADER + 2 + 1 + 1 + 1 + 8 + 1 + 4}


def test_bytes_by_hand():
    """The layout of docs/wire.md, written out."""
    mask = torch.tensor([[True, False], [False, True]])
    message = Message({"w": torch.tensor([[1.0, 0.0], [0.0, -2.0]]), "n": torch.tensor(7)}, {"w": mask}, {"t": 3})
    opening = b"\x01\x00" + b"\x01t" + b"i" + (3).to_bytes(8, "little")  # one scalar
    opening += b"\x02" + b"\x01n" + b"\x01\x00" + b"\x01w" + b"\x00\x02\x02\x02"  # n: int64, 0-d; w: float32, 2 x 2
    covered = b"\x02" + bytes([0b10])  # raw: only the second of n, w
    section = b"\x05" + covered + b"\x00" + b"\x02" + bytes([0b1001])  # length; covered; form; raw; the bitmap
    # 1.0 = 3f800000 and -2.0 = c0000000, rotated left: 7f000000 and 80000001
    values = b"\0\x00\x01" + b"\0\x00\x00" + b"\0\x00\x00" + b"\0\x7f\x80" + (7).to_bytes(8, "little")
    head = b"SCTR" + b"\x02\x00\x02\x00"
    sizes = b"\x09\x00\x00\x00" + struct.pack("<IQ", len(section), len(values))
    body = opening + section + values
    crc = zlib.crc32(head + sizes + body).to_bytes(4, "little")
    assert encode(message, context=9) == head + crc + sizes + body
    digest = hashlib.blake2b(b"w(2, 2)" + bytes([0b1001]), digest_size=16).digest()
    assert encode(message, known={"w": mask})[HEADER : HEADER + 16] == digest
    template = {name: Spec(tuple(t.shape), t.dtype) for name, t in message.tensors.items()}
    named = encode(message, template=template)
    assert hashlib.blake2b(opening[13:], digest_size=8).digest() == named[HEADER + 13 : HEADER + 21]
    asked = encode(Message({}))
    assert lost(asked) == sealed(b"SCTR\x02\x01\0\0" + bytes(4) + asked[8:12] + bytes(12))


def test_a_known_mask_costs_sixteen_bytes_and_a_changed_one_its_difference():
    g = torch.Generator().manual_seed(0)
    mask = {f"t{n}": torch.rand(10000, generator=g) < 0.1 for n in range(5)}
    tensors = {n: torch.where(m, torch.ones(10000), 0.0) for n, m in mask.items()}
    message = Message(tensors, mask)
    assert part_sizes(encode(message, known=mask))["mask"] == 16
    fresh = part_sizes(encode(message))["mask"]
    bound = sum(entropy(int(m.sum()), 10000) for m in mask.values())
    assert bound < fresh < 1.02 * bound + 5 * 5
    # all others as they were: two bytes for each; half of what t0 keeps is new
    before = mask | {"t0": torch.rand(10000, generator=g) < 0.2}
    changed = encode(message, known=before)
    assert part_sizes(changed)["mask"] < fresh / 5 + 60
    back = decode(changed, Expected.of(tensors, mask="required", known=before))
    assert all(torch.equal(back.mask[n], m) for n, m in mask.items())


def test_negative_zero_is_canonical_where_pruned_and_kept_where_not():
    mask = torch.tensor([False, True])
    back = decode(
        encode(Message({"w": torch.tensor([-0.0, -0.0])}, {"w": mask})), Expected({"w": Spec((2,))}, "optional")
    )
    assert torch.signbit(back.tensors["w"]).tolist() == [False, True]


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
SPECS = HEADER + 2  # where the tensors' names begin in a message without scalars


def refused(data, expected, says, kind=WireError):
    with pytest.raises(kind, match=says):
        decode(data, expected)


def edit(data, at, new, cut=None):
    """Replace ``cut`` bytes (as many as are new) at a place, and make the checksum right again."""
    return sealed(data[:at] + new + data[at + (len(new) if cut is None else cut) :])


def test_headers():
    data = encode(FULL)
    refused(b"", Expected(W), "ends within the header")
    refused(b"XXXX" + data[4:], Expected(W), "not a secateur payload")
    refused(edit(data, 4, b"\x01"), Expected(W), "version 1.*update")
    refused(data[:-1] + bytes([data[-1] ^ 1]), Expected(W), "checksum")
    refused(data[:12] + b"\x01" + data[13:], Expected(W), "checksum")
    refused(edit(data, 5, b"\x03"), Expected(W), "unknown kind")
    refused(edit(data, 6, b"\x10"), Expected(W), "unknown kind of payload, mask form")
    refused(edit(data, 7, b"\x04"), Expected(W), "unknown kind of payload, mask form or value")
    refused(sealed(data + b"x"), Expected(W), "16 bytes of values announced, 17 are there")
    refused(sealed(data[:-4]), Expected(W), "16 bytes of values announced, 12 are there")
    refused(edit(data, 20, bytes([17])) + b"", Expected(W), "17 bytes of values announced")
    refused(edit(sealed(data + b"x"), 20, bytes([17])), Expected(W), "1 bytes after the last value")
    refused(edit(data[:-1], 20, bytes([15])), Expected(W), "ends within the values")
    refused(edit(data, 16, b"\x01"), Expected(W), "a mask of 1 bytes does not fit its form")


def test_a_reply_is_bound_to_its_request():
    asked, other = encode(FULL), encode(MASKED)
    reply = encode(FULL, context=context_of(asked))
    assert decode(reply, Expected(W, context=context_of(asked)))
    refused(reply, Expected(W, context=context_of(other)), "answers another request")
    refused(reply, Expected(W, context=0), "answers another request")
    assert context_of(b"") == 0


def test_a_receiver_that_lost_its_mask_says_so():
    asked = encode(MASKED, known=MASK)
    refused(asked, Expected(W, "same"), "does not hold", MaskNotHeldError)
    answer = lost(asked)
    assert is_lost(answer, context_of(asked))
    assert not is_lost(answer, 0)
    assert not is_lost(answer[:-1], context_of(asked))
    assert not is_lost(sealed(answer + b"x"), context_of(asked))
    assert not is_lost(encode(FULL, context=context_of(asked)), context_of(asked))
    assert part_sizes(answer) == {"values": 0, "mask": 0, "framing": HEADER}
    refused(answer, Expected(W), "asks for the full mask")


def test_tensors():
    data = encode(FULL)
    two = Expected({**W, "v": Spec((1,))})
    refused(data, Expected({}), "1 tensors announced, 0 expected")
    refused(data, Expected({"v": Spec((3,))}), "'w' is not expected")
    refused(data, Expected({"w": Spec((4,))}), r"\(3,\) arrived")
    refused(data, Expected({"w": Spec((3,), torch.int64)}), "int64")
    refused(data, two, "'v' is missing")
    assert decode(data, replace(two, optional=True)).tensors.keys() == {"w"}
    refused(edit(data, SPECS + 3, b"\x09"), Expected(W), "unknown dtype")
    refused(edit(data, SPECS + 5, b"\x83\x00", 1), Expected(W), "shortest form")
    refused(edit(data, SPECS + 5, b"\xff" * 9, 1), Expected(W), "shortest form")
    refused(edit(data, SPECS + 2, b"\xff"), Expected(W), "not UTF-8")
    entry = data[SPECS + 1 : SPECS + 6]
    refused(edit(data, SPECS, b"\x02" + entry + entry, 6), two, "comes twice")
    backwards = encode(Message({"v": torch.zeros(1), "w": FULL.tensors["w"]}))
    v = backwards[SPECS + 1 : SPECS + 6]
    refused(edit(backwards, SPECS, b"\x02" + entry + v), two, "'v' is out of order")
    for bad in (torch.nan, torch.inf):
        refused(encode(Message({"w": torch.tensor([1.0, bad, 0.0])})), Expected(W), "NaN or infinity")
    flag = encode(Message({"b": torch.tensor([True])}))
    refused(edit(flag, len(flag) - 1, b"\x02"), Expected({"b": Spec((1,), torch.bool)}), "no truth values")


def test_tensors_named_by_a_hash():
    both = {**W, "v": Spec((1,))}
    message = Message({"w": FULL.tensors["w"], "v": torch.ones(1)})
    data = encode(message, template=both)
    assert list(decode(data, Expected(both)).tensors) == ["w", "v"]
    refused(data, Expected(W), "tensors are not those expected")
    refused(data, Expected({**both, "v": Spec((1,), torch.bool)}), "another model, or other shapes")
    # a message of other tensors than the template's names them
    assert encode(FULL, template=both) == encode(FULL)


def test_masks():
    fresh, known = encode(MASKED), encode(MASKED, known=MASK)
    refused(fresh, Expected(W), "a mask came where none is accepted")
    refused(fresh, Expected(W, "optional", frozenset()), "no mask is accepted for it")
    refused(fresh, Expected(W, "same", known=MASK), "another mask came")
    refused(known, Expected(W, "optional"), "does not hold", MaskNotHeldError)
    refused(known, Expected(W, "same", known={"w": ~MASK["w"]}), "does not hold", MaskNotHeldError)
    refused(known, Expected(W, "none", known=MASK), "none is accepted")
    refused(encode(FULL), Expected(W, "required"), "required and none came")
    refused(encode(FULL), Expected(W, "same", known=MASK), "required and none came")
    kept = {"w": torch.tensor([True, True, False])}
    refused(fresh, Expected(W, "required", known=kept, within=True), "pruned already")
    assert decode(fresh, Expected(W, "required", frozenset("w"), {"w": MASK["w"] | True}, within=True)).mask
    assert decode(known, Expected(W, "same", known=MASK)).mask is MASK
    bare = encode(Message(FULL.tensors, {}))
    refused(bare, Expected(W, "required", frozenset("w")), r"covers \[\], \['w'\] must")
    refused(bare, Expected(W, "none"), "none is accepted")
    refused(bare, Expected(W, "same", known=MASK), "another mask")
    # the mask's size in the header covers its hash
    refused(edit(known, 16, bytes([15])), Expected(W, "same", known=MASK), "a mask of 15 bytes does not fit")
    refused(edit(known, 16, bytes([17])), Expected(W, "same", known=MASK), "a mask of 17 bytes does not fit")


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
    known = encode(MASKED, known=MASK)
    bare = known[:20] + bytes(8) + known[HEADER : HEADER + 16] + b"\0\0" + b"\0"
    refused(sealed(bare), Expected(W, "optional", known=MASK, optional=True), "covers 'w', which did not come")


def test_part_sizes_of_what_was_never_encoded():
    data = encode(FULL)
    for bad, says in (
        (edit(data, 20, bytes([200])), "more than it has"),
        (edit(data, 20, b"\xff" * 8), "more than it has"),
        (edit(data, 16, b"\xff" * 4), "more than it has"),
        (data[:-1], "checksum"),
        (b"", "ends within the header"),
    ):
        with pytest.raises(WireError, match=says):
            part_sizes(bad)


def test_part_sizes_counts_whatever_decode_accepts():
    wanted = {f"s{n}": int for n in range(70)}
    data = encode(Message({}, None, dict.fromkeys(wanted, 1)))
    assert len(decode(data, Expected({}, scalars=wanted)).scalars) == 70
    assert part_sizes(data) == {"values": 4, "mask": 0, "framing": len(data) - 4}


def test_scalars():
    data = encode(Message({}, None, {"b": True, "i": 1, "f": 0.5, "s": "x"}))
    at = HEADER + 2
    wanted = {"b": bool, "i": int, "f": float, "s": str}
    assert decode(data, Expected({}, scalars=wanted)).scalars == {"b": True, "i": 1, "f": 0.5, "s": "x"}
    refused(data, Expected({}, scalars={"b": bool}), "4 scalars announced")
    refused(data, Expected({}, scalars={**wanted, "i": float}), "expected")
    refused(edit(data, at + 3, b"\x02"), Expected({}), "no truth value")
    refused(edit(data, at + 2, b"?"), Expected({}), "unknown type")
    refused(edit(data, at + 1, b"\xff"), Expected({}), "not UTF-8")
    refused(edit(data, at + 4 + 1, b"b"), Expected({}), "comes twice")
    refused(edit(data, at, b"\x00b\x01", 4), Expected({}), "without a name")
    many = encode(Message({}, None, {f"s{n}": n for n in range(65)}))
    refused(many, Expected({}), "65 scalars announced")
    text = encode(Message({}, None, {"s": "x"}))
    refused(edit(text, at + 3, struct.pack("<I", 70000)), Expected({}), "70000 bytes, at most")


def test_a_hash_stands_for_the_template_where_more_may_come():
    specs = {"w": Spec((3,))}
    more = Expected({**specs, "guide/w": Spec((3,))}, optional=True, template=specs)
    few = Message({"w": torch.ones(3)})
    data = encode(few, template=specs)
    assert set(decode(data, more).tensors) == {"w"}
    both = Message({"w": torch.ones(3), "guide/w": torch.zeros(3)})
    assert set(decode(encode(both, template=specs), more).tensors) == {"w", "guide/w"}
    with pytest.raises(WireError, match="not those expected"):
        decode(data, Expected(more.tensors, optional=True))


@pytest.mark.parametrize("mask", ["none", "fresh", "known", "change"])
def test_a_scalar_put_in_afterwards_is_the_payload_that_had_it_from_the_start(mask):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(30, 20, generator=g)
    held, other = ({"w": torch.rand(30, 20, generator=g) < 0.5} for _ in range(2))
    own = {"none": None, "fresh": held, "known": held, "change": held}[mask]
    known = {"none": None, "fresh": None, "known": held, "change": {"w": held["w"] ^ (other["w"] & (w > 1.5))}}[mask]
    told = [{"n": 3, "word": "seconds", "yes": True, "seconds": value, "loss": 0.5} for value in (0.0, 12.25)]
    early, late = (encode(Message({"w": w}, own, scalars), known=known, context=7) for scalars in told)
    assert with_scalar(early, "seconds", 12.25) == late
    assert early == with_scalar(late, "seconds", 0.0)
    for name in ("n", "word", "nothing"):
        with pytest.raises(WireError, match=f"no float scalar '{name}'"):
            with_scalar(early, name, 1.0)
