"""Arrays of anyone's: what is accepted, what is converted, and what is refused in one line before training."""

import numpy as np
import pytest
import torch

from secateur import data
from secateur.data import Source
from secateur.data.hold import hold_out
from secateur.data.validate import checked
from secateur.errors import DataError


def rows(n=24, d=5, c=3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)).astype(np.float32), np.arange(n) % c


def made(x, y, outputs=3, *, x_test=None, y_test=None, **more):
    x_test = x[:6] if x_test is None else x_test
    y_test = y[:6] if y_test is None else y_test
    settings = {"ids": None, "kind": "tabular", "scale": 1.0, **more}
    ids = settings.pop("ids")
    return Source("mine", x, y, x_test, y_test, ids, outputs, settings.pop("kind"), settings.pop("scale"), **settings)


X, Y = rows()


@pytest.mark.parametrize(
    ("x", "y", "more"),
    [
        (X.astype(np.float64), Y, {}),
        (X.astype(">f4"), Y, {}),
        (X.tolist(), Y.tolist(), {}),
        (torch.from_numpy(X), torch.from_numpy(Y), {}),
        (X, Y[:, None], {}),
        (X, Y.astype(float), {}),
        (X, Y.astype(np.uint8), {}),
        (np.repeat(X, 2, axis=0)[::2], Y, {}),
        (X, Y, {"ids": (np.arange(24) % 4)[:, None], "outputs": np.int64(3), "scale": np.float32(1)}),
    ],
)
def test_what_means_the_same_is_converted(x, y, more):
    found = checked(made(x, y, **more), "mine")
    assert (found.x_train.dtype, found.y_train.dtype) == (np.float32, np.int64)
    assert np.array_equal(found.x_train, X)
    assert found.y_train.tolist() == Y.tolist()
    assert found.x_train.flags.c_contiguous
    torch.from_numpy(found.x_train)
    assert (found.outputs, found.scale) == (3, 1.0)
    assert found.ids is None or found.ids.tolist() == (np.arange(24) % 4).tolist()


def test_other_kinds_keep_what_they_are():
    image = np.zeros((24, 1, 4, 4), np.uint8)
    assert checked(made(image, Y, kind="image", scale=255.0), "m").x_train.dtype == np.uint8
    assert checked(made(image / 2, Y, kind="image"), "m").x_train.dtype == np.float32
    tokens = np.arange(48).reshape(24, 2)
    assert checked(made(tokens.astype(np.uint8), Y, kind="tokens"), "m").x_train.dtype == np.uint8
    assert checked(made(tokens, Y, kind="tokens"), "m").x_train.dtype == np.int32
    values = checked(made(X, np.linspace(0, 1, 24), 1, task="regression"), "m")
    assert (values.y_train.dtype, values.y_train.ndim) == (np.float32, 1)
    several = checked(made(X, X[:, :2].astype(float), 2, task="mine:Task"), "m")
    assert (several.y_train.shape, several.y_train.dtype) == ((24, 2), np.float32)
    words = checked(made(X, Y, ids=np.array(["b", "a", "c", "b"] * 6)), "m")
    assert words.ids[:4].tolist() == [1, 0, 2, 1]
    own = checked(made(X, np.zeros(24, int), x_test=X[:0], y_test=Y[:0]), "m", whole=False)  # a node's own
    assert len(own.x_test) == 0


