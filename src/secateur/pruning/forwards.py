"""Sizes that a model's own code names: a module gets a forward pass whose calls have the sizes that a plan leaves.

``x.reshape(B, N, 3, self.num_heads, self.head_dim)`` holds the number of heads, so a layer with fewer heads would fail
there. Such a module's forward pass is traced with ``torch.fx``, its own layers as they are, and the numbers that count
units are replaced. Nothing else changes: parameters, names, hooks stay, and its class is derived from the one it had.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import add, getitem
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from secateur.errors import ModelError
from secateur.pruning.structure import Cut, composed

SHAPED = frozenset({"view", "reshape", "expand", "unflatten"})
"""Calls whose arguments name the size of each dimension of what they return."""
BOUNDED = frozenset({"chunk", "split", "split_with_sizes", "unbind", "getitem"})
"""Calls that take parts of what they get; their arguments name places along one of its dimensions."""
FILLED = frozenset({"zeros", "new_zeros"})
"""Calls that make a tensor of the sizes that they name, of nothing else."""
_GUARDS = {"_assert", "_assert_is_none"}
_MAKERS = ("arange", "empty", "eye", "full", "linspace", "ones", "randn", "tril_indices", "zeros")
_CONSTANT = "_tensor_constant"


@dataclass(frozen=True)
class Site:
    """A call in a module's own forward pass.

    Attributes:
        module: the module's name.
        call: what is called, as ``view``.
        index: how many such calls the forward pass makes before it.
        rank: number of dimensions of the tensor whose sizes it names; of a call that returns parts, their number.
    """

    module: str
    call: str
    index: int
    rank: int

    def __str__(self) -> str:
        """Return the name under which a plan has it: module, call, index and rank with colons between."""
        return f"{self.module}:{self.call}:{self.index}:{self.rank}"

    @classmethod
    def parse(cls, name: str) -> Site:
        """Return the site of such a name.

        Raises:
            ModelError: it is none.
        """
        module, *rest = name.split(":")
        if len(rest) != 3 or rest[0] not in SHAPED | BOUNDED | FILLED or not (rest[1] + rest[2]).isdecimal():
            raise ModelError(f"structural plan: {name!r} is no call in a module's forward pass")
        return cls(module, rest[0], int(rest[1]), int(rest[2]))


def resize(module: nn.Module, cuts: Sequence[Cut]) -> None:
    """Give a module, in place, a forward pass with other sizes.

    It is traced when it first runs in each mode and with each set of arguments that are no tensors.

    Args:
        module: the module whose own code names the sizes.
        cuts: what is left along dimensions of what its calls get or return; each names a ``Site``.

    Raises:
        ModelError: when it runs, if its forward pass cannot be traced, or has no such calls.
    """
    base = getattr(type(module), "dense_class", type(module))
    cuts = composed(getattr(type(module), "cuts", ()), cuts)
    made: dict[tuple[Any, ...], Callable[..., Any]] = {}
    signature = inspect.signature(base.forward)

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = dict(list(bound.arguments.items())[1:])
        fixed = {name: value for name, value in values.items() if isinstance(value, bool | int | float | str | None)}
        key = (self.training, *fixed.items())
        if key not in made:
            made[key] = _traced(self, base, fixed, cuts)
        return made[key](self, *values.values())

    module.__class__ = type(base.__name__, (base,), {"forward": forward, "dense_class": base, "cuts": cuts})


def graph_of(model: nn.Module) -> fx.GraphModule:
    """Return a model as a graph of torch's own layers and calls, in its current mode.

    Raises:
        Exception: whatever ``torch.fx``, or the model's own code on a proxy, raises.
    """
    tracer = fx.Tracer()
    tracer.proxy_buffer_attributes = True
    with _proxies():
        graph = tracer.trace(model)
    return fx.GraphModule(tracer.root, graph)


class _Tracer(fx.Tracer):
    """Traces one module's own code; the modules in it are called as they are."""

    proxy_buffer_attributes = True

    def __init__(self, cuts: Sequence[Cut]) -> None:
        """Make the tracer; the sites of cuts say into how many parts a call takes its value."""
        super().__init__()
        self._sites = [Site.parse(cut.tensor) for cut in cuts]

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate the parts of a value."""
        for site in self._sites:
            calls = _calls(obj.node.graph).get(site.call, []) if site.call in BOUNDED - {"getitem"} else []
            if site.index < len(calls) and calls[site.index] is obj.node:
                return iter([obj.tracer.create_proxy("call_function", getitem, (obj, n), {}) for n in range(site.rank)])
        return super().iter(obj)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return True."""
        del m, module_qualified_name
        return True


