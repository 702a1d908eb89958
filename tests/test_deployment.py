"""Flower for real: SuperLink and SuperNodes in processes of their own, TLS, node keys, sockets, kill -9."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]' in a clone of secateur")

from helpers import model_of, play, rows_of, same
from secateur.federation import prepare
from secateur.flower import apps

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = "rounds=2 data.clients=3 model.name=mlp model.hidden=[32] criterion.explore.epochs=1"


@pytest.fixture(scope="module")
def deploy():
    sys.path.insert(0, str(EXAMPLES / "deployment"))
    yield importlib.import_module("deploy")
    sys.path.remove(str(EXAMPLES / "deployment"))


@pytest.fixture(scope="module")
def here(deploy, tmp_path_factory):
    """Start a SuperLink, three registered nodes, two that must not get in, and three that are in and hostile."""
    folder = tmp_path_factory.mktemp("deployment")
    with deploy.Deployment(folder) as running:
        for k in range(3):
            running.start_node(f"node{k}", f'partition-id={k} state="{folder / "state" / str(k)}"')
        running.start_node("unregistered", "partition-id=0", register=False)
        other = deploy.authority(folder / "another authority")
        running.start_node("deceived", "partition-id=1", ca=other)
        for name in HOSTILE:
            running.start_node(name, f'partition-id=0 hostile="{name}"')
        yield running


# the digits app, in which a node may be told to be hostile; it is greeted as every other one
APP = """
from flwr.app import Error, Message
from flwr.clientapp import ClientApp

from secateur.flower import client_app, messages, server_app
from secateur.flower.greeting import about_this

FLOOD = "A" + chr(27) + "[2J" + chr(10) + "[/red]" * 10**6
FACTS = {"client": 0, "own": False, "outputs": 10, "kind": "image", "scale": 16.0, "task": "classification"}
FACTS |= {"model": "0" * 16, "classes": "", **about_this()}
SAID = {
    "impostor": {**FACTS, "inputs": [1, 8, 8]},
    "width": {**FACTS, "client": 1, "inputs": [10**9]},
    "flood": {"error": FLOOD, "detail": FLOOD},
}


class App(ClientApp):
    honest = client_app()

    def __call__(self, message, context):
        how = context.node_config.get("hostile")
        if how is None:
            return self.honest(message, context)
        return Message(messages.pack(SAID[how]), reply_to=message)


server = server_app()
client = App()
"""
HOSTILE = ("impostor", "width", "flood")


@pytest.fixture(scope="module")
def hostile_app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    (folder / "digits_app.py").write_text(APP)
    (folder / "pyproject.toml").write_text((EXAMPLES / "digits" / "pyproject.toml").read_text())
    return folder


def locally(settings, folder):
    made, _ = apps.study_of(settings)
    with prepare.federation(made) as shards:
        play(made, folder, shards)


def ledger(folder):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(folder)]


def config_of(app):
    import tomllib

    from flwr.common.config import flatten_dict

    return flatten_dict(tomllib.loads((EXAMPLES / app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"])


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local") / "run"
    locally({**config_of("digits"), "set": SMALL}, folder)
    return folder


def test_a_deployment_gives_the_local_engines_bits_beside_hostile_nodes_and_strangers(here, hostile_app, local):
    """Hostile nodes have keys of their own: one has a client's number first, one a width, one floods the server."""
    out = here.folder / "run"
    run = here.submit(hostile_app, out=str(out), set=SMALL)
    finished(here, run, out)
    log = here.flwr("log", run, "here", "--show")
    refused = [line for line in log.splitlines() if "cannot take part" in line]
    for why in ("its introduction lacks 'inputs.0'", "it says A"):
        assert any(why in line for line in refused), why
    # whichever of the two is greeted first, the impostor is known by its model, or by the number that is taken
    assert any("its model is 0000000000000000" in line or "which node" in line for line in refused)
    assert max(map(len, log.splitlines())) < 2_000
    for name in HOSTILE:
        here.stop(name)
    assert same(model_of(out), model_of(local))
    assert ledger(out) == ledger(local)
    nodes = json.loads(here.flwr("supernode", "list", "here", "--format", "json"))["nodes"]
    # the deceived node's key is known, but it never connects; the unregistered one is not even listed
    honest = [node["status"] for node in nodes if str(node["node-id"]) not in {here.nodes[name] for name in HOSTILE}]
    assert sorted(honest) == ["online"] * 3 + ["registered"]
    for stranger in ("unregistered", "deceived"):
        assert "retrying" in here.log(stranger).read_text()
        here.stop(stranger)


def wait_for(condition, seconds, what):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.2)


def records(folder):
    path = folder / "rounds.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def finished(here, run, out):
    """Wait without flwr's commands, which take the cores that the nodes need."""
    wait_for((out / "summary.json").exists, 300, "the end of the run")
    assert here.wait(run, 100) == "finished:completed"


@pytest.mark.long
def test_a_killed_node_comes_back_and_a_stopped_server_goes_on(here):
    """Node 2 is killed in mid-round and started again; later the whole SuperLink is; the run ends, and tells.

    Each message costs a node a process that imports torch: on busy cores a round takes 20 s.
    """
    out = here.folder / "disturbed"
    settings = {"out": str(out), "set": SMALL.replace("rounds=2", "rounds=3")}
    here.submit(EXAMPLES / "digits", **settings, deadline=30)
    wait_for(lambda: len(records(out)) == 1, 120, "the exploration")
    time.sleep(2)
    here.stop("node2", signal.SIGKILL)
    wait_for(lambda: len(records(out)) >= 2, 60, "a round without node 2")
    here.stop("superlink", signal.SIGKILL)
    done = len(records(out))
    assert not (out / "summary.json").exists()
    here.start_superlink()  # the nodes find it again by themselves
    here.start_node("node2", f'partition-id=2 state="{here.folder / "state" / "2"}"')
    again = here.submit(EXAMPLES / "digits", **settings, deadline=150)  # nobody is to be left out any more
    finished(here, again, out)
    rows = rows_of(out)
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert done >= 2
    left_out = {row["round"]: [o["client"] for o in row["left_out"]] for row in rows}
    assert 2 in left_out[1]
    assert left_out[3] == []
    assert json.loads((out / "summary.json").read_text())["left_out"]["2"] >= 1


def test_a_port_in_use_is_one_clear_line(deploy, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"port {port} is in use: stop what listens there"):
            deploy.Deployment(tmp_path, port)


def test_flowers_simulation_gives_the_same_bits(deploy, local, tmp_path):
    pytest.importorskip("ray", reason="Flower's simulation is not installed: pip install 'flwr[simulation]'")
    out = tmp_path / "run"
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        **os.environ, **deploy.QUIET, "FLWR_HOME": str(home), "XDG_CACHE_HOME": str(home),
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
    }  # fmt: skip
    done = subprocess.run(
        ["flwr", "run", ".", "--stream", "--federation-config", "num-supernodes=3", "--run-config",
         f'out="{out}" set="{SMALL}"'],
        cwd=EXAMPLES / "digits", env=environment, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    try:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert same(model_of(out), model_of(local))
        assert ledger(out) == ledger(local)
    finally:
        for found in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"FLWR_HOME={home}".encode() in found.read_bytes():
                    os.kill(int(found.parent.name), signal.SIGKILL)
            except OSError:
                continue
