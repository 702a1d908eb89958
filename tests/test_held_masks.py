"""Who holds which mask: names of all, contents of the newest that many hold."""

import torch

from helpers import same
from secateur.federation.held_masks import HeldMasks, name_of
from secateur.wire import masks as packing
from secateur.wire.message import Spec

SPECS = {"w": Spec((3, 5)), "v": Spec((2,))}


def mask(seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(spec.shape, generator=generator) < 0.5 for n, spec in SPECS.items()}


def held_by(held, client):
    name = held.name(client)
    return None if name is None else held.mask(name)


def test_the_notes_say_who_holds_what():
    held = HeldMasks(SPECS)
    assert held.name(1) is None
    held.confirm({1: True, 2: True, 3: False}, mask(0))
    held.confirm({2: True}, mask(1))
    assert same(held_by(held, 1), mask(0))
    assert same(held_by(held, 2), mask(1))
    assert held.name(3) is None
    held.confirm({1: False}, mask(1))  # asked and not heard of: it may hold either
    assert held.name(1) is None
    held.confirm({2: True}, mask(1))
    assert held.name(2) == packing.digest(mask(1)).hex()


def test_what_names_stand_for_is_kept_of_the_newest_only_and_survives_a_checkpoint():
    held = HeldMasks(SPECS)
    for client in range(40):
        held.confirm({client: True}, mask(client))
        held.confirm({99: True}, mask(99))  # used all the time: always among the newest
    assert len(held.versions) == len(held.order) == 32
    assert [client for client in range(40) if held.name(client) is None] == list(range(9))
    again = HeldMasks(SPECS, held.held, held.versions, held.order)
    assert all(same(held_by(again, client), mask(client)) for client in (*range(9, 40), 99))
    again.confirm({50: True}, mask(50))
    assert again.name(9) is None


def test_a_mask_that_nobody_answered_to_takes_no_place():
    held = HeldMasks(SPECS)
    held.confirm({1: False, 2: False}, mask(0))
    assert (list(held.versions), held.order) == ([], [])


def test_a_mask_of_a_clients_own_is_known_by_name_to_who_has_it():
    held = HeldMasks(SPECS)
    for client in range(1000):
        held.note(client, name_of(mask(client)))
    assert not held.versions
    assert held.name(7) is None
    assert held.name(7, at_hand=name_of(mask(7))) == name_of(mask(7))
    assert held.name(7, at_hand=name_of(mask(8))) is None
    held.note(7, None)
    assert held.name(7, at_hand=name_of(mask(7))) is None
    held.note(7, None)
