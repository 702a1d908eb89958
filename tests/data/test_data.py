"""Sources, partitions and shards."""

import gzip
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import small
from secateur import data, models
from secateur.data.characters import LETTERS
from secateur.data.graphs import neighbourhood
from secateur.data.partition import _libraries, parse, partition
from secateur.data.shards import make_shards, open_shards
from secateur.errors import ConfigError, DataError
from secateur.federation import prepare
from secateur.streams import stream
from secateur.study.study import parse_study

FASHION = Path(__file__).parents[2].parent / "shared" / "data" / "fashion_mnist"

SMALL = {"hidden": 4}  # of an LSTM


# ---- sources


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    found = data.load("digits", seed=3)
    original = load_digits()
    rows = {
        (row.tobytes(), label) for row, label in zip(original.images.astype(np.uint8), original.target, strict=True)
    }
    assert len(found.x_train) + len(found.x_test) == 1797
    both = zip(
        np.concatenate([found.x_train, found.x_test]), np.concatenate([found.y_train, found.y_test]), strict=True
    )
    assert {(x[0].tobytes(), y) for x, y in both} == rows
    assert (found.x_train.shape[1:], found.scale, found.outputs) == ((1, 8, 8), 16.0, 10)
    share = np.bincount(found.y_test) / np.bincount(original.target)
    assert np.allclose(share, 0.2, atol=0.003)
    assert np.array_equal(found.x_test, data.load("digits", seed=3).x_test)
    assert not np.array_equal(found.y_test, data.load("digits", seed=4).y_test)


def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


