"""The command line, as a user types it: in its own process where it matters."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import secateur as secateur_package
from helpers import model_of, same
from secateur import cli
from secateur.comparison.known import shadowed
from secateur.engines.stopping import Stopped, going_on, stoppable
from secateur.federation.folder import read_records
from secateur.study import usual
from secateur.study.study import Study

QUICK = [
    "--clients", "4", "--rounds", "3", "--partition", "iid", "--workers", "1", "--model", "mlp",
    "--set", "model.hidden=[8]",    "--set", "training.epochs=1", "--set", "criterion.explore.epochs=2",
]  # fmt: skip


def secateur(*arguments, cwd, ok=True, **env):
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-m", "secateur", *map(str, arguments)], check=False, capture_output=True, text=True,
        cwd=cwd, env={**os.environ, "PYTHONPATH": path, **env},
    )  # fmt: skip
    assert (done.returncode == 0) == ok, done.stderr
    return done


def refused(*arguments, cwd):
    """Return the one line on stderr; exit code 2."""
    done = secateur(*arguments, cwd=cwd, ok=False)
    assert done.returncode == 2
    assert done.stderr.startswith("secateur: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_run_shows_both_methods_and_leaves_a_folder_that_runs_again(tmp_path):
    done = secateur("run", *QUICK, "--out", "one", cwd=tmp_path)
    for words in (
        "autoflip",
        "dense FedAvg",
        "bytes down, explore",
        "client seconds, train",
        "MACs, units removed",
        "sparsity",
    ):
        assert words in done.stdout
    assert "Run folder: one" in done.stdout
    secateur("run", "--config", "one/study.toml", "--out", "two", "--no-dense", "--workers", "2", cwd=tmp_path)
    assert same(model_of(tmp_path / "one"), model_of(tmp_path / "two"))
    again = secateur("resume", "one", cwd=tmp_path)
    assert "dense FedAvg" in again.stdout
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    dense = json.loads((tmp_path / "one" / "dense" / "summary.json").read_text())
    assert dense["final"]["sparsity"] == 0
    assert summary["phases"]["train"]["asks"] == dense["phases"]["train"]["asks"] == 3


def test_a_method_by_its_dotted_path(tmp_path):
    (tmp_path / "their").mkdir()
    toy = Path(__file__).parent / "toy_method.py"
    (tmp_path / "their" / "method.py").write_text(toy.read_text())
    quick = [q for q in QUICK if q != "criterion.explore.epochs=2"][:-1]
    done = secateur(
        "run", "their.method", *quick, "--set", "sparsity=0.25", "--out", "run", cwd=tmp_path, PYTHONPATH=str(tmp_path)
    )
    assert "their.method" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "autofilp"], "did you mean 'autoflip'"),
        (["run", "--set", "schedule.sparsty=1"], "schedule.sparsity"),
        (["run", "--set", "rounds"], "path=value"),
        (["run", "--partition", "shards"], "data.partition"),
        (["run", "--rounds", "0"], "rounds = '0'"),
        (["run", "--config", "none.toml"], "none.toml"),
        (["run", "--data", "idx:/no/such"], "no such folder"),
        (["run", "--data", "digit"], "did you mean 'digits'"),
        (["run", "--data", "digits", "--target", "age"], "'digits' takes no options, nor names of columns"),
        (["run", "--data", "table:none.csv", "--target", "age"], "cannot read the table none.csv"),
        (["run", "--data", "table:.", "--site", "ward"], "name the column to learn"),
        (["run", "--data", "arrays:none.npz"], "cannot read the arrays none.npz"),
        (["run", "--model", "twocn"], "did you mean 'twocnn'"),
        (["run", "--clients", "5000"], "only 1438 training rows"),
        (["run", "--partition", "dirichlet:0.001"], "cannot be made"),
        (["run", "--workers", "-1"], "workers = -1"),
        (["resume", "nothing"], "holds no run"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["secateur", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert says in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # nothing was trained, nothing was written


def test_a_config_with_a_typo_and_a_corrupt_checkpoint(tmp_path):
    (tmp_path / "run.toml").write_text("rouns = 3\n")
    assert "did you mean 'rounds'" in refused("run", "--config", "run.toml", cwd=tmp_path)
    secateur("run", "fedavg", *QUICK[:-2], "--no-dense", "--out", "run", cwd=tmp_path)
    (tmp_path / "run" / "summary.json").unlink()
    path = tmp_path / "run" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert "checkpoint" in refused("resume", "run", cwd=tmp_path)
    assert path.exists()


def test_help_does_not_import_torch(tmp_path):
    code = "import sys; from secateur import cli; assert 'torch' not in sys.modules; assert 'numpy' not in sys.modules"
    path = os.pathsep.join(p for p in sys.path if p)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})


def test_list(tmp_path, monkeypatch, capsys):
    for extra in ([], ["--markdown"]):
        monkeypatch.setattr(sys, "argv", ["secateur", "list", *extra])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code in {0, None}
        out = capsys.readouterr().out
        assert "fedsparsify_local" in out
        assert "2405.10271" in out
        assert "server_momentum" in out


def test_the_first_line_comes_before_torch_is_imported(tmp_path):
    """Once the line is out, the rest is stopped: torch must not have been looked for by then."""
    code = (
        "import sys\n"
        "class Told(Exception): ...\n"
        "class Out:\n"
        "    def write(self, text): self.text = text\n"
        "    def flush(self): raise Told(self.text)\n"
        "    def isatty(self): return False\n"
        "real, sys.stdout = sys.stdout, Out()\n"
        "sys.argv = ['secateur', 'run', 'fedsparsify', '--clients', '7']\n"
        "from secateur import cli\n"
        "try: cli.app(standalone_mode=False)\n"
        "except Told as told:\n"
        "    sys.stdout = real\n"
        "    print(told, {'torch', 'numpy', 'pydantic'} & set(sys.modules))\n"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == f"secateur {secateur_package.__version__}: fedsparsify on digits, 7 clients\n set()\n"


def test_what_the_first_line_takes_for_granted_is_what_a_study_does():
    assert (Study().method, Study().data.source) == (usual.METHOD, usual.SOURCE)


@pytest.mark.parametrize("command", [[], ["run"], ["resume"], ["compare"], ["report"], ["export"], ["list"]])
def test_minus_h_is_help(command):
    told = CliRunner().invoke(cli.app, [*command, "-h"])
    assert told.exit_code == 0
    assert "Usage" in told.output


def test_version_and_completion():
    assert CliRunner().invoke(cli.app, ["--version"]).output == f"secateur {secateur_package.__version__}\n"
    assert "--install-completion" in CliRunner().invoke(cli.app, ["-h"], env={"COLUMNS": "160"}).output
    done = subprocess.run(
        [sys.executable, "-m", "secateur"], check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COMP_WORDS": "secateur res", "COMP_CWORD": "1",
             "_PYTHON _M SECATEUR_COMPLETE": "complete_bash", "_PYTHON_M_SECATEUR_COMPLETE": "complete_bash"},
    )  # fmt: skip
    assert "resume" in done.stdout


OWN_MODEL = """
from torch import nn

