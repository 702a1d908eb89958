"""Known tensors: named by a digest in a message, carried where the receiver lacks them, and nothing but WireError."""

import hashlib
import math
import struct
import zlib

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import TensorsNotHeldError, WireError
from secateur.wire import carried
from secateur.wire.carried import Group
from secateur.wire.codec import decode, encode, is_lost, known_in, lost, part_sizes, with_scalar
from secateur.wire.head import context_of
from secateur.wire.known import Known, digest
from secateur.wire.message import Expected, Message, Spec, specs_of
from secateur.wire.reader import Reader, varint

HEADER = 28
PAST = {"past": torch.full((3, 3), -math.inf).triu(1)}
WHOLE = {
    **PAST, "w": torch.tensor([[0.5, -0.0], [1e-42, 3.25]]), "ids": torch.arange(4), "none": torch.zeros(0, 2),
    "half": torch.tensor([1.5, -2.0, 0.1], dtype=torch.bfloat16), "long": torch.tensor(math.pi, dtype=torch.float64),
}  # fmt: skip
W = {"w": Spec((3,))}
FULL = Message({"w": torch.tensor([1.0, 2.0, 3.0])}, None, {"loss": 0.5})


def sealed(data):
    return data[:8] + struct.pack("<I", zlib.crc32(data[12:], zlib.crc32(data[:8]))) + data[12:]