@pytest.fixture
def idx(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("t10k", 5)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 255, (n, 4, 3)).astype(np.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", (np.arange(n) % 3).astype(np.uint8))
    return tmp_path


def test_idx_folder(idx):
    found = data.load(f"idx:{idx}", seed=0)
    assert found.x_train.shape == (12, 1, 4, 3)
    assert found.y_test.tolist() == [0, 1, 2, 0, 1]
    assert found.outputs == 3


def test_some_rows_of_an_idx_folder_are_drawn_from_the_seed(idx):
    whole, few = (data.load(f"idx:{idx}", seed=3, options=given) for given in ({}, {"rows": 7}))
    assert len(few.y_train) == 7
    places = [int(np.flatnonzero((whole.x_train == x).all(axis=(1, 2, 3)))[0]) for x in few.x_train]
    assert places == sorted(set(places))  # rows of the whole, none of them twice
    assert whole.y_train[places].tolist() == few.y_train.tolist()
    assert np.array_equal(few.x_test, whole.x_test)
    assert any(
        not np.array_equal(few.x_train, data.load(f"idx:{idx}", seed=seed, options={"rows": 7}).x_train)
        for seed in range(4, 8)
    )
    with pytest.raises(DataError, match="rows = 13: .* has 12 training rows"):
        data.load(f"idx:{idx}", seed=0, options={"rows": 13})


def test_fashion_mnist_itself():
    if not FASHION.exists():
        pytest.skip("Fashion-MNIST is not beside this checkout (../shared/data/fashion_mnist)")
    found = data.load(f"idx:{FASHION}", seed=0)
    assert found.x_train.shape == (60000, 1, 28, 28)
    assert np.bincount(found.y_train).tolist() == [6000] * 10
    assert np.bincount(found.y_test).tolist() == [1000] * 10


def test_idx_damage(idx):
    images = idx / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    images.write_bytes(whole[:-20])
    with pytest.raises(DataError, match="train-images.*complete gzip"):
        data.load(f"idx:{idx}", seed=0)
    images.write_bytes(gzip.compress(b"\0\0\x0b\3" + bytes(12)))
    with pytest.raises(DataError, match="not an idx file"):
        data.load(f"idx:{idx}", seed=0)
    images.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(DataError, match=r"announces \(12, 4, 3\) but holds 143"):
        data.load(f"idx:{idx}", seed=0)
    images.write_bytes(gzip.compress(b"\0\0\x08\3" + struct.pack(">3I", 2**31, 2**31, 4)))  # 0 modulo 2**64
    with pytest.raises(DataError, match="holds 0 bytes"):
        data.load(f"idx:{idx}", seed=0)
    images.write_bytes(whole[:10] + b"\xff" * 8 + whole[18:])
    with pytest.raises(DataError, match="not a complete gzip"):
        data.load(f"idx:{idx}", seed=0)
    write_idx(images, np.zeros((12, 5, 3), np.uint8))
    with pytest.raises(DataError, match=r"different shapes: \(1, 5, 3\) and \(1, 4, 3\)"):
        data.load(f"idx:{idx}", seed=0)
    write_idx(images, np.zeros((11, 4, 3), np.uint8))
    with pytest.raises(DataError, match="11 train images but 12 labels"):
        data.load(f"idx:{idx}", seed=0)
    images.unlink()
    with pytest.raises(DataError, match="is missing: the folder must hold"):
        data.load(f"idx:{idx}", seed=0)


def test_cifar10_binary(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    records = rng.integers(0, 255, (6, 3073)).astype(np.uint8)
    records[:, 0] = np.arange(6)
    records[:4].tofile(folder / "data_batch_1.bin")
    records[4:5].tofile(folder / "data_batch_2.bin")
    records[5:].tofile(folder / "test_batch.bin")
    for spec in (tmp_path, folder):
        found = data.load(f"cifar10:{spec}", seed=0)
        assert found.y_train.tolist() == [0, 1, 2, 3, 4]
        assert found.x_test[0, 1, 0].tolist() == records[5, 1 + 1024 : 1 + 1024 + 32].tolist()
    (folder / "test_batch.bin").write_bytes(b"x" * 3074)
    with pytest.raises(DataError, match="3074 bytes"):
        data.load(f"cifar10:{folder}", seed=0)
    (folder / "test_batch.bin").write_bytes(b"\xff" * 3073)
    with pytest.raises(DataError, match="labels above 9"):
        data.load(f"cifar10:{folder}", seed=0)
    (folder / "test_batch.bin").unlink()
    with pytest.raises(DataError, match="cannot read.*test_batch"):
        data.load(f"cifar10:{folder}", seed=0)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="holds no data_batch"):
        data.load(f"cifar10:{tmp_path / 'other'}", seed=0)


def test_text_by_role(tmp_path):
    play = tmp_path / "play.txt"
    a, b = "abcdefghij" * 40, "klmnopqrst" * 40
    play.write_text(f"ROMEO:\n{a}\n\nJULIET:\n{b}\n\nROMEO:\n{a}\n")
    found = data.load(f"text:{play}", seed=0)
    assert (found.x_train.shape[1], found.kind, found.outputs) == (80, "tokens", 80)
    assert set(found.ids.tolist()) == {0, 1}
    vocabulary = sorted(set(play.read_text()))
    first = "".join(vocabulary[c] for c in found.x_train[0])
    assert first == a[:80]
    assert vocabulary[found.y_train[0]] == a[80]
    assert np.bincount(found.ids)[0] > np.bincount(found.ids)[1]


def test_text_without_roles_and_refusals(tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text("the quick brown fox " * 100)
    assert set(data.load(f"text:{plain}", seed=0).ids.tolist()) == {0}
    plain.write_text("short")
    with pytest.raises(DataError, match="more than 80"):
        data.load(f"text:{plain}", seed=0)
    plain.write_text("\n\n".join(f"ROLE {n}:\nshort\n" for n in range(40)))
    with pytest.raises(DataError, match="speaks long enough"):
        data.load(f"text:{plain}", seed=0)
    with pytest.raises(DataError, match="cannot read the text"):
        data.load(f"text:{tmp_path / 'none.txt'}", seed=0)


def test_text_loses_no_paragraph(tmp_path):
    novel = tmp_path / "novel.txt"
    before, note, after = "dark night. " * 40, "this is a note. " * 40, "and on it went. " * 40
    novel.write_text(f"{before}\n\nNote:\n{note}\n\n{after}")
    found = data.load(f"text:{novel}", seed=0)
    vocabulary = np.array(sorted(set(novel.read_text())))
    told = ["".join(vocabulary[row]) for row in found.x_train]
    assert set(found.ids.tolist()) == {0, 1}
    for part in ("dark night", "this is a note", "on it went"):
        assert any(part in row for row in told)


def test_no_character_of_the_test_part_is_a_training_target(tmp_path):
    # one role of 1,001 different places: the text says where it is
    place = tmp_path / "place.txt"
    text = "".join(chr(0x4E00 + k % 251) for k in range(1001))
    place.write_text(text, "utf-8")
    found = data.load(f"text:{place}", seed=0)
    targets = np.arange(80, 1001, 10)
    assert len(found.y_train) == (targets < 0.9 * 1001).sum()
    assert len(found.y_test) == (targets >= 0.9 * 1001).sum()
    assert found.y_test.tolist() == (targets[targets >= 0.9 * 1001] % 251).tolist()
    assert found.outputs == 251
    model = models.build("charlstm", input_shape=(80,), outputs=found.outputs, tokens=True, options=SMALL)
    assert model(torch.from_numpy(found.x_train[:2]).long()).shape == (2, 251)


@pytest.fixture
def hub():
    return pytest.importorskip("datasets", reason="needs the hub extra")


def test_hub_images_with_natural_ids(hub, tmp_path):
    pictures = [np.full((5, 4), k * 9, np.uint8) for k in range(20)]
    features = hub.Features({"img": hub.Image(), "fine": hub.ClassLabel(num_classes=2), "who": hub.Value("string")})
    rows = {"img": pictures, "fine": [k % 2 for k in range(20)], "who": [f"w{k % 3}" for k in range(20)]}
    whole = hub.Dataset.from_dict(rows, features=features)
    hub.DatasetDict({"train": whole.select(range(15)), "test": whole.select(range(15, 20))}).save_to_disk(
        tmp_path / "set"
    )
    found = data.load(f"hub:{tmp_path / 'set'}#who", seed=0)
    assert found.x_train.shape == (15, 1, 5, 4)
    assert found.x_train[3, 0, 0, 0] == 27
    assert found.ids.tolist() == [k % 3 for k in range(15)]
    assert found.y_test.tolist() == [1, 0, 1, 0, 1]
    with pytest.raises(DataError, match="no column 'nobody'"):
        data.load(f"hub:{tmp_path / 'set'}#nobody", seed=0)


def test_hub_text_and_colour_without_a_test_split(hub, tmp_path):
    texts = hub.Dataset.from_dict({"text": ["ab" * k for k in range(1, 51)], "label": [k % 2 for k in range(50)]})
    texts.save_to_disk(tmp_path / "texts")
    found = data.load(f"hub:{tmp_path / 'texts'}", seed=0)
    assert (len(found.x_train), len(found.x_test), found.kind) == (40, 10, "tokens")
    assert found.x_train.shape[1] == 80
    colour = [np.zeros((3, 3, 3), np.uint8) for _ in range(10)]
    features = hub.Features({"image": hub.Image(), "labels": hub.Value("int64")})
    hub.Dataset.from_dict({"image": colour, "labels": [0, 1] * 5}, features=features).save_to_disk(tmp_path / "colour")
    assert data.load(f"hub:{tmp_path / 'colour'}", seed=0).x_train.shape[1:] == (3, 3, 3)


def save(rows, folder):
    rows.save_to_disk(folder)
    return f"hub:{folder}"


def test_hub_text_is_coded_by_leafs_letters(hub, tmp_path):
    spec = save(hub.Dataset.from_dict({"who": ["w"] * 10, "text": ["az~", None] * 5, "label": [0, 1] * 5}), tmp_path)
    found = data.load(f"{spec}#who", seed=0)  # the column of ids is not mistaken for the text
    row = found.x_train[found.y_train == 0][0]
    assert row.tolist() == [LETTERS.index("a"), LETTERS.index("z"), LETTERS.index(" ")] + [0] * 77
    assert not found.x_train[found.y_train == 1].any()
    assert (len(LETTERS), len(set(LETTERS)), found.ids.tolist()) == (80, 80, [0] * 8)
    model = models.build("charlstm", input_shape=(80,), outputs=found.outputs, tokens=True, options=SMALL)
    assert model(torch.from_numpy(found.x_train).long()).shape == (8, 2)


def test_hub_text_without_labels_is_next_character_prediction(hub, tmp_path):
    rows = hub.Dataset.from_dict({"text": ["abc" * 100, "xyz" * 100, "short"], "who": ["p", "p", "q"]})
    found = data.load(save(rows, tmp_path / "rows"), seed=0)
    assert (found.kind, found.outputs, set(found.ids.tolist())) == ("tokens", 80, {0, 1})
    assert [LETTERS[c] for c in found.x_train[0, :3]] == ["a", "b", "c"]
    assert LETTERS[found.y_train[0]] == "abc"[80 % 3]
    by_id = data.load(f"hub:{tmp_path / 'rows'}#who", seed=0)
    assert set(by_id.ids.tolist()) == {0}
    split = hub.DatasetDict({"train": rows, "test": rows.select([1])})
    given_test = data.load(save(split, tmp_path / "split"), seed=0)
    assert (len(given_test.x_train), len(given_test.x_test)) == (44, 22)
    with pytest.raises(DataError, match="0 training and 0 test rows"):
        data.load(save(rows.select([2]), tmp_path / "tiny"), seed=0)


@pytest.mark.parametrize(
    ("who", "ids"),
    [([10, 2, 10, 2, 1], [2, 1, 2, 1, 0]), (["b", None, "a", "b", None], [2, 0, 1, 2, 0])],  # numbers in their order
)
def test_hub_ids_keep_the_order_of_their_kind(hub, tmp_path, who, ids):
    rows = hub.Dataset.from_dict({"text": ["hello"] * 5, "label": [0, 1, 0, 1, 0], "who": who})
    spec = save(hub.DatasetDict({"train": rows, "test": rows}), tmp_path / "set")
    assert data.load(f"{spec}#who", seed=0).ids.tolist() == ids


def test_hub_labels(hub, tmp_path):
    text = ["hello"] * 10
    features = hub.Features({"text": hub.Value("string"), "kind": hub.ClassLabel(num_classes=7)})
    rows = hub.Dataset.from_dict({"text": text, "kind": [0, 1] * 5}, features=features)
    assert data.load(save(rows, tmp_path / "seven"), seed=0).outputs == 7
    for n, labels in enumerate(([-1] * 10, ["a"] * 10, [None] + [1] * 9, [0.5] * 10)):
        spec = save(hub.Dataset.from_dict({"text": text, "label": labels}), tmp_path / str(n))
        with pytest.raises(DataError, match="'label' must hold a class 0, 1"):
            data.load(spec, seed=0)
    spec = save(hub.Dataset.from_dict({"text": text, "label": [0] * 9 + [1]}), tmp_path / "rare")
    rare = data.load(spec, seed=0)
    assert (rare.y_train.tolist().count(1), rare.y_test.tolist()) == (1, [0, 0])


def test_hub_images_of_every_mode(hub, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="needs the hub extra")
    features = hub.Features({"image": hub.Image(), "label": hub.Value("int64")})

    def loaded(name, pictures):
        rows = {"image": pictures, "label": [k % 2 for k in range(len(pictures))]}
        return data.load(save(hub.Dataset.from_dict(rows, features=features), tmp_path / name), seed=0)

    grey, colour, clear = (image.new(mode, (4, 4)) for mode in ("L", "RGB", "RGBA"))
    palette = image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50] + [0] * 762)
    assert loaded("grey", [grey] * 6).x_train.shape[1:] == (1, 4, 4)
    assert loaded("mixed", [grey, grey, colour, colour]).x_train.shape[1:] == (3, 4, 4)
    assert loaded("clear", [clear] * 6).x_train.shape[1:] == (4, 4, 4)
    assert loaded("palette", [palette] * 6).x_train[0, :, 0, 0].tolist() == [200, 100, 50]
    with pytest.raises(DataError, match=r"not of 8 bits: \['I;16'\]"):
        loaded("deep", [image.fromarray(np.full((4, 4), 1000, np.uint16))] * 6)
    with pytest.raises(DataError, match="missing"):
        loaded("none", [None] * 6)


