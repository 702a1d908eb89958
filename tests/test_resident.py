"""The resident participant of a node: another process answers with the same bits, and is gone when it should be."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]' in a clone of secateur")

from helpers import model_of, same
from loopgrid import LoopGrid, Node
from secateur.flower import apps, asked, client_app, clientapp, messages, node, resident
from secateur.flower.codes import RefusedError
from secateur.flower.site import site_of

SETTINGS = {
    "method": "fedsparsify_local", "data.source": "digits", "data.clients": 2, "model.name": "mlp",
    "model.options.hidden": "[8]", "rounds": 2, "seed": 1, "wait": 60, "wire.values": "int8", "wire.feedback": "True",
}  # fmt: skip
SLOW = 60.0  # seconds within which another process has imported torch, or has ended, on a busy machine


@pytest.fixture
def home(monkeypatch):
    """A folder for sockets that is short enough, and a process that stands for Flower's."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as folder:
        parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        monkeypatch.setattr(resident.os, "getppid", lambda: parent.pid)
        monkeypatch.setattr(sys, "argv", ["/usr/bin/flwr-clientapp"])
        yield Path(folder), parent
        parent.kill()
        parent.wait()
        until(lambda: not residents(folder))
        for process in resident._STARTED:
            process.wait()
        resident._STARTED.clear()


def residents(folder, module="secateur.flower.resident"):
    """Return the processes that listen in a folder, or are about to."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = place.read_bytes()
        except OSError:
            continue
        if f"\0{module}\0".encode() in command and str(folder).encode() in command:
            found.append(int(place.parent.name))
    return found


def until(true, seconds=SLOW):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def hello(run=1, client=0, **config):
    about = {"schema": "", "challenge": "00"}
    return asked.Asked(messages.HELLO, about, None, asked.Node(7, run, {"partition-id": client, **config}, SETTINGS))


def grid():
    return LoopGrid({10 + k: Node(client_app(), 10 + k, SETTINGS, **{"partition-id": k}) for k in range(2)})


def test_a_run_by_residents_has_the_bits_of_one_without(home, tmp_path, monkeypatch):
    folder, _ = home
    apps.serve(grid(), {**SETTINGS, "out": str(tmp_path / "resident")})
    assert len(residents(folder)) == 2  # one a node, for all of its messages
    monkeypatch.setattr(sys, "argv", ["pytest"])
    apps.serve(grid(), {**SETTINGS, "out": str(tmp_path / "here")})
    assert same(model_of(tmp_path / "resident"), model_of(tmp_path / "here"))


def test_it_stays_for_one_run_and_ends_with_flowers_process(home):
    folder, parent = home
    expected = node.answer(hello())
    assert resident.answered(hello()) == expected
    (first,) = residents(folder)
    assert resident.answered(hello()) == expected
    assert residents(folder) == [first]
    assert resident.answered(hello(run=2)) == expected  # its code may have changed, and the old one goes
    until(lambda: first not in residents(folder))
    assert len(residents(folder)) == 1
    parent.kill()
    parent.wait()
    until(lambda: not residents(folder))
    assert not list((folder / f"secateur-{os.geteuid()}").glob("*.sock"))


def test_one_that_dies_at_work_costs_nothing(home, monkeypatch):
    folder, _ = home
    resident.answered(hello())
    (process,) = residents(folder)
    os.kill(process, signal.SIGSTOP)
    threading.Timer(1.0, os.kill, (process, signal.SIGKILL)).start()
    told = []
    monkeypatch.setattr(clientapp.LOG, "info", lambda text, *given: told.append(text % given))
    assert clientapp._answer(hello()) == node.answer(hello())
    assert any("has ended at work" in line and "does the work itself" in line for line in told)


SLEEPER = """
import time
from pathlib import Path
from torch import nn
def net(input_shape, outputs):
    while Path(__file__).with_suffix(".asleep").exists():
        time.sleep(0.1)
    return nn.Linear(input_shape[-1], outputs)
