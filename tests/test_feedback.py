"""Updates, their largest entries, and the residual of both; what a client's end of the wire remembers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import same
from secateur.errors import ConfigError, WireError
from secateur.federation import feedback
from secateur.federation.feedback import WireMemory
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


def test_what_a_client_keeps_stands_beside_its_methods_memory():
    kept = WireMemory(mask(3), mask(4), {"w": torch.ones(3, 5)})
    memory = {"theirs": torch.arange(3.0)}
    again, rest = WireMemory.split(memory | kept.tensors(), SPECS)
    assert same(rest, memory)
    assert same(again.held, mask(3))
    assert same(again.own, mask(4))
    assert same(again.residual, kept.residual)
    assert WireMemory.split({}, SPECS) == (WireMemory(), {})


def test_the_mask_of_a_reply_is_remembered_where_it_is_another():
    first = WireMemory().after(mask(1), mask(2))
    assert [same(known, mask(seed)) for known, seed in zip(first.known(), (2, 1), strict=True)] == [True, True]
    assert first.after(None, mask(3)) is first  # nothing came that could be held
    assert first.after(mask(2), None) is first  # scored under its own mask, which it holds
    for reply in (None, mask(4)):
        (only,) = first.after(mask(4), reply).known()
        assert same(only, mask(4))
    assert WireMemory().known() == [None]


def test_what_a_client_kept_of_another_model_is_forgotten():
    """A new model in an old folder: no mask is held, so the whole one is asked for."""
    other = {"w": Spec((4, 5)), "v": Spec((2,))}
    again, _ = WireMemory.split(
        WireMemory(mask(3), mask(4), {"w": torch.ones(3, 5), "v": torch.ones(2)}).tensors(), other
    )
    assert again.known() == [None]
    assert set(again.residual) == {"v"}
    assert WireMemory.split(WireMemory(mask(3)).tensors(), {"v": Spec((2,))})[0].held is None


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.booleans())
def test_updates_there_and_back(seed, masked):
    base, reply = weights(seed), weights(seed + 1)
    kept = mask(seed) if masked else None
    if masked:
        reply = {n: torch.where(kept[n], t, 0.0) if n in kept else t for n, t in reply.items()}
    update = feedback.as_update(Message(reply, kept, {"samples": 3}), base)
    assert update.tensors["n"] == reply["n"]  # only floats have differences
    assert torch.equal(
        update.tensors["v"], torch.where(kept["v"], reply["v"] - base["v"], 0.0) if masked else reply["v"] - base["v"]
    )
    back = feedback.from_update(update, base)
    assert back.scalars == {"samples": 3}
    assert all(torch.allclose(back.tensors[n].float(), t.float(), atol=1e-6) for n, t in reply.items())


def test_an_update_beyond_the_range_is_refused():
    base = {"w": torch.tensor([3e38])}
    with pytest.raises(WireError, match="'w'.*beyond"):
        feedback.from_update(Message({"w": torch.tensor([3e38])}), base)


def test_the_largest_by_hand():
    tensors = {"b": torch.tensor([3.0, -5.0, 1.0]), "a": torch.tensor([[3.0, 0.5], [-4.0, 9.0]]), "n": torch.tensor(2)}
    kept = {"a": torch.tensor([[True, True], [True, False]])}
    top = feedback.top_k(Message(tensors, kept), 0.5)  # 6 entries are kept by the mask: 3 are sent
    # -5, -4, then 3.0 twice: the earlier, in the order of names, is a's
    assert top.tensors["a"].tolist() == [[3.0, 0.0], [-4.0, 0.0]]
    assert top.tensors["b"].tolist() == [0.0, -5.0, 0.0]
    assert top.mask["b"].tolist() == [False, True, False]
    assert top.tensors["n"] == 2
    assert sum(int(m.sum()) for m in feedback.top_k(Message(tensors, kept), 1e-9).mask.values()) == 1


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.booleans(), st.floats(0.01, 1.0))
def test_the_largest_are_those_of_a_stable_sort(seed, masked, share):
    """An independent way: numpy's stable argsort over all tensors in the order of their names; values repeat."""
    draw = np.random.default_rng(seed)
    tensors = {n: torch.from_numpy(draw.integers(-4, 5, (3, 5)).astype(np.float32)) for n in ("b", "a", "c")}
    kept = {n: torch.from_numpy(draw.random((3, 5)) < 0.5) for n in ("b", "c")} if masked else None
    top = feedback.top_k(Message(tensors, kept), share)
    allowed = np.concatenate([(kept or {}).get(n, torch.ones(3, 5) > 0).numpy().ravel() for n in sorted(tensors)])
    sizes = np.where(allowed, np.concatenate([tensors[n].abs().numpy().ravel() for n in sorted(tensors)]), -1)
    chosen = np.zeros(sizes.size, bool)
    chosen[np.argsort(-sizes, kind="stable")[: max(1, int(share * allowed.sum()))]] = True
    assert np.concatenate([top.mask[n].numpy().ravel() for n in sorted(tensors)]).tolist() == chosen.tolist()
    assert all(torch.equal(top.tensors[n] == 0, ~top.mask[n] | (tensors[n] == 0)) for n in tensors)


def test_what_is_left_out_is_added_next_time():
    wanted = Message({"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(1)})
    arrived = Message({"w": torch.tensor([1.5, 0.0]), "n": torch.tensor(1)})
    residual = feedback.residual(wanted, arrived)
    assert {n: t.tolist() for n, t in residual.items()} == {"w": [-0.5, 2.0]}
    after = feedback.add(Message({"w": torch.ones(2)}, {"w": torch.tensor([True, False])}), residual)
    assert after.tensors["w"].tolist() == [0.5, 0.0]  # nothing where the mask prunes


def test_wire_options():
    assert not Wire().has_residual
    assert Wire("int8").has_residual
    assert Wire(replies="topk").has_residual
    assert not Wire(replies="updates").has_residual
    with pytest.raises(ConfigError, match=r"wire\.topk = 0"):
        Wire(topk=0.0)