def changed(array, place, value):
    copy = np.array(array, dtype=np.float64)
    copy[place] = value
    return copy


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (made(X, Y + 1), "classes go from 1 to 3; they begin at 0: give y - 1"),
        (made(X, changed(Y, 7, 3)), "y_train, row 7: class 3 is not among the 3, 0 to 2"),
        (made(X, changed(Y, 7, -1)), "y_train, row 7: class -1"),
        (made(X, Y, y_test=Y[:6] + 5), "y_test, row 0: class 5"),
        (made(X, changed(Y, 7, 0.5)), r"y_train, row 7: 0.5 is no class 0, 1, .*task='regression'"),
        (made(X, changed(Y, 7, np.nan)), "y_train, row 7: nan"),
        (made(X, np.array(["a", "b", "c"])[Y]), "y_train holds words, such as 'a'; .*numpy.unique"),
        (made(X, [None] * 24), "y_train holds objects of Python .NoneType."),
        (made(X, np.eye(3)[Y]), r"y_train has shape \(24, 3\); one target a row"),
        (made(X, np.zeros(24, int)), "all rows are of class 0: there is nothing to tell apart"),
        (made(X, Y[:-1]), "y_train has 23 rows, x_train has 24"),
        (made(X, Y, y_test=Y[:5]), "y_test has 5 rows, x_test has 6"),
        (made(X, Y, 1), "outputs = 1 for classification"),
        (made(X, Y, 2), "y_train, row 2: class 2 is not among the 2"),
        (made(X, Y, "3"), "outputs = '3' must be the number of classes"),
        (made(X, X[:, :2], 2, task="regression"), "outputs = 2 for regression"),
        (made(X, X[:, :2], 1, task="regression"), r"y_train has shape \(24, 2\)"),
        (made(X, changed(X[:, 0], 3, np.inf), 1, task="regression"), "y_train, row 3: inf is no finite number"),
        (made(changed(X, (5, 2), np.nan), Y), "x_train, row 5, column 2: nan is no finite number"),
        (made(changed(X, (5, 2), 1e39), Y), "x_train, row 5, column 2: 1e[+]39"),
        (made(X, Y, x_test=changed(X[:6], (1, 0), -np.inf)), "x_test, row 1, column 0: -inf"),
        (made([[1.0, 2.0], [3.0]], [0, 1]), "x_train is no array|holds objects"),
        (made(np.array([["a"]] * 24), Y), "x_train holds <U1; numbers are expected"),
        (made(X + 1j, Y), "x_train holds complex"),
        (made(X[:, 0], Y), r"x_train has shape \(24,\)"),
        (made(X[:, :0], Y), r"x_train has shape \(24, 0\)"),
        (made(np.ma.masked_invalid(X), Y), "x_train is a masked array"),
        (made(X, Y, x_test=X[:6, :4]), r"different shapes: \(5,\) and \(4,\)"),
        (made(X[:0], Y[:0], x_test=X, y_test=Y), "has 0 training and 24 test rows"),
        (made(X, Y, x_test=X[:0], y_test=Y[:0]), "has 24 training and 0 test rows"),
        (made(X, Y, kind="image"), r"x_train has shape \(24, 5\); images are \(rows, channels, height, width\)"),
        (made(np.zeros((24, 8, 8, 3)), Y, kind="image"), r"images are \(rows, channels"),
        (made(np.zeros((24, 8, 8)), Y, kind="image"), r"images are \(rows, channels"),
        (made(X, Y, kind="tokens"), "x_train holds float32; whole numbers are expected"),
        (made(np.full((24, 3), -1), Y, kind="tokens"), "x_train, row 0: a token is below 0"),
        (made(np.full((24, 3), 2**40), Y, kind="tokens"), "x_train, row 0: a token is above"),
        (made(X, Y, kind="picture"), "kind = 'picture': write one of image, tokens, tabular"),
        (made(X, Y, scale=0.0), "scale = 0.0 must be a number above 0"),
        (made(X, Y, target_scale=float("nan")), "target_scale = nan must be a number above 0"),
        (made(X, Y, target_mean=float("inf")), "target_mean = inf must be a finite number"),
        (made(X, Y, remarks="read by hand"), "remarks = 'read by hand' must be a tuple of lines"),
        (made(X, np.zeros(24), y_test=np.ones(6)), "all training rows are of class 0"),
        (made(X, Y, ids=np.arange(20)), "ids has 20 rows, x_train has 24"),
        (made(X, Y, ids=np.array([None] * 24)), "ids holds object"),
        (made(X, Y, ids=changed(Y, 2, np.nan)), "ids, row 2: nan"),
    ],
)
def test_what_could_mean_something_else_is_refused_in_one_line(source, words):
    with pytest.raises(DataError, match=f"data 'mine'.*({words})") as refused:
        checked(source, "mine")
    assert "\n" not in str(refused.value)


# ---- arrays:FILE.npz


def saved(path, **arrays):
    np.savez(path, **arrays)
    return f"arrays:{path}"


def test_arrays_with_a_test_part_and_without(tmp_path):
    given = saved(tmp_path / "a.npz", x_train=X, y_train=Y, x_test=X[:4], y_test=Y[:4], ids=np.array(list("abcd") * 6))
    found = data.load(given, seed=0)
    assert (found.kind, found.scale, found.outputs, found.task) == ("tabular", 1.0, 3, "classification")
    assert np.array_equal(found.x_test, X[:4])
    assert found.ids[:4].tolist() == [0, 1, 2, 3]
    drawn = data.load(saved(tmp_path / "b.npz", x=X, y=Y, ids=Y + 10), seed=3)
    train, test = hold_out(Y, 3)
    assert np.array_equal(drawn.x_train, X[train])
    assert np.array_equal(drawn.y_test, Y[test])
    assert drawn.ids.tolist() == (Y + 10)[train].tolist()


