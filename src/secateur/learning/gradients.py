"""Statistics of each weight from gradients over a few batches; pruning criteria score weights by them."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.learning.loop import Fit, normalises
from secateur.learning.loop import batches as split
from secateur.learning.optimiser import Training
from secateur.learning.task import Data
from secateur.pruning.criteria import Form
from secateur.pruning.roles import roles, stored
from secateur.streams import Turn, global_stream


def gradient_statistic(
    model: nn.Module, data: Data, training: Training, form: Form, turn: Turn, *, batches: int = 1
) -> tuple[dict[str, torch.Tensor], Fit]:
    """Return one statistic of every trained parameter, the mean over some batches, and what was done; train nothing.

    The forms: ``gradient`` g, ``square`` g^2, ``saliency`` |w g|, ``curvature`` H g (the Hessian times the gradient),
    and ``flow``, which needs no data: |w| dR/d|w|, R the sum of outputs for an input of ones through |w|, divided by
    its largest entry.

    Args:
        model: the resident model, at the weights to measure.
        data: the client's rows.
        training: its ``batch_size`` is that of the batches.
        form: which statistic.
        turn: the key of the draws: batches are drawn without replacement, and dropout.
        batches: the number of batches; all rows if there are fewer.

    Returns:
        Tensors with the names and shapes of the trained parameters, and a ``Fit`` whose rows are weighed by the work of
        a training row: a row counts twice for ``curvature``, which has two backward passes; ``flow`` counts one in all.

    Reference: SNIP, Lee et al., arXiv 1810.02340; GraSP, Wang et al., arXiv 2002.07376; SynFlow, Tanaka et al.,
    arXiv 2006.05467.
    """
    if form == "flow":
        return _flow(model, data), Fit(len(data), 1, 0, 0, 0.0)
    shuffle = torch.Generator().manual_seed(turn.derive("gradients"))
    order = torch.randperm(len(data), generator=shuffle)
    chosen = split(order, training.batch_size, paired=normalises(model), most=batches)
    sums = {name: torch.zeros_like(p) for name, p in _trained(model).items()}
    total, rows = 0.0, sum(len(index) for index in chosen)
    model.train()
    with global_stream(turn.seed, "dropout", turn.round, turn.client):
        for index in chosen:
            x, y = data.batch(index)
            loss = data.task.loss(model(x), y)
            total += loss.item() * len(index)
            for name, part in _of_batch(model, loss, form).items():
                sums[name] += part
    mean = {name: held.detach() / max(1, len(chosen)) for name, held in sums.items()}
    passes = 2 if form == "curvature" else 1
    return mean, Fit(len(data), passes * rows, 0, 0, total / max(1, rows))


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _of_batch(model: nn.Module, loss: torch.Tensor, form: Form) -> dict[str, torch.Tensor]:
    parameters = _trained(model)
    gradients = _gradient(loss, parameters, again=form == "curvature")
    if form == "square":
        return {name: g.square() for name, g in gradients.items()}
    if form == "saliency":
        return {name: (parameters[name].detach() * g).abs() for name, g in gradients.items()}
    if form == "curvature":
        inner = torch.stack([(g * g.detach()).sum() for g in gradients.values() if g.requires_grad]).sum()
        return _gradient(inner, parameters)
    return gradients


def _gradient(
    value: torch.Tensor, parameters: dict[str, nn.Parameter], *, again: bool = False
) -> dict[str, torch.Tensor]:
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, create_graph=again)
    pairs = zip(parameters.items(), gradients, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


def _flow(model: nn.Module, data: Data) -> dict[str, torch.Tensor]:
    """Return the flow divided by its largest entry; computed in float64, so that deep networks do not overflow.

    A model that casts to a type of its own choice cannot run in float64, and is run as it is.

    Raises:
        ModelError: the flow is not finite, in the type that the model chose.
    """
    x, _ = data.batch(slice(0, 1))
    try:
        flows = _flows(copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x)
    except RuntimeError:
        flows = _flows(copy.deepcopy(model), x)
    largest = max((float(flow.max()) for flow in flows.values() if flow.numel()), default=0.0) or 1.0
    if not math.isfinite(largest):
        raise ModelError("the flow through this model overflows float32, and its forward refuses float64: do not cast")
    return {name: (flows[name] / largest).to(p.dtype) for name, p in _trained(model).items()}


def _flows(twin: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    constant = {name for name, role in roles(twin).items() if role == "constant"}  # a mask's -inf must stay
    with torch.no_grad():
        for name, tensor in stored(twin).items():
            if tensor.is_floating_point() and name not in constant:
                tensor.abs_()
    parameters = _trained(twin)
    ones = x.new_ones((1, *x.shape[1:]))  # a server has no rows of its own
    slopes = _gradient(twin.eval()(ones).sum(), parameters)
    return {name: p.detach() * slopes[name] for name, p in parameters.items()}
