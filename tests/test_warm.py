"""A warm process becomes its node's resident participant, once, for code of its own version and place only."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]' in a clone of secateur")

from secateur.flower import resident, supernode, warm
from test_resident import SLOW, hello, home, residents, until

__all__ = ["home"]


@pytest.fixture
def waiting(home, monkeypatch):
    """A warm process that listens, its socket, and its parent, which stands for the SuperNode."""
    folder = resident.folder()
    place = folder / "warm.sock"
    code = (
        "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-m', 'secateur.flower.warm', sys.argv[1]]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(place)])
    until(place.exists)
    monkeypatch.setenv(resident.WARM, str(place))
    yield place, parent
    parent.kill()
    parent.wait()


def pids(place):
    """Return the warm processes of a place."""
    return residents(place, "secateur.flower.warm")


def test_it_becomes_the_resident_and_answers_without_another_process(home, waiting):
    place, _ = waiting
    (child,) = pids(place)
    answer = resident.answered(hello())
    assert answer.about["client"] == 0
    assert not residents(home[0])  # no process was started for it
    assert not resident._STARTED
    assert not place.exists()  # it is no longer to be had
    os.kill(child, 0)
    assert resident.answered(hello()).about == answer.about  # and the same one answers again
    assert not resident._STARTED
    home[1].kill()  # the process with which a resident ends
    home[1].wait()
    until(lambda: not pids(place))


def test_the_next_run_finds_none_and_starts_its_own(home, waiting):
    resident.answered(hello())
    assert resident.answered(hello(run=2)).about["client"] == 0
    assert len(resident._STARTED) == 1
    until(lambda: not pids(waiting[0]))  # the first one has ended


def test_it_is_nobodys_of_another_version_and_stays_for_the_right_one(home, waiting, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(resident, "origin", lambda: ["0.0.0", "elsewhere", sys.executable])
        assert not resident._warmed({"place": "", "parent": 1, "key": "", "path": [], "folder": "/"})
    for said in (b"", b"{", b"[]\n", b"x" * 2**20, json.dumps({"of": None}).encode() + b"\n"):
        with socket.socket(socket.AF_UNIX) as knocking:
            knocking.connect(str(waiting[0]))
            knocking.settimeout(SLOW)
            knocking.sendall(said)
            knocking.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):  # closed with bytes unread
                assert knocking.recv(1) == b""
    resident.answered(hello())
    assert not resident._STARTED


def test_it_ends_with_its_parent(waiting):
    place, parent = waiting
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not pids(place))


def test_a_supernode_keeps_one_and_starts_another_when_it_has_ended(home, monkeypatch):
    until(lambda: all(thread.name != "secateur-warm" for thread in threading.enumerate()))
    started, ended = [], threading.Semaphore(0)
    clock = iter([0.0, 60.0, 100.0, 160.0, 200.0, 201.0])

    def runs(command, **_):
        started.append(command)
        ended.acquire(timeout=SLOW)

    monkeypatch.setattr(warm.subprocess, "run", runs)
    monkeypatch.setattr(warm, "time", types.SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _: None))
    monkeypatch.setenv(resident.WARM, "")
    warm.keep()
    place = os.environ[resident.WARM]
    for count in (1, 2, 3):
        until(lambda count=count: len(started) == count)
        ended.release()
    assert started[0] == [sys.executable, "-m", "secateur.flower.warm", place]
    # the third ended at once: there is no fourth
    until(lambda: all(thread.name != "secateur-warm" for thread in threading.enumerate()))
    assert len(started) == 3


@pytest.mark.parametrize(
    ("config", "wants"),
    [("partition-id=0", True), ("partition-id=0 resident=false", False), ("resident = false x=1", False)],
)
def test_an_owner_who_wants_no_resident_gets_no_warm_process(config, wants, monkeypatch):
    kept = []
    monkeypatch.setattr(supernode.warm, "keep", lambda: kept.append(1))
    monkeypatch.setattr(sys, "argv", ["supernode", "--node-config", config, "--no-such-flag"])
    monkeypatch.setattr("flwr.supernode.start_client_internal.time", time)
    monkeypatch.setenv("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "1")
    with pytest.raises(SystemExit):
        supernode.main()
    assert bool(kept) == wants
    assert os.environ["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] == "1"


def test_without_a_folder_it_is_said_and_the_node_starts(monkeypatch, capsys):
    def refuses():
        raise resident.UnavailableError("no folder")

    monkeypatch.setattr(supernode.warm, "keep", refuses)
    monkeypatch.setattr(sys, "argv", ["supernode", "--no-such-flag"])
    monkeypatch.setattr("flwr.supernode.start_client_internal.time", time)
    monkeypatch.setenv("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "1")
    with pytest.raises(SystemExit):
        supernode.main()
    assert "secateur: no folder; the first message of a run waits for imports" in capsys.readouterr().err
