"""The local engine with real processes: order, deaths, deadlines, states."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engines import serving
from secateur.engines import Failure, Task, pipes
from secateur.engines.local import LocalEngine
from secateur.engines.store import StateStore
from secateur.engines.workers import for_workers
from secateur.errors import EngineError

REQUESTS = [(k, b"x" * k) for k in range(20)]


def engine(make, workers=2, clients=20, **options):
    return LocalEngine(make, clients=clients, workers=workers, **options)


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_same_replies_for_any_number_of_workers(workers):
    with engine(serving.make_echo, workers) as running:
        assert list(running.clients()) == list(range(20))
        for _ in range(2):
            assert dict(running.exchange(REQUESTS)) == {k: b"%d:" % k + b"x" * k for k in range(20)}
        assert running.states.get(3) == b"2"


def test_state_stays_with_the_client_whatever_worker_serves_it():
    with engine(serving.make_counted, 3, clients=4) as running:
        for n in range(4):
            assert dict(running.exchange((k, b"") for k in range(4))) == dict.fromkeys(range(4), b"%d" % n)


def test_large_payloads_pass():
    big = os.urandom(30_000_000)
    with engine(serving.make_echo, 1, clients=1) as running:
        assert dict(running.exchange([(0, big)]))[0] == b"0:" + big


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_is_a_failure_of_its_client_alone(workers):
    with engine(serving.make_troubled, workers) as running:
        answers = dict(running.exchange([(0, b"a"), (1, b"b"), (4, b"c")]))
    assert answers == {0: b"a", 1: Failure(1, "ValueError: two lines"), 4: b"c"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reply_or_an_error_that_cannot_travel_is_a_failure_of_its_client_alone(workers):
    with engine(serving.make_clumsy, workers) as running:
        assert dict(running.exchange([(0, b"a")])) == {0: b"a"}
        before = running.pids()
        answers = dict(running.exchange([(1, b"b"), (2, b"c"), (3, b"d")]))
        assert running.pids() == before
    assert answers[1].reason.startswith("TypeError: ")
    assert answers[2] == Failure(2, "ValueError: \\ud800")
    assert answers[3] == b"d"


def test_a_death_is_noticed_though_a_process_left_behind_holds_the_pipe():
    with engine(serving.make_leaver, 1) as running:
        begun = time.monotonic()
        answers = dict(running.exchange([(0, b"a"), (1, b"b"), (3, b"d")]))
        assert time.monotonic() - begun < 10
    assert "died 3 times" in answers.pop(1).reason
    assert answers == {0: b"a", 3: b"d"}


def test_workers_compute_while_a_reply_is_handled():
    """When a reply is handed over, the worker that sent it has its next task already."""
    with engine(serving.make_echo, 1) as running:
        busy = [running.staffed()[0].task is not None for _ in running.exchange(REQUESTS[:4])]
    assert busy == [True, True, True, False]


def test_workers_have_one_thread_and_this_process_keeps_its_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "12345")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    with engine(serving.make_threads, 1) as running:
        assert dict(running.exchange([(0, b"")])) == {0: b"1 1"}
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ
    with for_workers():
        assert (os.environ["MALLOC_TRIM_THRESHOLD_"], os.environ["MALLOC_MMAP_THRESHOLD_"]) == ("12345", "33554432")
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "12345"
    assert "MALLOC_MMAP_THRESHOLD_" not in os.environ


def test_an_interrupt_while_workers_imports_go_on_is_answered_by_the_server_alone():
    code = """if True:
        import signal, sys, time
        from secateur.engines.workers import warm
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        warm()
        print("warm", flush=True)
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            sys.exit(7)
    """
    path = os.pathsep.join(p for p in sys.path if p)
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert server.stdout.readline() == "warm\n"
    time.sleep(1.0)  # imports of torch take longer
    os.killpg(server.pid, signal.SIGINT)
    _, said = server.communicate(timeout=60)  # it ends when nobody holds the pipe any more
    assert (server.returncode, said) == (7, "")


def test_a_factory_that_cannot_travel_is_an_error():
    with engine(lambda: None, 1) as running, pytest.raises(EngineError, match="cannot be started"):
        list(running.exchange(REQUESTS))


def test_a_task_that_kills_its_worker_fails_alone():
    with engine(serving.make_troubled) as running:
        answers = dict(running.exchange([(0, b"a"), (2, b"b"), (4, b"c"), (5, b"d")]))
    assert "died 3 times" in answers.pop(2).reason
    assert answers == {0: b"a", 4: b"c", 5: b"d"}


def test_killed_workers_leave_no_trace_in_the_replies():
    with engine(serving.make_slow, 2, clients=40) as running:
        seen = []
        for client, reply in running.exchange((k, b"") for k in range(40)):
            assert isinstance(reply, bytes)
            seen.append(client)
            if len(seen) in {3, 11, 12, 25}:
                os.kill(running.pids()[len(seen) % 2], signal.SIGKILL)
    assert sorted(seen) == list(range(40))


def test_deadline_names_the_late_and_the_engine_goes_on():
    with engine(serving.make_troubled, 2) as running:
        dict(running.exchange([(0, b"a")]))
        begun = time.monotonic()
        answers = dict(running.exchange([(0, b"a"), (3, b"b"), (4, b"c")], deadline=4.0))
        assert time.monotonic() - begun < 20
        assert answers == {0: b"a", 3: Failure(3, "no reply within 4 s"), 4: b"c"}
        assert dict(running.exchange([(5, b"z")])) == {5: b"z"}


@pytest.mark.parametrize(("workers", "sent"), [(0, 0), (1, 1)])
def test_after_the_deadline_nothing_more_is_sent(workers, sent):
    with engine(serving.make_echo, workers) as running:
        dict(running.exchange([(0, b"")]))
        late = dict(running.exchange([(1, b"x"), (2, b"y"), (4, b"z")], deadline=1e-9))
    assert sum(late[k].sent for k in (1, 2, 4)) == sent
    assert {late[k].reason for k in (1, 2, 4)} == {"no reply within 1e-09 s"}  # as it was set, not as it was measured


@contextlib.contextmanager
def woken(after, pids):
    """Let stopped processes go on after so many seconds, so that who waits for them fails instead of hanging."""

    def wake():
        for pid in pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    timer = threading.Timer(after, wake)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        wake()


LATE, PATIENCE = 4.0, 20.0


def test_a_worker_stopped_in_the_middle_of_a_request_costs_its_own_clients_the_round_alone():
    big = os.urandom(30_000_000)

    def requests():
        os.kill(running.pids()[0], signal.SIGSTOP)
        yield from [(0, big), (1, b"b"), (4, b"e")]

    with engine(serving.make_echo, 2) as running, woken(60, running.pids):
        dict(running.exchange((k, b"") for k in (5, 6)))
        begun = time.monotonic()
        answers = dict(running.exchange(requests(), LATE))
        assert time.monotonic() - begun < PATIENCE
        assert answers == {0: Failure(0, "no reply within 4 s"), 1: b"1:b", 4: b"4:e"}
        assert dict(running.exchange([(0, big), (7, b"")])) == {0: b"0:" + big, 7: b"7:"}


def test_a_worker_stopped_in_the_middle_of_a_reply_costs_its_own_clients_the_round_alone():
    with engine(serving.make_halting, 2) as running, woken(60, running.pids):
        dict(running.exchange((k, b"") for k in (5, 6)))
        begun = time.monotonic()
        answers = dict(running.exchange([(3, b"x" * 100_000), (1, b"b"), (4, b"e")], LATE))
        assert time.monotonic() - begun < PATIENCE
        assert answers == {3: Failure(3, "no reply within 4 s"), 1: b"1:b", 4: b"4:e"}
        assert dict(running.exchange([(7, b"h")])) == {7: b"7:h"}


def test_no_more_workers_are_started_than_have_something_to_do():
    with engine(serving.make_slow, 40) as running:
        assert running.workers == 40
        for count, started in ((3, 3), (2, 3), (5, 5)):
            assert len(dict(running.exchange(REQUESTS[:count]))) == count
            assert len(running.pids()) == started


def test_a_channel_that_cannot_ask_whether_its_pipe_takes_more_carries_the_same(monkeypatch):
    """As on Windows: it waits instead."""
    monkeypatch.setattr(pipes, "_POLLS", False)
    with engine(serving.make_echo, 1) as running:
        assert dict(running.exchange(REQUESTS[:3])) == {k: b"%d:" % k + b"x" * k for k in range(3)}


def test_an_exchange_left_early_leaves_a_usable_engine():
    with engine(serving.make_slow) as running:
        for _ in running.exchange(REQUESTS):
            break
        assert len(dict(running.exchange(REQUESTS[:4]))) == 4


def test_requests_run_at_most_four_times_the_workers_ahead():
    """While the first request takes a minute, no more than 4 x 2 are taken; the deadline then names the rest."""
    taken, at_first_answer = [], []

    def requests():
        for k in range(40):
            taken.append(k)
            yield (3 if k == 0 else 4), b""

    with engine(serving.make_troubled, 2) as running:
        dict(running.exchange([(0, b"")]))
        for _, reply in running.exchange(requests(), deadline=2.0):
            if isinstance(reply, Failure) and not at_first_answer:
                at_first_answer.append(len(taken))
    assert at_first_answer == [8]
    assert len(taken) == 40


def test_workers_that_cannot_serve_are_an_error_not_a_hang():
    with engine(serving.make_broken) as running, pytest.raises(EngineError, match="RuntimeError: no model here"):
        list(running.exchange(REQUESTS))
    with engine(serving.make_dead, 1) as running, pytest.raises(EngineError, match="3 worker processes ended"):
        list(running.exchange(REQUESTS))


def test_unknown_clients_are_refused():
    with engine(serving.make_echo, 0, clients=2) as running, pytest.raises(EngineError, match="client 7 is unknown"):
        list(running.exchange([(7, b"")]))


def test_no_worker_outlives_a_killed_server(tmp_path):
    script = tmp_path / "server.py"
    script.write_text(
        "import sys, time\n"
        "from engines import serving\n"
        "from secateur.engines.local import LocalEngine\n"
        "if __name__ == '__main__':\n"
        "    running = LocalEngine(serving.make_echo, clients=2, workers=2)\n"
        "    print(dict(running.exchange([(0, b''), (1, b'')])), flush=True)\n"
        "    print(*running.pids(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    server = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    with server:
        server.stdout.readline()
        pids = [int(p) for p in server.stdout.readline().split()]
        server.kill()
    assert len(pids) == 2
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def script(tmp_path, text, *, stdin=False):
    """Run a script file, or the same text from standard input; return how it ended and what it wrote."""
    path = os.pathsep.join(p for p in sys.path if p)
    (tmp_path / "script.py").write_text(text)
    return subprocess.run(
        [sys.executable, "-" if stdin else "script.py"], input=text if stdin else None, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("stdin", [False, True])
def test_a_script_without_a_main_guard_is_run_once(tmp_path, stdin):
    text = """if True:
        import sys
        from engines import serving
        from secateur.engines.local import LocalEngine
        print("begun", flush=True)
        with LocalEngine(serving.make_echo, clients=2, workers=2) as running:
            print(sorted(running.exchange([(0, b"a"), (1, b"b")])), sys.modules["__main__"].__name__)
    """
    done = script(tmp_path, text, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "begun\n[(0, b'0:a'), (1, b'1:b')] __main__\n"


OF_ITS_OWN = """
from secateur.engines.local import LocalEngine
def make():
    return lambda client, request, state: (b"own " + request, None)
{guard}
    with LocalEngine(make, clients=1, workers=1) as running:
        print(list(running.exchange([(0, b"a")])))