def test_arrays_say_what_they_are(tmp_path):
    grey = np.arange(24 * 25, dtype=np.uint16).reshape(24, 5, 5).astype(np.uint8)
    found = data.load(saved(tmp_path / "a.npz", x=grey, y=Y), seed=0)
    assert (found.kind, found.scale, found.x_train.shape[1:]) == ("image", 255.0, (1, 5, 5))
    last = np.stack([grey] * 3, axis=3)
    spec = saved(tmp_path / "b.npz", x_train=last, y_train=Y, x_test=last, y_test=Y)
    with pytest.raises(DataError, match="images are .rows, channels"):
        data.load(spec, seed=0)
    found = data.load(spec, seed=0, options={"channels": "last"})
    assert np.array_equal(found.x_train[:, 2], grey)
    values = data.load(saved(tmp_path / "c.npz", x=X, y=X[:, 0]), seed=0)
    assert (values.task, values.outputs, len(values.x_test)) == ("regression", 1, 5)
    words = data.load(saved(tmp_path / "d.npz", x=X, y=np.array(["no", "yes", "may"])[Y]), seed=0)
    assert words.outputs == 3
    assert "classes are 0 may, 1 no, 2 yes" in words.remarks[0]
    assert data.load(saved(tmp_path / "e.npz", x=X, y=Y), seed=0, options={"classes": 7}).outputs == 7
    tokens = data.load(saved(tmp_path / "f.npz", x=np.abs(X).astype(np.int64), y=Y), seed=0, options={"kind": "tokens"})
    assert tokens.x_train.dtype == np.int32


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": X}, "holds x: name them x_train"), ({"a": X, "b": Y}, "holds a, b: name them"),
        ({"x": X, "y": Y[:20]}, "24 rows in x and 20 in y"), ({"x": X, "y": Y + 1}, "the least class in y is 1"),
        ({"x": X, "y": Y, "ids": Y[:3]}, r"ids of shape \(3,\) for 24 rows"), ({"x": X[:0], "y": Y[:0]}, "0 rows in x"),
        ({"x": X, "y": np.array([None] * 24)}, "cannot read the arrays .*numpy.savez"),
        ({"x": np.float64(3), "y": np.float64(3)}, "0 rows in x and 0 in y"),
        ({"x": changed(X, (3, 1), np.nan), "y": Y}, "row [0-9]+, column 1: nan"),
    ],
)  # fmt: skip
def test_arrays_that_cannot_be_used(arrays, words, tmp_path):
    with pytest.raises(DataError, match=words):
        data.load(saved(tmp_path / "a.npz", **arrays), seed=0)


def test_files_that_are_no_arrays(tmp_path):
    path = tmp_path / "a.npz"
    for raw in (b"", b"no zip", b"PK\x03\x04 broken"):
        path.write_bytes(raw)
        with pytest.raises(DataError, match="cannot read the arrays"):
            data.load(f"arrays:{path}", seed=0)
    with pytest.raises(DataError, match="cannot read the arrays"):
        data.load(f"arrays:{tmp_path / 'none.npz'}", seed=0)
    np.save(tmp_path / "b.npy", X)
    with pytest.raises(DataError, match="is a single array"):
        data.load(f"arrays:{tmp_path / 'b.npy'}", seed=0)
    path.unlink()
    saved(tmp_path / "only.npz", x=X, y=Y)
    assert data.load(f"arrays:{tmp_path}", seed=0, whole=False).outputs == 3  # a node's folder
    saved(tmp_path / "two.npz", x=X, y=Y)
    with pytest.raises(DataError, match="holds 2 .npz files"):
        data.load(f"arrays:{tmp_path}", seed=0)


def test_whether_whole_numbers_are_classes_or_values(tmp_path):
    floats = data.load(saved(tmp_path / "a.npz", x=X, y=Y.astype(float)), seed=0)
    assert (floats.task, floats.outputs) == ("classification", 3)
    x = np.repeat(X, 5, axis=0)
    many = saved(tmp_path / "b.npz", x=x, y=np.arange(120) * 2 % 97)
    for spec, words in (
        (many, "97 whole numbers, 0 to 96"),
        (saved(tmp_path / "c.npz", x=X, y=Y - 1), "3 .*, -1 to 1"),
    ):
        with pytest.raises(DataError, match=f"y holds {words}: if they are values, set data.options.task=regression"):
            data.load(spec, seed=0)
        assert data.load(spec, seed=0, options={"task": "regression"}).outputs == 1
        assert data.load(spec, seed=0, task="regression").task == "regression"
    assert data.load(many, seed=0, options={"task": "classification"}).outputs == 97