"""


def test_it_ends_when_whoever_asked_is_gone(home, tmp_path, monkeypatch):
    folder, parent = home
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    (tmp_path / "sleeper.asleep").touch()
    monkeypatch.syspath_prepend(tmp_path)
    settings = {path: value for path, value in SETTINGS.items() if "hidden" not in path}
    there = hello(allow="model.name=sleeper:net").node
    named = replace(hello(), node=replace(there, settings={**settings, "model.name": "sleeper:net"}))
    resident.answered(hello())
    (process,) = residents(folder)
    (place,) = (folder / f"secateur-{os.geteuid()}").glob("*.sock")
    with resident._connected(place, parent.pid, resident._key(named)) as connection:
        resident.send_asked(connection, named)
        time.sleep(1)
        assert residents(folder) == [process]
    until(lambda: not residents(folder))
    assert resident.answered(hello()) == node.answer(hello())  # the next message starts another


def test_a_second_message_at_a_time_is_not_kept_waiting(home):
    folder, parent = home
    resident.answered(hello())
    (place,) = (folder / f"secateur-{os.geteuid()}").glob("*.sock")
    with resident._connected(place, parent.pid, resident._key(hello())):
        with pytest.raises(resident.UnavailableError, match="at work on another message"):
            resident.answered(hello())
        with pytest.raises(resident.UnavailableError, match="at work on another message"):
            resident.answered(hello(run=2))  # nor does another run end it
        assert clientapp._answer(hello()) == node.answer(hello())


def test_it_keeps_to_the_owners_limits(home):
    long = asked.Asked(messages.SERVE, {"client": 0, "run": "a"}, b"0" * 100, hello(**{"most.bytes": 10}).node)
    assert resident.answered(long) == asked.Answer({"error": "limit", "detail": "bytes 10"})
    assert resident.answered(hello(client=5)).about["error"] == "client"


def test_what_a_node_keeps_goes_there_and_back(home):
    sides = socket.socketpair()
    kept = {"secateur-a": {"x": b"1", "y": b""}, "secateur-b": {}}
    sent = asked.Asked("train.secateur", {"a": 1, "b": [0.5, True], "c": b"1"}, b"p" * 3_000_000, hello().node)
    sent.node.kept.update(kept)
    writing = threading.Thread(target=asked.send_asked, args=(sides[0], sent))
    writing.start()
    came = asked.receive_asked(sides[1])
    writing.join()
    assert (came.payload, came.node.kept, came.kind) == (sent.payload, kept, sent.kind)
    assert came.about == {"a": 1, "b": [0.5, True], "c": "b'1'"}
    text = b'{"head": {}, "about": {}, "payload": null, "kept": {}}'
    headless = len(text).to_bytes(4, "little") + text
    for bad in (b"", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\2\0\0\0{}", b"\2\0\0\0[]", b"\1\0", headless):
        ours, theirs = socket.socketpair()
        ours.sendall(bad)
        ours.close()
        with pytest.raises(resident.WireError):
            asked.receive_asked(theirs)
        theirs.close()
    for side in sides:
        side.close()


def test_what_is_not_this_users_alone_is_not_used(home, monkeypatch):
    folder, _ = home
    place = folder / f"secateur-{os.geteuid()}"
    place.mkdir(mode=0o755)
    place.chmod(0o755)
    with pytest.raises(resident.UnavailableError, match="is not a folder of this user's alone; delete it"):
        resident.answered(hello())
    place.rmdir()
    place.symlink_to("/tmp")
    with pytest.raises(resident.UnavailableError, match=r"cannot be made|not a folder of this user's alone"):
        resident.answered(hello())
    place.unlink()
    monkeypatch.setattr(resident.os, "geteuid", lambda: 12345)
    with pytest.raises(resident.UnavailableError, match="not a folder of this user's alone"):
        resident.answered(hello())
    monkeypatch.undo()


def test_another_user_behind_the_socket_is_not_spoken_to(home, monkeypatch):
    folder, parent = home
    resident.folder()
    name = resident.hashlib.sha256(f"7 {parent.pid}".encode()).hexdigest()[:16]
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / f"secateur-{os.geteuid()}" / f"{name}.sock"))
        listening.listen()
        monkeypatch.setattr(resident.struct, "unpack", lambda *_: (1, 12345, 1))
        with pytest.raises(resident.UnavailableError, match="another user listens on"):
            resident.answered(hello())


def test_a_path_too_long_for_a_socket_is_said(home, monkeypatch):
    folder, _ = home
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder / ("x" * 90)))
    with pytest.raises(resident.UnavailableError, match="too long for a socket: give this node a shorter TMPDIR"):
        resident.answered(hello())


@pytest.mark.usefixtures("home")
def test_what_killed_ones_left_is_deleted():
    place = resident.folder()
    for name in ("old", "new"):
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(place / f"{name}.sock"))  # closed, and still there
        (place / f"{name}.lock").touch()
    os.utime(place / "old.sock", (1, 1))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place / "live.sock"))
        listening.listen()
        os.utime(place / "live.sock", (1, 1))
        resident._sweep(place)
    assert {path.name for path in place.iterdir()} == {"new.sock", "new.lock", "live.sock"}
    (place / "live.sock").unlink()
    (place / "new.sock").unlink()


def test_one_that_cannot_start_is_said(home, monkeypatch):
    monkeypatch.setattr(resident.sys, "executable", "/bin/false")
    with pytest.raises(resident.UnavailableError, match="did not start"):
        resident.answered(hello())


def test_when_it_is_wanted(home, monkeypatch):
    assert resident.wanted(hello())
    assert not resident.wanted(hello(resident=False))
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert not resident.wanted(hello())


def test_its_setting_is_looked_for_in_the_nodes_configuration(tmp_path):
    assert not site_of({"resident": False}, {}).resident
    (tmp_path / "p.toml").write_text("resident = false\n")
    with pytest.raises(RefusedError, match="looked for in --node-config alone"):
        site_of({"policy": str(tmp_path / "p.toml")}, {})


def test_the_process_that_flower_starts_imports_no_torch():
    code = "import sys, secateur.flower; secateur.flower.client_app(); secateur.flower.server_app(); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
