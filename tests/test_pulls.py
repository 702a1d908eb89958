"""Replies that are pulled from a grid while others are stuck, and payloads in parts."""

import threading
import time

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]' in a clone of secateur")

from secateur.flower import messages
from secateur.flower.pulls import Pulls


class Replies:
    """A grid's ``pull_messages``: replies that are there, that never come, or whose upload is stuck."""

    def __init__(self, ready=(), stuck=()):
        self.ready, self.stuck, self.free = set(ready), set(stuck), threading.Event()
        self.pulled = []

    def __call__(self, asks):
        (ask,) = asks
        if ask in self.stuck:
            self.free.wait()
        if ask not in self.ready | self.stuck:
            return []
        self.pulled.append(ask)
        return [ask]


def arrivals(pulls, count, seconds=10.0):
    end, found = time.monotonic() + seconds, []
    while len(found) < count and time.monotonic() < end:
        found += pulls.arrived(0.05)
    return found


def test_replies_that_are_stuck_hold_up_no_other():
    replies = Replies(ready=[f"r{k}" for k in range(40)], stuck=[f"s{k}" for k in range(6)])
    pulls = Pulls(replies, first=2)
    for ask in [*sorted(replies.stuck), *sorted(replies.ready)]:
        pulls.add(ask)
    assert sorted(arrivals(pulls, 40)) == sorted(replies.ready)
    pulls.give_up("s0")
    replies.free.set()
    assert sorted(arrivals(pulls, 5)) == sorted(replies.stuck - {"s0"})
    pulls.close()


def test_a_reply_that_comes_later_is_found_and_one_that_was_given_up_is_not():
    replies = Replies()
    pulls = Pulls(replies)
    pulls.add("a")
    pulls.add("b")
    pulls.give_up("b")
    assert arrivals(pulls, 1, 0.3) == []
    replies.ready = {"a", "b"}
    assert arrivals(pulls, 2, 1.0) == ["a"]
    pulls.close()


def test_no_more_replies_than_a_window_are_in_memory():
    replies = Replies(ready=[f"r{k}" for k in range(60)])
    pulls = Pulls(replies, first=4)
    for ask in sorted(replies.ready):
        pulls.add(ask)
    time.sleep(0.5)
    assert len(replies.pulled) <= 16 + 4
    assert len(arrivals(pulls, 60)) == 60
    pulls.close()


def test_what_the_grid_raises_is_raised_where_replies_are_waited_for():
    def broken(asks):
        raise RuntimeError(f"the SuperLink is gone: {asks}")

    pulls = Pulls(broken)
    pulls.add("a")
    with pytest.raises(RuntimeError, match="the SuperLink is gone"):
        arrivals(pulls, 1)
    pulls.close()


PART = messages.USUAL


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 3 * PART + 5])
def test_a_payload_comes_out_of_its_parts_whole(size):
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    content = messages.pack({"a": 1}, payload)
    assert all(len(array.data) <= PART for array in content.array_records["payload"].values())
    assert messages.unpack(content) == ({"a": 1}, payload)
    if size > PART:
        del content.array_records["payload"]["payload.0"]
        assert messages.unpack(content) == ({"a": 1}, None)