def equal(one, other):
    bits = [t.contiguous().reshape(-1).view(torch.uint8).tolist() for t in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and bits[0] == bits[1]


def test_a_digest_by_hand():
    bits = struct.pack("<2f", 1.0, -math.inf)
    text = b"a (2,) torch.float32;" + bits + b"b () torch.int64;" + struct.pack("<q", 7)
    tensors = {"b": torch.tensor(7), "a": torch.tensor([1.0, -math.inf])}
    assert digest(tensors) == hashlib.blake2b(text, digest_size=16).hexdigest()


def test_every_bit_of_a_group_arrives():
    group = Group(WHOLE)
    named = group.named(carried=True)
    back = carried.read(named, specs_of(WHOLE), {"past"})
    assert list(back) == list(WHOLE)
    assert all(equal(back[n], t) for n, t in WHOLE.items())
    assert group.named(carried=False) == Known(digest(WHOLE))
    assert Group({}).named(carried=True) is None


def test_the_bytes_of_a_message_that_names_and_of_one_that_carries():
    """The section is 16 bytes, a length, and the group as a payload of its own; all else is as without it."""
    bare, group = encode(FULL), Group(PAST)
    name = bytes.fromhex(digest(PAST))
    form = bytes([bare[6] | 8])
    for whole in (False, True):
        inner = encode(Message(PAST)) if whole else b""
        wanted = bare[:6] + form + bare[7:HEADER] + name + varint(len(inner)) + inner + bare[HEADER:]
        found = encode(FULL, group=group.named(carried=whole))
        assert found == sealed(wanted)
        sizes = part_sizes(bare)
        assert part_sizes(found) == {**sizes, "base": 16 + len(varint(len(inner))) + len(inner)}
        assert sum(part_sizes(found).values()) == len(found)
        assert known_in(found) == Known(digest(PAST), inner)
        back = decode(found, Expected(W, holds=frozenset([digest(PAST)])))
        assert torch.equal(back.tensors["w"], FULL.tensors["w"])
        with pytest.raises(TensorsNotHeldError, match=f"names tensors {digest(PAST)}, which the receiver does not"):
            decode(found, Expected(W, holds=frozenset([digest(WHOLE)])))
        assert with_scalar(found, "loss", 0.25) == encode(
            Message(FULL.tensors, None, {"loss": 0.25}), group=group.named(carried=whole)
        )
    assert known_in(bare) is None


def test_the_section_stands_behind_the_masks_hash():
    mask = {"w": torch.tensor([True, False, True])}
    sent = Message({"w": torch.tensor([1.0, 0.0, 3.0])}, mask)
    data = encode(sent, known=mask, group=Group(PAST).named(carried=True))
    assert known_in(data).digest == digest(PAST)
    assert part_sizes(data)["mask"] == 16
    back = decode(data, Expected(W, "same", known=mask, holds=frozenset([digest(PAST)])))
    assert torch.equal(back.tensors["w"], sent.tensors["w"])


def test_a_receiver_that_lacks_the_tensors_says_so():
    asked = encode(FULL, group=Group(PAST).named(carried=False))
    answer = lost(asked, tensors=True)
    assert answer == sealed(b"SCTR\x02\x02\0\0" + bytes(4) + asked[8:12] + bytes(12))
    assert is_lost(answer, context_of(asked), tensors=True)
    assert not is_lost(answer, context_of(asked))
    assert not is_lost(lost(asked), context_of(asked), tensors=True)
    with pytest.raises(WireError, match="asks for tensors that were named, here where nothing was referred to"):
        decode(answer, Expected(W))


def refused(given, specs, says, infinite=()):
    with pytest.raises(WireError, match=says):
        carried.read(given, specs, infinite)


def test_what_came_must_be_what_was_announced_and_what_is_expected():
    tensors = {"w": torch.ones(4)}
    given, specs = Group(tensors).named(carried=True), specs_of(tensors)
    other = Group({"w": torch.zeros(4)}).named(carried=True)
    refused(Known(given.digest, other.carried), specs, f"have the digest {other.digest}.*announced as {given.digest}")
    refused(given, {"v": specs["w"]}, "'w' is not expected")
    refused(given, {**specs, "v": Spec((1,))}, "'v' is missing")
    refused(given, {"w": Spec((5,))}, r"\(4,\) arrived")
    refused(given, {"w": Spec((4,), torch.int32)}, "float32 .* arrived")
    refused(given, {"w": Spec((4,), torch.bfloat16)}, r"float32 \(4,\) arrived")
    refused(Known(given.digest, b"x"), specs, "ends within the header")
    rounded = encode(Message(tensors), values="fp16")
    refused(Known(given.digest, rounded), specs, "asked for as fp32")
    masked = encode(Message(tensors, {"w": torch.ones(4, dtype=torch.bool)}))
    refused(Known(given.digest, masked), specs, "a mask came where none is accepted")
    refused(Known(given.digest, encode(Message(tensors, None, {"s": 1}))), specs, "1 scalars announced")


def test_infinities_come_where_they_are_allowed_and_nan_never():
    """Of a model's frozen tensors none may be infinite; a constant, such as a causal mask, may."""
    both = {**PAST, "w": torch.ones(2)}
    assert carried.read(Group(both).named(carried=True), specs_of(both), {"past"})
    refused(Group(both).named(carried=True), specs_of(both), "NaN or infinity")
    bad = {**PAST, "w": torch.tensor([1.0, math.inf])}
    refused(Group(bad).named(carried=True), specs_of(bad), "NaN or infinity", {"past"})
    for dtype in (torch.float32, torch.float16):
        nan = {"past": torch.tensor([math.nan, 0.0], dtype=dtype)}
        refused(Group(nan).named(carried=True), specs_of(nan), "NaN or infinity", {"past"})
    half = {"w": torch.tensor([math.inf], dtype=torch.float16)}
    refused(Group(half).named(carried=True), specs_of(half), "'w' holds NaN or infinity", {"past"})
    # an ordinary message takes none, whatever the format
    for values in ("fp32", "fp16", "bf16"):
        with pytest.raises(WireError, match="NaN or infinity"):
            decode(encode(Message({"w": bad["w"]}), values=values), Expected({"w": Spec((2,))}))


def test_a_bomb_is_refused_before_it_is_opened():
    frame = zstandard.ZstdCompressor().compress(bytes(10**8))
    honest = encode(Message({"w": torch.ones(4)}))
    planes = 4 * (b"\1" + varint(len(frame)) + frame)
    head = honest[: len(honest) - part_sizes(honest)["values"]]
    bomb = sealed(head[:20] + struct.pack("<Q", len(planes)) + head[28:] + planes)
    refused(Known(digest({"w": torch.ones(4)}), bomb), {"w": Spec((4,))}, "a frame of 100000000 bytes where 4")


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_whatever_is_done_to_a_payload_ends_in_the_group_or_in_wire_error(data):
    """Cut, flipped or with another length, its checksum made right again."""
    tensors = {"w": torch.linspace(-1, 1, 50)}
    group = Group(tensors).named(carried=True)
    whole = bytearray(encode(FULL, group=group))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(5, len(whole) - 1))
        whole[at] ^= data.draw(st.integers(1, 255))
    sent = sealed(bytes(whole[: data.draw(st.sampled_from([len(whole), len(whole) // 2, 60]))]))
    try:
        found = known_in(sent)
        sizes = part_sizes(sent)
        if found is not None and found.digest == group.digest:
            assert equal(carried.read(found, specs_of(tensors))["w"], tensors["w"])
    except WireError:
        return
    assert sum(sizes.values()) == len(sent)


def test_a_section_that_ends_too_early():
    for data, says in ((b"\0" * 15, "the digest of known tensors"), (b"\0" * 16 + b"\5abc", "the known tensors")):
        with pytest.raises(WireError, match=f"ends within {says}"):
            Known.read(Reader(data))
