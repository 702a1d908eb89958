"""Rows that are kept, by what files hold; and a node's own, which are kept nowhere."""

import os
import tempfile
import time

import numpy as np
import pytest

from helpers import small
from secateur.data.shards import make_shards, open_shards
from secateur.data.sources import Source
from secateur.errors import CheckpointError, ConfigError, DataError
from secateur.federation import checkpoint, prepare
from secateur.study.study import parse_study


def write(path, bmi=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{n},{bmi + n},{n % 2},{'ns'[n % 2 if n < 20 else 0]}" for n in range(40)]
    path.write_text("age,bmi,sick,site\n" + "\n".join(lines) + "\n")


def study(source="table:data.csv", **data):
    return small("fedavg", data={"source": source, "clients": 2, "partition": "iid", "target": "sick", **data})


def test_two_projects_with_one_relative_name_share_no_row(tmp_path, monkeypatch):
    folders = []
    for name, bmi in (("one", 20), ("other", 50)):
        write(tmp_path / name / "data.csv", bmi)
        monkeypatch.chdir(tmp_path / name)
        folders.append(prepare.simulated(study(), tmp_path / "cache"))
        assert prepare.simulated(study(), tmp_path / "cache") == folders[-1]
    assert len(set(folders)) == 2


def test_a_file_that_was_edited_is_read_again_even_under_its_old_time_and_size(tmp_path):
    write(tmp_path / "data.csv")
    made = study(f"table:{tmp_path / 'data.csv'}")
    first = prepare.simulated(made, tmp_path / "cache")
    before = (tmp_path / "data.csv").stat()
    write(tmp_path / "data.csv", bmi=50)
    os.utime(tmp_path / "data.csv", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (tmp_path / "data.csv").stat().st_size == before.st_size
    assert prepare.simulated(made, tmp_path / "cache") != first


def test_columns_and_options_belong_to_what_is_kept(tmp_path):
    write(tmp_path / "data.csv")
    source, cache = f"table:{tmp_path / 'data.csv'}", tmp_path / "cache"
    settings = [{}, {"site": "site"}, {"options": {"drop": "bmi"}}, {"options": {"drop": ("bmi", "site")}}]
    made = [prepare.simulated(study(source, **more), cache) for more in settings]
    assert len(set(made)) == 4
    # age, bmi, and a column for each of the two sites unless the column of sites is one, or is dropped
    assert [open_shards(folder).input_shape for folder in made] == [(4,), (2,), (3,), (1,)]


def test_what_a_source_reads_is_found_in_its_name(tmp_path, monkeypatch):
    place = tmp_path / "a#b"
    place.mkdir()
    (place / "t.csv").write_text("x")
    (tmp_path / "loaders_of_a_test.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert prepare.places(f"table:{place}#target#site") == [place]
    assert prepare.places("digits") == []
    mine = prepare.places(f"loaders_of_a_test:read:{place}")
    assert mine == [place, tmp_path / "loaders_of_a_test.py"]
    before = prepare.marks(*mine)
    (tmp_path / "loaders_of_a_test.py").write_text("x = 1")
    assert prepare.marks(*mine) != before
    assert [name for name, *_ in before] == [str(place / "t.csv"), str(tmp_path / "loaders_of_a_test.py")]


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    write(tmp_path / "data.csv")

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path / "data.csv"))

    monkeypatch.setattr(prepare, "_digest", refuse)
    with pytest.raises(DataError, match=r"cannot read .*data.csv: Permission denied"):
        prepare.simulated(study(f"table:{tmp_path / 'data.csv'}"), tmp_path / "cache")


@pytest.fixture
def hospital(tmp_path, monkeypatch):
    """A node's folder of rows; everything else that could be written to is watched."""
    (tmp_path / "rows").mkdir()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 4)).astype(np.float32)
    np.savez(tmp_path / "rows" / "patients.npz", x=x, y=np.arange(30) % 2)
    for name in ("TMPDIR", "XDG_CACHE_HOME", "HOME"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_a_nodes_own_rows_are_written_nowhere(hospital):
    made = study("arrays", target="")
    shards = prepare.own(made, 1, str(hospital / "rows"))
    assert [len(shards.train(k)[1]) for k in range(2)] == [0, 17]  # 24, of which 5 are its test and 2 its validation
    assert prepare.own(made, 1, str(hospital / "rows")) is shards
    files = {str(path.relative_to(hospital)) for path in hospital.rglob("*") if path.is_file()}
    assert files == {"rows/patients.npz"}
    held = np.load(hospital / "rows" / "patients.npz")
    np.savez(hospital / "rows" / "patients.npz", x=held["x"] + 1, y=held["y"])
    again = prepare.own(made, 1, str(hospital / "rows"))
    assert again.fingerprint() != shards.fingerprint()


def test_a_node_without_rows_is_told(hospital):
    (hospital / "none").mkdir()
    for name, words in (("none", "is empty"), ("nowhere", "does not exist")):
        with pytest.raises(ConfigError, match=f"client 1: its data folder .*{name} {words}"):
            prepare.own(study("arrays", target=""), 1, str(hospital / name))


def test_rows_in_memory_and_on_disk_are_the_same(tmp_path):
    x = np.arange(80, dtype=np.float32).reshape(40, 2)
    source = Source("s", x, np.arange(40) % 2, x[:3], np.arange(3) % 2, None, 2, "tabular", 1.0, remarks=("one",))
    parts = [np.arange(0, 25), np.arange(25, 40)]
    more = {"test_fraction": 0.2, "validation_fraction": 0.1, "seed": 3}
    held, mapped = (make_shards(source, parts, folder=folder, **more) for folder in (None, tmp_path))
    assert held.meta == mapped.meta
    for part in ("train", "test", "validation"):
        for client in range(2):
            for one, other in zip(getattr(held, part)(client), getattr(mapped, part)(client), strict=True):
                assert one.numpy().tobytes() == other.numpy().tobytes()
    other = make_shards(source, [np.arange(0, 26), np.arange(26, 40)], folder=None, **more)
    x[0] += 1
    changed = make_shards(source, parts, folder=None, **more)
    assert len({held.fingerprint(), other.fingerprint(), changed.fingerprint()}) == 3


def test_rows_that_a_killed_command_left_are_deleted_by_the_next_and_nobody_elses(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    places = {name: tmp_path / f"secateur-rows-{name}" for name in ("left", "held", "fresh")}
    for place in places.values():
        place.mkdir()
        (place / "x_train.npy").write_bytes(b"rows")
    with checkpoint.alone(places["held"]):
        for name in ("left", "held"):
            os.utime(places[name], (time.time() - 3600,) * 2)
        with prepare.federation(small(data={"source": "digits", "clients": 5, "partition": "iid"})) as folder:
            assert folder.name.startswith("secateur-rows-")
            with pytest.raises(CheckpointError), checkpoint.alone(folder):
                pass
            assert set(tmp_path.iterdir()) == {places["held"], places["fresh"], folder}


def test_sites_that_a_number_of_clients_leaves_out_are_named(tmp_path):
    """Hospitals a, b, c, d with 9, 5, 7 and 6 rows: three clients are a, c and d; unset, all four take part."""
    lines = ["age,site,sick"]
    for name, count in (("a", 9), ("b", 5), ("c", 7), ("d", 6)):
        lines += [f"{30 + row},{name},{'yes' if row % 2 else 'no'}" for row in range(count)]
    (tmp_path / "data.csv").write_text("\n".join(lines))
    given = {"source": f"table:{tmp_path / 'data.csv'}", "target": "sick", "site": "site", "partition": "natural"}

    def remarks(**more):
        values = {"method": "fedavg", "data": {**given, **more}}
        with prepare.federation(parse_study(values)) as folder:
            return [one for one in open_shards(folder).meta.remarks if one.startswith("data.clients")]

    assert remarks(clients=3) == ["data.clients = 3 leaves out the smallest sites: b"]
    assert remarks() == remarks(clients=4) == []


def test_natural_clients_that_are_left_out_are_named_where_there_is_no_table(tmp_path):
    """Rows of ten clients, 0 to 9, client k with 4 + k rows: seven clients leave out 0, 1 and 2."""
    ids = np.repeat(np.arange(10), np.arange(4, 14))
    x = np.arange(2 * len(ids), dtype=np.float32).reshape(-1, 2)
    np.savez(tmp_path / "rows.npz", x_train=x, y_train=ids % 2, ids=ids, x_test=x, y_test=ids % 2)
    section = {"source": f"arrays:{tmp_path / 'rows.npz'}", "partition": "natural", "clients": 7}
    with prepare.federation(parse_study({"method": "fedavg", "data": section})) as folder:
        (told,) = open_shards(folder).meta.remarks
    assert told == "data.clients = 7 leaves out the smallest sites: 0, 1, 2"
