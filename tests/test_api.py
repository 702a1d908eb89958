"""The Python interface: a person's model and rows, in a script, from standard input and in a notebook."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import secateur
from helpers import environment, model_of, rows_of, same
from secateur.errors import ConfigError, DataError, ModelError, NoResultError, SecateurError
from secateur.federation import opening
from secateur.models.fingerprint import digest

ROOT = Path(__file__).parents[1]
X, Y = load_digits(return_X_y=True)
X = X / 16
QUICK = {"rounds": 2, "participation": 1.0, "lr": 0.1, "training.epochs": 1, "progress": False}


class Net(nn.Module):
    """What a person writes."""

    def __init__(self, hidden=16, outputs=10):
        super().__init__()
        self.first, self.last = nn.Linear(64, hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


def net(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**options)


def sites(count=3):
    return [(X[k::6], Y[k::6]) for k in range(count)]


TEST = (X[5::6], Y[5::6])


def example(name="README.md"):
    """Return a page's example in Python, with fewer rounds."""
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf-8"), re.DOTALL)
    assert "__main__" not in text
    return re.sub(r"rounds=40", "rounds=2", text)


def test_the_example_of_the_page_on_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = example("docs/python.md").replace("rounds=5, seeds=2", "rounds=1, seeds=1, controls=['dense']")
    given = {"__name__": "example"}
    exec(compile(text.replace("rounds=10", "rounds=1"), "docs/python.md", "exec"), given)
    assert "oneshot" in capsys.readouterr().out
    assert given["result"].study.data.clients == 3


@pytest.mark.parametrize("stdin", [False, True], ids=["file", "standard input"])
def test_the_readme_s_example_runs_as_it_stands(tmp_path, stdin):
    text = example() + "print(type(masked).__name__, sum(p.numel() for p in small.parameters()))\n"
    assert len([line for line in example().splitlines() if line.strip()]) <= 10
    (tmp_path / "example.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-" if stdin else "example.py"], input=text if stdin else None, cwd=tmp_path,
        env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    *table, last = done.stdout.strip().splitlines()
    assert any("accuracy on the server's test set" in line for line in table)
    kind, parameters = last.split()
    assert kind == "Sequential"
    assert 0 < int(parameters) <= 64 * 64 + 64 + 640 + 10
    (folder,) = (tmp_path / "runs").iterdir()
    assert {"study.toml", "rounds.jsonl", "model.safetensors", "summary.json"} <= {p.name for p in folder.iterdir()}


