"""The store, the archive and the books: facts by client that go together with the checkpoint, whatever is killed."""

import os
import shutil
import sqlite3
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import INLINE, model_of, rows_of, same, small, tiny_shards
from secateur.errors import CheckpointError
from secateur.federation import checkpoint, server
from secateur.federation.archive import Archive
from secateur.federation.folder import reserve
from secateur.federation.store import NAME, Store


def opened(path, mark=None):
    store = Store(path)
    store.open(mark)
    return store


def contents(store, kind="mask"):
    return dict(store.facts(kind))


# ---- the store


def test_facts_are_mappings_by_kind():
    store = Store()
    held, files = store.facts("mask"), store.facts("archive")
    held[3], held[1], files["mask/3"] = "a", "b", "c"
    held[3] = "d"
    assert (list(held.items()), list(files.items())) == ([(1, "b"), (3, "d")], [("mask/3", "c")])
    assert (len(held), held.get(2), held.pop(1), held.pop(1, None)) == (2, None, "b", None)
    assert 1 not in held
    for missing in (lambda: held[9], lambda: held.__delitem__(9)):
        with pytest.raises(KeyError):
            missing()
    assert held.setdefault(9, "e") == held.setdefault(9, "f") == "e"


def test_a_store_goes_on_from_its_last_commit(tmp_path):
    store = opened(tmp_path / NAME)
    store.facts("mask")[1] = "a"
    mark = store.commit()
    store.facts("mask")[1] = "lost"
    store.close()
    assert contents(opened(tmp_path / NAME, mark)) == {1: "a"}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["a", "b", None])), max_size=8), max_size=6))
def test_every_exchange_can_be_taken_back_once(tmp_path_factory, exchanges):
    """Against a plain dictionary of each moment: the last commit, and the one before it."""
    path = tmp_path_factory.mktemp("store") / NAME
    store, moments, now = opened(path), [], {}
    for changes in exchanges:
        for client, name in changes:
            now[client] = name
            if name is None:
                store.facts("mask").pop(client, None)
            else:
                store.facts("mask")[client] = name
        moments.append((store.commit(), {k: v for k, v in now.items() if v is not None}))
    store.close()
    for number, (mark, expected) in enumerate(moments, start=1):
        there = path.with_name(f"{number}.sqlite")
        shutil.copy(path, there)
        if number < len(moments) - 1:
            with pytest.raises(
                CheckpointError, match=rf"is of exchange {len(moments)} and .* of {number}: they are not"
            ):
                opened(there, mark)
            continue
        for _ in range(2):  # what is taken back stays so without another commit, and with it
            store = opened(there, mark)
            assert contents(store) == expected
            store.close()
        store = opened(there, mark)
        store.facts("mask")[0] = "after"
        assert store.commit()["exchange"] == number + 1
        store.close()
        assert contents(opened(there, mark)) == expected


def test_a_refused_checkpoint_takes_nothing_with_it(tmp_path):
    store = opened(tmp_path / NAME)
    old = store.commit()
    store.facts("mask")[1] = "a"
    new = store.commit()
    store.close()
    opened(tmp_path / NAME, old).close()
    assert contents(opened(tmp_path / NAME, new)) == {1: "a"}


def test_a_checkpoint_that_is_newer_than_its_store_is_refused(tmp_path):
    store = opened(tmp_path / NAME)
    store.facts("mask")[1] = "a"
    store.commit()
    store.close()
    shutil.copy(tmp_path / NAME, tmp_path / "old")
    store = opened(tmp_path / NAME, {**_mark(tmp_path / NAME)})
    mark = store.commit()
    store.close()
    shutil.copy(tmp_path / "old", tmp_path / NAME)
    with pytest.raises(CheckpointError, match="is of exchange 1 and the checkpoint beside it of 2.*secateur run"):
        opened(tmp_path / NAME, mark)


def _mark(path):
    store = Store(path)
    store._connect()
    store._sum = store._summed()
    mark = {"exchange": store._exchange, "digest": store._digest()}
    store.close()
    return mark


def test_a_missing_store_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"clients\.sqlite is missing.*secateur run --config"):
        opened(tmp_path / NAME, {"exchange": 3, "digest": "00"})


