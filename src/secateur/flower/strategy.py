"""Pruning and sparse messages for an existing Flower app: a strategy around the app's own, and a mod for its clients.

    strategy = Pruned(FedAvg(...), FedSparsify(), Net())     the server
    app = ClientApp(mods=[prune(Net())])                     the client; its training code stays as it is
    keep_pruned(net)                                         after each optimiser step, to apply the mask while training

The wrapped strategy samples nodes, merges and evaluates as before. It sees dense arrays, in which a pruned weight has
the server's own value, so that it neither moves nor counts in a norm. Only surviving values travel between server and
mod.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from secateur.aggregation.robust import Robust
from secateur.aggregation.steps import Mean
from secateur.contract.ask import TRAIN, Ask
from secateur.contract.reducer import Reduced, reduce
from secateur.contract.state import Setting, State
from secateur.errors import ConfigError, WireError
from secateur.federation.held_masks import HeldMasks
from secateur.federation.records import check_any, short
from secateur.flower.messages import (
    LOG,
    ArrayRecord,
    ConfigRecord,
    Grid,
    MetricRecord,
    Result,
    Strategy,
    payload_of,
    reason_of,
    with_arrays,
    with_payload,
)
from secateur.flower.messages import Message as FlowerMessage
from secateur.flower.ties import Held
from secateur.methods.kit.composition import Composition
from secateur.methods.kit.rounds import MEAN
from secateur.pruning import mask as masks
from secateur.pruning.discovery import layout
from secateur.wire.codec import decode, encode, is_lost, part_sizes
from secateur.wire.head import context_of
from secateur.wire.message import Message, Scalar, specs_of

EPOCHS, PHASE = "epochs", "phase"


@dataclass(frozen=True)
class _Drawn(Setting):
    """A setting with a cohort that another strategy has drawn."""

    those: tuple[int, ...] = ()

    def cohort(self, round_: int) -> tuple[int, ...]:
        """Return the clients that were drawn."""
        del round_
        return self.those


@dataclass
class _Exchange:
    """An exchange under way: the ask, the messages sent to nodes, and what was carried and answered."""

    ask: Ask
    grid: Grid
    messages: Mapping[int, FlowerMessage]
    sent: dict[int, bytes] = field(default_factory=dict)
    answered: dict[int, bool] = field(default_factory=dict)
    down: Counter[str] = field(default_factory=Counter)
    up: Counter[str] = field(default_factory=Counter)
    left_out: dict[int, str] = field(default_factory=dict)


class Pruned(Strategy):  # type: ignore[misc, unused-ignore]
    """A strategy that prunes the model that another strategy merges.

    Args:
        strategy: the wrapped strategy, which samples, merges and evaluates as it would without pruning.
        method: what is pruned and when: a composition whose masks are made on the server. The wrapped strategy replaces
            its aggregator.
        model: the app's model, for names and shapes; its weights do not matter.
        seed: the seed of the method's random draws.
        example: an input of the model, shape (1, ...), for methods that remove channels, heads or blocks; needed where
            the model's first layer does not tell it.

    Attributes:
        state: the method's state: weights (which may be dense beneath the mask), mask, round.
        ledger: a row for each exchange: bytes by direction and part, sparsity, the number of replies that counted, the
            nodes that were left out and why.

    Raises:
        ConfigError: the method is no composition, lets clients vote, measures something at the server, asks clients for
            more than their training, or brings a robust rule of its own.
        ModelError: the model has no units of the kind that the method removes; the text says why.
    """

    def __init__(
        self, strategy: Strategy, method: Composition, model: nn.Module, *, seed: int = 0,
        example: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        composed = isinstance(method, Composition) and not method.consensus.ballot and not method.refines
        if not composed or method.criterion.by_training is None:
            raise ConfigError(
                f"{type(method).__name__}, as it is set here, needs code of its own on clients: run it with "
                "secateur.flower.server_app and client_app; Pruned takes methods whose masks are made on the server"
            )
        if isinstance(method.aggregator, Robust):
            raise ConfigError(
                f"aggregator {method.aggregator.name} would be dropped: the wrapped strategy merges; wrap one of "
                "Flower's, such as FedMedian, FedTrimmedAvg or MultiKrum"
            )
        shadow = method.aggregator.pruned != "zero"
        self.strategy = strategy
        self.method = replace(method, aggregator=Mean(pruned="shadow" if shadow else "zero"))
        self.model = Held.of(model)
        self.held = HeldMasks(self.model.specs)
        self.ledger: list[dict[str, Any]] = []
        self.state: State | None = None
        self._setting = _Drawn(seed, 0, 1, 1.0, layout(model, example=example), self.model.specs)
        self.method.granularity.prunable(self._setting.layout)
        self._nodes: list[int] = []
        self._turn: _Exchange | None = None

    def summary(self) -> None:
        """Log the method's name, then the summary of the wrapped strategy."""
        LOG.info("%s prunes what %s merges", type(self.method).__name__, type(self.strategy).__name__)
        for remark in self.method.remarks(self._setting):
            LOG.warning("%s", remark)
        self.strategy.summary()

    def start(self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, *args: Any, **more: Any) -> Result:
        """Run the federation, as ``Strategy.start`` does, with the same arguments.

        Raises:
            ConfigError: the arrays do not fit the model.
            NobodyTrainedError: no reply of any round counted; raised at the end, ``ledger`` and ``state`` are kept.
        """
        weights = self.model.once(initial_arrays.to_torch_state_dict())
        if specs_of(weights) != self.model.specs:
            raise ConfigError("initial_arrays are not those of the model that Pruned was given")
        self._nodes, self.ledger, self.held = sorted(grid.get_node_ids()), [], HeldMasks(self.model.specs)
        self._setting = replace(self._setting, rounds=num_rounds, clients=max(1, len(self._nodes)))
        self.state = self.method.start(self._setting, weights, {})
        result = super().start(grid, initial_arrays, num_rounds, *args, **more)
        self._check_answers()
        return result

    def _check_answers(self) -> None:
        """Refuse a result without any reply that counted, whatever the wrapped strategy made of it."""
        rows = [row for row in self.ledger if row["phase"] == TRAIN]
        if any(row["answered"] for row in rows):
            return
        why = [{"client": node, "reason": reason} for row in rows for node, reason in row["left_out"].items()]
        check_any(TRAIN, len(why) or len(rows), why or [{"client": 0, "reason": "no node replied"}] * len(rows))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[FlowerMessage]:
        """Return the wrapped strategy's messages, with surviving values instead of its dense arrays.

        If the method explores, all explorers do so before round 1.
        """
        del arrays  # these are under the mask; the strategy goes on from the dense weights
        state = self._started()
        dense = ArrayRecord(torch_state_dict=self.model.by_all_names(state.weights))
        messages = {m.metadata.dst_node_id: m for m in self.strategy.configure_train(server_round, dense, config, grid)}
        if not messages:
            return []
        state = self._draw(state, messages)
        ask = self.method.plan(state)
        while ask is not None and ask.phase != TRAIN:
            state = self._explore(state, ask, next(iter(messages.values())), grid)
            ask = self.method.plan(state)
        if ask is None:
            raise ConfigError(f"round {server_round} is beyond the {state.setting.rounds} that were announced")
        self.state, self._turn = state, _Exchange(ask, grid, messages)
        return [self._send(self._turn, node) for node in messages]

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the wrapped strategy merge the replies, then prune."""
        state, turn = self._started(), self._turn
        if turn is None:
            return self.strategy.aggregate_train(server_round, replies)
        dense = [
            received for reply in self._served(turn, replies) if (received := self._receive(turn, reply)) is not None
        ]
        arrays, metrics = self.strategy.aggregate_train(server_round, dense)
        mask = turn.ask.message.mask
        merged = {} if arrays is None else masks.apply(self.model.once(arrays.to_torch_state_dict()), mask)
        specs = self.model.specs
        mean = {name: tensor.to(specs[name].dtype) for name, tensor in merged.items()}  # some merge in float64
        self.state = self.method.absorb(state, Reduced(turn.ask, {MEAN: mean}, {}, {}))
        if mask is not None:
            self.held.confirm({node: turn.answered.get(node, False) for node in turn.messages}, mask)
        self._enter(turn, server_round)
        self._turn = None
        return (None if arrays is None else ArrayRecord(torch_state_dict=self._shipped())), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[FlowerMessage]:
        """Return the wrapped strategy's messages; the pruned model is evaluated, as dense arrays."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[FlowerMessage]) -> MetricRecord | None:
        """Return what the wrapped strategy makes of the replies."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def _started(self) -> State:
        if self.state is None:
            raise ConfigError("Pruned is started with start(), as every strategy is")
        return self.state

    def _shipped(self) -> dict[str, torch.Tensor]:
        state = self._started()
        done = state.round == state.setting.rounds
        return self.model.by_all_names((self.method.final(state) if done else state).model())

    def _draw(self, state: State, messages: Mapping[int, FlowerMessage]) -> State:
        """Return the state whose cohort is the nodes that the wrapped strategy drew."""
        self._nodes += [node for node in messages if node not in self._nodes]
        drawn = tuple(sorted(self._nodes.index(node) for node in messages))
        return replace(state, setting=replace(self._setting, clients=len(self._nodes), those=drawn))

    def _send(self, turn: _Exchange, node: int, **scalars: Scalar) -> FlowerMessage:
        ours, theirs = turn.ask.message, turn.messages[node]
        name = self.held.name(node) if ours.mask is not None else None
        held = None if name is None else self.held.mask(name)
        message = replace(ours, scalars={**ours.scalars, PHASE: turn.ask.phase, **scalars})
        payload = encode(message, known=held, template=self.model.specs)
        turn.sent[node] = payload
        turn.down.update(part_sizes(payload, checked=True))
        meta = theirs.metadata
        return FlowerMessage(with_payload(theirs.content, payload), node, meta.message_type, ttl=meta.ttl)

    def _served(self, turn: _Exchange, replies: Iterable[FlowerMessage]) -> list[FlowerMessage]:
        """Return the replies, after sending the mask again to nodes that have lost it."""
        by_node = {reply.metadata.src_node_id: reply for reply in replies}
        again = [node for node, reply in by_node.items() if not reply.has_error() and self._lost(turn, node, reply)]
        for node in again:
            self.held.note(node, None)
        if again:
            answers = turn.grid.send_and_receive([self._send(turn, node) for node in again])
            by_node |= {reply.metadata.src_node_id: reply for reply in answers}
        return list(by_node.values())

    def _lost(self, turn: _Exchange, node: int, reply: FlowerMessage) -> bool:
        _, payload = payload_of(reply.content)
        referred = turn.ask.message.mask is not None and self.held.name(node) is not None
        if payload is None or not referred or not is_lost(payload, context_of(turn.sent.get(node, b""))):
            return False
        turn.up.update(part_sizes(payload))
        return True

    def _read(self, turn: _Exchange, reply: FlowerMessage) -> Message | None:
        """Return the message in a reply; None if it is not what was asked for, with the reason in the ledger."""
        node = reply.metadata.src_node_id
        if reply.has_error():
            turn.left_out[node] = reason_of(reply)
            return None
        _, payload = payload_of(reply.content)
        if payload is None or node not in turn.sent:
            turn.left_out[node] = "its reply holds no payload: is prune() among the ClientApp's mods?"
            return None
        try:
            expects = replace(turn.ask.expects, infinite=self.model.infinite, scalars=None)
            message = decode(payload, replace(expects, context=context_of(turn.sent[node])))
        except WireError as broken:
            turn.left_out[node] = short(str(broken))
            return None
        turn.up.update(part_sizes(payload, checked=True))
        turn.answered[node] = True
        return message

    def _receive(self, turn: _Exchange, reply: FlowerMessage) -> FlowerMessage | None:
        """Return a reply as dense arrays for the wrapped strategy; pruned weights have the server's values."""
        message, state = self._read(turn, reply), self._started()
        if message is None:
            return None
        mask = turn.ask.message.mask or {}
        tensors = {n: torch.where(mask[n], t, state.weights[n]) if n in mask else t for n, t in message.tensors.items()}
        reply.content = with_arrays(reply.content, ArrayRecord(torch_state_dict=self.model.by_all_names(tensors)))
        return reply

    def _explore(self, state: State, ask: Ask, like: FlowerMessage, grid: Grid) -> State:
        """Ask explorers for their deviations after the app's training, which they repeat for the method's epochs."""
        nodes = {self._nodes[client]: like for client in ask.clients}
        turn, epochs = _Exchange(ask, grid, nodes), self.method.criterion.by_training
        if not epochs:
            raise ConfigError(
                f"criterion {type(self.method.criterion).__name__} asks for {ask.phase!r}, which no app has"
            )
        answers = []
        for reply in grid.send_and_receive([self._send(turn, node, **{EPOCHS: epochs}) for node in nodes]):
            message = self._read(turn, reply)
            if message is not None:
                scalars = {"samples": 1, "processed": 0, "loss": 0.0}
                answers.append((self._nodes.index(reply.metadata.src_node_id), replace(message, scalars=scalars)))
        self.state = self.method.absorb(state, reduce(ask, state, answers))
        self._enter(turn, 0)
        return self.state

    def _enter(self, turn: _Exchange, round_: int) -> None:
        row = {
            "phase": turn.ask.phase, "round": round_, "down": turn.down, "up": turn.up,
            "sparsity": masks.sparsity(self._started().mask), "left_out": turn.left_out,
            "answered": len(turn.answered),
        }  # fmt: skip
        self.ledger.append(row)
        sizes = sum(turn.down.values()), sum(turn.up.values())
        LOG.info("%s %d: sparsity %.4f, down %d B, up %d B", turn.ask.phase, round_, row["sparsity"], *sizes)
        for node, reason in turn.left_out.items():
            LOG.warning("node %d was left out: %s", node, reason)
