"""A Flower Grid inside the test's process: real messages, contexts and ClientApps, without sockets or processes.

It needs one private hook of Flower, the identity that a message's constructor reads; nothing in the product does.
"""

import copy
import itertools

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class Node:
    """A node: its app, what it keeps, and how it behaves."""

    def __init__(self, app, number, run_config, **config):
        self.app = app
        self.context = Context(1, number, config, RecordDict(), run_config)
        self.mute = False  # takes a message and never answers
        self.asked = 0

    def answer(self, message):
        self.asked += 1
        if self.mute:
            return None
        TaskIdentity.node_id = self.context.node_id
        try:
            return self.app(message, self.context)
        except Exception as broken:  # noqa: BLE001 -- as Flower does
            return Message(Error(2, f"{type(broken).__name__}: {broken}"), reply_to=message)
        finally:
            TaskIdentity.node_id = 0


class LoopGrid(Grid):
    def __init__(self, nodes=()):
        self.nodes = dict(nodes)
        self.replies = {}
        self.numbers = itertools.count(1)
        self.carried = 0
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **more):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        pushed = []
        for message in messages:
            number = str(next(self.numbers))
            message.metadata.__dict__["_message_id"] = number
            pushed.append(number)
            node = self.nodes.get(message.metadata.dst_node_id)
            sent = copy.deepcopy(message)
            reply = node.answer(sent) if node else None
            if reply is not None:
                self.carried += 1
                self.replies[number] = reply
        return pushed

    def pull_messages(self, message_ids):
        return [self.replies.pop(number) for number in list(message_ids) if number in self.replies]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))
