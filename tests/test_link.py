"""What the two ends of a link remember; the arithmetic of updates and of what is left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import same
from secateur.errors import ConfigError, WireError
from secateur.federation import link
from secateur.federation.link import Kept, Links
from secateur.wire.message import Message, Spec
from secateur.wire.settings import Wire

SPECS = {"w": Spec((3, 5)), "v": Spec((2,)), "n": Spec((), torch.int64)}


def mask(seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(SPECS[n].shape, generator=generator) < 0.5 for n in ("w", "v")}


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(SPECS[n].shape, generator=generator) for n in ("w", "v")}
    return tensors | {"n": torch.tensor(seed)}


def test_the_book_says_who_holds_what():
    links = Links(SPECS)
    assert links.mask(1) is None
    links.confirm({1: True, 2: True, 3: False}, mask(0))
    links.confirm({2: True}, mask(1))
    assert same(links.mask(1), mask(0))
    assert same(links.mask(2), mask(1))
    assert links.mask(3) is None
    assert len(links.versions) == 2
    links.confirm({1: False}, mask(1))  # asked and not heard of: it may hold either
    assert links.mask(1) is None
    assert len(links.versions) == 1  # nobody holds the first any more
    links.confirm({2: True}, mask(1))
    assert same(links.mask(2), mask(1))


def test_the_book_keeps_so_many_versions_and_survives_a_checkpoint():
    links = Links(SPECS)
    for client in range(40):
        links.confirm({client: True}, mask(client))
    assert len(links.versions) == 32
    assert [client for client in range(40) if links.mask(client) is None] == list(range(8))
    again = Links(SPECS)
    again.restore(links.held, links.tensors())
    assert again.held == links.held
    assert list(again.versions) == list(links.versions)
    assert all(same(again.mask(client), mask(client)) for client in range(8, 40))


def test_what_a_client_keeps_stands_beside_its_methods_memory():
    kept = Kept(mask(3), {"w": torch.ones(3, 5)})
    memory = {"theirs": torch.arange(3.0)}
    again, rest = Kept.split(memory | kept.tensors(), SPECS)
    assert same(rest, memory)
    assert same(again.held, mask(3))
    assert same(again.error, kept.error)
    assert Kept.split({}, SPECS) == (Kept(), {})


def test_what_a_client_kept_of_another_model_is_forgotten():
    """A new model in an old folder: no mask is held, so the whole one is asked for."""
    other = {"w": Spec((4, 5)), "v": Spec((2,))}
    again, _ = Kept.split(Kept(mask(3), {"w": torch.ones(3, 5), "v": torch.ones(2)}).tensors(), other)
    assert again.held is None
    assert set(again.error) == {"v"}
    assert Kept.split(Kept(mask(3)).tensors(), {"v": Spec((2,))})[0].held is None


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.booleans())
def test_updates_there_and_back(seed, masked):
    base, reply = weights(seed), weights(seed + 1)
    kept = mask(seed) if masked else None
    if masked:
        reply = {n: torch.where(kept[n], t, 0.0) if n in kept else t for n, t in reply.items()}
    update = link.as_update(Message(reply, kept, {"samples": 3}), base)
    assert update.tensors["n"] == reply["n"]  # only floats have differences
    assert torch.equal(
        update.tensors["v"], torch.where(kept["v"], reply["v"] - base["v"], 0.0) if masked else reply["v"] - base["v"]
    )
    back = link.from_update(update, base)
    assert back.scalars == {"samples": 3}
    assert all(torch.allclose(back.tensors[n].float(), t.float(), atol=1e-6) for n, t in reply.items())


def test_an_update_beyond_the_range_is_refused():
    base = {"w": torch.tensor([3e38])}
    with pytest.raises(WireError, match="'w'.*beyond"):
        link.from_update(Message({"w": torch.tensor([3e38])}), base)


def test_the_largest_by_hand():
    tensors = {"b": torch.tensor([3.0, -5.0, 1.0]), "a": torch.tensor([[3.0, 0.5], [-4.0, 9.0]]), "n": torch.tensor(2)}
    kept = {"a": torch.tensor([[True, True], [True, False]])}
    top = link.largest(Message(tensors, kept), 0.5)  # 6 entries are kept by the mask: 3 are sent
    # -5, -4, then 3.0 twice: the earlier, in the order of names, is a's
    assert top.tensors["a"].tolist() == [[3.0, 0.0], [-4.0, 0.0]]
    assert top.tensors["b"].tolist() == [0.0, -5.0, 0.0]
    assert top.mask["b"].tolist() == [False, True, False]
    assert top.tensors["n"] == 2
    assert sum(int(m.sum()) for m in link.largest(Message(tensors, kept), 1e-9).mask.values()) == 1


def test_what_is_left_out_is_added_next_time():
    wanted = Message({"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(1)})
    arrived = Message({"w": torch.tensor([1.5, 0.0]), "n": torch.tensor(1)})
    error = link.left_out(wanted, arrived)
    assert {n: t.tolist() for n, t in error.items()} == {"w": [-0.5, 2.0]}
    after = link.add(Message({"w": torch.ones(2)}, {"w": torch.tensor([True, False])}), error)
    assert after.tensors["w"].tolist() == [0.5, 0.0]  # nothing where the mask prunes


def test_wire_options():
    assert not Wire().leaves_out
    assert Wire("int8").leaves_out
    assert Wire(replies="topk").leaves_out
    assert not Wire(replies="updates").leaves_out
    with pytest.raises(ConfigError, match=r"wire\.topk = 0"):
        Wire(topk=0.0)