"""


def test_what_a_script_defines_itself_reaches_its_workers_where_it_has_a_main_guard(tmp_path):
    done = script(tmp_path, OF_ITS_OWN.format(guard='if __name__ == "__main__":'))
    assert (done.returncode, done.stdout) == (0, "[(0, b'own a')]\n")
    done = script(tmp_path, OF_ITS_OWN.format(guard="if True:"))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "3 worker processes ended before they could serve; this script names code of its own" in last
    assert 'must stand under if __name__ == "__main__":' in last


def test_what_clients_keep_outlives_the_engine_in_a_folder_of_its_own(tmp_path):
    store = StateStore(tmp_path)
    with engine(serving.make_echo, 0, store=store) as running:
        dict(running.exchange([(1, b"")]))
    assert store.get(1) == b"1"


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_who_is_served_with_whom_follows_from_the_order_alone(workers):
    with engine(serving.make_groups, workers, clients=12, together=4) as running:
        for n in (1, 2):
            answers = dict(running.exchange((k, b"r%d" % k) for k in range(10)))
            reason = "ValueError: client 7 alone"
            assert answers.pop(7) == Failure(7, reason)
            assert {k: reply.split()[1] for k, reply in answers.items()} == {
                k: b"0,1,2,3" if k < 4 else b"4,5,6,7" if k < 8 else b"8,9" for k in range(10) if k != 7
            }
            assert [running.states.get(k) for k in (0, 7, 9)] == [b"%d" % n, None, b"%d" % n]


def test_a_request_that_is_the_one_before_is_not_carried_again():
    same, other = os.urandom(100), os.urandom(100)
    with engine(serving.make_groups, 1) as running:
        replies = [reply.split()[0] for _, reply in running.exchange([(0, same), (1, same), (2, other), (3, same)])]
        assert replies == [b"new", b"again", b"new", b"new"]
        assert dict(running.exchange([(4, same)]))[4].split()[0] == b"again"
        os.kill(running.pids()[0], signal.SIGKILL)
        assert dict(running.exchange([(5, same)]))[5].split()[0] == b"new"


def test_a_group_that_kills_its_worker_or_is_late_fails_whole():
    with engine(serving.make_groups, 2, together=2) as running:
        answers = dict(running.exchange((k, b"") for k in (0, 1, 12, 13, 14, 15)))
        assert all("died 3 times" in answers.pop(k).reason for k in (12, 13))
        assert {k: reply.split()[1] for k, reply in answers.items()} == {
            0: b"0,1",
            1: b"0,1",
            14: b"14,15",
            15: b"14,15",
        }
        late = dict(running.exchange(((k, b"") for k in (0, 1, 16, 17)), deadline=5.0))
    assert [late[k] for k in (16, 17)] == [Failure(k, "no reply within 5 s") for k in (16, 17)]
    assert isinstance(late[0], bytes)


@pytest.mark.parametrize(("whole", "groups"), [(True, {b"0,1,2", b"3,4"}), (False, {b"0", b"1", b"2", b"3", b"4"})])
def test_a_stack_whose_worker_died_is_done_again_as_a_stack(whole, groups, tmp_path):
    tasks = [Task(0, [(k, b"") for k in (0, 1, 2)], whole), Task(3, [(k, b"") for k in (3, 4)], whole)]
    with engine(serving.make_stacks, 2) as running:
        made = [(part.first, bytes(part.made[0])) for part in running.gather(tasks, str(tmp_path))]
    assert {members for _, members in made} == groups
    assert all(members.startswith(b"%d" % first) for first, members in made)