def test_a_store_without_its_checkpoint_is_no_new_run(tmp_path):
    """One exchange may have been committed before the first checkpoint; more than one had a checkpoint."""
    store = opened(tmp_path / NAME)
    store.facts("mask")[1] = "a"
    store.commit()
    store.close()
    store = opened(tmp_path / NAME)
    assert contents(store) == {}
    store.commit()
    store.commit()
    store.close()
    with pytest.raises(CheckpointError, match="checkpoint beside .* is missing, though 2 exchanges were complete"):
        opened(tmp_path / NAME)


def filled(path, count=300):
    store = opened(path)
    store.facts("mask").update({client: f"{client:032x}" for client in range(count)})
    mark = store.commit()
    store.close()
    return mark


def test_every_kind_of_damage_is_one_clear_line_or_no_damage(tmp_path):
    """Of a flipped bit nothing is noticed only where nothing hangs on it: all facts are then what they were."""
    mark = filled(tmp_path / NAME)
    whole, expected = (tmp_path / NAME).read_bytes(), {client: f"{client:032x}" for client in range(300)}
    refused = 0
    for at in range(0, len(whole), len(whole) // 150):
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / NAME).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        said = ""
        try:
            store = opened(tmp_path / NAME, mark)
            assert contents(store) == expected
            store.close()
        except CheckpointError as error:
            said = str(error)
        refused += NAME in said and "\n" not in said
        assert not said or NAME in said
    assert refused > 75
    for data in (b"", b"x" * 5000, whole[: len(whole) // 2]):
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / NAME).write_bytes(data)
        with pytest.raises(CheckpointError, match=r"clients\.sqlite"):
            opened(tmp_path / NAME, mark)


def test_a_changed_fact_is_noticed(tmp_path):
    mark = filled(tmp_path / NAME)
    with sqlite3.connect(tmp_path / NAME) as database:
        database.execute("UPDATE facts SET value = ? WHERE key = 7", ("0" * 32,))
    database.close()
    with pytest.raises(CheckpointError, match="is damaged .its digest differs"):
        opened(tmp_path / NAME, mark)


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read or write .*clients\.sqlite"):
        Store(tmp_path / NAME)._connect()
    with pytest.raises(RuntimeError, match="not open"):
        Store(tmp_path / "never opened").get("mask", 1)


def written(path, clients, rounds=6, cohort=100):
    """Return the bytes that one exchange writes into a store in which all clients have facts of three kinds."""
    store, draw = opened(path), torch.Generator().manual_seed(0)
    for client in range(clients):
        for kind in ("mask", "train rows", "clients"):
            store.put(kind, client, f"{client:032x}" if kind != "train rows" else 20)
    store.commit()
    store.close()
    sizes = []
    for number in range(1, rounds):
        store = opened(path, _mark(path)) if number == 1 else store
        for client in torch.randperm(clients, generator=draw)[:cohort].tolist():
            for kind in ("mask", "clients"):
                store.put(kind, client, f"{number * clients + client:032x}")
        before = _log(path)
        store.commit()
        sizes.append(_log(path) - before)
    store.close()
    return sorted(sizes)[len(sizes) // 2]


def _log(path):
    log = path.with_name(path.name + "-wal")
    return log.stat().st_size if log.exists() else 0


def test_what_an_exchange_writes_does_not_grow_with_clients(tmp_path):
    sizes = [written(tmp_path / f"{count}.sqlite", count) for count in (1_000, 10_000, 40_000)]
    assert min(sizes) > 0
    assert max(sizes) < 1.3 * min(sizes), sizes


# ---- the archive


def test_archive_entries_are_exact_and_checked(tmp_path):
    archive = Archive(tmp_path / "archive")
    archive["deviation/3"] = {"b": torch.tensor([-0.0, 2.0]), "a": torch.ones(1, 2)}
    assert list(archive["deviation/3"]) == ["b", "a"]
    assert torch.signbit(archive["deviation/3"]["b"]).tolist() == [True, False]
    assert (list(archive), len(archive), "deviation/4" in archive) == (["deviation/3"], 1, False)
    (path,) = (tmp_path / "archive").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match=r"deviation%2F3.* is damaged"):
        archive["deviation/3"]
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        archive["deviation/3"]


def test_what_was_replaced_or_deleted_stays_until_it_is_collected(tmp_path):
    digests = {}
    archive = Archive(tmp_path, digests)
    one, two = {"a": torch.ones(2)}, {"a": torch.zeros(2)}
    archive["mask/1"], archive["mask/2"] = one, one
    before = dict(digests)
    archive["mask/1"] = two
    del archive["mask/2"]
    archive.commit()
    held = Archive(tmp_path, before)  # a kill now: the last checkpoint still has both
    assert same(held["mask/1"], one)
    assert same(held["mask/2"], one)
    archive.collect()
    assert [path.name.rpartition(".")[0].rpartition(".")[0] for path in tmp_path.iterdir()] == ["mask%2F1"]
    assert same(Archive(tmp_path, digests)["mask/1"], two)


def test_an_entry_that_became_what_it_was_is_not_deleted(tmp_path):
    archive = Archive(tmp_path)
    for value in (0.0, 1.0, 0.0):
        archive["mask/1"] = {"a": torch.full((2,), value)}
    archive.collect()
    assert archive["mask/1"]["a"].tolist() == [0.0, 0.0]
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_kill_left_behind_goes_with_the_next_checkpoint(tmp_path):
    digests = {}
    archive = Archive(tmp_path / "archive", digests)
    archive.check()
    archive["a.b/c d"] = {"a": torch.ones(1)}
    kept = dict(digests)
    archive["a.b/c d"] = {"a": torch.zeros(1)}
    archive["new"] = {"a": torch.zeros(1)}
    (tmp_path / "archive" / "half.tmp").write_bytes(b"hal")
    again = Archive(tmp_path / "archive", kept)
    again.check()
    assert len(list((tmp_path / "archive").iterdir())) == 4
    again.collect()
    assert len(list((tmp_path / "archive").iterdir())) == 1
    assert again["a.b/c d"]["a"].tolist() == [1.0]
    for path in (tmp_path / "archive").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match=r"a\.b%2Fc%20d.* is missing"):
        again.check()


