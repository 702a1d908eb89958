"""Trials of a model that was just built: it takes the inputs, it can be trained, and which tensors are what.

What a trial finds about a module's own tensors is noted in attributes of the module, ``constant_buffers`` and
``not_pruned``, which ``pruning.roles`` reads; one that the model's author has set is believed.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from secateur.errors import ModelError
from secateur.pruning.roles import check_hooks, matrix_like, roles, stored, travelling

_PRODUCTS = frozenset({
    *("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "addmv", "dot", "vdot"),
    *("inner", "tensordot", "einsum", "linear", "bilinear", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("embedding", "embedding_bag", "__getitem__", "gather", "index_select", "take"),
})  # fmt: skip
"""What a weight is for: products with what came from the inputs, or a look-up by them."""


def reached(broken: BaseException) -> str:
    """Return the layer in which a model failed and the shape that it was given, as the end of a sentence."""
    for frame, _ in reversed(list(traceback.walk_tb(broken.__traceback__))):
        layer, code = frame.f_locals.get("self"), frame.f_code
        if not isinstance(layer, nn.Module) or code.co_name != "forward":
            continue
        taken = [frame.f_locals.get(name) for name in code.co_varnames[1 : code.co_argcount]]
        shapes = [tuple(one.shape) for one in taken if isinstance(one, torch.Tensor)]
        name = repr(layer) if "\n" not in repr(layer) else type(layer).__name__
        return f"; it failed in {name}" + (f", which was given shape {shapes[0]}" if shapes else "")
    return ""


def take_shapes(model: nn.Module, input_shape: tuple[int, ...], *, tokens: bool) -> None:
    """Give lazy layers the shapes that follow from the inputs, by a forward pass; a model without any is not run.

    Raises:
        ModelError: forward never reaches one of them.
    """
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        _run(model, input_shape, tokens=tokens)
    left = [name for name, tensor in model.named_parameters() if is_lazy(tensor)]
    if left:
        raise ModelError(
            f"parameter {left[0]!r} of a lazy layer has no shape, as forward never reaches it: remove the layer"
        )


def check_eager(model: nn.Module) -> None:
    """Refuse modules that torch has compiled: what they call cannot be followed, nor copied and cut.

    Raises:
        ModelError: one is scripted, traced or compiled.
    """
    for name, module in model.named_modules():
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        if compiled or isinstance(module, torch.jit.ScriptModule):
            maker, what = "torch.compile" if compiled else "torch.jit", f"module {name!r}" if name else "the model"
            raise ModelError(
                f"{what} was made by {maker}, and compiled code cannot be followed or cut: let the factory return the "
                "plain module, and compile what secateur.load returns"
            )


def check_parameters(model: nn.Module) -> None:
    """Refuse parameters that cannot be trained and exchanged; give expanded buffers memory of their own.

    Raises:
        ModelError: one is complex, of another float type than float32, expanded, or shares memory with another; or a
            hook computes a layer's weight from other tensors.
    """
    check_hooks(model)
    begins: dict[int, str] = {}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in parameters.items():
        if parameter.is_complex():
            raise ModelError(
                f"parameter {name!r} is complex, and what is exchanged are float32 values: keep its real and imaginary "
                "parts as one real parameter, and use torch.view_as_complex of it"
            )
        _check_type(name, parameter)
        if _is_expanded(parameter):
            raise ModelError(
                f"parameter {name!r} is an expanded view, several of its entries are one number in memory, and no "
                "optimiser can move it: give it memory of its own with .clone()"
            )
        other = begins.setdefault(parameter.data_ptr(), name) if parameter.numel() else name
        if other != name:
            raise ModelError(
                f"parameters {other!r} and {name!r} share memory but are two: to tie them let both be one parameter, "
                f"model.{name} = model.{other}, without .data"
            )
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if _is_expanded(buffer):
                module._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)  # noqa: SLF001 -- in its place


def check_outputs(model: nn.Module, input_shape: tuple[int, ...], outputs: int, *, tokens: bool) -> None:
    """Refuse a model that does not return one row of logits for each input, or has nothing to train.

    What the model keeps (counters) stays as it was made, unless forward makes layers when it is first called.
    """
    trial = copied(model)
    output = _run(trial, input_shape, tokens=tokens)
    if stored(trial).keys() != stored(model).keys():
        _run(model, input_shape, tokens=tokens)
    _check_logits(output, outputs, "")
    alone = _run(copied(model), input_shape, tokens=tokens, rows=1)
    if not isinstance(alone, torch.Tensor) or tuple(alone.shape) != (1, outputs):
        raise ModelError(
            f"the model returns shape {tuple(getattr(alone, 'shape', ()))} for a batch of 1, (1, {outputs}) is "
            "expected: squeeze() drops the rows too, name its dimension or use flatten(1)"
        )
    try:
        with torch.no_grad():
            trained = copied(model).train()(_inputs(input_shape, tokens=tokens))
    except Exception:  # noqa: BLE001 -- whether it can be trained on real rows is tried where these are
        trained = output
    _check_logits(trained, outputs, " in training mode")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("the model has no parameter that is trained (all are frozen, or there are none)")


def _check_logits(output: object, outputs: int, mode: str) -> None:
    if not isinstance(output, torch.Tensor):
        raise ModelError(
            f"the model returns {type(output).__name__}{mode}, and one tensor of logits, shape (rows, {outputs}), is "
            "expected: let forward return that alone, or wrap the model in a module that picks it out"
        )
    if tuple(output.shape) != (2, outputs):
        raise ModelError(
            f"the model returns shape {tuple(output.shape)} for a batch of 2{mode}, (2, {outputs}) is expected"
        )


def note_constants(model: nn.Module, input_shape: tuple[int, ...], *, tokens: bool) -> None:
    """Name the buffers that training leaves alone in their modules' attribute ``constant_buffers``.

    A buffer is constant where a step of training with random inputs leaves its bits. Those of torch's norm layers never
    are, and those of a module that has the attribute already are what it says.

    Raises:
        ModelError: training changes one that cannot be exchanged.
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
    trial = copied(model).train()
    output = trial(_inputs(input_shape, tokens=tokens))
    if output.requires_grad:
        output.sum().backward()
    for name, module in owners.items():
        after = dict(trial.get_submodule(name).named_buffers(recurse=False))
        before = module.named_buffers(recurse=False)
        module.constant_buffers = frozenset(n for n, b in before if _same_bits(b, after[n]))
    for name, tensor in travelling(model).items():
        _check_type(name, tensor)