def net(shape, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, outputs))
"""


@pytest.fixture
def own(tmp_path):
    """Return a folder with a method, a model and a loader of one's own, and a folder inside it."""
    home = tmp_path / "home"
    (home / "inside").mkdir(parents=True)
    (home / "theirs.py").write_text((Path(__file__).parent / "toy_method.py").read_text())
    (home / "nets_of_mine.py").write_text(OWN_MODEL)
    (home / "rows_of_mine.py").write_text(
        "from secateur.data import load\n\ndef read(folder, seed):\n    return load('digits', seed=seed)\n"
    )
    return home


SMALL = ["--clients", "4", "--rounds", "1", "--partition", "iid", "--set", "training.epochs=1", "-q"]


def test_files_of_ones_own_are_found_by_workers_by_resume_and_by_export(own, tmp_path):
    files = ["../theirs.py", "--model", "../nets_of_mine.py:net", "--data", "../rows_of_mine.py:read:x"]
    out = secateur("run", *files, *SMALL, "--workers", "2", "--no-dense", "--out", "run", cwd=own / "inside").stdout
    assert out.startswith("theirs: accuracy ")
    assert out.count("\n") == 1  # quiet: the last line only
    folder = own / "inside" / "run"
    told = (folder / "study.toml").read_text()
    assert 'code = [\n    "../..",\n]' in told
    assert str(tmp_path) not in told
    named = ["theirs", "--model", "nets_of_mine:net", "--data", "rows_of_mine:read:x"]
    secateur("run", *named, *SMALL, "--workers", "0", "--no-dense", "--out", "named", cwd=own)
    assert same(model_of(folder), model_of(own / "named"))
    (folder / "summary.json").unlink()
    moved = tmp_path / "moved"
    own.rename(moved)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = moved / "inside" / "run"
    secateur("resume", folder, "-q", "--workers", "1", cwd=elsewhere)
    again = ["run", "--config", folder / "study.toml", "-q", "--workers", "0", "--no-dense", "--out", "again"]
    secateur(*again, cwd=elsewhere)
    assert same(model_of(folder), model_of(elsewhere / "again"))
    secateur("export", folder, "--to", "torch", cwd=elsewhere)
    (moved / "theirs.py").unlink()
    assert f"no module 'theirs' in {moved} any more" in refused("resume", folder, "-q", cwd=elsewhere)


