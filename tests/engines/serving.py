"""What workers serve in the tests; a module of its own, so that worker processes can import it."""

import os
import signal
import struct
import time
from pathlib import Path

from secateur.engines import pipes, workers


def echo(client, request, state):
    """Reply with what came; remember how often this client was asked."""
    count = int(state or b"0") + 1
    return b"%d:" % client + request, b"%d" % count


def counted(client, request, state):
    """Reply with how often this client was asked before."""
    return (state or b"0"), b"%d" % (int(state or b"0") + 1)


def troubled(client, request, state):
    """Client 1 raises, client 2 kills its worker, client 3 takes long."""
    if client == 1:
        raise ValueError("two\nlines")
    if client == 2:
        os._exit(9)
    if client == 3:
        time.sleep(60)
    return request, None


def slow(client, request, state):
    """Reply after a moment, with the worker's process id."""
    time.sleep(0.05)
    return b"%d" % os.getpid(), None


def clumsy(client, request, state):
    """Client 1 replies with text, client 2 raises what UTF-8 cannot write."""
    if client == 1:
        return "text", None
    if client == 2:
        raise ValueError("\ud800")
    return request, None


def leaver(client, request, state):
    """Client 1 leaves a process behind, which holds all that its worker had open, and dies."""
    if client == 1:
        if os.fork() == 0:
            time.sleep(5)
        os._exit(1)
    return request, None


def threads(client, request, state):
    """Reply with the number of threads that the environment asks for."""
    return f"{os.environ.get('OMP_NUM_THREADS')} {os.environ.get('MKL_NUM_THREADS')}".encode(), None


def make_halting():
    """Serve as ``echo``, but be stopped in the middle of a reply of client 3, which is large."""

    def send(pipe, items):
        if items[0][1] != 3:
            whole(pipe, items)
            return
        head, reply, *_ = pipes.messages(items)
        pipe.send_bytes(head)
        os.write(pipe.fileno(), struct.pack("!i", len(reply)) + reply[: len(reply) // 2])
        os.kill(os.getpid(), signal.SIGSTOP)

    whole, workers.send = workers.send, send
    return echo


def make_clumsy():
    return clumsy


def make_leaver():
    return leaver


def make_threads():
    return threads


def make_echo():
    return echo


def make_counted():
    return counted


def make_troubled():
    return troubled


def make_slow():
    return slow


def make_broken():
    raise RuntimeError("no model\nhere")


def make_dead():
    os._exit(3)


class Groups:
    """Says with whom a client was served, and whether its request is the very object that was served before it."""

    def __init__(self):
        self.last = None

    def __call__(self, client, request, state):
        return self.together([(client, request, state)])[0]

    def together(self, asked):
        answers = []
        for client, request, state in asked:
            if client == 13:
                os.kill(os.getpid(), signal.SIGKILL)
            if client == 17:
                time.sleep(60)
            again = b"again" if request is self.last else b"new"
            self.last = request
            members = b",".join(b"%d" % who for who, _, _ in asked)
            failed = ValueError(f"client {client} alone") if client == 7 else None
            answers.append(failed or (again + b" " + members, b"%d" % (int(state or b"0") + 1)))
        return answers


def make_groups():
    return Groups()


class Stacks:
    """Says with whom a client was gathered; its process dies once in each task of more than one client."""

    def __call__(self, client, request, state):
        return request, None

    def gather(self, job, first, asked):
        died = Path(job) / str(first)
        if len(asked) > 1 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [b",".join(b"%d" % who for who, _, _ in asked)], [None] * len(asked)


def make_stacks():
    return Stacks()