@contextlib.contextmanager
def _proxies() -> Iterator[None]:
    """Let functions of torch that make a tensor take sizes that are traced; ``torch.fx`` follows tensors only."""

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            found = [part for part in tree_leaves((args, kwargs)) if isinstance(part, fx.Proxy)]
            if not found:
                return function(*args, **kwargs)
            return found[0].tracer.create_proxy("call_function", inspect.unwrap(function), args, kwargs)

        return call

    before = {name: getattr(torch, name) for name in _MAKERS}
    for name, function in before.items():
        setattr(torch, name, made(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)


def _traced(module: nn.Module, base: type[nn.Module], fixed: dict[str, Any], cuts: Sequence[Cut]) -> Callable[..., Any]:
    """Return a module's forward pass in its current mode, for fixed arguments, with other sizes."""
    resized, module.__class__ = type(module), base
    try:
        with _proxies():
            graph = _Tracer(cuts).trace(module, concrete_args=fixed)
        for node in [node for node in graph.nodes if getattr(node.target, "__name__", "") in _GUARDS]:
            graph.erase_node(node)
        _edit(graph, cuts)
        forward = type(fx.GraphModule(module, graph)).forward
    except ModelError:
        raise
    except Exception as broken:
        reason = " ".join(str(broken).split())[:200]
        raise ModelError(f"its code holds sizes that cannot be changed, as torch.fx fails on it: {reason}") from broken
    finally:
        module.__class__ = resized
        for name in [name for name in vars(module) if name.startswith(_CONSTANT)]:
            setattr(resized, name, vars(module).pop(name))  # copies of the module have none of their own
    return forward


def _calls(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Return the calls of a graph by name, in order, but for those that take a size apart."""
    calls: dict[str, list[fx.Node]] = {}
    sizes: set[fx.Node] = set()
    for node in graph.nodes:
        name = (node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")).strip("_")
        if name in {"size", "shape"} or (name in {"getattr", "getitem", "add"} and _of_size(node, sizes)):
            sizes.add(node)
        elif node.op in {"call_method", "call_function"} and (name != "getitem" or not isinstance(node.args[1], int)):
            calls.setdefault(name, []).append(node)
    return calls


def _edit(graph: fx.Graph, cuts: Sequence[Cut]) -> None:
    calls = _calls(graph)
    for cut in cuts:
        site = Site.parse(cut.tensor)
        if site.index >= len(calls.get(site.call, ())):
            raise ModelError(f"its code makes a call ({cut.tensor}) that torch.fx does not see")
        node = calls[site.call][site.index]
        with graph.inserting_before(node):
            (_bound if site.call in BOUNDED else _shape)(graph, node, site, cut)


def _of_size(node: fx.Node, sizes: set[fx.Node]) -> bool:
    """Return whether a value is a size, or a part of one."""
    return node.args[1] == "shape" or (isinstance(node.args[0], fx.Node) and node.args[0] in sizes)


def _shape(graph: fx.Graph, node: fx.Node, site: Site, cut: Cut) -> None:
    """Set one of the sizes of what a call returns."""
    first = 0 if site.call == "zeros" else 1
    place, sizes = cut.dim, list[Any](node.args[first:])
    if site.call == "unflatten":
        first, dim, sizes = 2, cast("int", node.args[1]), list[Any](node.args[2:])
        place -= dim if dim >= 0 else site.rank - len(cast("tuple[int, ...]", sizes[0])) + 1 + dim
    together = len(sizes) == 1 and (site.rank > 1 or isinstance(sizes[0], (tuple, list)))
    named: Any = sizes[0] if together else tuple(sizes)
    if isinstance(named, fx.Node):
        before, after = (
            graph.call_function(getitem, (named, part)) for part in (slice(0, place), slice(place + 1, None))
        )
        named = graph.call_function(add, (graph.call_function(add, (before, (len(cut.kept),))), after))
    elif not 0 <= place < len(named):
        return
    elif named[place] != -1:
        named = (*named[:place], len(cut.kept), *named[place + 1 :])
    node.args = (*node.args[:first], *((named,) if together else named))


def _bound(graph: fx.Graph, node: fx.Node, site: Site, cut: Cut) -> None:
    """Move the places that a call names along a dimension to where they lie in what is left."""
    del graph
    if site.call == "unbind":
        return
    target, named, *rest = node.args
    if site.call == "getitem":
        node.args = (target, _index(named if isinstance(named, tuple) else (named,), site, cut))
        return
    even = -(-cut.size // site.rank)
    widths = list[Any](named) if isinstance(named, (tuple, list)) else [even] * (cut.size // even) + [cut.size % even]
    ends = [sum(widths[: n + 1]) for n in range(len(widths))]
    left = [sum(end - width <= k < end for k in cut.kept) for end, width in zip(ends, widths, strict=True)]
    node.args = (target, left[: site.rank], *rest)
    if site.call == "chunk":
        node.target = "split" if node.op == "call_method" else torch.split


def _index(index: tuple[Any, ...], site: Site, cut: Cut) -> tuple[Any, ...]:
    """Return an index whose slice along the cut's dimension has other bounds."""

    def moved(place: Any) -> Any:
        if not isinstance(place, int):
            return place
        left = sum(k < place % cut.size for k in cut.kept)
        return left if 0 <= place < cut.size else left - len(cut.kept) if -cut.size <= place < 0 else place

    found, dim = list[Any](index), 0
    for n, part in enumerate(index):
        if part is Ellipsis:
            dim = site.rank - sum(later is not None for later in index[n + 1 :])
        elif part is not None:
            if dim == cut.dim and isinstance(part, slice):
                found[n] = slice(moved(part.start), moved(part.stop), part.step)
            dim += 1
    return tuple(found)
