"""How a study says what its attackers do: ``name[:share][,parameter=value...]``, such as ``alie:0.3,z=1.5``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from secateur import attacks
from secateur.contract.attack import Attack
from secateur.errors import ConfigError, check
from secateur.streams import stream
from secateur.study.options import build, flatten

SHARE = 0.2
"""The share of clients that attack where a study does not say it."""


@dataclass(frozen=True)
class Hostile:
    """The attack of a study, and the share of its clients that play it.

    Attributes:
        attack: what they do.
        share: of all clients, rounded to whole ones.
        name: the attack's name, or the module of anyone's own.
    """

    attack: Attack
    share: float
    name: str

    @classmethod
    def parse(cls, text: str) -> Hostile:
        """Return what a text says.

        Raises:
            ConfigError: there is no such attack or parameter, or a value is out of bounds; the text names it.
        """
        head, *settings = text.split(",")
        name, colon, share = head.partition(":")
        options: dict[str, str] = {}
        for setting in settings:
            parameter, equals, value = setting.partition("=")
            if not equals or not parameter.strip():
                raise ConfigError(f"attack {text!r}: write {setting!r} as parameter=value, for example alie:0.3,z=1.5")
            options[parameter.strip()] = value.strip()
        try:
            part = float(share) if colon else SHARE
        except ValueError:
            raise ConfigError(f"attack {text!r}: the share {share!r} is no number; write it as alie:0.3") from None
        check(0 < part <= 1, name=f"attack {text!r}: share", value=part, must="be above 0 and at most 1")
        kind = attacks.find(name.strip())
        try:
            return cls(build(kind, options), part, name.strip())
        except ConfigError as broken:
            raise ConfigError(f"attack {text!r}: {broken}") from broken

    def __str__(self) -> str:
        """Return the whole text, with every parameter, so that defaults may change later."""
        options = "".join(f",{name}={value}" for name, value in flatten(self.attack).items())
        return f"{self.name}:{self.share:g}{options}"

    def who(self, seed: int, clients: int) -> frozenset[int]:
        """Return the attackers: the first of an order of all clients that is the same for every study of a seed.

        Raises:
            ConfigError: the share of so few clients is nobody.
        """
        count = round(self.share * clients)
        if not count:
            raise ConfigError(f"attack {self}: {self.share:g} of {clients} clients is nobody; raise the share")
        return frozenset(torch.randperm(clients, generator=stream(seed, "attackers"))[:count].tolist())