def test_a_folder_is_synced_once_an_exchange(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append(stat.S_ISDIR(os.fstat(handle).st_mode)))
    archive = Archive(tmp_path / "archive")
    archive["a"], archive["b"] = {"a": torch.ones(1)}, {"a": torch.ones(1)}
    archive["a"] = {"a": torch.ones(1)}  # what it is already
    archive.commit()
    archive.commit()
    assert synced == [False, False, True]


# ---- a run


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


class Stop(Exception):
    pass


def stop(event):
    if event["event"] == "row":
        raise Stop


PERSONAL = [("subfedavg", "accuracy=0.1"), ("dispfl",), ("fedsparsify",), ("fedpub",)]


@pytest.mark.parametrize("method", PERSONAL, ids=lambda method: method[0])
def test_a_kill_between_store_and_checkpoint_resumes_to_the_same_model(method, tmp_path, shards, monkeypatch):
    """The store and all files are of the new exchange, the checkpoint is of the one before: at every exchange."""
    study = small(*method, rounds=5, training={"epochs": 2, "batch_size": 16, "lr": 0.1})
    reserve(tmp_path / "whole", study)
    server.resume(tmp_path / "whole", INLINE, shards=shards)
    reserve(tmp_path / "cut", study)
    save, at = checkpoint.save, [0]

    def killed(folder, state, *rest):
        at[0] += 1
        if at[0] % 2:
            raise Stop  # the exchange is lost and done again
        save(folder, state, *rest)

    monkeypatch.setattr(checkpoint, "save", killed)
    for _ in range(40):
        try:
            server.resume(tmp_path / "cut", INLINE, shards=shards)
            break
        except Stop:
            continue
    assert same(model_of(tmp_path / "cut"), model_of(tmp_path / "whole"))
    strip = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(tmp_path / "cut")]
    assert strip == [{k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(tmp_path / "whole")]
    files = [
        {path.name for path in (folder / "archive").glob("*")} for folder in (tmp_path / "cut", tmp_path / "whole")
    ]
    assert files[0] == files[1]  # nothing that was replaced or lost is left


def test_an_older_copy_of_a_checkpoint_is_refused_and_the_right_one_goes_on(tmp_path, shards):
    study = small("fedsparsify", rounds=5)
    reserve(tmp_path / "run", study)
    copies = []
    for _ in range(4):
        with pytest.raises(Stop):
            server.resume(tmp_path / "run", INLINE, shards=shards, watch=stop)
        copies.append((tmp_path / "run" / checkpoint.NAME).read_bytes())
    (tmp_path / "run" / checkpoint.NAME).write_bytes(copies[0])
    with pytest.raises(CheckpointError, match="of exchange 4 and the checkpoint beside it of 1"):
        server.resume(tmp_path / "run", INLINE, shards=shards)
    (tmp_path / "run" / checkpoint.NAME).write_bytes(copies[2])
    with pytest.raises(CheckpointError, match=r"state of client .* is missing"):  # replaced, and deleted since
        server.resume(tmp_path / "run", INLINE, shards=shards)
    (tmp_path / "run" / checkpoint.NAME).write_bytes(copies[3])  # what was refused has changed nothing
    server.resume(tmp_path / "run", INLINE, shards=shards)
    reserve(tmp_path / "whole", study)
    server.resume(tmp_path / "whole", INLINE, shards=shards)
    assert same(model_of(tmp_path / "run"), model_of(tmp_path / "whole"))


def test_a_run_whose_store_or_checkpoint_is_gone_is_refused(tmp_path, shards):
    reserve(tmp_path / "run", small("fedsparsify"))
    for _ in range(2):
        with pytest.raises(Stop):
            server.resume(tmp_path / "run", INLINE, shards=shards, watch=stop)
    (tmp_path / "run" / checkpoint.NAME).rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match="is missing, though 2 exchanges of the run are recorded"):
        server.resume(tmp_path / "run", INLINE, shards=shards)
    assert len(rows_of(tmp_path / "run")) == 2
    (tmp_path / "away").rename(tmp_path / "run" / checkpoint.NAME)
    (tmp_path / "run" / NAME).rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"clients\.sqlite is missing"):
        server.resume(tmp_path / "run", INLINE, shards=shards)


