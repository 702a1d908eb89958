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


def test_commit_restore_and_collect(tmp_path):
    store = StateStore(tmp_path)
    store.put(1, b"one")
    store.put(2, b"two")
    first = store.commit()
    assert sorted(first) == [1, 2]
    store.put(1, b"changed")
    store.put(3, b"never committed")
    later = StateStore(tmp_path)
    later.restore(first)
    assert (later.get(1), later.get(2), later.get(3)) == (b"one", b"two", None)
    second = store.commit()
    assert second[2] == first[2]
    store.collect(second)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(second.values())
    assert store.commit() == second


def test_a_state_within_no_budget_still_works(tmp_path):
    store = StateStore(tmp_path, budget=0)
    store.put(1, b"x")
    assert store.get(1) == b"x"
    assert store.commit().keys() == {1}


def test_damage_is_named(tmp_path):
    store = StateStore(tmp_path)
    store.put(4, b"state")
    manifest = store.commit()
    (tmp_path / manifest[4]).write_bytes(b"other")
    with pytest.raises(CheckpointError, match="client 4.*damaged"):
        StateStore(tmp_path).restore(manifest)
    (tmp_path / manifest[4]).unlink()
    with pytest.raises(CheckpointError, match="client 4.*cannot read"):
        StateStore(tmp_path).restore(manifest)


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
    store.collect(store.commit())
    store.close()
    assert not store.folder.exists()
    StateStore(store.folder).collect({})


def test_what_a_kill_left_half_written_is_collected(tmp_path):
    (tmp_path / "3-0123456789abcdef.tmp").write_bytes(b"hal")
    store = StateStore(tmp_path)
    store.put(1, b"one")
    manifest = store.commit()
    store.collect(manifest)
    assert [p.name for p in tmp_path.iterdir()] == [manifest[1]]


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
    store = StateStore(tmp_path / "states", budget=200_000)
    for client in range(10_000):
        store.put(client, b"%d" % client * 100)
        assert sum(map(len, store._memory.values())) <= 200_000
    manifest = store.commit()
    assert len(manifest) == 10_000
    again = StateStore(tmp_path / "states", budget=200_000)
    again.restore(manifest)
    assert all(again.get(client) == b"%d" % client * 100 for client in range(0, 10_000, 97))
    assert sum(map(len, again._memory.values())) <= 200_000