def test_words_in_one_part_and_numbers_in_the_other(tmp_path):
    words = np.array(["no", "yes"])[Y % 2]
    for one, other in ((words, Y % 2), (Y % 2, words)):
        with pytest.raises(DataError, match="words in one of y_train and y_test"):
            data.load(saved(tmp_path / "a.npz", x_train=X, y_train=one, x_test=X, y_test=other), seed=0)


# ---- images:FOLDER


@pytest.fixture
def pictures(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="needs the images extra")

    def write(place, value, size=(6, 4), mode="L"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        image.new(mode, size, value).save(tmp_path / place)

    return tmp_path, write


def test_a_folder_of_images_for_each_class(pictures):
    folder, write = pictures
    for label, name in enumerate(["cat", "dog"]):
        for n in range(5):
            write(f"{name}/{n}.png", 100 * label + n)
    found = data.load(f"images:{folder}", seed=0)
    assert (found.x_train.shape, found.outputs, found.kind, found.scale) == ((8, 1, 4, 6), 2, "image", 255.0)
    assert (found.x_train[:, 0, 0, 0] // 100 == found.y_train).all()
    assert len(found.y_test) == 2
    (folder / "dog" / "notes.txt").write_text("no image")
    write("dog/5.JPEG", (255, 0, 0), mode="RGB")
    coloured = data.load(f"images:{folder}", seed=0)
    assert coloured.x_train.shape[1:] == (3, 4, 6)
    assert coloured.remarks == (f"{folder}: 1 files are no PNG or JPEG: left out",)
    write("dog/6.png", 1, size=(3, 3))
    with pytest.raises(DataError, match=r"dog/6.png is 3x3 pixels, .*cat/0.png is 6x4: set data.options.size=6x4"):
        data.load(f"images:{folder}", seed=0)
    assert data.load(f"images:{folder}", seed=0, options={"size": 2}).x_train.shape[1:] == (3, 2, 2)
    assert data.load(f"images:{folder}", seed=0, options={"size": "5x3"}).x_train.shape[1:] == (3, 3, 5)
    with pytest.raises(DataError, match="size = 'large': write it as 32"):
        data.load(f"images:{folder}", seed=0, options={"size": "large"})


def test_images_with_a_test_folder_and_classes_that_a_site_lacks(pictures):
    folder, write = pictures
    for part in ("train", "test"):
        for label, name in enumerate(["a", "b", "c"]):
            if (part, name) != ("test", "a"):
                write(f"{part}/{name}/1.png", label)
    found = data.load(f"images:{folder}", seed=0)
    assert (found.y_train.tolist(), found.y_test.tolist(), found.outputs) == ([0, 1, 2], [1, 2], 3)
    wide = data.load(f"images:{folder}", seed=0, options={"classes": ["z", "c", "b", "a"]})
    assert (wide.y_train.tolist(), wide.outputs) == ([1, 2, 3], 4)
    with pytest.raises(DataError, match="holds a folder 'c', which is none of data.options.classes"):
        data.load(f"images:{folder}", seed=0, options={"classes": ["a", "b"]})


def test_folders_without_images(pictures):
    folder, write = pictures
    with pytest.raises(DataError, match="holds no folders: put the images of each class"):
        data.load(f"images:{folder}", seed=0)
    (folder / "a").mkdir()
    with pytest.raises(DataError, match="holds no .jpeg, .jpg, .png"):
        data.load(f"images:{folder}", seed=0)
    write("a/1.png", 3)
    (folder / "b").mkdir()
    assert data.load(f"images:{folder}", seed=0, whole=False).remarks[-1].endswith("in 'b': a class without rows")
    with pytest.raises(DataError, match="data.options.classes names 'a' twice"):
        data.load(f"images:{folder}", seed=0, options={"classes": ("a", "b", "a")})
    (folder / "a" / "2.png").write_bytes((folder / "a" / "1.png").read_bytes()[:40])
    with pytest.raises(DataError, match="cannot read the image .*2.png"):
        data.load(f"images:{folder}", seed=0)
    (folder / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot read the image .*2.png"):
        data.load(f"images:{folder}", seed=0)
    with pytest.raises(DataError, match="there is no such folder"):
        data.load(f"images:{folder / 'none'}", seed=0)
