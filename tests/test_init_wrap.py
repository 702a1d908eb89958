"""Apps for Flower: one that is written anew, and the lines that prune one that exists."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers import model_of, rows_of, same
from secateur import cli
from secateur.errors import ConfigError
from secateur.federation import prepare, server
from secateur.study.runtime import Runtime
from secateur.study.study import assign, parse_study

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"


def typed(*arguments):
    """Return what a command prints on standard output."""
    done = CliRunner().invoke(cli.app, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def config_of(app):
    """Return an app's run configuration by path, as Flower flattens it."""

    def flat(values, prefix=""):
        for name, value in values.items():
            yield from flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]

    return dict(flat(tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]))


def test_settings_stand_in_the_configuration_and_make_the_study_again(tmp_path):
    app = tmp_path / "My app 2"
    given = ["schedule=geometric", "schedule.sparsity=0.5", "training.lr=0.25", "model.hidden=[8, 4]"]
    more = [part for one in given for part in ("--set", one)]
    out = typed("init", app, "--method", "fedsparsify", "--model", "mlp", "--clients", 3, "--rounds", 7, *more)
    assert f"flwr run '{app}' --stream --federation-config 'num-supernodes=3'" in out
    project = tomllib.loads((app / "pyproject.toml").read_text())
    assert project["project"]["name"] == "my-app-2"
    assert project["tool"]["flwr"]["app"]["components"]["serverapp"] == "my_app_2_app:server"
    config = config_of(app)
    # a key of TOML is a text or a table, so that a slot and its options stand together in one text
    assert config.pop("set") == "schedule=geometric schedule.sparsity=0.5"
    assert config == {
        "method": "fedsparsify", "rounds": 7, "data.source": "digits", "data.clients": 3, "participation": 1.0,
        "model.name": "mlp", "training.lr": 0.25, "model.hidden": "[8, 4]", "out": "", "deadline": 600, "wait": 120,
        "link": "",
    }  # fmt: skip


def test_files_of_ones_own_go_along_and_nodes_are_told_to_allow_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "nets_for_init.py").write_text("def net(shape, outputs): ...")
    out = typed("init", "app", "--model", "./nets_for_init.py:net", "--data", "table", "--target", "sick")
    assert out.endswith("How to run it: app/README.md\n")
    assert (tmp_path / "app" / "nets_for_init.py").exists()
    assert config_of(tmp_path / "app")["model.name"] == "nets_for_init:net"
    told = (tmp_path / "app" / "README.md").read_text()
    assert """--node-config 'partition-id=K data="/data" allow="model.name=nets_for_init:net"'""" in told
    assert "secateur run autoflip --data table:FOLDER" in told


