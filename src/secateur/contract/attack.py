"""Attacks: what chosen clients of a simulation send instead of their honest replies, to try a federation's defences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch

from secateur.contract.ask import TRAIN
from secateur.contract.state import Setting
from secateur.errors import ConfigError
from secateur.learning.task import Data, Task
from secateur.pruning.mask import Tensors, apply
from secateur.pruning.ranking import planes
from secateur.streams import stream
from secateur.wire.message import Message, Spec

Kind = Literal["weights", "scores", "ranks", "bits", "statistics", "votes"]
"""What a reply brings: trained ``weights``; what is learnt in their place, as float ``scores``, as ``ranks`` of edges
or as ``bits`` and other whole numbers; ``statistics`` of another phase than training; ``votes``, masks of clients' own.
"""

Made = TypeVar("Made")
Cast = Mapping[str, torch.Tensor]
FLOATS: frozenset[Kind] = frozenset({"weights", "scores", "statistics"})
EVERY: frozenset[Kind] = FLOATS | {"ranks", "bits", "votes"}


@dataclass(frozen=True)
class Scene:
    """What an attacker knows of the exchange that it answers in.

    Attributes:
        phase, round: those of the ask.
        client: the attacker.
        setting: the federation.
        sent: the request, as the attacker read it.
        kinds: what its honest reply brings.
    """

    phase: str
    round: int
    client: int
    setting: Setting
    sent: Message
    kinds: frozenset[Kind]

    @property
    def base(self) -> Tensors:
        """Return the tensors that training began from, by name; empty where the reply is a statistic."""
        return self.sent.tensors if self.phase == TRAIN else {}

    def generator(self) -> torch.Generator:
        """Return the random stream of this attacker in this exchange."""
        return stream(self.setting.seed, "attack", self.phase, self.round, self.client)


@dataclass(frozen=True)
class Cohort:
    """What colluding attackers see of an exchange, in the order of its clients.

    Attributes:
        honest: the messages that arrived from honest clients.
        own: what the attackers would send if they were honest.
    """

    honest: Sequence[Message]
    own: Sequence[Message]
    _made: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """Return what ``make`` returns, made once for all attackers of the exchange."""
        if name not in self._made:
            self._made[name] = make()
        found: Made = self._made[name]
        return found

    def seen(self, knows: Literal["all", "own"]) -> Sequence[Message]:
        """Return the messages that an attack uses.

        These are the honest clients', or only the attackers' own if the attack knows no others, or there are none.
        """
        return self.honest if knows == "all" and self.honest else self.own


class Attack:
    """Base of attacks, which are frozen dataclasses, one a file.

    An attacker is asked and works as any client, on ``poison``'s rows. Then it sends what ``alter`` makes of its honest
    reply. Where ``colludes`` is True it sends what ``craft`` makes of the messages of the whole exchange, once all
    others have answered. Attackers pass no guard on their own side.

    Attributes:
        fits: the kinds of replies that the attack changes.
        colludes: whether attackers use each other's replies, or those of honest clients.
    """

    fits: ClassVar[frozenset[Kind]] = EVERY
    colludes: ClassVar[bool] = False

    def check(self, setting: Setting, task: Task) -> None:
        """Refuse a model or a task that the attack cannot be played on; called before any client is asked.

        Raises:
            ConfigError: the text says what does not fit.
        """

    def poison(self, data: Data, classes: int) -> Data:
        """Return the rows that an attacker trains on instead of its own.

        Args:
            data: its own rows.
            classes: the number of the model's outputs.
        """
        del classes
        return data

    def alter(self, message: Message, scene: Scene, memory: dict[str, torch.Tensor]) -> Message:
        """Return what an attacker sends instead of its honest reply.

        Args:
            message: the honest reply.
            scene: the exchange.
            memory: tensors that the attacker keeps between rounds, changed in place.
        """
        del scene, memory
        return message

    def craft(self, message: Message, cohort: Cohort, scene: Scene) -> Message:
        """Return what a colluding attacker sends instead of ``message``, its honest reply."""
        del cohort, scene
        return message


def kinds_of(phase: str, specs: Mapping[str, Spec], setting: Setting, *, plain: bool, votes: bool) -> frozenset[Kind]:
    """Return what replies of some tensors bring.

    Args:
        phase: the ask's.
        specs: shape and dtype of the reply's tensors.
        setting: the federation.
        plain: whether something else than weights is trained.
        votes: whether the reply has a mask of the client's own.
    """
    found: set[Kind] = {"votes"} if votes else set()
    floats = any(spec.dtype == torch.float32 for spec in specs.values())
    ranked = planes({name: setting.specs[name].shape for name in setting.layout.names("weight")})
    if phase != TRAIN:
        found |= {"statistics"} if floats else set()
    elif not plain:
        found.add("weights")
    elif specs and {name: spec.shape for name, spec in specs.items()} == ranked:
        found.add("ranks")
    else:
        found.add("scores" if floats else "bits")
    return frozenset(found)


def floats(message: Message) -> dict[str, torch.Tensor]:
    """Return the float tensors of a message, by name."""
    return {name: tensor for name, tensor in message.tensors.items() if tensor.dtype == torch.float32}


def change(message: Message, scene: Scene) -> dict[str, torch.Tensor]:
    """Return how far a message's float tensors are from those that training began from; a statistic itself."""
    base = scene.base
    return {
        name: tensor - base[name] if name in base and base[name].shape == tensor.shape else tensor
        for name, tensor in floats(message).items()
    }


def changed(message: Message, changes: Cast, scene: Scene) -> Message:
    """Return the message with other changes, under its own mask; see ``change``."""
    base = scene.base
    tensors = {
        name: base[name] + move if name in base and base[name].shape == move.shape else move
        for name, move in changes.items()
    }
    return with_tensors(message, tensors)


def with_tensors(message: Message, tensors: Tensors) -> Message:
    """Return the message with some of its tensors replaced, under its own mask."""
    return replace(message, tensors=apply({**message.tensors, **tensors}, message.mask))


def within(name: str, value: float, *, least: float = 0.0) -> None:
    """Refuse an option below its least value.

    Raises:
        ConfigError: it is below, or no finite number.
    """
    if not least <= value < float("inf"):
        raise ConfigError(f"{name} = {value!r} must be a finite number of at least {least:g}")


def listing(kinds: Iterable[Kind]) -> str:
    """Return kinds in words, sorted."""
    return ", ".join(sorted(kinds)) or "nothing"
