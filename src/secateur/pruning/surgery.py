"""Surgery: units are removed from a model by a plan; the result is a smaller model of plain torch modules."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import singledispatch
from typing import Any, cast

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.pruning.attention import PROJECTIONS, SlimMultiheadAttention
from secateur.pruning.forwards import Site, graph_of, resize
from secateur.pruning.mask import Tensors
from secateur.pruning.roles import stored
from secateur.pruning.structure import Cut, Number, Plan, slim


class SlimGroupNorm(nn.Module):
    """Group normalisation of the kept channels of a layer, as if the removed ones were present and zero.

    Mean and variance of a group count its removed channels as zeros, so that the result is that of the masked dense
    layer. Groups may keep different numbers of channels.

    Shapes: (batch, kept channels, ...) to the same.
    """

    eps: float
    num_groups: int
    num_channels: int
    kept: tuple[int, ...]
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, norm: nn.GroupNorm | SlimGroupNorm, kept: Sequence[int]) -> None:
        """Make the layer for the ``kept`` channels (indices) of ``norm``, with its affine parameters for them."""
        super().__init__()
        index = torch.tensor(kept)
        self.kept: tuple[int, ...] = (
            tuple(norm.kept[k] for k in kept) if isinstance(norm, SlimGroupNorm) else tuple(kept)
        )
        self.eps, self.num_groups, self.num_channels = norm.eps, norm.num_groups, norm.num_channels
        self.weight = nn.Parameter(norm.weight.detach()[index].clone())
        self.bias = nn.Parameter(norm.bias.detach()[index].clone())
        each = self.num_channels // self.num_groups
        member = nn.functional.one_hot(torch.tensor(self.kept) // each, self.num_groups).to(norm.weight.dtype)
        self.register_buffer("member", member, persistent=False)
        self.share = 1 / each

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised input; training has a backward pass of its own, much faster than autograd's."""
        member = cast("torch.Tensor", self.member)
        rows = x.reshape(x.size(0), len(self.kept), -1)
        if self.training:
            normed: torch.Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
                rows, self.weight, self.bias, member, self.share, self.eps
            )[0]
            return normed.view_as(x)
        scale, shift, _, _ = _affine(rows, self.weight, self.bias, member, self.share, self.eps)
        return torch.addcmul(shift.unsqueeze(2), rows, scale.unsqueeze(2)).view_as(x)


def _affine(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, member: torch.Tensor, share: float, eps: float
) -> tuple[torch.Tensor, ...]:
    """Return scale and shift of each row and channel, and mean and 1/deviation, from sums over the dense group."""
    mean = share * (rows.mean(2) @ member)
    square = share * ((torch.linalg.vector_norm(rows, dim=2).square() / rows.size(2)) @ member)
    inverse = torch.rsqrt((square - mean * mean).clamp(min=0) + eps) @ member.T
    mean = mean @ member.T
    scale = weight * inverse
    return scale, bias - mean * scale, mean, inverse


class _Normalise(torch.autograd.Function):
    """The function of ``SlimGroupNorm`` with an explicit gradient.

    With P = sum dy x and Q = sum dy for each row and channel, and N entries in a dense group:
    dx = scale dy - inverse (A + B x^), A = sum_group weight Q / N, B = sum_group weight (P - mean Q) inverse / N.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, member: torch.Tensor, share: float, eps: float
    ) -> tuple[torch.Tensor, ...]:
        scale, shift, mean, inverse = _affine(rows, weight, bias, member, share, eps)
        return torch.addcmul(shift.unsqueeze(2), rows, scale.unsqueeze(2)), scale, mean, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        rows, weight, _, member, share, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(rows, weight, member, *output[1:])
        ctx.share = share

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, *_: torch.Tensor) -> Any:
        rows, weight, member, scale, mean, inverse = ctx.saved_tensors
        q = dy.sum(2)
        aligned = ((dy * rows).sum(2) - mean * q) * inverse
        count = ctx.share / rows.size(2)
        a = count * ((weight * q) @ member) @ member.T
        b = count * ((weight * aligned) @ member) @ member.T
        slope = -b * inverse * inverse
        dx = torch.addcmul((-a * inverse - slope * mean).unsqueeze(2), rows, slope.unsqueeze(2))
        return torch.addcmul(dx, dy, scale.unsqueeze(2)), aligned.sum(0), q.sum(0), None, None, None


def shrink(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` without the units and blocks that the plan removes.

    Names in the state dict stay; tensors of dropped blocks are gone.

    Raises:
        ModelError: the plan is for another model.
    """
    model = copy.deepcopy(model)
    smaller = slim({n: t.detach() for n, t in stored(model).items()}, plan)
    for block in plan.dropped:
        owner = _submodule(model, block.rpartition(".")[0])
        setattr(owner, block.rpartition(".")[2], nn.Identity())
    for name in dict.fromkeys(cut.tensor.rpartition(".")[0] for cut in plan.cuts):
        module = _submodule(model, name)
        if isinstance(module, (nn.GroupNorm, SlimGroupNorm, nn.MultiheadAttention, SlimMultiheadAttention)):
            owner = _submodule(model, name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], _replaced(name, module, plan, smaller))
            continue
        for tensor in dict.fromkeys(cut.tensor for cut in plan.cuts if cut.tensor.rpartition(".")[0] == name):
            _replace(model, module, tensor.rpartition(".")[2], smaller[tensor])
        _resize(module)
    for number in plan.numbers:
        _recount(model, number)
    for encoder in (module for module in model.modules() if isinstance(module, nn.TransformerEncoder)):
        if any(isinstance(module, SlimMultiheadAttention) for module in encoder.modules()):
            encoder.use_nested_tensor = False  # only torch's own attention takes rows of different lengths
    calls: dict[str, list[Cut]] = {}
    for cut in plan.calls:
        calls.setdefault(Site.parse(cut.tensor).module, []).append(cut)
    for name, cuts in calls.items():
        resize(_submodule(model, name), cuts)
    return model


