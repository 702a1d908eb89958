"""Flower for real: SuperLink and SuperNodes in processes of their own, TLS, node keys, sockets, kill -9."""

import importlib
import json
import os
import re
import shutil
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
    assert all(residents(here, k) for k in range(3))
    assert not any("does the work itself" in here.log(f"node{k}").read_text() for k in range(3))
    nodes = json.loads(here.flwr("supernode", "list", "here", "--format", "json"))["nodes"]
    # the deceived node's key is known, but it never connects; the unregistered one is not even listed
    honest = [node["status"] for node in nodes if str(node["node-id"]) not in {here.nodes[name] for name in HOSTILE}]
    assert sorted(honest) == ["online"] * 3 + ["registered"]
    for stranger in ("unregistered", "deceived"):
        assert "retrying" in here.log(stranger).read_text()
        here.stop(stranger)


def residents(here, k):
    """Return the processes that a node's log names as its resident participants, the newest last."""
    found = re.findall(r"process (\d+) is the resident participant of this node", here.log(f"node{k}").read_text())
    return [int(process) for process in found]


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
    """Node 1's resident is killed and not missed; node 2 is killed in mid-round and comes back; so does the server."""
    out = here.folder / "disturbed"
    settings = {"out": str(out), "set": SMALL.replace("rounds=2", "rounds=3")}
    here.submit(EXAMPLES / "digits", **settings, deadline=30)
    wait_for(lambda: len(records(out)) == 1, 120, "the exploration")
    os.kill(residents(here, 1)[-1], signal.SIGKILL)
    time.sleep(2)
    here.stop("node2", signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{residents(here, 2)[-1]}").exists(), 30, "the end of node 2's resident")
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
    assert 1 not in left_out[1]
    assert left_out[3] == []
    assert json.loads((out / "summary.json").read_text())["left_out"]["2"] >= 1


@pytest.mark.long
def test_nodes_elsewhere_are_started_by_what_was_packed_for_them(deploy, tmp_path):
    """As docs/hosts.md has it; the other machines are folders here."""
    folder = tmp_path / "server"
    script = EXAMPLES / "deployment" / "deploy.py"
    run = [sys.executable, str(script), "--host", "localhost", "--nodes", "2", "--folder", str(folder)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*run, "--set", SMALL.replace("clients=3", "clients=2"), "--wait", "300"], stdout=log)
    nodes = []
    try:
        for k in range(2):
            packed, there = folder / "nodes" / str(k), tmp_path / f"machine {k}"
            wait_for(lambda packed=packed: (packed / "start.sh").exists(), 120, "the packing of a node")
            shutil.move(packed, there)
            assert (there / "key").stat().st_mode & 0o077 == 0
            path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
            environment = {**os.environ, "PATH": path, "FLWR_HOME": str(there / "home")}
            nodes.append(
                subprocess.Popen(
                    ["sh", str(there / "start.sh"), "--port", str(deploy.free_port())],
                    env=environment,
                    start_new_session=True,
                )
            )
        assert server.wait(400) == 0, (tmp_path / "log").read_text()
    finally:
        for process in (server, *nodes):
            process.kill()
            process.wait()
    assert json.loads((folder / "run" / "summary.json").read_text())["left_out"] == {}
    assert (tmp_path / "machine 0" / "state").is_dir()


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