def test_compare_takes_files_and_names_of_ones_own(own):
    common = ["--seeds", "1", "--rounds", "1", "--set", "data.clients=4", "--partition", "iid", "--no-open", "-q"]
    common += ["--set", "model.name=../nets_of_mine.py:net", "--set", "training.epochs=1", "--jobs", "1"]
    out = secateur("compare", "../theirs.py:sparsity=0.25", "fedavg", *common, "--out", "it", cwd=own / "inside").stdout
    assert out == "Page: it/page/index.html\n"
    assert "theirs 25 %" in (own / "inside" / "it" / "table.md").read_text()
    assert secateur("report", own / "inside" / "it", "--no-open", cwd=own.parent).stdout.startswith("Page: ")
    assert "compare it with" not in refused("compare", "theirz", "--out", "it2", cwd=own)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "./their.py"], "method = './their.py': there is no file their.py: did you mean 'theirs.py'?"),
        (["run", "./random.py"], "a module 'random' is found before it"),
        (["run", "my-method.py"], "'my-method' is no name that Python can import"),
        (["run", "broken_file"], "importing it failed: SyntaxError"),
        (["run", "fedavg", "--model", "broken_file:net"], "importing broken_file failed: SyntaxError"),
        (["run", "fedavg", "--data", "broken_file:read:."], "importing broken_file failed: SyntaxError"),
        (["run", "fedavg", "--set", "aggregator=broken_file:Mean"], "aggregator = 'broken_file:Mean': SyntaxError"),
        (["run", "fedavg", "--set", "code=nowhere"], "code = 'nowhere': there is no folder"),
        (["run", "fedsparsify", "--set", "sparsity=0.5"], "'sparsity': did you mean schedule.sparsity?"),
        (["run", "fedavg", "--set", "lr=0.1"], "'lr': did you mean training.lr?"),
        (["run", "--data", "fashion-mnist"], "write idx:FOLDER"),
        (["run", "runs"], "secateur resume runs/one"),
        (["run", "runs/one"], "secateur resume runs/one"),
        (["resume", "runs"], "it holds runs, name one of them: runs/one, runs/two"),
        (["resume", "runs/on"], "there is no such folder: did you mean 'one'?"),
        (["resume", "comparison"], "it holds a comparison"),
        (["export", "runs"], "it holds runs, name one of them: runs/one, runs/two"),
        (["report", "runs", "--no-open"], "it holds runs, name one of them: runs/one, runs/two"),
    ],
)
def test_slips_are_answered_with_the_nearest_right_thing(arguments, says, own, monkeypatch, capsys):
    (own / "broken_file.py").write_text("x = (")
    for name in ("random", "my-method"):
        (own / f"{name}.py").write_text("")
    for folder in ("runs/one", "runs/two", "comparison/runs/one"):
        (own / folder).mkdir(parents=True)
        (own / folder / "study.toml").write_text("")
    monkeypatch.chdir(own)
    monkeypatch.setattr(sys, "argv", ["secateur", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = sorted(own.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert says in error
    assert error.count("\n") == 1
    assert [path for path in sorted(own.rglob("*")) if "__pycache__" not in path.parts] == before


def test_a_name_that_is_a_suite_and_a_file_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quick.toml", "fedavg.py"):
        (tmp_path / name).write_text("")
    assert shadowed(["quick"]) == ["quick is the suite of the package; for the file that lies here write ./quick.toml"]
    assert shadowed(["fedavg:lr=1", "prunefl"]) == [
        "fedavg is the method of the package; for the file that lies here write ./fedavg.py"
    ]


def test_a_run_that_learns_nothing_ends_with_one_line_and_is_told_again_by_resume(tmp_path):
    lost = ["run", "fedavg", *QUICK[:-2], "--set", "training.lr=1e30", "--out", "run"]
    told = refused(*lost, cwd=tmp_path)
    assert "no first step of training can be taken" in told
    assert "lower training.lr" in told
    assert not (tmp_path / "run" / "rounds.jsonl").exists()
    assert refused("resume", "run", cwd=tmp_path) == told
    assert not (tmp_path / "run" / "summary.json").exists()


def test_run_and_resume_in_this_process(tmp_path, monkeypatch, capsys):
    """The same as a user would type, with the worker inside this process."""

    def typed(*arguments):
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code in {0, None}
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    inline = [q if q != "1" else "0" for q in QUICK]
    out = typed("run", "fedsparsify", *inline[:-2], "--set", "schedule.sparsity=0.5")
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"secateur resume runs/{folder.name}" in out
    assert "dense FedAvg" in out
    assert json.loads((folder / "summary.json").read_text())["final"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    (folder / "dense" / "summary.json").unlink()  # as if it had been stopped just before its end
    assert "dense FedAvg" in typed("resume", folder, "--workers", "0")
    alone = typed("run", "random", *inline[:-2], "--no-dense", "--out", "alone")
    assert "dense FedAvg" not in alone
    assert not (tmp_path / "alone" / "dense").exists()


def test_the_package_is_a_command_too():
    done = subprocess.run([sys.executable, "-m", "secateur", "--help"], check=True, capture_output=True, text=True)
    assert "Prune neural networks while they train across a federation" in done.stdout


def descendants(pid):
    tasks = Path(f"/proc/{pid}/task")
    direct = [int(c) for t in tasks.glob("*/children") for c in t.read_text().split()] if tasks.exists() else []
    return direct + [c for d in direct for c in descendants(d)]


STOPPABLE = """if True:
    import signal
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    from secateur.cli import main
    main()
"""


@pytest.mark.parametrize(("name", "status", "how"), [("INT", 130, "stopped"), ("TERM", 143, "stopped by SIGTERM")])
def test_a_run_that_is_asked_to_end_says_how_to_go_on_and_leaves_nothing_behind(tmp_path, name, status, how):
    """Neither rows in the temporary folder, nor processes, nor spools."""
    rows = tmp_path / "run" / "rounds.jsonl"
    place = Path(tempfile.mkdtemp(prefix="s-"))  # short: the address of a socket lies in it
    long = ["run", "fedsparsify", *QUICK[:-2], "--set", "rounds=5000", "--out", "run"]
    running = subprocess.Popen(
        [sys.executable, "-c", STOPPABLE, *long], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "TMPDIR": str(place)},
    )  # fmt: skip
    with running:
        end = time.monotonic() + 120
        while time.monotonic() < end and not (rows.exists() and rows.read_bytes().count(b"\n") > 2):
            time.sleep(0.05)
        left, shards = descendants(running.pid), list(place.glob("secateur-*"))
        running.send_signal(getattr(signal, f"SIG{name}"))
        said = running.communicate(timeout=60)[1]
    assert left
    assert shards
    assert (running.returncode, said) == (status, f"secateur: {how}; go on with: secateur resume run\n")
    assert not list(place.iterdir())
    assert not list((tmp_path / "run").glob("spool-*"))
    end = time.monotonic() + 20
    while time.monotonic() < end and any(Path(f"/proc/{pid}").exists() for pid in left):
        time.sleep(0.05)
    assert not [pid for pid in left if Path(f"/proc/{pid}").exists()]
    assert len(read_records(tmp_path / "run")) > 2
    place.rmdir()


def test_a_temporary_folder_whose_path_is_too_long_for_a_socket_is_one_line(tmp_path):
    place = tmp_path / ("t" * 90)
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "secateur", "run", "fedsparsify", *QUICK[:-2], "--out", str(tmp_path / "run")],
        capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(place)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "is too long for the address of a socket: set TMPDIR to one of at most" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_signal_that_a_process_was_started_to_ignore_stays_ignored():
    """As SIGHUP under ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(Stopped, match=r"^stopped by SIGTERM; go on with: this$") as told, going_on("this"):
                signal.raise_signal(signal.SIGTERM)
            assert told.value.status == 143
            signal.raise_signal(signal.SIGTERM)  # it is ending already: nothing interrupts that
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
