"""Models: the networks of the papers or your own ``module:factory``, with seeded initial weights.

A factory is called as ``factory(input_shape, outputs, **options)``: the shape of one input without the batch
dimension, the number of classes (or 1 for regression).
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError, SecateurError, unknown
from secateur.models import graph, tabular, text, vision
from secateur.models.memory_format import keep_channels_first, takes_channels_last
from secateur.streams import global_stream

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
        ModelError: the model is unknown, its options do not fit, or it cannot take such inputs.
    """
    factory = _find(name)
    options = dict(options or {})
    _check_options(name, factory, options)
    with global_stream(seed, "init"):
        try:
            model = _module(name, factory(input_shape, outputs, **options))
            initialise(model, init)
            _try(model, input_shape, outputs, tokens=tokens)
            own_image = ":" in name and not tokens and len(input_shape) == _IMAGE
            keep_channels_first(model, everywhere=own_image and not takes_channels_last(model, input_shape))
            _find_constants(model, input_shape, tokens=tokens)
        except SecateurError:
            raise
        except Exception as broken:  # a factory may be anyone's code
            raise ModelError(f"model {name!r} cannot take inputs of shape {input_shape}: {_line(broken)}") from broken
    return model


def initialise(model: nn.Module, scheme: str) -> None:
    """Set initial weights in place, from torch's global generator.

    ``xavier_normal`` (gain 1; AutoFLIP), ``xavier_uniform`` (Glorot uniform; FedSparsify) and
    ``kaiming_normal`` (for ReLU) set the weights of convolutions and linear layers and zero their biases;
    LSTM, embedding and normalisation keep torch's defaults. ``torch`` changes nothing.

    A layer with the attribute ``keep_bias = True`` keeps the bias that its model gave it. A frozen parameter, one that
    needs no gradient, keeps what its model gave it, whatever the scheme.

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
            if module.weight.requires_grad:
                schemes[scheme](module.weight)
            bias = module.bias
            if bias is not None and bias.requires_grad and not getattr(module, "keep_bias", False):
                nn.init.zeros_(bias)


def _find(name: str) -> Factory:
    if ":" not in name:
        if name not in _factories():
            raise unknown("model", name, _factories(), error=ModelError)
        return _factories()[name]
    module, _, attribute = name.partition(":")
    if not attribute or not all(part.isidentifier() for part in module.split(".")):
        raise ModelError(f"model {name!r}: give your own model as module:factory, for example my_models:net")
    try:
        factory: Factory = getattr(importlib.import_module(module), attribute)
    except SecateurError:
        raise
    except (ImportError, AttributeError) as broken:
        raise ModelError(f"model {name!r}: {broken}; give it as module:factory") from broken
    except Exception as broken:  # importing runs anyone's code
        raise ModelError(f"model {name!r}: importing {module} failed: {_line(broken)}") from broken
    if not callable(factory):
        raise ModelError(f"model {name!r}: {attribute} is not callable")
    return factory


def _module(name: str, made: object) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise ModelError(f"model {name!r}: the factory returned {type(made).__name__}, not a torch.nn.Module")
    return made


def _check_options(name: str, factory: Factory, options: Mapping[str, Any]) -> None:
    try:
        accepted = inspect.signature(factory).parameters
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


def _try(model: nn.Module, input_shape: tuple[int, ...], outputs: int, *, tokens: bool) -> None:
    dtype = torch.long if tokens else torch.float32
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model(torch.zeros((2, *input_shape), dtype=dtype))
    model.train(was_training)
    if not isinstance(output, torch.Tensor):
        raise ModelError(f"the model returns {type(output).__name__}, a tensor of logits is expected")
    if tuple(output.shape) != (2, outputs):
        raise ModelError(f"the model returns shape {tuple(output.shape)} for a batch of 2, (2, {outputs}) is expected")


def _find_constants(model: nn.Module, input_shape: tuple[int, ...], *, tokens: bool) -> None:
    """Name the buffers that training leaves alone in their modules' attribute ``constant_buffers``.

    A buffer is constant where a step of training with random inputs leaves its bits. Those of torch's norm layers never
    are, and those of a module that has the attribute already are what it says.
    """
    norms = (nn.modules.batchnorm._NormBase,)  # noqa: SLF001 -- torch's own base class
    owners = {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, norms) and not hasattr(module, "constant_buffers")
        and any(b is not None and b.is_floating_point() for b in module._buffers.values())  # noqa: SLF001 -- its own
    }  # fmt: skip
    if not owners:
        return
    trial = copy.deepcopy(model).train()
    x = torch.randint(0, 2, (2, *input_shape)) if tokens else torch.randn(2, *input_shape)
    output = trial(x)
    if output.requires_grad:
        output.sum().backward()
    for name, module in owners.items():
        after = dict(trial.get_submodule(name).named_buffers(recurse=False))
        before = module.named_buffers(recurse=False)
        module.constant_buffers = frozenset(n for n, b in before if _same_bits(b, after[n]))


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (one, other)))