def _replace(model: nn.Module, module: nn.Module, part: str, value: torch.Tensor) -> None:
    """Put a smaller tensor in the place of a module's tensor, and of every other that it is tied to."""
    old = getattr(module, part)
    if not isinstance(old, nn.Parameter):
        setattr(module, part, value)
        return
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    for other in model.modules():
        tied = [name for name, parameter in other.named_parameters(recurse=False) if parameter is old]
        for name in tied:
            setattr(other, name, new)
        if tied and other is not module:
            _resize(other)


def _recount(model: nn.Module, number: Number) -> None:
    """Set an attribute that counts units to the number of those that are left."""
    owner, _, attribute = number.attribute.rpartition(".")
    module = _submodule(model, owner)
    if getattr(module, attribute, None) != number.size:
        raise ModelError(f"structural plan sets {number.attribute!r} from {number.size}: the model has another number")
    setattr(module, attribute, number.left)


def plain(model: nn.Module) -> nn.Module:
    """Return the model as a graph of torch's own layers and calls, without classes of this package.

    It is in evaluation mode; names and weights stay. A model that cannot be traced is returned unchanged.
    """
    model = copy.deepcopy(model).eval()
    try:
        traced = graph_of(model)
    except Exception:  # noqa: BLE001 -- fx raises whatever the model's own forward raises on a proxy
        return model
    for hook in model._forward_pre_hooks.values():  # noqa: SLF001 -- a trace does not see those of the model itself
        traced.register_forward_pre_hook(hook)
    return traced


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as absent:
        raise ModelError(f"structural plan names {name!r}, which the model does not have") from absent


def _replaced(name: str, module: nn.Module, plan: Plan, smaller: Tensors) -> nn.Module:
    """Return the layer that stands for one whose torch class cannot lose units."""
    if isinstance(module, (nn.MultiheadAttention, SlimMultiheadAttention)):
        own = {part: smaller[f"{name}.{part}"] for part in PROJECTIONS if f"{name}.{part}" in smaller}
        of_heads = next((cut for part in own for cut in plan.of(f"{name}.{part}") if cut.dim == 0), None)
        return SlimMultiheadAttention(module, of_heads, own)
    return _group_norm(cast("nn.GroupNorm", module), plan.of(f"{name}.weight")[0].kept)


def _group_norm(norm: nn.GroupNorm | SlimGroupNorm, kept: Sequence[int]) -> nn.Module:
    """Return torch's own layer, which is faster, if only whole groups are removed."""
    each = norm.num_channels // norm.num_groups
    groups = sorted({k // each for k in kept})
    if isinstance(norm, SlimGroupNorm) or len(kept) < each * len(groups):
        return SlimGroupNorm(norm, kept)
    whole = nn.GroupNorm(len(groups), len(kept), eps=norm.eps).to(norm.weight)
    index = torch.tensor(kept)
    with torch.no_grad():
        whole.weight.copy_(norm.weight[index])
        whole.bias.copy_(norm.bias[index])
    return whole


@singledispatch
def _resize(module: nn.Module) -> None:
    """Update the sizes that a layer stores to those of its parameters."""
    if type(module).__module__.startswith("torch.nn.modules"):
        raise ModelError(f"structural plan cuts a {type(module).__name__}, which secateur cannot resize")


@_resize.register
def _(module: nn.Linear) -> None:
    module.out_features, module.in_features = module.weight.shape


@_resize.register(nn.modules.conv._ConvNd)  # noqa: SLF001 -- torch's own base class
def _(module: nn.Conv2d) -> None:
    if module.groups > 1:
        module.groups = len(module.weight) * module.groups // module.out_channels
    module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups


@_resize.register(nn.modules.conv._ConvTransposeNd)  # noqa: SLF001 -- likewise
def _(module: nn.ConvTranspose2d) -> None:
    if module.groups > 1:
        module.groups = module.out_channels = len(module.weight)
    else:
        module.out_channels = module.weight.shape[1]
    module.in_channels = len(module.weight)


@_resize.register
def _(module: nn.Embedding) -> None:
    module.embedding_dim = module.weight.shape[1]


@_resize.register
def _(module: nn.PReLU) -> None:
    module.num_parameters = len(module.weight)


@_resize.register
def _(module: nn.RNNBase) -> None:
    first, own = (cast("torch.Tensor", getattr(module, f"weight_{part}_l0")) for part in ("ih", "hh"))
    module.input_size, module.hidden_size = first.shape[1], own.shape[1]


@_resize.register
def _(module: nn.RNNCellBase) -> None:
    module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


@_resize.register(nn.modules.batchnorm._NormBase)  # noqa: SLF001 -- likewise
def _(module: nn.BatchNorm2d) -> None:
    kept = module.running_mean if module.weight is None else module.weight
    module.num_features = len(cast("torch.Tensor", kept))