def cells(notebook, folder, *texts):
    """Run a notebook of some cells in a folder, with a kernel of its own; return its cells."""
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in texts])
    client.NotebookClient(
        made, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return made.cells


def html(cell):
    return "".join(out["data"].get("text/html", "") for out in cell.outputs if "data" in out)


@pytest.mark.filterwarnings("default")
def test_the_readme_s_example_runs_in_a_notebook_and_its_result_draws_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    compared = "secateur.compare(['fedsparsify', 'oneshot'], net, clients, rounds=1, seeds=1, controls=['dense'])"
    run, shown, page, comparison = cells(None, tmp_path, example(), "result", "result.page()", compared)
    assert "accuracy on the server's test set" in "".join(out.get("text", "") for out in run.outputs)
    assert 'value="2" max="2"' in html(run)  # the bar, as it ended
    assert "accuracy on the server" in html(shown)
    assert "<svg" in html(shown)
    assert html(page).startswith("<iframe srcdoc=")
    assert "Plotly" in html(page)
    assert all(name in html(comparison) for name in ("FedAvg", "fedsparsify", "oneshot", "<svg"))
    assert not [out for cell in (run, shown, page) for out in cell.outputs if out.get("name") == "stderr"]


KILLED = """
import os, signal, torch, secateur
from sklearn.datasets import load_digits
x, y = load_digits(return_X_y=True)
clients = [(x[k::6] / 16, y[k::6]) for k in range(3)]
class Net(torch.nn.Sequential):
    pass
def made():
    return Net(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
"""


@pytest.mark.filterwarnings("default")
def test_a_kernel_that_is_closed_leaves_a_folder_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    pytest.importorskip("nbclient")
    run = "result = secateur.run('fedsparsify', made, clients, rounds=6, seed=3, epochs=1, lr=0.1, out=out)"
    dying = f"""{KILLED}
import secateur.federation.server as server
write = server.checkpoint.append
def append(*given):
    length = write(*given)
    if b'"round": 3' in given[0].read_bytes():
        os.kill(os.getpid(), signal.SIGKILL)
    return length
server.checkpoint.append = append
out = 'mine'
{run}"""
    from nbclient.exceptions import DeadKernelError

    with pytest.raises(DeadKernelError):
        cells(None, tmp_path, dying)
    assert len(rows_of(tmp_path / "mine")) == 3
    assert not (tmp_path / "mine" / "summary.json").exists()
    going_on = f"{KILLED}\nout = 'mine'\n{run}\nout = 'whole'\n{run}\nprint(result.score)"
    done = subprocess.run(
        [sys.executable, "-"], input=going_on, cwd=tmp_path, env=environment(), capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert same(model_of(tmp_path / "mine"), model_of(tmp_path / "whole"))


def test_the_bits_are_those_of_a_named_model_and_a_file_for_any_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "their_net.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "def net(input_shape, outputs):\n"
        "    torch.manual_seed(7)\n"
        "    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))\n"
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        mine = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    parts = sites()
    ids = np.repeat(np.arange(3), [len(y) for _, y in parts])
    x, y = np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
    np.savez(tmp_path / "rows.npz", x_train=x, y_train=y, x_test=TEST[0], y_test=TEST[1], ids=ids)
    by_path = secateur.run(
        "fedsparsify", "their_net:net", data=f"arrays:{tmp_path / 'rows.npz'}", partition="natural", init="torch",
        out=tmp_path / "named", workers=0, sparsity=0.8, **QUICK,
    )  # fmt: skip
    for workers in (0, 2):
        out = tmp_path / f"held-{workers}"
        held = secateur.run("fedsparsify", mine, parts, TEST, out=out, workers=workers, sparsity=0.8, **QUICK)
        assert same(model_of(held.folder), model_of(by_path.folder))
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())
    model = held.model
    assert type(model) is nn.Sequential
    assert not model.training
    shipped = model_of(held.folder)
    held_ = model.state_dict()
    assert held_.keys() <= shipped.keys()
    assert same(dict(held_), {name: shipped[name] for name in held_})
    zeros = sum(int((model[k].weight == 0).sum()) for k in (0, 2))
    assert zeros == pytest.approx(held.sparsity * (64 * 16 + 160), abs=0.5)
    with torch.no_grad():
        assert torch.allclose(held.slim()(torch.tensor(X[:50]).float()), model(torch.tensor(X[:50]).float()), atol=1e-5)
    assert held.score == held.summary["final"]["accuracy"]
    assert held.bytes == sum(row["bytes_down"] + row["bytes_up"] for row in rows_of(held.folder))
    assert len(held.records) == len(rows_of(held.folder))
    assert held.export("safetensors").exists()
    np.savez(tmp_path / "new.npz", x=X[:50].astype(np.float32))
    classes = model(torch.tensor(X[:50]).float()).argmax(1)
    assert held.predict(tmp_path / "new.npz").values.tolist() == classes.tolist()


def test_a_process_that_has_used_its_threads_can_be_forked(tmp_path):
    text = """
import torch, secateur, numpy as np
torch.set_num_threads(2)
draw = torch.randn(1500, 1500, requires_grad=True)
((draw @ draw).relu().sum()).backward()  # by several threads, whose pool no copy has
rng = np.random.default_rng(0)
clients = [(rng.normal(size=(200, 64)), rng.integers(0, 10, 200)) for _ in range(3)]
net = torch.nn.Sequential(torch.nn.Linear(64, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10))
secateur.run("fedavg", net, clients, rounds=2, participation=1.0, out="a", lr=0.01, workers=2, batch_size=200)
secateur.run("fedavg", net, clients, rounds=2, participation=1.0, out="b", lr=0.01, workers=0, batch_size=200)
"""
    free = {name: value for name, value in environment().items() if name not in {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}}
    done = subprocess.run(
        [sys.executable, "-"],
        input=text,
        cwd=tmp_path,
        env=free,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert same(model_of(tmp_path / "a"), model_of(tmp_path / "b"))


def test_where_a_process_cannot_be_forked_it_trains_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(opening.torch.cuda, "is_available", lambda: True)
    assert opening.forking() is None
    monkeypatch.setattr(opening, "LocalEngine", functools.partial(_inline_only, opening.LocalEngine))
    assert secateur.run("fedavg", net(), sites(), TEST, out=tmp_path / "run", workers=4, **QUICK).score > 0
    found = secateur.compare(
        ["oneshot"], net(), sites(), TEST, out=tmp_path / "many", seeds=1, controls=["dense"], **QUICK
    )
    assert len(found.cells) == 2


def _inline_only(engine, *given, **named):
    assert named["workers"] == 0
    return engine(*given, **named)


def test_a_folder_is_gone_on_with_by_the_same_objects_only(tmp_path):
    out = tmp_path / "mine"
    first = secateur.run("fedsparsify", net(), sites(), TEST, out=out, **QUICK)
    stamp = (out / "summary.json").stat().st_mtime_ns
    again = secateur.run("fedsparsify", net(), sites(), TEST, out=out, **QUICK)
    assert (again.summary, (out / "summary.json").stat().st_mtime_ns) == (first.summary, stamp)
    with pytest.raises(ConfigError, match=r"holds another run: model.name was 'memory:Net-.*seed a model's weights"):
        secateur.run("fedsparsify", net(1), sites(), TEST, out=out, **QUICK)
    with pytest.raises(ConfigError, match=r"data.source was 'memory:"):
        secateur.run("fedsparsify", net(), sites(), (X[4::6], Y[4::6]), out=out, **QUICK)
    with pytest.raises(ConfigError, match=r"training.lr was 0.1, is 0.2"):
        secateur.run("fedsparsify", net(), sites(), TEST, out=out, **{**QUICK, "lr": 0.2})
    with pytest.raises(ConfigError, match="is not empty, and holds no run"):
        secateur.run("fedsparsify", net(), sites(), TEST, out=tmp_path, **QUICK)


def test_the_command_line_reports_such_a_folder_and_says_what_it_cannot(tmp_path):
    out = tmp_path / "mine"
    secateur.run("fedsparsify", net(), sites(), TEST, out=out, **QUICK)
    commands = f"""
import sys
from secateur.cli import main
for command in (["report", {str(out)!r}, "--no-open"], ["export", {str(out)!r}]):
    sys.argv = ["secateur", *command]
    try:
        main()
    except SystemExit as ended:
        print("code", ended.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", commands], env=environment(), capture_output=True, text=True, timeout=240, check=True
    )
    page, *codes = [line for line in done.stdout.splitlines() if line.startswith(("Page", "code"))]
    assert page.endswith("index.html")
    assert codes[-1] == "code 2"
    assert "was an object of the Python process that ran it" in done.stderr
    assert "Traceback" not in done.stderr


def test_five_methods_are_compared_on_a_person_s_objects_with_controls(tmp_path):
    mine = net()
    before = [p.clone() for p in mine.parameters()]
    methods = ["fedsparsify:sparsity=0.8", "prunefl", "oneshot", "feddst", {"method": "random", "sparsity": 0.5}]
    settings = {"controls": ["dense", "random"], "seeds": 1, "test": TEST, "out": tmp_path / "out", **QUICK}
    found = secateur.compare(methods, mine, sites(), **settings)
    assert all(torch.equal(one, other) for one, other in zip(before, mine.parameters(), strict=True))
    names = ["fedsparsify 80 %", "prunefl", "oneshot", "feddst", "random 50 %"]
    assert list(found.suite.variants) == names
    assert {cell.control for cell in found.cells} == {"", "dense", "random"}
    assert not found.failed
    index = found.report()
    assert index.exists()
    data = (index.parent / "data.js").read_text("utf-8")
    assert all(name in data for name in (*names, "FedAvg", "fedsparsify 80 %: random"))
    assert all(name.split()[0] in str(found.table()) for name in (*names, "FedAvg"))
    assert len(found.records) == len(found.lines)
    one = found.result("fedsparsify 80 %")
    assert one.sparsity == pytest.approx(0.8, abs=0.01)
    assert type(one.model) is Net
    with pytest.raises(ConfigError, match="no run of 'prunfl'"):
        found.result("prunfl")
    with pytest.raises(ConfigError, match=r"holds a comparison in which the model is 'memory:Net-"):
        secateur.compare(methods, net(1), sites(), **settings)
    with pytest.raises(ConfigError, match=r"holds a comparison in which rows are 'memory:"):
        secateur.compare(methods, mine, sites(2), **settings)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("runs/*/summary.json")}
    again = secateur.compare(methods, mine, sites(), **settings)
    assert repr(again.lines) == repr(found.lines)  # what is not a number is not equal to itself
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


class Choosy(Net):
    """Cannot be trained on what one client has."""

    def forward(self, x):
        if self.training and x.max() > 5:
            raise ValueError("what a [large] number")
        return super().forward(x)


def test_without_a_bar_rounds_are_logged_and_who_is_left_out_is_a_warning(tmp_path, caplog, capsys):
    clients = [*sites(), (X[3::6] * 10, Y[3::6])]
    before = torch.get_rng_state(), torch.get_num_threads()
    with caplog.at_level("INFO", logger="secateur"):
        secateur.run("fedavg", Choosy, clients, TEST, out=tmp_path / "run", workers=0, **QUICK)
    said = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "secateur"]
    assert [text for level, text in said if level == "WARNING"] == [
        f"fedavg round {t}: client 3 left out: ValueError: what a [large] number" for t in (1, 2)
    ]
    assert [text.split(":")[0] for level, text in said if level == "INFO"] == ["fedavg train 1", "fedavg train 2"]
    assert capsys.readouterr() == ("", "")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == torch.get_num_threads()
    caplog.clear()
    secateur.run("fedavg", Choosy, clients, TEST, out=tmp_path / "bar", workers=0, **{**QUICK, "progress": True})
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "fedavg round 2/2: accuracy" in shown.err
    assert "client 3 left out: ValueError: what a [large] number" in shown.err


class Untested(Net):
    """Cannot be scored on some rows."""

    def forward(self, x):
        if not self.training and x.max() > 5:
            raise ValueError("what a large number")
        return super().forward(x)


def test_a_model_that_raises_on_test_rows_ends_the_run_in_one_line(tmp_path):
    with pytest.raises(
        NoResultError, match="on the server's rows: ValueError: what a large number; its traceback is in"
    ):
        secateur.run("fedavg", Untested, sites(), (TEST[0] * 10, TEST[1]), out=tmp_path, workers=0, **QUICK)
    assert "what a large number" in json.loads((tmp_path / "failure.json").read_text())["failed"]
    assert "in forward" in (tmp_path / "run.log").read_text()


class Words(torch.utils.data.Dataset):
    """Items by number."""

    def __len__(self):
        return 60

    def __getitem__(self, k):
        return torch.tensor(X[k]).float(), "odd" if Y[k] % 2 else "even"


def test_rows_are_taken_in_every_form(tmp_path):
    lists = [(x.tolist(), y.tolist()) for x, y in sites()]
    tensors = [torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y)) for x, y in sites()]
    loaders = [torch.utils.data.DataLoader(one, batch_size=7, shuffle=True) for one in tensors]
    arrays = [(x, y[:, None]) for x, y in sites()]
    runs = [
        secateur.run("fedavg", net(), given, TEST, out=tmp_path / str(k), workers=0, **QUICK)
        for k, given in enumerate((lists, tensors, loaders, arrays))
    ]
    models = [model_of(run.folder) for run in runs]
    assert all(same(models[0], other) for other in models[1:])
    named = secateur.run(
        "fedavg", net(outputs=2), {"rome": Words(), "oslo": Words()}, out=tmp_path / "w", workers=0, **QUICK
    )
    assert {"clients are 0 rome, 1 oslo", "the data: classes are 0 even, 1 odd"} <= set(named.summary["remarks"])
    assert named.study.data.clients == 2


def test_rows_are_divided_between_clients(tmp_path):
    made = secateur.run(
        "fedavg", net(), 4, data=(X, Y), partition="dirichlet:0.5", workers=0, out=tmp_path / "a", **QUICK
    )
    assert (made.study.data.clients, made.study.data.partition) == (4, "dirichlet:0.5")
    assert {client for row in rows_of(made.folder) for client in row["clients"]} == {0, 1, 2, 3}
    assert (
        secateur.run("fedavg", net(), 4, data=(X, Y), workers=0, out=tmp_path / "b", **QUICK).study.data.partition
        == "iid"
    )
    named = secateur.run("fedavg", "mlp", 4, data="digits", workers=0, out=tmp_path / "c", **QUICK)
    assert (named.study.data.source, named.study.data.clients) == ("digits", 4)


def frames():
    pandas = pytest.importorskip("pandas")

    def made(seed):
        rng = np.random.default_rng(seed)
        age, sex = rng.integers(20, 80, 90), rng.choice(["f", "m"], 90)
        ill = np.where(age + 15 * (sex == "m") > 55, "yes", "no")
        return pandas.DataFrame({"age": age, "sex": sex, "ill": ill, "town": rng.choice(["x", "y"], 90)})

    return {"rome": made(0), "oslo": made(1)}


def test_data_frames_are_tables(tmp_path):
    pandas = pytest.importorskip("pandas")
    given = frames()
    for name, frame in given.items():
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    held = secateur.run("fedavg", "mlp", given, target="ill", drop=["town"], out=tmp_path / "a", workers=0, **QUICK)
    (tmp_path / "sites").mkdir()
    for name in ("rome", "oslo"):
        (tmp_path / f"{name}.csv").rename(tmp_path / "sites" / f"{'01'[name == 'oslo']}{name}.csv")
    read = secateur.run(
        "fedavg", "mlp", data=f"table:{tmp_path / 'sites'}", target="ill", drop=["town"], out=tmp_path / "b", workers=0,
        **QUICK,
    )  # fmt: skip
    assert same(model_of(held.folder), model_of(read.folder))
    assert held.study.training.clip == read.study.training.clip == 1.0
    assert held.slim()(torch.tensor([[30.0, 0.0], [70.0, 1.0]])).shape == (2, 2)  # rows as they stand in the table
    whole = pandas.concat(given.values())
    by_site = secateur.run("fedavg", data=whole, target="ill", site="town", out=tmp_path / "c", workers=0, **QUICK)
    assert len(rows_of(by_site.folder)[-1]["clients"]) == 2


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({}, DataError, "give target='NAME'"),
        ({"target": "il"}, DataError, r"frame rome has no column 'il' \(data.target\): did you mean 'ill'\?"),
        ({"target": "ill", "test": TEST}, ConfigError, "each site holds out test rows of its own"),
        (
            {"target": "ill", "clients": [*frames().values(), TEST]},
            DataError,
            "client 2 is a tuple of 2, others are data",
        ),
    ],
)
def test_bad_frames_are_one_line(change, kind, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=said):
        secateur.run(**{"method": "fedavg", "model": "mlp", "clients": frames(), **change})
    assert not list(tmp_path.iterdir())


def test_tokens_go_to_a_model_that_looks_them_up(tmp_path):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.last = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.words(x).mean(1))

    x = np.random.default_rng(0).integers(0, 9, (60, 5))
    made = secateur.run("fedavg", Reader(), [(x, x[:, 0] % 2)] * 2, out=tmp_path / "run", workers=0, **QUICK)
    assert made.study.data.options == {"kind": "tokens"}


def test_each_seed_draws_the_weights_of_a_class_anew_and_keeps_those_of_a_model(tmp_path):
    def initial(model, seed, **more):
        from secateur.api.given import given
        from secateur.data.shards import Shape
        from secateur.federation.client import make_model

        objects = given(model, sites(), TEST, None)
        study = objects.study("fedavg", {"seed": seed, **more})
        return make_model(study, Shape((64,), 10, "tabular", 1.0, "classification")).state_dict()

    mine = net()
    assert same(dict(initial(mine, 0)), dict(mine.state_dict()))
    assert same(dict(initial(mine, 1)), dict(mine.state_dict()))
    assert same(dict(initial(Net, 0)), dict(initial(Net, 0)))
    assert not same(dict(initial(Net, 0)), dict(initial(Net, 1)))
    drawn = initial(mine, 0, init="xavier_normal")
    assert not same(dict(drawn), dict(mine.state_dict()))
    assert not drawn["first.bias"].any()


RIGHT = {"model": net(), "clients": sites(), "test": TEST, "rounds": 1}
WORDS = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
BAD = {
    "a misspelt option": (
        {"sparsty": 0.8}, ConfigError, r"unknown setting 'sparsty': did you mean 'sparsity'\?"
    ),
    "a misspelt path": (
        {"settings": {"schedule.sparsty": 0.8}}, ConfigError, r"'schedule.sparsty': did you mean 'schedule.sparsity'\?"
    ),
    "a misspelt method": ({"method": "fedsparsfy"}, ConfigError, r"did you mean 'fedsparsify'\?"),
    "a short name of two paths": (
        {"method": "autoflip", "epochs": 2}, ConfigError,
        r"epochs = 2 may be criterion.explore.epochs or training.epochs: write the whole path",
    ),
    "one setting twice": ({"lr": 0.1, "settings": {"training.lr": 0.2}}, ConfigError, "lr = 0.1 and training.lr = 0.2"),
    "a model of other inputs": (
        {"model": nn.Sequential(nn.Flatten(), nn.Linear(784, 10))}, ModelError,
        r"inputs of shape \(64,\).*in Linear\(in_features=784, out_features=10, .*, which was given shape \(2, 64\)",
    ),
    "a model of other outputs": (
        {"model": nn.Linear(64, 7)}, ModelError, r"returns shape \(2, 7\) for a batch of 2, \(2, 10\) is expected"
    ),
    "something else for a model": ({"model": 3}, ModelError, "model is a int: give a torch.nn.Module"),
    "a misspelt model": ({"model": "mpl"}, ModelError, r"did you mean 'mlp'\?"),
    "arrays of two lengths": (
        {"clients": [*sites(), (X[:5], Y[:4])]}, DataError, "client 3: x has 5 rows, y has 4; each row needs both"
    ),
    "a client without rows": (
        {"clients": {"rome": sites()[0], "oslo": (X[:0], Y[:0])}}, DataError, "client oslo has no rows"
    ),
    "rows of two widths": (
        {"clients": [*sites(), (X[:5, :8], Y[:5])]}, DataError,
        r"client 3 has rows of shape \(8,\), client 0 of \(64,\)",
    ),
    "test rows of another width": ({"test": (X[:, :8], Y)}, DataError, r"test has rows of shape \(8,\)"),
    "rows of no length": ({"clients": [([[1, 2], [3]], [0, 1])]}, DataError, "client 0, x is no array"),
    "one pair for all clients": (
        {"clients": (X, Y)}, DataError, r"client 0 is a ndarray of shape \(1797, 64\).*give clients=\[\(x, y\), ...\]"
    ),
    "no clients": ({"clients": []}, DataError, "clients is empty"),
    "clients by a fraction": ({"clients": 2.5}, ConfigError, "clients is a float"),
    "rows in two ways": ({"data": (X, Y)}, ConfigError, "rows are given twice"),
    "rows and a source": ({"data": "digits"}, ConfigError, "has training and test rows of its own"),
    "test rows alone": ({"clients": None}, ConfigError, "nobody has training rows"),
    "words for some labels": (
        {"test": (X[:50], WORDS[Y[:50]])}, DataError, "words in one of y_train and y_test, and numbers in the other"
    ),
    "words for some clients' labels": (
        {"clients": [sites()[0], (X[:50], WORDS[Y[:50]])]}, DataError, "of clients 0 and 1 one has words as labels"
    ),
    "labels from one": (
        {"clients": [(x, y + 1) for x, y in sites()], "test": (TEST[0], TEST[1] + 1)}, DataError,
        "the least class in y is 1, and must be 0",
    ),
    "a value that is none": ({"clients": [(X * np.nan, Y)]}, DataError, "nan is no finite number"),
    "a folder that cannot be made": ({"out": "/proc/nothing/mine"}, ConfigError, "cannot make the run folder"),
    "a file for a folder": ({"out": __file__}, ConfigError, "holds no run: give another folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_anything_is_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, kind, said = BAD[name]
    with pytest.raises(SecateurError, match=said) as refused:
        secateur.run(**{"method": "fedsparsify", **RIGHT, **change})
    assert type(refused.value) is kind
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("methods", "more", "said"),
    [
        (["fedavgg"], {}, r"did you mean 'fedavg'"),
        (["fedavg", "fedavg"], {}, "'fedavg' is compared twice"),
        ([3], {}, "methods: 3 names no method"),
        (["quick"], {}, "'quick' is a suite, with rows of its own: play it with: secateur compare quick"),
        ([], {}, "methods is empty"),
        (["fedavg"], {"controls": ["rendom"]}, "controls.0: input should be 'dense', 'random'"),
        (["fedsparsify:sparsty=0.9"], {}, r"fedsparsify: unknown setting 'sparsty': did you mean 'sparsity'"),
        ({"mine": {"method": "fedsparsify", "lr": -1}}, {}, r"variant 'mine': training.lr"),
    ],
)
def test_what_cannot_be_compared_is_one_line(methods, more, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said) as refused:
        secateur.compare(methods, net(), sites(), TEST, **more)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_a_suite_and_a_file_is_not_guessed_at(tmp_path, monkeypatch):
    from secateur.comparison import suite

    monkeypatch.chdir(tmp_path)
    assert suite.load("quick").title
    (tmp_path / "quick.toml").write_text(
        'source = "digits"\npartitions = ["iid"]\n[variants.mine]\nmethod = "fedavg"\n'
    )
    with pytest.raises(
        ConfigError, match="'quick' is a suite of secateur, and quick.toml a file here: write quick.toml"
    ):
        suite.load("quick")
    assert list(suite.load("quick.toml").variants) == ["mine"]


def made(forward, attribute=0.5, bias=True, seed=0):
    """Return a model with a forward pass of its own."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 2, bias=bias), attribute

    Own.forward = forward
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Own()


def helper(x):
    return x + 1


def other_helper(x):
    return x + 2


def plain(self, x):
    return self.layer(x) * self.scale


def helped(self, x):
    return self.layer(helper(x))


def test_a_model_s_digest_changes_with_what_it_computes_and_with_nothing_else(monkeypatch):
    first = digest(made(plain))
    assert digest(made(plain)) == first
    used = made(plain)
    used.forward(torch.ones(3, 4)).sum().backward()
    assert digest(used.eval()) == first
    others = [
        made(plain, seed=1), made(plain, attribute=0.25), made(plain, bias=False), made(helped),
        made(lambda self, x: self.layer(x) - self.scale), made(lambda self, x: self.layer(x) * 2 * self.scale),
    ]  # fmt: skip
    frozen = made(plain)
    frozen.layer.weight.requires_grad_(False)
    found = [first, *map(digest, [*others, frozen])]
    assert len(set(found)) == len(found)
    before = digest(made(helped)), digest(lambda: made(helped))
    monkeypatch.setitem(globals(), "helper", other_helper)  # what forward calls is another function
    assert digest(made(helped)) != before[0]
    assert digest(lambda: made(helped)) != before[1]
    width = 3
    assert digest(lambda: nn.Linear(width, 2)) != digest(lambda: nn.Linear(4, 2))


def test_a_model_that_nobody_holds_is_said_so():
    study = secateur.Study(model={"name": "memory:Net-00000000"}, data={"source": "memory:00"})
    from secateur.data import load
    from secateur.models import build

    with pytest.raises(ModelError, match="was an object of the Python process that ran it"):
        build(study.model.name, input_shape=(64,), outputs=10)
    with pytest.raises(DataError, match="were objects of the Python process"):
        load(study.data.source, seed=0)
