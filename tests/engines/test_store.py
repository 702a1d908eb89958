"""Client states: spilled beyond the budget, durable after a commit, checked when read."""

import os
import stat

import pytest

from secateur.engines.store import StateStore
from secateur.errors import CheckpointError


def test_spills_the_least_recently_used(tmp_path):
    store = StateStore(tmp_path, budget=25)
    for k in range(3):
        store.put(k, b"%d" % k * 10)
    assert len(list(tmp_path.glob("0-*.state"))) == 1
    assert [store.get(k) for k in range(3)] == [b"0" * 10, b"1" * 10, b"2" * 10]
    assert store.get(7) is None


def started(folder, names=None, **more):
    store = StateStore(folder, **more)
    store.restore({} if names is None else names)
    return store


def test_commit_restore_and_collect(tmp_path):
    names = {}
    store = started(tmp_path, names)
    store.put(1, b"one")
    store.put(2, b"two")
    store.commit()
    first = dict(names)
    assert sorted(first) == [1, 2]
    store.put(1, b"changed")
    store.put(3, b"three")
    store.commit()
    assert names[2] == first[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({*first.values(), *names.values()})
    store.collect()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names.values())
    store.commit()
    store.collect()
    assert [started(tmp_path, names).get(k) for k in (1, 2, 3)] == [b"changed", b"two", b"three"]


def test_who_goes_on_from_before_the_last_commit_finds_what_was_then(tmp_path):
    """A kill after the commit and before the checkpoint: nothing that was replaced has been deleted."""
    names = {}
    store = started(tmp_path, names, budget=0)
    store.put(1, b"one")
    store.commit()
    store.collect()
    before = dict(names)
    for changed in (b"changed", b"twice", b"one", b"again"):
        store.put(1, changed)
    store.put(2, b"two")
    store.commit()
    later = started(tmp_path, before)
    assert (later.get(1), later.get(2)) == (b"one", None)
    later.collect()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(before.values())  # the others are gone


def test_what_became_what_it_was_is_not_deleted(tmp_path):
    names = {}
    store = started(tmp_path, names, budget=0)
    for data in (b"one", b"two", b"one"):
        store.put(1, data)
    store.commit()
    store.collect()
    assert started(tmp_path, names).get(1) == b"one"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_state_within_no_budget_still_works(tmp_path):
    store = StateStore(tmp_path, budget=0)
    store.put(1, b"x")
    assert store.get(1) == b"x"
    store.commit()
    assert store.get(1) == b"x"


def test_damage_is_named(tmp_path):
    names = {}
    store = started(tmp_path, names)
    store.put(4, b"state")
    store.put(5, b"other")
    store.commit()
    (tmp_path / names[4]).write_bytes(b"other")
    later = started(tmp_path, names)
    assert later.get(5) == b"other"
    with pytest.raises(CheckpointError, match="client 4.*damaged"):
        later.get(4)
    (tmp_path / names[4]).unlink()
    with pytest.raises(CheckpointError, match="client 4.*cannot read"):
        later.get(4)
    with pytest.raises(CheckpointError, match="client 4.*missing"):
        started(tmp_path, names)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    store = StateStore(tmp_path / "file")
    store.put(1, b"x")
    with pytest.raises(CheckpointError, match="cannot write client state"):
        store.commit()


def test_a_temporary_folder_goes_away():
    store = StateStore(budget=0)
    store.put(1, b"x")
    assert store.folder.exists()
    store.commit()
    store.collect()
    store.close()
    assert not store.folder.exists()
    started(store.folder).collect()


def test_what_a_kill_left_half_written_is_collected(tmp_path):
    (tmp_path / "3-0123456789abcdef.tmp").write_bytes(b"hal")
    (tmp_path / "3-0123456789abcdef.state").write_bytes(b"never in a checkpoint")
    names = {}
    store = started(tmp_path, names)
    store.put(1, b"one")
    store.commit()
    assert len(list(tmp_path.iterdir())) == 3  # until a checkpoint is written
    store.collect()
    assert [p.name for p in tmp_path.iterdir()] == [names[1]]


def test_a_commit_writes_the_folder_too(tmp_path, monkeypatch):
    """Once for a commit that wrote something, however many files; not for one that wrote nothing."""
    synced = []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append(stat.S_ISDIR(os.fstat(handle).st_mode)))
    store = StateStore(tmp_path, budget=0)
    store.put(1, b"spilled at once")
    store.put(2, b"this too")
    assert synced == [False, False]
    store.commit()
    assert synced == [False, False, True]
    store.commit()
    assert synced == [False, False, True]


def test_ten_thousand_clients_lie_on_disk(tmp_path):
    names = {}
    store = started(tmp_path / "states", names, budget=200_000)
    for client in range(10_000):
        store.put(client, b"%d" % client * 100)
        assert sum(map(len, store._memory.values())) <= 200_000
    store.commit()
    assert len(names) == 10_000
    again = started(tmp_path / "states", names, budget=200_000)
    assert all(again.get(client) == b"%d" % client * 100 for client in range(0, 10_000, 97))
    assert sum(map(len, again._memory.values())) <= 200_000