def test_hub_refusals(hub, tmp_path):
    features = hub.Features({"image": hub.Image(), "x": hub.Value("int64")})
    hub.Dataset.from_dict({"image": [np.zeros((3, 3), np.uint8)], "x": [1]}, features=features).save_to_disk(
        tmp_path / "nolabel"
    )
    with pytest.raises(DataError, match="no class label"):
        data.load(f"hub:{tmp_path / 'nolabel'}", seed=0)
    hub.Dataset.from_dict({"x": [1.0], "label": [1]}).save_to_disk(tmp_path / "noinput")
    with pytest.raises(DataError, match="neither an image nor a text"):
        data.load(f"hub:{tmp_path / 'noinput'}", seed=0)
    hub.DatasetDict({"other": hub.Dataset.from_dict({"x": [1]})}).save_to_disk(tmp_path / "nosplit")
    with pytest.raises(DataError, match="no split named train"):
        data.load(f"hub:{tmp_path / 'nosplit'}", seed=0)
    features = hub.Features({"image": hub.Image(), "label": hub.Value("int64")})
    shapes = [np.zeros((3, 3), np.uint8), np.zeros((4, 4), np.uint8)]
    hub.Dataset.from_dict({"image": shapes, "label": [0, 1]}, features=features).save_to_disk(tmp_path / "shapes")
    with pytest.raises(DataError, match="2 different shapes"):
        data.load(f"hub:{tmp_path / 'shapes'}", seed=0)
    with pytest.raises(DataError, match="cannot be loaded"):
        data.load(f"hub:{tmp_path / 'nothing here'}", seed=0)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("digit", "did you mean 'digits'"), ("idx", "say where it is, as idx:FOLDER"), ("digits:x", "take no folder"),
        ("idx:/no/such/folder", "no such folder"), ("cifar10:/no/such/folder", "no such folder"),
    ],
)  # fmt: skip
def test_unknown_sources(spec, says):
    with pytest.raises(DataError, match=says):
        data.load(spec, seed=0)