def test_a_checkpoint_names_no_client(tmp_path, shards):
    """What grows with clients is in the store: a checkpoint of ten times the clients is no larger."""
    sizes = []
    for clients in (4, 40):
        rows = tiny_shards(tmp_path / f"shards{clients}", clients=clients, rows=160)
        study = small("subfedavg", "accuracy=0.1", data={"clients": clients, "partition": "iid"}, participation=1.0)
        reserve(tmp_path / str(clients), study)
        server.resume(tmp_path / str(clients), INLINE, shards=rows)
        sizes.append((tmp_path / str(clients) / checkpoint.NAME).stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 16


@pytest.mark.parametrize("method", [("subfedavg", "accuracy=0.1"), ("lotteryfl", "accuracy=0.1"), ("dispfl",)])
def test_a_clients_own_mask_is_sent_once_however_many_clients(method, tmp_path):
    """Forty clients with masks of their own, which change: each gets its first mask whole, then 16 bytes a round."""
    data = {"clients": 40, "partition": "iid", "test_fraction": 0.2}
    rows = tiny_shards(tmp_path / "shards", clients=40, rows=400)
    study = small(*method, data=data, participation=1.0, rounds=4, training={"epochs": 2, "batch_size": 8, "lr": 0.1})
    reserve(tmp_path / "run", study)
    server.resume(tmp_path / "run", INLINE, shards=rows)
    first, *later = [row["down"]["mask"] for row in rows_of(tmp_path / "run")]
    assert first > 0
    assert later == [16 * 40] * 3


def test_a_clients_mask_is_read_once_an_exchange(tmp_path, shards, monkeypatch):
    """For the request, the check of the reply, who holds it, and the MACs together."""
    read, asked = Archive.__getitem__, []

    def counted(archive, key):
        found = read(archive, key)
        asked.append(key)
        return found

    exchanges = []

    def watch(event):
        if event["event"] == "row":
            exchanges.append(sorted(asked))
            asked.clear()

    monkeypatch.setattr(Archive, "__getitem__", counted)
    study = small("subfedavg", "accuracy=0.1", participation=1.0, rounds=4, evaluate_every=4)
    reserve(tmp_path / "run", study)
    server.resume(tmp_path / "run", INLINE, shards=shards, watch=watch)
    assert exchanges == [[], *[[f"mask/{client}" for client in range(4)]] * 3]
    assert all(row["train_macs"] > row["train_macs_physical"] / 3 > 0 for row in rows_of(tmp_path / "run"))
