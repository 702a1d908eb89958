"""Engines that have replies reduced where they are made: real processes, large results, deaths and deadlines."""

import json
import os
import signal
import time

import numpy as np
import pytest

from secateur.engines import Failure, Gathered, Gathering, Task
from secateur.engines.local import LocalEngine
from secateur.errors import EngineError


class Adder:
    """Adds what its clients say; a job is what each of them says, and what happens to some."""

    def __call__(self, client, request, state):
        return b"single", state

    def gather(self, job, first, asked):
        said = []
        for client, request, state in asked:
            count = int(state or b"0") + 1
            if job.get("dies") == client and (count, job.get("always")) != (2, False):
                os.kill(os.getpid(), signal.SIGKILL)
            if job.get("slow") == client:
                time.sleep(60)
            if job.get("raises") == client:
                raise ValueError("two\nlines")
            said.append([client, request.decode(), count])
        large = np.full(job.get("sizes", {}).get(first, job.get("size", 4)), first, np.uint8)
        return [json.dumps([first, said]).encode(), memoryview(large)], [b"%d" % s[2] for s in said]


def make_adder():
    return Adder()


def tasks(*sizes, request=b"r"):
    first = 0
    for size in sizes:
        yield Task(first, [(k, request) for k in range(first, first + size)])
        first += size


def engine(workers, clients=40):
    return LocalEngine(make_adder, clients=clients, workers=workers)


def gathered(running, given, job, deadline=None):
    """Return what was made by place, read before it is overwritten, and the failures."""
    made, failed = {}, {}
    for answer in running.gather(given, job, deadline):
        if isinstance(answer, Failure):
            failed[answer.client] = answer
        else:
            assert isinstance(answer, Gathered)
            head, large = answer.made
            first, said = json.loads(bytes(head))
            assert first == answer.first
            assert tuple(s[0] for s in said) == answer.clients
            made[first] = said, bytes(large)
    return made, failed


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("size", [0, 5, 3_000_000], ids=["nothing", "little", "much"])
def test_every_task_is_made_once_and_states_are_kept(workers, size):
    with engine(workers) as running:
        assert isinstance(running, Gathering)
        assert running.workers == max(1, workers)
        for count in (1, 2):
            made, failed = gathered(running, tasks(16, 4, 1, 1), {"size": size})
            assert not failed
            assert sorted(made) == [0, 16, 20, 21]
            assert all(s == [s[0], "r", count] for said, _ in made.values() for s in said)
            assert all(large == bytes([first]) * size for first, (_, large) in made.items())


@pytest.mark.parametrize("workers", [1, 2])
def test_small_and_large_results_take_turns_in_any_order(workers):
    """Large ones lie in one of two rooms by turns, whether those between them were large or small."""
    sizes = {first: 3_000_000 if first in {1, 2, 4, 7, 8, 10} else 5 for first in range(12)}
    with engine(workers) as running:
        for _ in range(2):
            made, failed = gathered(running, tasks(*[1] * 12), {"sizes": sizes})
            assert not failed
            assert {first: large for first, (_, large) in made.items()} == {k: bytes([k]) * n for k, n in sizes.items()}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_costs_its_unfinished_task_which_is_done_again_one_by_one(workers):
    with engine(workers) as running:
        gathered(running, tasks(8), {})
        # client 5 kills its first worker only: its state is that of its second request then
        made, failed = gathered(running, tasks(4, 4), {"dies": 5, "always": False})
        assert not failed
        assert sorted(s[0] for said, _ in made.values() for s in said) == list(range(8))
        assert len(running.pids()) == workers


def test_who_kills_three_workers_alone_is_left_out_and_its_neighbours_are_not():
    with engine(2) as running:
        made, failed = gathered(running, tasks(4, 4, 4), {"dies": 6, "always": True})
        assert set(failed) == {6}
        assert failed[6].reason.startswith("its worker process died 3 times")
        assert sorted(s[0] for said, _ in made.values() for s in said) == [k for k in range(12) if k != 6]
        assert sorted(made) == [0, 4, 5, 7, 8]


def test_what_cannot_be_gathered_costs_its_task():
    with engine(1) as running:
        made, failed = gathered(running, tasks(2, 2), {"raises": 1})
        assert {k: f.reason for k, f in failed.items()} == dict.fromkeys((0, 1), "ValueError: two lines")
        assert list(made) == [2]


def test_the_deadline_names_who_was_under_way_and_who_was_not_asked():
    with engine(1) as running:
        gathered(running, tasks(1), {})
        begun = time.monotonic()
        made, failed = gathered(running, tasks(1, 2, 2), {"slow": 2}, deadline=3)
        assert time.monotonic() - begun < 30
        assert list(made) == [0]
        assert {k: f.sent for k, f in failed.items()} == {1: True, 2: True, 3: False, 4: False}
        # the worker that was under way is replaced, and the next round has one that is not
        made, failed = gathered(running, tasks(1, 2, 2), {})
        assert not failed
        assert sorted(made) == [0, 1, 3]


def test_a_job_that_no_worker_can_read_ends_the_exchange_in_one_line():
    with engine(1) as running, pytest.raises(EngineError, match="job"):
        gathered(running, tasks(1), {"unreadable": lambda: 0})


def test_an_unknown_client_is_refused():
    with engine(1, clients=3) as running, pytest.raises(EngineError, match="client 3 is unknown"):
        gathered(running, tasks(4), {})
