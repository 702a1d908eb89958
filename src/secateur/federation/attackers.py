"""Attackers: the clients of a simulation that are hostile, and what they send."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from secateur.contract.ask import EVALUATE, TRAIN, Ask
from secateur.contract.attack import Attack, Cohort, Kind, Scene, floats, kinds_of, listing, with_tensors
from secateur.contract.method import Method
from secateur.contract.state import Setting, State
from secateur.data.shards import Shards
from secateur.engines import Relaying
from secateur.errors import ConfigError
from secateur.learning import task as tasks
from secateur.learning.task import Data
from secateur.methods.kit.composition import Composition
from secateur.pruning.mask import Tensors
from secateur.study.study import Study
from secateur.wire.masks import same
from secateur.wire.message import Message, specs_of
from secateur.wire.settings import Wire
from secateur.wire.values import LARGEST

_MEMORY = "attack/"


@dataclass(frozen=True)
class Attackers:
    """The hostile clients of a study.

    Attributes:
        attack: what they do.
        who: their numbers; empty: all clients are honest.
        wire: how values travel.
        setting: the federation.
    """

    attack: Attack
    who: frozenset[int]
    wire: Wire
    setting: Setting

    @classmethod
    def of(cls, study: Study, setting: Setting) -> Attackers:
        """Return the attackers of a study."""
        hostile = study.build_attack()
        if hostile is None:
            return cls.nobody(study, setting)
        return cls(hostile.attack, hostile.who(study.seed, setting.clients), study.wire, setting)

    @classmethod
    def nobody(cls, study: Study, setting: Setting) -> Attackers:
        """Return the attackers of a federation whose clients are all honest."""
        return cls(Attack(), frozenset(), study.wire, setting)

    @property
    def collude(self) -> bool:
        """Return whether attackers use the replies of others, which must then be at hand in one place."""
        return bool(self.who) and self.attack.colludes

    def rows(self, client: int, phase: str, data: Data, classes: int) -> Data:
        """Return the rows that a client works on; those of an honest client are its own."""
        return self.attack.poison(data, classes) if client in self.who and phase != EVALUATE else data

    def split(self, memory: Tensors) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return a client's memory without, and with nothing but, what it keeps as an attacker."""
        own = {name.removeprefix(_MEMORY): t for name, t in memory.items() if name.startswith(_MEMORY)}
        return {name: t for name, t in memory.items() if not name.startswith(_MEMORY)}, own

    def joined(self, memory: Tensors, own: Tensors) -> dict[str, torch.Tensor]:
        """Return a client's memory with what it keeps as an attacker."""
        return {**memory, **{_MEMORY + name: tensor for name, tensor in own.items()}}

    def altered(self, ask: Ask, message: Message, own: dict[str, torch.Tensor]) -> Message:
        """Return what an attacker sends; where attackers collude, its honest reply for now.

        Args:
            ask: what it was asked.
            message: its honest reply.
            own: what it keeps as an attacker, changed in place.
        """
        scene = self._scene(ask, ask.clients[0], ask.message, message)
        if self.attack.colludes or not scene.kinds & self.attack.fits:
            return message
        return self._carried(self.attack.alter(message, scene, own))

    def crafted(self, ask: Ask, client: int, sent: Message, message: Message, cohort: Cohort) -> Message:
        """Return what a colluding attacker sends instead of its honest reply to ``sent``."""
        scene = self._scene(ask, client, sent, message)
        if not scene.kinds & self.attack.fits:
            return message
        return self._carried(self.attack.craft(message, cohort, scene))

    def named(self, clients: tuple[int, ...]) -> dict[str, list[int]]:
        """Return the attackers among some clients, for a record; nothing where the study has none."""
        return {"attackers": [who for who in clients if who in self.who]} if self.who else {}

    def _scene(self, ask: Ask, client: int, sent: Message, message: Message) -> Scene:
        votes = message.mask is not None and not same(message.mask, sent.mask)
        kinds = kinds_of(ask.phase, specs_of(message.tensors), self.setting, plain=ask.plain, votes=votes)
        return Scene(ask.phase, ask.round, client, self.setting, sent, kinds)

    def _carried(self, message: Message) -> Message:
        """Return a message whose values the wire's format carries: larger ones are the largest that it does."""
        most = LARGEST[self.wire.values]
        nan = most if self.wire.values == "int8" else math.nan
        values = {name: x.nan_to_num(nan, most, -most).clamp(-most, most) for name, x in floats(message).items()}
        return with_tensors(message, values)


def check(study: Study, method: Method, setting: Setting, shards: Shards, weights: Tensors) -> None:
    """Refuse a study whose attack cannot be played; called before any client is asked.

    Args:
        study: the study.
        method: its method.
        setting: the federation.
        shards: the rows of its clients.
        weights: theta_0.

    Raises:
        ConfigError: the run is no simulation, the attack changes nothing of what the method's clients send, or
            it cannot be played on what is learnt.
    """
    attackers = Attackers.of(study, setting)
    if not attackers.who:
        return
    if shards.empty:
        raise ConfigError(f"attack = {study.attack}: attacks are played in simulations, and these clients are real")
    attackers.attack.check(setting, tasks.find(shards.task))
    sent = frozenset(_sent(study, method, setting, weights))
    if not sent & attackers.attack.fits:
        raise ConfigError(
            f"attack = {study.attack}: it changes {listing(attackers.attack.fits)}, and clients of {study.method} send "
            f"{listing(sent)}"
        )


def check_engine(attackers: Attackers, engine: object) -> None:
    """Refuse colluding attackers below relays, which add replies up before anybody sees two of them.

    Raises:
        ConfigError: so it is.
    """
    if attackers.collude and isinstance(engine, Relaying):
        raise ConfigError(
            f"attack {type(attackers.attack).__name__}: its attackers see each other's replies, which relays add up; "
            "set relays=0"
        )


def _sent(study: Study, method: Method, setting: Setting, weights: Tensors) -> Iterator[Kind]:
    """Yield what a method's clients send: in its first exchange, in training, and in votes that come later."""
    state: State = method.start(setting, weights, {})
    # a method that refines can plan nothing before the server has trained
    ask = None if method.refines else method.plan(state)
    if ask is not None:
        votes = ask.phase == TRAIN and ask.expects.mask in {"optional", "required"}
        yield from kinds_of(ask.phase, ask.expects.tensors, setting, plain=ask.plain, votes=votes)
    if method.trains_weights or ask is None:
        yield "weights" if method.trains_weights else "scores"
    if isinstance(method, Composition) and method.consensus.ballot:
        due = any(method.schedule.due(done, study.rounds) for done in range(1, study.rounds + 1))
        if due:
            yield "votes"
