"""Models that are objects of this process: a study names one as ``memory:CLASS-DIGEST``, and whoever holds it finds it.

Nothing of them is written but weights: worker processes are forked from the one that holds them, or it serves itself.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.errors import ModelError
from secateur.models.fingerprint import digest
from secateur.models.trial import copied

NAME = "memory"


@dataclass(frozen=True, eq=False)
class HeldModel:
    """A model, or a factory of models, that is found by its name for as long as somebody keeps this object.

    Attributes:
        name: ``memory:CLASS-DIGEST``.
        make: called as ``make(input_shape, outputs, **options)``, as any factory is.
        whole: whether it is one model with weights of its own, rather than a factory.
    """

    name: str
    make: Callable[..., object]
    whole: bool


_HELD: weakref.WeakValueDictionary[str, HeldModel] = weakref.WeakValueDictionary()


def hold(given: object) -> HeldModel:
    """Hold a copy of a model, or a factory.

    Args:
        given: a module, which stays as it is; a class or a function that takes no arguments, or (input_shape, outputs)
            and options.

    Raises:
        ModelError: it is neither, or a model that cannot be copied.
    """
    if isinstance(given, nn.Module):
        kept = copied(given)

        def make(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
            del input_shape, outputs
            return copied(kept)

        held = HeldModel(f"{NAME}:{type(given).__name__}-{digest(given)}", make, whole=True)
    elif callable(given):
        label = getattr(given, "__name__", type(given).__name__).strip("<>")
        make_any = _without_arguments(given) if _takes_nothing(given) else given
        held = HeldModel(f"{NAME}:{label}-{digest(given)}", make_any, whole=False)
    else:
        raise ModelError(
            f"model is a {type(given).__name__}: give a torch.nn.Module, a class or function that makes one, or a name "
            "of secateur list"
        )
    return _HELD.setdefault(held.name, held)


def find(name: str) -> Callable[..., object]:
    """Return the factory of a held model.

    Raises:
        ModelError: this process does not hold it.
    """
    held = _HELD.get(name)
    if held is None:
        raise ModelError(
            f"model {name!r} was an object of the Python process that ran it, which alone can build it: "
            "call .export() or .slim() of its result there, or secateur.run again with the same objects and out=FOLDER"
        )
    return held.make


def _takes_nothing(given: Callable[..., Any]) -> bool:
    """Return whether a factory can be called without arguments."""
    try:
        accepted = inspect.signature(given).parameters.values()
    except ValueError:  # written in C
        return False
    return all(one.default is not one.empty or one.kind in {one.VAR_POSITIONAL, one.VAR_KEYWORD} for one in accepted)


def _without_arguments(given: Callable[..., Any]) -> Callable[..., object]:
    def make(input_shape: tuple[int, ...], outputs: int, **options: object) -> object:
        del input_shape, outputs
        return given(**options)

    return make