def note_weights(model: nn.Module, input_shape: tuple[int, ...], *, tokens: bool) -> None:
    """Name parameters that look like weights and are none in their modules' attribute ``not_pruned``.

    Of the parameters of anybody's own modules, those that forward reads, but in no product with what came from the
    inputs, nor in a look-up by it: positions that are added, gates that scale. Those that forward never reads stay.
    """
    named = {name for name, role in roles(model).items() if role == "weight"}
    bare = {
        name: parameter for name, parameter in model.named_parameters()
        if name in named and matrix_like(parameter) and _is_bare(model, name)
    }  # fmt: skip
    if not bare:
        return
    trial = copied(model).eval()
    inputs = _inputs(input_shape, tokens=tokens)
    own = dict(trial.named_parameters())
    watch = _Watch(inputs, {name: own[name] for name in bare}, (*trial.parameters(), *trial.buffers()))
    with torch.no_grad(), watch:
        trial(inputs)
    found: dict[str, set[str]] = {}
    for name in watch.read - watch.multiplied:
        prefix, _, last = name.rpartition(".")
        found.setdefault(prefix, set()).add(last)
    for prefix, names in found.items():
        owner: Any = model.get_submodule(prefix)
        owner.not_pruned = frozenset(names)


class _Watch(TorchFunctionMode):
    """Follows parameters through a forward pass: which are read, and which are multiplied with what inputs became."""

    def __init__(self, inputs: torch.Tensor, watched: Mapping[str, torch.Tensor], held: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.read: set[str] = set()
        self.multiplied: set[str] = set()
        self._alive: list[torch.Tensor] = [inputs, *held]  # else an identity could be given to another tensor
        self._entered = {id(inputs)}
        self._of = {id(parameter): {name} for name, parameter in watched.items()}

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a call, and note whose parts took part."""
        del types
        made = func(*args, **(kwargs or {}))
        taking = list(_tensors((args, kwargs)))
        entered = any(id(t) in self._entered for t in taking)
        parts = set[str]().union(*(self._of.get(id(t), set()) for t in taking))
        self.read |= parts
        product = getattr(func, "__name__", "") in _PRODUCTS
        if entered and product:
            self.multiplied |= parts
        if product and not all(id(t) in self._of for t in taking):
            parts = set()  # what another layer made of it is no longer a parameter, but an activation
        for result in _tensors(made):
            self._alive.append(result)
            if entered:
                self._entered.add(id(result))
            elif parts:
                self._of[id(result)] = parts
        return made


def _tensors(tree: object) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _tensors(part)


def _is_bare(model: nn.Module, name: str) -> bool:
    """Return whether a parameter belongs to a module of somebody's own, which has not said what it is."""
    owner = model.get_submodule(name.rpartition(".")[0])
    torchs = type(owner).__module__.startswith("torch.") and not isinstance(owner, nn.ParameterList | nn.ParameterDict)
    return not torchs and not hasattr(owner, "not_pruned")


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model.

    Raises:
        ModelError: something in it cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as broken:  # an attribute may be anything
        raise ModelError(
            f"the model cannot be copied, which is how it is made smaller ({type(broken).__name__}: {broken}): "
            "keep what cannot be copied out of its attributes, and make it where it is used"
        ) from broken


def _run(model: nn.Module, input_shape: tuple[int, ...], *, tokens: bool, rows: int = 2) -> object:
    """Return what the model makes of some inputs of zeros, in evaluation mode."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model(torch.zeros((rows, *input_shape), dtype=torch.long if tokens else torch.float32))
    model.train(was_training)
    return output


def _check_type(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise ModelError(
            f"{name!r} is of {tensor.dtype}: what is trained and exchanged is float32; call .float() on it"
        )


def _inputs(input_shape: tuple[int, ...], *, tokens: bool) -> torch.Tensor:
    return torch.randint(0, 2, (2, *input_shape)) if tokens else torch.randn(2, *input_shape)


def _is_expanded(tensor: torch.Tensor) -> bool:
    strided: Iterable[tuple[int, int]] = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and step == 0 for size, step in strided)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (one, other)))
