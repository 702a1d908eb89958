"""Models: the networks of the papers or your own ``module:factory``, with seeded initial weights.

A factory is called as ``factory(input_shape, outputs, **options)``: the shape of one input without the batch
dimension, the number of classes (or 1 for regression).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from secateur.errors import ModelError, SecateurError, unknown
from secateur.models import graph, held, tabular, text, trial, vision
from secateur.models.memory_format import keep_channels_first, takes_channels_last
from secateur.streams import global_streams

Factory = Callable[..., nn.Module]
_IMAGE = 3  # dimensions: channels, height, width


@dataclass(frozen=True)
class ModelInfo:
    """A built-in model: its name, one line on it, and its paper."""

    name: str
    summary: str
    reference: str


def _factories() -> dict[str, type[nn.Module]]:
    return {
        name.lower(): cls
        for module in (vision, text, tabular, graph)
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, nn.Module) and cls.__module__ == module.__name__ and not name.startswith("_")
    }


def names() -> dict[str, ModelInfo]:
    """Return the built-in models by name, in lower case."""
    found = {}
    for name, cls in sorted(_factories().items()):
        doc = inspect.cleandoc(cls.__doc__ or "")
        reference = " ".join(doc.partition("Reference: ")[2].split())
        found[name] = ModelInfo(name, doc.partition("\n")[0], reference)
    return found


def build(
    name: str, *, input_shape: tuple[int, ...], outputs: int, init: str = "xavier_normal", seed: int = 0,
    options: Mapping[str, Any] | None = None, tokens: bool = False,
) -> nn.Module:  # fmt: skip
    """Return a model with its seeded initial weights, after one trial forward pass.

    Args:
        name: a built-in name, or ``module:factory``.
        input_shape: the shape of one input without the batch dimension.
        outputs: number of classes, or 1 for regression.
        init: the initialisation, see ``initialise``.
        seed: the seed of the initial weights.
        options: keyword arguments of the factory.
        tokens: whether inputs are integers.

    Raises:
        ModelError: the model is unknown, its options do not fit, it cannot take such inputs, or its parameters cannot
            be trained and exchanged; see ``trial``.
    """
    made_by = find(name)
    options = dict(options or {})
    _check_options(name, made_by, options)
    with global_streams(seed, "init"):
        try:
            model = _module(name, made_by(input_shape, outputs, **options))
            trial.check_eager(model)
            trial.take_shapes(model, input_shape, tokens=tokens)
            trial.check_parameters(model)
            initialise(model, init)
            trial.check_outputs(model, input_shape, outputs, tokens=tokens)
            own_image = ":" in name and not tokens and len(input_shape) == _IMAGE
            keep_channels_first(model, everywhere=own_image and not takes_channels_last(model, input_shape))
            trial.note_constants(model, input_shape, tokens=tokens)
            trial.note_weights(model, input_shape, tokens=tokens)
        except SecateurError:
            raise
        except Exception as broken:  # a factory may be anyone's code
            raise ModelError(
                f"model {name!r} cannot take inputs of shape {input_shape}: {_line(broken)}{trial.reached(broken)}"
            ) from broken
    return model


def initialise(model: nn.Module, scheme: str) -> None:
    """Set initial weights in place, from torch's global generator.

    ``xavier_normal`` (gain 1; AutoFLIP), ``xavier_uniform`` (Glorot uniform; FedSparsify) and
    ``kaiming_normal`` (for ReLU) set the weights of convolutions and linear layers and zero their biases;
    LSTM, embedding and normalisation keep torch's defaults. ``torch`` changes nothing.

    A layer with the attribute ``keep_bias = True`` keeps the bias that its model gave it. A frozen parameter, one that
    needs no gradient, keeps what its model gave it, whatever the scheme, and so does a weight that a parametrisation
    computes from others.

    Reference: Glorot and Bengio, AISTATS 2010 (xavier); He et al., arXiv 1502.01852 (kaiming).
    """
    schemes: dict[str, Callable[[torch.Tensor], object]] = {
        "xavier_normal": nn.init.xavier_normal_,
        "xavier_uniform": nn.init.xavier_uniform_,
        "kaiming_normal": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
    }
    if scheme == "torch":
        return
    if scheme not in schemes:
        raise unknown("initialisation", scheme, [*schemes, "torch"], error=ModelError)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):  # noqa: SLF001 -- torch's own base class
            if isinstance(module.weight, nn.Parameter) and module.weight.requires_grad:
                schemes[scheme](module.weight)
            bias = module.bias
            if bias is not None and bias.requires_grad and not getattr(module, "keep_bias", False):
                nn.init.zeros_(bias)


def find(name: str) -> Factory:
    """Return what makes a model, of a name of ``names`` or of anyone's own ``module:factory``.

    Raises:
        ModelError: there is no such model, or its module cannot be imported.
    """
    if ":" not in name:
        if name not in _factories():
            raise unknown("model", name, _factories(), error=ModelError)
        return _factories()[name]
    if name.startswith(f"{held.NAME}:"):
        return cast("Factory", held.find(name))
    module, _, attribute = name.partition(":")
    if not attribute or not all(part.isidentifier() for part in module.split(".")):
        raise ModelError(f"model {name!r}: give your own model as module:factory, for example my_models:net")
    try:
        found: Factory = getattr(importlib.import_module(module), attribute)
    except SecateurError:
        raise
    except (ImportError, AttributeError) as broken:
        raise ModelError(f"model {name!r}: {broken}; give it as module:factory") from broken
    except Exception as broken:  # importing runs anyone's code
        raise ModelError(f"model {name!r}: importing {module} failed: {_line(broken)}") from broken
    if not callable(found):
        raise ModelError(f"model {name!r}: {attribute} is not callable")
    return found


def _module(name: str, made: object) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise ModelError(f"model {name!r}: the factory returned {type(made).__name__}, not a torch.nn.Module")
    return made


def _check_options(name: str, made_by: Factory, options: Mapping[str, Any]) -> None:
    try:
        accepted = inspect.signature(made_by).parameters
    except ValueError:  # a factory written in C has none; calling it will tell
        return
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return
    known = list(accepted)[2:]
    for option in options:
        if option not in known:
            raise unknown(f"option of model {name}", option, known, error=ModelError)


def _line(broken: Exception) -> str:
    return f"{type(broken).__name__}: {' '.join(str(broken).split())}"
