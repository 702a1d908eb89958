"""Bristle in its server form: the body stays, and the last layer is merged class by class, by whose class is better.

    down     the last layer's weights and bias, and running statistics; the body is theta_0's
    train    the last layer alone
    judge    F_k,c: client k's F1 score of class c on the server's public rows; F_0,c: that of the server's last layer
    merge    row c of the last layer <- sum_k g_k,c row_k,c / sum_k g_k,c,  g_k,c = max(0, F_k,c - F_0,c); without any
             better one it stays; running statistics <- their median

Paper symbol -> option: none; the public rows are its small i.i.d. test set.

Reference: Verbraeken et al., "Bristle: Decentralized Federated Learning in Byzantine, Non-i.i.d. Environments", arXiv
2110.11006; its body was *not read*. *Read*: an early version in Kotlin (TU Delft's trustchain superapp, ai/gar), which
weighs peers by losses per class.
Departures: there are no peers, hence no choice among them by distance, with a share of chance: the server looks at the
whole cohort. The body is drawn, not pre-trained. F1 instead of accuracy, which a client that always says c has in full.
A class without public rows takes the median of its rows.
Not reproduced: its figures are of peers with a body that was trained before; we did not run that setting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from secateur.contract.ask import REPORT, TRAIN, Ask
from secateur.contract.client import Client, report
from secateur.contract.method import Method
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Keep
from secateur.contract.state import Setting, State
from secateur.errors import ModelError
from secateur.learning import resident
from secateur.methods.kit.classwise import f1, gains, head_of, merge, outputs
from secateur.methods.kit.personal import store_own
from secateur.pruning.mask import Tensors
from secateur.wire.message import Expected, Message

_HEAD, _KEPT = "head", "kept"


@dataclass(frozen=True)
class Bristle(Method):
    """Merges last layers class by class."""

    @property
    def trains_weights(self) -> bool:
        """Return False: the body's weights stay, and there is no setting at which it is FedAvg."""
        return False

    @property
    def refines(self) -> bool:
        """Return True: the server judges and merges."""
        return True

    @property
    def wants_public(self) -> bool:
        """Return True: it judges on public rows."""
        return True

    def check(self, setting: Setting) -> None:
        """Refuse a model whose last layer was not found.

        Raises:
            ModelError: the text says what was not found.
        """
        if not head_of(setting):
            raise ModelError(
                "bristle merges the last layer class by class, and this model has no linear layer as its output whose "
                "name is known (model.structure = none?)"
            )

    def accepts(self, setting: Setting) -> Expected:
        """Accept a model, or the part of it that travels."""
        return Expected(setting.specs, mask="optional", optional=True)

    def plan(self, state: State) -> Ask | None:
        """Send the last layer and the running statistics to the next cohort."""
        round_, setting = state.round + 1, state.setting
        if round_ > setting.rounds:
            return None
        names = [*head_of(setting), *setting.layout.names("buffer")]
        expects = Expected({name: setting.specs[name] for name in names}, scalars=REPORT)
        message = Message({name: state.weights[name] for name in names})
        return Ask(TRAIN, round_, setting.cohort(round_), message, expects, {_KEPT: Keep()})

    def respond(self, ask: Ask, client: Client) -> Message:
        """Train the last layer on the body of theta_0."""
        head = {name: ask.message.tensors[name] for name in head_of(client.setting)}
        learnt, done = client.learn({**client.initial, **ask.message.tensors}, head, dict, round_=ask.round)
        moved = resident.tensors_of(client.model)
        buffers = {name: moved[name] for name in client.setting.layout.names("buffer")}
        return Message({**learnt, **buffers}, None, report(done))

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Store what clients sent, for the server to judge."""
        store_own(state, _HEAD, reduced[_KEPT].items())
        return replace(state, round=reduced.ask.round)

    def refine(self, state: State, server: Client) -> tuple[State, int]:
        """Judge each class of each client, and merge.

        Raises:
            ModelError: targets are no classes.
        """
        if not server.data.task.classes:
            raise ModelError("bristle merges classes, and the targets of these rows are numbers: use fedavg")
        sent = [key for key in state.archive if key.startswith(f"{_HEAD}/")]
        if not sent:
            return state, 0
        sent.sort(key=lambda key: int(key.partition("/")[2]))
        rows: list[Tensors] = [state.archive[key] for key in sent]
        own, targets = outputs(server, state.weights)
        before = f1(own, targets)
        scores = [f1(outputs(server, {**state.weights, **tensors})[0], targets) for tensors in rows]
        weights = merge(state, rows, gains(torch.stack(scores), before))
        for key in sent:
            del state.archive[key]
        seen = len(targets) * (len(rows) + 1) // 3  # a third of a training row's work: forward only
        return replace(state, weights={**state.weights, **weights}), seen