def test_listing():
    listed = data.names()
    assert listed["idx"].name == "idx:FOLDER"
    assert all(info.summary and info.reference for info in listed.values())


# ---- partitions

LABELS = np.arange(600) % 10


@pytest.mark.parametrize("spec", ["iid", "dirichlet:0.5", "pathological:2"])
def test_partitions_cover_every_row_once_and_follow_the_seed(spec):
    parts = partition(LABELS, None, spec, clients=20, seed=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(600))
    assert all((np.diff(p) > 0).all() for p in parts)
    again = partition(LABELS, None, spec, clients=20, seed=1)
    other = partition(LABELS, None, spec, clients=20, seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


@settings(derandomize=True, max_examples=15, deadline=None, database=None)
@given(
    rows=st.integers(40, 200), classes=st.integers(2, 6), clients=st.integers(1, 12), seed=st.integers(0, 2**40),
    spec=st.sampled_from(["iid", "dirichlet:1", "pathological:2"]),
)  # fmt: skip
def test_no_row_has_two_clients_and_none_is_lost(rows, classes, clients, seed, spec):
    labels = np.arange(rows) % classes
    try:
        parts = partition(labels, None, spec, clients=clients, seed=seed)
    except DataError:
        assert spec == "dirichlet:1"  # few rows over many clients: the library gives up, and says so
        return
    found = np.concatenate(parts)
    held = np.isin(labels, labels[found])
    assert np.array_equal(np.sort(found), np.flatnonzero(held))
    assert all(len(part) for part in parts)
    if not spec.startswith("pathological") or clients >= classes:
        assert held.all()


def test_pathological_with_few_clients_leaves_classes_out_whole():
    parts = partition(LABELS, None, "pathological:2", clients=3, seed=0)
    found = np.concatenate(parts)
    held = np.unique(LABELS[found])
    assert len(held) < 10
    assert sorted(found.tolist()) == np.flatnonzero(np.isin(LABELS, held)).tolist()


def test_dirichlet_of_a_large_set_over_a_hundred_clients():
    labels = np.repeat(np.arange(10), 6000)  # the labels of Fashion-MNIST, sorted
    parts = partition(labels, None, "dirichlet:0.5", clients=100, seed=0)
    assert sum(map(len, parts)) == 60_000
    assert min(map(len, parts)) >= 2


@pytest.mark.parametrize("spec", ["iid", "dirichlet:0.5", "pathological:2", "natural"])
def test_partitions_are_quiet(spec, capfd):
    partition(LABELS, LABELS, spec, clients=10, seed=0)
    assert capfd.readouterr() == ("", "")


def test_pathological_clients_hold_at_most_k_classes():
    for k in (1, 2, 3):
        parts = partition(LABELS, None, f"pathological:{k}", clients=20, seed=0)
        assert all(len(set(LABELS[p])) == k for p in parts)


@pytest.mark.parametrize(("rows", "clients"), [(40, 7), (40, 40), (41, 1), (100, 33)])
def test_iid_gives_the_parts_of_the_library(rows, clients):
    """Without asking it, since a million clients would take it minutes."""
    datasets, partitioners = _libraries()
    labels, made = np.arange(rows) % 4, partitioners.IidPartitioner(clients)
    order = torch.randperm(rows, generator=stream(3, "partition")).numpy()
    made.dataset = datasets.Dataset.from_dict({"row": order})
    expected = [sorted(made.load_partition(client)["row"]) for client in range(clients)]
    assert [part.tolist() for part in partition(labels, None, "iid", clients=clients, seed=3)] == expected


def test_iid_is_balanced_and_dirichlet_is_skewed():
    sizes = [len(p) for p in partition(LABELS, None, "iid", clients=7, seed=0)]
    assert max(sizes) - min(sizes) <= 1
    skewed = [
        np.bincount(LABELS[p], minlength=10).max() / len(p)
        for p in partition(LABELS, None, "dirichlet:0.1", clients=5, seed=0)
    ]
    flat = [
        np.bincount(LABELS[p], minlength=10).max() / len(p)
        for p in partition(LABELS, None, "dirichlet:1000", clients=5, seed=0)
    ]
    assert np.mean(skewed) > 2 * np.mean(flat)


def test_natural_ids_and_the_largest_of_them():
    ids = np.repeat([7, 3, 9], [10, 30, 20])
    labels = np.zeros(60, int)
    parts = partition(labels, ids, "natural", clients=3, seed=0)
    assert [len(p) for p in parts] == [30, 10, 20]
    assert [set(ids[p]) for p in parts] == [{3}, {7}, {9}]
    assert [set(ids[p]) for p in partition(labels, ids, "natural", clients=2, seed=0)] == [{3}, {9}]
    assert [set(ids[p]) for p in partition(labels, ids, "natural", clients=0, seed=0)] == [{3}, {7}, {9}]
    with pytest.raises(DataError, match="has 3 natural ids"):
        partition(labels, ids, "natural", clients=4, seed=0)
    with pytest.raises(DataError, match="no natural client ids"):
        partition(labels, None, "natural", clients=2, seed=0)


def test_partitions_that_cannot_be_made():
    with pytest.raises(DataError, match=r"data\.clients = 0 must be at least 1"):
        partition(LABELS, LABELS, "iid", clients=0, seed=0)
    with pytest.raises(DataError, match="only 600 training rows"):
        partition(LABELS, None, "iid", clients=601, seed=0)
    with pytest.raises(DataError, match=r"pathological:11.*cannot be made"):
        partition(LABELS, None, "pathological:11", clients=4, seed=0)
    with pytest.raises(DataError, match=r"dirichlet:0\.01.*100 clients cannot be made"):
        partition(LABELS, None, "dirichlet:0.01", clients=100, seed=0)
    with pytest.raises(DataError, match="needed to be assigned to more partitions"):
        partition(np.array([0] * 3 + [1] * 27), None, "pathological:1", clients=30, seed=0)


def test_clients_left_empty_are_named(monkeypatch):
    parts = [np.arange(600)] + [np.arange(0)] * 7
    monkeypatch.setattr("secateur.data.partition._split", lambda *_: parts)
    with pytest.raises(DataError, match=r"leaves 7 of 8 clients without rows \(1, 2, 3, 4, 5, \.\.\.\): fewer clients"):
        partition(LABELS, None, "iid", clients=8, seed=0)


@pytest.mark.parametrize(
    "spec",
    ["dirichlet", "dirichlet:-1", "dirichlet:x", "pathological:1.5", "iid:3", "shards", "natural:2", "dirichlet:inf"],
)
def test_nonsense_is_refused_before_any_data_is_read(spec):
    with pytest.raises(ConfigError, match=r"data\.partition"):
        parse(spec)


# ---- shards


def source(n=40):
    x = np.arange(n * 4, dtype=np.uint8).reshape(n, 1, 2, 2)
    return data.Source("s", x, np.arange(n), x[:3], np.arange(3), None, n)


def test_shards_split_each_client_and_map_without_copying(tmp_path):
    parts = [np.arange(0, 10), np.arange(10, 11), np.arange(11, 40)]
    made = make_shards(source(), parts, test_fraction=0.2, seed=0, folder=tmp_path)
    assert made.clients == 3
    assert (made.input_shape, made.outputs, made.kind, made.scale, made.task) == (
        (1, 2, 2),
        40,
        "image",
        255.0,
        "classification",
    )
    for client, rows in enumerate(parts):
        train, test = made.train(client)[1].tolist(), made.test(client)[1].tolist()
        assert sorted(train + test) == rows.tolist()
    assert [len(made.test(k)[1]) for k in range(3)] == [2, 0, 6]
    x, y = made.train(2)
    assert torch.equal(x[:, 0, 0, 0], (y * 4).to(torch.uint8))
    again = open_shards(tmp_path)
    assert torch.equal(again.train(2)[0], x)
    assert again.train(0)[0].untyped_storage().data_ptr() == again.train(1)[0].untyped_storage().data_ptr()
    assert len(again.server_test()[1]) == 3


def test_shards_without_local_tests_and_by_seed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    none = make_shards(source(), [np.arange(40)], test_fraction=0.0, seed=0, folder=tmp_path / "a")
    assert len(none.test(0)[1]) == 0
    assert len(none.train(0)[1]) == 40
    other = make_shards(source(), [np.arange(40)], test_fraction=0.5, seed=1, folder=tmp_path / "b")
    (tmp_path / "c").mkdir()
    third = make_shards(source(), [np.arange(40)], test_fraction=0.5, seed=2, folder=tmp_path / "c")
    assert other.test(0)[1].tolist() != third.test(0)[1].tolist()


def test_validation_rows_are_taken_from_training_and_never_from_a_test(tmp_path):
    parts = [np.arange(0, 10), np.arange(10, 11), np.arange(11, 40)]
    made = {}
    for share in (0.0, 0.1):
        folder = tmp_path / str(share)
        folder.mkdir()
        made[share] = make_shards(
            source(), parts, test_fraction=0.2, validation_fraction=share, seed=0, folder=folder
        )  # fmt: skip
    with_, without = made[0.1], made[0.0]
    assert [len(with_.validation(k)[1]) for k in range(3)] == [1, 0, 3]  # a tenth of 10, of 1 and of 29 rows
    assert [len(without.validation(k)[1]) for k in range(3)] == [0, 0, 0]
    for client, rows in enumerate(parts):
        x, y = with_.validation(client)
        assert torch.equal(x[:, 0, 0, 0], (y * 4).to(torch.uint8))
        train, test, held = (part(client)[1].tolist() for part in (with_.train, with_.test, with_.validation))
        assert sorted(train + test + held) == rows.tolist()
        assert test == without.test(client)[1].tolist()
        assert sorted(train + held) == without.train(client)[1].tolist()
        # as rows were split before there was a validation split
        order = torch.randperm(len(rows), generator=stream(0, "split", client)).numpy()
        count = max(0, min(len(rows) - 1, round(0.2 * len(rows))))
        assert without.train(client)[1].tolist() == rows[np.sort(order[count:])].tolist()
        assert without.test(client)[1].tolist() == rows[np.sort(order[:count])].tolist()
    union = [y for k in range(3) for y in with_.validation(k)[1].tolist()]
    assert with_.server_validation()[1].tolist() == union


def test_a_row_stays_for_training_whatever_is_held_out(tmp_path):
    made = make_shards(
        source(), [np.arange(3), np.arange(3, 40)], test_fraction=0.6, validation_fraction=0.39, seed=0, folder=tmp_path
    )
    assert [len(made.train(k)[1]) for k in range(2)] == [1, 1]  # of 3: two for a test; of 37: 22, and 14 of 15
    assert [len(made.validation(k)[1]) for k in range(2)] == [0, 14]


def test_a_digest_of_the_rows_tells_other_features_and_other_splits(tmp_path):
    found = set()
    for number, (change, share) in enumerate([(0, 0.0), (1, 0.0), (0, 0.1)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows = source()
        rows.x_train[5] += change
        made = make_shards(rows, [np.arange(40)], test_fraction=0.2, validation_fraction=share, seed=0, folder=folder)
        found.add(made.fingerprint())
        assert open_shards(folder).fingerprint() == made.fingerprint()
    assert len(found) == 3


def test_kept_shards_are_made_again_for_another_split_and_for_a_file_that_changed(tmp_path):
    path, cache = tmp_path / "t.csv", tmp_path / "cache"
    path.write_text("a,b,site\n" + "".join(f"{n},{n % 2},{n % 2}\n" for n in range(40)))
    top = {"source": f"table:{path}#b#site", "clients": 2, "partition": "iid"}
    with_, without = (small("fedavg", data={**top, "validation_fraction": share}) for share in (0.1, 0.0))
    first = prepare.simulated(with_, cache)
    assert prepare.simulated(with_, cache) == first != prepare.simulated(without, cache)
    assert len(open_shards(first).server_validation()[1]) == 4  # two of sixteen rows at each client
    path.write_text(path.read_text().replace("\n39,", "\n390,"))
    assert prepare.simulated(with_, cache) != first


def test_what_is_read_to_open_shards_does_not_grow_with_clients(tmp_path):
    """Where a client's rows lie is mapped, and read of the clients that are asked."""
    sizes = []
    for clients in (10, 1000):
        folder = tmp_path / str(clients)
        folder.mkdir()
        rows = source(1000)
        parts = np.array_split(np.arange(1000), clients)
        make_shards(rows, parts, test_fraction=0.0, seed=0, folder=folder)
        made = open_shards(folder)
        assert made.clients == clients
        assert made.count(7, "train") == 1000 // clients
        assert made.count(7, "test") == made.count(7, "validation") == 0
        assert torch.equal(made.train(clients - 1)[0], torch.from_numpy(rows.x_train[parts[-1]]))
        sizes.append((folder / "meta.json").stat().st_size)
    assert sizes[0] == sizes[1]


def test_writing_to_a_mapped_tensor_stays_in_this_process(tmp_path):
    made = make_shards(source(), [np.arange(40)], test_fraction=0.2, seed=0, folder=tmp_path)
    made.train(0)[0].fill_(7)
    assert not (open_shards(tmp_path).train(0)[0] == 7).all()


def test_folders_that_hold_no_shards(tmp_path):
    with pytest.raises(DataError, match="holds no complete shards.*make them again"):
        open_shards(tmp_path)
    make_shards(source(), [np.arange(40)], test_fraction=0.2, seed=0, folder=tmp_path)
    whole = (tmp_path / "x_train.npy").read_bytes()
    for damage in (whole[:-1], whole[:20], b""):
        (tmp_path / "x_train.npy").write_bytes(damage)
        with pytest.raises(DataError, match="holds no complete shards"):
            open_shards(tmp_path)
    (tmp_path / "x_train.npy").write_bytes(whole)
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(DataError, match="holds no complete shards"):
        open_shards(tmp_path)


def yours(tmp_path, monkeypatch, body):
    (tmp_path / "rows_of_mine.py").write_text("import numpy as np\nfrom secateur.data import Source\n" + body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rows_of_mine", raising=False)


def test_a_loader_of_your_own(tmp_path, monkeypatch):
    body = """
def load(folder, seed):
    x = np.full((6, 3), seed, np.float32)
    return Source(folder, x, np.arange(6) % 2, x[:2], np.arange(2), None, 2, kind="tabular")
"""
    yours(tmp_path, monkeypatch, body)
    source = data.load("rows_of_mine:load:/some/place", seed=5)
    assert source.name == "/some/place"
    assert source.x_train.tolist() == [[5.0] * 3] * 6


@pytest.mark.parametrize(
    ("body", "spec", "words"),
    [
        ("def load(folder, seed):\n    raise OSError('no such\\n disk')", "rows_of_mine:load", "OSError: no such disk"),
        ("def load(folder, seed):\n    return 3", "rows_of_mine:load", "returned int, not a secateur.data.Source"),
        ("", "rows_of_mine:load", "has no attribute 'load'"),
        ("import nothing_of_that_name", "rows_of_mine:load", "No module named 'nothing_of_that_name'"),
        ("", "rows_of_nobody:load", "unknown data source 'rows_of_nobody'"),
        ("", "digit", "did you mean 'digits'"),
        ("def load(folder, seed):\n    raise SystemExit(3)", "rows_of_mine:load", "SystemExit: 3"),
        ("", __file__, f"is a path: write what it is before it, such as table:{__file__}"),
    ],
)
def test_whatever_a_loader_of_your_own_does_is_one_clear_line(body, spec, words, tmp_path, monkeypatch):
    yours(tmp_path, monkeypatch, body)
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        data.load(spec, seed=0)
    assert "\n" not in str(caught.value)


# ---- communities


def test_a_neighbourhood_by_hand():
    """0 - 1 - 2 - 3, and 0 - 4: within two steps of 0 are 1, 4 and 2; 3 is too far."""
    edges = {0: [1, 4], 1: [0, 2], 2: [1, 3], 3: [2], 4: [0]}
    row = neighbourhood(edges, np.arange(10.0).reshape(5, 2), 0)
    assert row.shape == (16, 2 + 16)
    assert row[:5, :2].tolist() == [[0, 1], [2, 3], [8, 9], [4, 5], [0, 0]]  # 0, 1, 4, 2, nothing
    around = row[:, 2:]
    assert around[:4, :4].tolist() == [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert not around[4:].any()
    assert not around[:, 4:].any()


def test_communities_are_the_same_for_a_seed_and_natural_clients():
    one, two, other = (
        data.load("communities", seed=3),
        data.load("communities", seed=3),
        data.load("communities", seed=4),
    )
    assert np.array_equal(one.x_train, two.x_train)
    assert not np.array_equal(one.x_train, other.x_train[: len(one.x_train)])
    assert sorted(set(one.ids)) == list(range(10))
    assert one.outputs == 5
    assert one.x_train.dtype == np.float32
    parts = partition(one.y_train, one.ids, "natural", clients=10, seed=0)
    assert all(len({one.ids[row] for row in part}) == 1 for part in parts)


def test_public_rows_belong_to_no_client(tmp_path):
    study = small("fedavg", data={"clients": 4, "partition": "iid", "public": 100})
    shards = open_shards(prepare.simulated(study, tmp_path))
    x, y = shards.public()
    assert len(x) == len(y) == 100
    source = data.load("digits", seed=0)
    parts = [part(k) for k in range(4) for part in (shards.train, shards.test, shards.validation)]
    assert sum(len(y) for _, y in parts) == len(source.y_train) - 100
    rows = {row.tobytes() for x, _ in parts for row in x.numpy()}
    everything = [row.tobytes() for row in source.x_train]
    alone = {row for row in everything if everything.count(row) == 1}
    assert not {row.tobytes() for row in x.numpy()} & alone & rows


def test_too_many_public_rows_are_refused(tmp_path):
    study = small("fedavg", data={"clients": 4, "partition": "iid", "public": 100_000})
    with pytest.raises(DataError, match=r"data\.public = 100000 leaves fewer rows than clients"):
        prepare.simulated(study, tmp_path)


# ---- tables


def test_a_table_by_site(tmp_path):
    path = tmp_path / "people.csv"
    lines = [f"{n},{20 + n / 3},{n % 7},{'north' if n % 2 else 'south'},{'?' if n % 10 == 0 else n}" for n in range(60)]
    path.write_text("name,age,a,site,b\n" + "\n".join(lines) + "\n")
    source = data.load(f"table:{path}#age#site", seed=0)
    assert (source.task, source.outputs, source.kind) == ("regression", 1, "tabular")
    study = parse_study({"data": {"source": f"table:{path}#age#site"}})
    shards = open_shards(prepare.simulated(study, tmp_path / "cache"))
    assert shards.clients == 2
    assert [shards.count(k, kind) for k in range(2) for kind in ("train", "test", "validation")] == [21, 6, 3] * 2
    assert len(shards.server_test()[1]) == 12
    assert shards.input_shape == (4,)  # name, a, b, and whether b is missing
    (x, y), (x1, y1) = shards.train(0), shards.train(1)
    x, y = np.concatenate([x, x1]), np.concatenate([y, y1])
    assert np.allclose(x[:, 1].mean(), 0, atol=1e-6)
    assert np.allclose(x[:, 1].std(), 1, atol=1e-5)
    assert (x[x[:, 3] == 1, 2] == 0).all()
    assert np.allclose([y.mean(), y.std()], [0, 1], atol=1e-6)


def test_a_folder_of_tables_without_headers(tmp_path):
    for number in range(3):
        rows = [f"{number}.5,{n},{n % 4}" for n in range(10 + number)]
        (tmp_path / f"site{number}.data").write_text("\n".join(rows))
    classes = data.load(f"table:{tmp_path}#3", seed=0)
    assert (classes.task, classes.outputs) == ("classification", 4)
    sick = data.load(f"table:{tmp_path}#3>0", seed=0)
    assert sick.outputs == 2
    assert np.array_equal(sick.y_train, (classes.y_train > 0).astype(int))
    parts = partition(sick.y_train, sick.ids, "natural", clients=3, seed=0)
    assert sorted(map(len, parts)) == [10, 11, 12]


@pytest.mark.parametrize(
    ("text", "argument", "told"),
    [
        ("a,b\n1,2\n", "#b#a#c", "write table:FILE#TARGET#SITE"),
        ("a,b\n1,2\n", "#c#a", r"has no column 'c' \(data.target\): its columns are 'a', 'b'"),
        ("age,b\n1,2\n", "#agee#b", r"did you mean 'age'\?"),
        ("a,b\n1,2\n", "#b#b", "data.target and data.site are both 'b'"),
        ("a b\n1 2\n", "#b", "name the delimiter with data.options.delimiter"),
        ("a,b,c\n1,x,0\n2,3,1\n", "#b#a", "row 2, column 'b': 'x' is a word"),
        ("a,b\n1\n", "#b#a", "row 2 has 1 cells, 2 are expected"),
    ],
)
def test_a_wrong_table_is_one_line(text, argument, told, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=told):
        data.load(f"table:{path}{argument}", seed=0)
    with pytest.raises(DataError, match="cannot read the table"):
        data.load(f"table:{tmp_path / 'none.csv'}#a#b", seed=0)


def test_a_folder_says_what_it_leaves_out_and_refuses_a_site_twice(tmp_path):
    for name in ("a.csv", "b.csv", "c.xlsx"):
        (tmp_path / name).write_text("age,bmi,sick\n1,2,0\n3,4,1\n5,6,1\n")
    options = {"target": "sick", "drop": ("bmi", "bmy")}
    found = data.load(f"table:{tmp_path}", seed=0, options=options)
    assert [column.name for column in found.table.features] == ["age"]
    assert any("'c.xlsx' is no table: left out" in remark for remark in found.remarks)
    assert any("no column 'bmy', which data.options.drop names" in remark for remark in found.remarks)
    (tmp_path / "a.txt").write_text((tmp_path / "a.csv").read_text())
    with pytest.raises(DataError, match="holds a.csv and a.txt, which may be one site twice"):
        data.load(f"table:{tmp_path}", seed=0, options=options)


@pytest.mark.parametrize("spec", ["dirichlet:0.5", "pathological:2"])
def test_numbers_to_learn_are_not_spread_by_class(spec):
    with pytest.raises(DataError, match="is by class, and the data has numbers to learn: use iid or natural"):
        partition(np.arange(20, dtype=np.float32), None, spec, clients=2, seed=0)


def test_nothing_that_draws_is_loaded_to_spread_rows_and_the_library_is_whole_for_who_asks_later(tmp_path):
    code = """if True:
        import sys
        from secateur.federation import prepare
        from secateur.study.study import parse_study
        prepare.simulated(parse_study({"method": "fedavg"}), __import__("pathlib").Path(sys.argv[1]))
        assert not {"matplotlib", "seaborn", "sklearn", "scipy"} & set(sys.modules)
        import flwr_datasets
        assert flwr_datasets.FederatedDataset and flwr_datasets.partitioner.IidPartitioner
    """
    path = os.pathsep.join(p for p in sys.path if p)
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, env={**os.environ, "PYTHONPATH": path})
