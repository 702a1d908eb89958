"""Our payloads, read by a second implementation written from docs/wire.md; and the vectors of that page."""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.wire.carried import Group
from secateur.wire.codec import decode, encode
from secateur.wire.message import Expected, Message, Spec
from secateur.wire.values import FORMATS
from wire import reference
from wire.drawing import messages

LETTERS = {torch.float32: "f", torch.int64: "q", torch.int32: "i", torch.uint8: "B", torch.bool: "?"}
PAGE = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()


def cells(tensor):
    return {cell: tensor[cell].item() for cell in reference.cells(tuple(tensor.shape))}


@settings(deadline=None, max_examples=150)
@given(messages(largest=7), st.sampled_from(FORMATS), st.booleans(), st.booleans())
def test_a_second_implementation_reads_what_we_write(drawn, values, by_hash, known):
    message, held = drawn
    held = message.mask if known and message.mask is not None else held
    template = {n: Spec(tuple(t.shape), t.dtype) for n, t in message.tensors.items()}
    data = encode(message, values=values, known=held, template=template if by_hash else None, seed=3)
    ours = decode(data, Expected.of(message.tensors, mask="optional", known=held))
    scalars, mask, tensors = reference.decode(
        data,
        {n: (LETTERS[s.dtype], s.shape) for n, s in template.items()},
        None if held is None else {n: (tuple(m.shape), cells(m)) for n, m in held.items()},
    )
    assert scalars == ours.scalars == message.scalars
    assert (mask is None) == (message.mask is None)
    assert (mask or {}) == {n: cells(m) for n, m in (message.mask or {}).items()}
    for name, tensor in ours.tensors.items():
        # plain Python multiplies int8's scales in double precision
        theirs = torch.tensor(list(tensors[name].values()), dtype=tensor.dtype).reshape(tensor.shape)
        assert torch.equal(theirs, tensor)


VECTORS = re.findall(
    r"^### (.+?)\n.*?```hex\n(.*?)```", PAGE.partition("## Test vectors")[2], flags=re.DOTALL | re.MULTILINE
)
BLOCK = torch.zeros(8, 8, dtype=torch.bool)
BLOCK[2, 1] = BLOCK[2, 3] = BLOCK[5, 1] = True
SPARSE = torch.arange(600).remainder(50) == 7
DENSE = {"b": torch.tensor([0.5, -1.5]), "n": torch.tensor(3)}

PAST = {"past": torch.tensor([[0.0, -math.inf], [0.0, 0.0]])}
NAMING = Message({"b": torch.tensor([0.5])}, None, {"round": 1})


def ramp(mask):
    return torch.where(mask, torch.arange(1.0, mask.numel() + 1).reshape(mask.shape), 0.0)


EXAMPLES = {
    "Dense": (Message(DENSE, None, {"phase": "train", "round": 1}), {}),
    "Fresh mask, dead units named": (Message({"w": ramp(BLOCK)}, {"w": BLOCK}), {}),
    "Fresh mask, coded": (Message({"w": ramp(SPARSE)}, {"w": SPARSE}), {}),
    "Changed mask": (Message({"w": ramp(SPARSE & (torch.arange(600) > 99))}, {"w": SPARSE & (torch.arange(600) > 99)}),
                     {"known": {"w": SPARSE}}),
    "Known mask, tensors by hash, answering": (
        Message({"w": ramp(SPARSE)}, {"w": SPARSE}),
        {"known": {"w": SPARSE}, "template": {"w": Spec((600,))}, "context": 0x01020304},
    ),
    "bfloat16": (Message({"w": torch.tensor([1.0, -2.0, 3.140625])}), {"values": "bf16"}),
    "int8": (Message({"b": torch.tensor([0.25]), "w": torch.tensor([[127.0, -64.0, 0.0]])}), {"values": "int8"}),
    "Known tensors, named": (NAMING, {"group": Group(PAST).named(carried=False)}),
    "Known tensors, carried": (NAMING, {"group": Group(PAST).named(carried=True)}),
}  # fmt: skip


def test_the_page_has_a_vector_for_every_example():
    assert [title for title, _ in VECTORS] == list(EXAMPLES)


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_vectors_of_the_page_are_what_is_written_and_read(title):
    message, how = EXAMPLES[title]
    vector = bytes.fromhex("".join(dict(VECTORS)[title].split()))
    assert encode(message, **how).hex(" ") == vector.hex(" ")
    known = how.get("known")
    holds = frozenset([how["group"].digest]) if "group" in how else frozenset()
    back = decode(vector, Expected.of(message.tensors, mask="optional", known=known, holds=holds))
    assert all(torch.equal(back.tensors[n], t) for n, t in message.tensors.items())
    held = None if known is None else {n: (tuple(m.shape), cells(m)) for n, m in known.items()}
    template = {n: (LETTERS[t.dtype], tuple(t.shape)) for n, t in message.tensors.items()}
    scalars, mask, tensors = reference.decode(vector, template, held)
    assert scalars == message.scalars
    assert (mask or {}) == {n: cells(m) for n, m in (message.mask or {}).items()}
    assert tensors == {n: cells(t) for n, t in message.tensors.items()}


@pytest.mark.parametrize("title", [title for title, (_, how) in EXAMPLES.items() if "group" in how])
def test_a_second_implementation_finds_the_tensors_that_are_named(title):
    vector = bytes.fromhex("".join(dict(VECTORS)[title].split()))
    name, tensors = reference.known(vector, {"past": ("f", (2, 2))})
    assert name.hex() == EXAMPLES[title][1]["group"].digest
    assert tensors == ({"past": cells(PAST["past"])} if title.endswith("carried") else None)