def test_nothing_is_written_where_something_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "here").write_text("")
    for arguments, says in (
        (["full"], "full is there already and is not an empty folder"),
        (["new", "--method", "fedsparsfy"], "did you mean 'fedsparsify'"),
        (["new", "--set", "schedule.sparsty=1"], "schedule.sparsity"),
        (["new", "--clients", "0"], "data.clients = 0"),
        (["new", "--model", "./none.py:net"], "there is no file none.py"),
    ):
        with pytest.raises(ConfigError, match=says):
            typed("init", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def patched(diff, app):
    subprocess.run(["patch", "-p1", "--quiet", "--no-backup-if-mismatch"], input=diff.encode(), cwd=app, check=True)
    return {path.name: path.read_text() for path in sorted(app.rglob("*_app.py"))}


def test_the_diff_of_the_quickstart_is_that_of_the_docs(tmp_path):
    """The file that the docs show was written by hand."""
    made = [shutil.copytree(QUICKSTART, tmp_path / name) for name in ("one", "two")]
    diff = typed("wrap", QUICKSTART)
    by_hand = (QUICKSTART / "fedsparsify.diff").read_text()
    assert patched(diff, made[0]) == patched(by_hand, made[1])
    changed = [line for line in diff.splitlines() if line[0] == "+" and line[:3] != "+++"]
    assert len(changed) == 5
    with pytest.raises(ConfigError, match="imports secateur already"):
        typed("wrap", made[0])


SERVER = """
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAdam as Adam
from mine import Größe, make

app = ServerApp()

@app.main()
def main(grid, context):
    start = make(Größe(3), "ä")
    plan = Adam(
        fraction_train=0.5,
        eta=context.run_config["eta"],
    )
    arrays = ArrayRecord(start.state_dict())
    plan.start(grid=grid, initial_arrays=arrays)
"""
CLIENT = """
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from mine import Größe, make

one = ClientApp(mods=[fixedclipping_mod])

@one.train()
def fit(msg, context):
    model = make(Größe(3), "ä")
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
"""


def app_of(folder, server=SERVER, client=CLIENT):
    (folder / "pyproject.toml").write_text(
        '[tool.flwr.app.components]\nserverapp = "server:app"\nclientapp = "client:one"\n'
    )
    (folder / "server.py").write_text(server)
    (folder / "client.py").write_text(client)
    return folder


def test_names_calls_of_many_lines_and_mods_of_another_app(tmp_path):
    app = app_of(tmp_path)
    subprocess.run(
        ["patch", "-p1", "-s"], input=typed("wrap", app, "--method", "oneshot").encode(), cwd=app, check=True
    )
    assert (app / "client.py").read_text() == CLIENT.replace(
        "mod import fixedclipping_mod\n", "mod import fixedclipping_mod\nfrom secateur.flower import prune\n"
    ).replace("mods=[fixed", 'mods=[prune(make(Größe(3), "ä")), fixed')
    assert (app / "server.py").read_text() == SERVER.replace(
        "FedAdam as Adam\n",
        "FedAdam as Adam\nfrom secateur.flower import Pruned\nfrom secateur.methods.oneshot import OneShotMagnitude\n",
    ).replace("plan = Adam(", "plan = Pruned(Adam(").replace(
        '["eta"],\n    )', '["eta"],\n    ), OneShotMagnitude(), make(Größe(3), "ä"))'
    )


@pytest.mark.parametrize(
    ("server", "client", "says"),
    [
        (SERVER.replace("plan.start(grid=grid,", "run(grid,"), CLIENT, "no strategy is found on which"),
        (SERVER.replace("start.state_dict()", "weights"), CLIENT, "no model is found"),
        (SERVER, CLIENT.replace("one = ClientApp(mods=[fixedclipping_mod])", "one = made()"), "one = ClientApp"),
        (SERVER, CLIENT.replace('make(Größe(3), "ä")', "make(context)"), "'context' is not known where the ClientApp"),
        ("x = (", CLIENT, "cannot be read"),
    ],
)
def test_an_app_that_is_written_in_another_way_is_refused(server, client, says, tmp_path):
    if says == "one = ClientApp":
        says = r"no line one = ClientApp\(...\) is found"
        client = client.replace("one = made()", "one = 1")
    with pytest.raises(ConfigError, match=says):
        typed("wrap", app_of(tmp_path, server, client))


def test_what_is_no_app_and_a_method_that_votes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no Flower app"):
        typed("wrap", tmp_path)
    with pytest.raises(ConfigError, match="fedsparsify_local needs code of its own on the nodes"):
        typed("wrap", QUICKSTART, "--method", "fedsparsify_local")


def test_an_app_that_was_written_runs_and_gives_the_bits_of_a_run_here(tmp_path):
    pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]' in a clone of secateur")
    pytest.importorskip("ray", reason="Flower's simulation is not installed: pip install 'flwr[simulation]'")
    app, home, out = tmp_path / "two-nodes", tmp_path / "home", tmp_path / "run"
    home.mkdir()
    settings = ["schedule.sparsity=0.5", "model.hidden=[8]", "training.epochs=1"]
    more = [part for one in settings for part in ("--set", one)]
    typed("init", app, "--method", "fedsparsify", "--model", "mlp", "--clients", 2, "--rounds", 1, *more)
    environment = {
        **os.environ, "FLWR_HOME": str(home), "XDG_CACHE_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }  # fmt: skip
    try:
        done = subprocess.run(
            ["flwr", "run", ".", "--stream", "--federation-config", "num-supernodes=2", "--run-config",
             f'out="{out}" wait=500'],
            cwd=app, env=environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    finally:
        end_all(home)
    assert [row["round"] for row in rows_of(out)] == [1]
    values = {}
    for path, value in config_of(app).items():
        if path not in {"set", "out", "deadline", "wait", "link"}:
            assign(values, f"{path}={value}")
    study = parse_study(values)
    with prepare.federation(study) as shards:
        server.start(study, Runtime(workers=0), tmp_path / "here", shards=shards)
    assert same(model_of(out), model_of(tmp_path / "here"))


def end_all(home):
    """End what Flower left running: the processes that have this home."""
    for found in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"FLWR_HOME={home}".encode() in found.read_bytes():
                os.kill(int(found.parent.name), signal.SIGKILL)
        except OSError:
            continue
