"""Who cannot keep a deadline is said before the exchange: by a given link, and by what earlier exchanges showed."""

import importlib
import inspect
import re
import subprocess
import sys
import time

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]' in a clone of secateur")

from flwr.app import Context, Message, RecordDict

from loopgrid import LoopGrid
from secateur.bandwidth import Bandwidth
from secateur.errors import ConfigError
from secateur.flower import apps, messages, supernode
from secateur.flower.asked import Answer
from secateur.flower.engine import FlowerEngine
from secateur.flower.pace import Pace
from test_flower import SETTINGS, grid_of


def test_a_given_link_says_it_before_the_first_round_with_what_would_do():
    """By hand: 5.6 MB are 44.8 s down at 1 Mbit/s and 179.2 s up at 0.25; in 70 of 224 s pass 3.5 of 11.2 MB."""
    pace = Pace(Bandwidth.parse("0.5:100Mbit/s;0.5:1/0.25Mbit/s"), 4)
    sizes = dict.fromkeys(range(4), 5_600_000)
    (line,) = pace.remarks(sizes, 70)
    assert line.startswith(
        "clients 2, 3 cannot answer within deadline = 70 s: 5.6 MB down and about 5.6 MB up take 224 s"
    )
    assert "at 1/0.25 Mbit/s; deadline=280 would do, or to send less (wire.values=int8" in line
    assert line.endswith(": 3.5 MB both ways fit")
    assert not pace.remarks(sizes, 224.01)
    pace.answered(3, 5_600_000, 500_000)  # its replies are small: 44.8 + 16 s
    assert pace.remarks(sizes, 70)[0].startswith("client 2 cannot")


def test_where_waiting_alone_takes_longer_no_size_is_said_to_fit():
    (line,) = Pace(Bandwidth.parse("1Mbit/s,flower:4s"), 1).remarks({0: 1000}, 3)
    assert "deadline=" in line
    assert "fit" not in line


def test_who_was_late_with_as_much_is_named_until_it_was_in_time():
    pace = Pace(None, 8)
    assert not pace.remarks({0: 10**9}, 1)
    for late in range(5):
        pace.missed(late, 2_000_000)
    (line,) = pace.remarks(dict.fromkeys(range(8), 2_000_000), 60)
    assert line.startswith(
        "clients 0, 1, 2 and 2 more did not answer within deadline = 60 s before, and 2 MB are to be"
    )
    assert not pace.remarks(dict.fromkeys(range(8), 1_999_999), 60)
    for late in range(5):
        pace.answered(late, 2_000_000, 10)
    assert not pace.remarks(dict.fromkeys(range(8), 2_000_000), 60)


def test_an_exchange_says_it_at_its_start(monkeypatch):
    said = []
    monkeypatch.setattr("secateur.flower.engine.LOG.warning", lambda text, *more: said.append(text % more))
    grid = grid_of(SETTINGS, clients=2)
    links = Bandwidth.parse("0.01Mbit/s")
    with FlowerEngine(grid, clients=2, run="r", wait=5.0, links=links) as engine:
        engine.meet(range(2))
        grid.nodes[10].mute = True
        dict(engine.exchange([(k, b"0" * 4000) for k in range(2)], deadline=1.0))
        assert [line.split(": ")[0] for line in said] == ["clients 0, 1 cannot answer within deadline = 1 s"]
        grid.nodes[10].mute = False
        dict(engine.exchange([(k, b"0" * 4000) for k in range(2)]))  # without a deadline nobody can be late
        assert len(said) == 1
        engine.pace, grid.nodes[10].mute = Pace(None, 2), True
        for _ in range(2):
            dict(engine.exchange([(k, b"0" * 4000) for k in range(2)], deadline=0.5))
        assert [line.split(" within")[0] for line in said[1:]] == ["client 0 did not answer"]


def test_a_link_that_cannot_be_read_ends_the_run_before_anybody_is_asked(tmp_path):
    grid = LoopGrid()
    with pytest.raises(ConfigError, match="write it as 10Mbit/s,50ms"):
        apps.serve(grid, {**SETTINGS, "out": str(tmp_path / "run"), "link": "fast"})
    assert not grid.carried


def test_parts_are_what_a_link_carries_in_time():
    """By hand: in 30 s, two at a time, 1 Mbit/s carries 1.875 MB each; a quarter of that is asked for."""
    pace = Pace(Bandwidth.parse("0.25:100Mbit/s;0.25:1Mbit/s;0.25:1/0.25Mbit/s;0.25:0.001Mbit/s"), 4)
    assert [pace.part(k) for k in range(4)] == [2**22, 468_750, 117_187, 2**12]
    assert Pace(None, 4).part(0) == 2**17


@pytest.mark.parametrize(("told", "cut"), [(2**13, 2**13), (1, 2**17), (2**40, 2**17), ("8192", 2**17), (None, 2**17)])
def test_a_node_cuts_its_reply_as_its_request_was_cut_within_bounds(told, cut):
    LoopGrid()  # the identity without which no message can be made
    payload = bytes(range(256)) * 2**12
    request = Message(messages.pack({} if told is None else {messages.PART: told}, payload), 1, messages.SERVE)
    question = messages.asked_by(request, Context(1, 1, {}, RecordDict(), {}))
    reply = messages.reply(request, Context(1, 1, {}, RecordDict(), {}), question, Answer({}, payload))
    (arrays,) = reply.content.array_records.values()
    assert max(len(array.data) for array in arrays.values()) == cut
    assert messages.unpack(reply.content)[1] == payload


def test_a_supernode_looks_soon_after_a_message_and_then_ever_more_rarely(monkeypatch):
    slept = []
    monkeypatch.setattr("secateur.flower.supernode.time.sleep", slept.append)
    waits = supernode.Waits()
    for _ in range(7):
        waits.sleep(3)
    assert slept == pytest.approx([0.5, 0.75, 1.125, 1.6875, 2.53125, 3, 3])
    waits.sleep(0.5)  # a message is at work
    waits.sleep(3)
    assert slept[-2:] == [0.1, 0.5]
    assert waits.monotonic is time.monotonic


def test_it_is_flowers_own_command_in_all_else():
    done = subprocess.run(
        [sys.executable, "-m", "secateur.flower.supernode", "--superlink", "127.0.0.1:1", "--no-such-flag"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "flower-supernode: error: unrecognized arguments: --no-such-flag" in done.stderr


def test_flower_still_waits_where_it_is_replaced():
    source = inspect.getsource(importlib.import_module("flwr.supernode.start_client_internal"))
    assert "time.sleep(3)" in source
    assert set(re.findall(r"time\.sleep\((.*?)\)", source)) == {"3", "0.5"}
