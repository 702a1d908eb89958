"""Discovery: the roles of a model's tensors, and its removable units, by tracing the model with ``torch.fx``.

One walk over the trace follows the units along the channel axis of every value. A layer makes new units, a sum joins
the units of two layers, and a call that mixes channels or does not keep zeros makes its input's units unremovable. A
second walk finds residual blocks: modules that return their input when all their tensors are zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import fx, nn
from torch.nn import functional

from secateur.pruning import depgraph, ends
from secateur.pruning.blocks import blocks
from secateur.pruning.layers import (
    ATTENTION,
    BATCH_NORMS,
    CONVS,
    GATES,
    NORMS,
    POINTWISE,
    POINTWISE_CALLS,
    POOL_CALLS,
    POOLS,
    SUMS,
    called,
)
from secateur.pruning.roles import FIXED, roles, tied, tokens
from secateur.pruning.structure import OUTPUT, Group, Kind, Layout, Slot

Form = Literal["channels", "features", "sequence", "states", "heads", "heads_first"]


How = Literal["trace", "torch_pruning", "none"]


def layout(model: nn.Module, how: How = "trace", example: torch.Tensor | None = None) -> Layout:
    """Return the layout of a model, without integer buffers (BatchNorm's counter), which are not exchanged.

    Units of which a part is never trained (a frozen layer reads or makes them) cannot be removed.

    Args:
        model: any network.
        how: how units are found: ``trace`` by ``units``, ``torch_pruning`` by ``depgraph.units``, ``none`` not at all.
        example: an input of the model, for ``torch_pruning``, which runs it.
    """
    # a forward pass, traced or not, may change what modules keep in buffers and attributes
    model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    if how == "torch_pruning" and example is not None:
        groups, whole = depgraph.units(model, example)
    else:
        groups, whole = units(model) if how == "trace" else ((), {})
    found = roles(model)
    kept = {name: "is never trained" for name, role in found.items() if role in FIXED}
    groups, fixed = _movable(groups, {**kept, **dict.fromkeys(tied(model), "is shared with another layer")})
    return Layout(found, groups, {**whole, **fixed}, tokens(model), ends.features(model))


def _movable(groups: tuple[Group, ...], fixed: Mapping[str, str]) -> tuple[tuple[Group, ...], dict[str, str]]:
    """Return the groups that no fixed tensor is part of, without the relatives of one that has such; and why.

    ``fixed`` has for each tensor, by name, what forbids to cut it.
    """
    held: dict[str, str] = {}
    for group in groups:
        own = {slot.tensor for slot in (*group.weights, *group.incoming, *group.statistics, *group.outgoing)}
        if group.kind == "block":
            own |= {name for name in fixed if name.startswith(f"{group.name}.")}
        tensor = next((name for name in fixed if name in own), None)
        if tensor is not None:
            held[group.name] = f"{tensor!r} {fixed[tensor]}, and would have to be cut with its units"
    families = {group.family: group.name for group in groups if group.family and group.name in held}
    held |= {g.name: held[families[g.family]] for g in groups if g.family in families and g.name not in held}
    return tuple(group for group in groups if group.name not in held), held


def units(model: nn.Module) -> tuple[tuple[Group, ...], dict[str, str]]:
    """Return the removable units of a model, and the layers without any, each with the reason.

    A model that cannot be traced has no units, with the reason under the empty name.
    """
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as broken:  # noqa: BLE001 -- fx raises whatever the model's own forward raises on a proxy
        return (), {"": f"the model cannot be traced: {str(broken).partition(chr(10))[0]}"}
    walk = _Walk(model, graph)
    found = list(walk.spaces())
    for space in found:
        for relative in (other for other in found if space.fixed and space.family and other.family == space.family):
            relative.fix(space.fixed or "")
    groups = [space.group() for space in found if space.fixed is None]
    whole = {slot.tensor.rpartition(".")[0]: space.fixed for space in found if space.fixed for slot in space.weights}
    whole = {name: reason for name, reason in walk.whole.items() if name not in whole} | whole
    return (*groups, *blocks(model, graph)), whole


@dataclass(eq=False)
class _Space:
    """The units along one channel axis; spaces whose values are added are joined."""

    name: str
    size: int
    order: int = 0
    grain: int = 1
    kind: Kind = "channel"
    family: str = ""
    fixed: str | None = None
    weights: list[Slot] = field(default_factory=list)
    incoming: list[Slot] = field(default_factory=list)
    statistics: list[Slot] = field(default_factory=list)
    outgoing: list[Slot] = field(default_factory=list)
    merged: _Space | None = None

    def root(self) -> _Space:
        return self if self.merged is None else self.merged.root()

    def fix(self, reason: str) -> None:
        self.root().fixed = self.root().fixed or reason

    def join(self, other: _Space) -> None:
        one, two = sorted((self.root(), other.root()), key=lambda space: space.order)
        if one is two:
            return
        if (one.size, one.family) != (two.size, two.family) or {one.grain, two.grain} - {1, max(one.grain, two.grain)}:
            one.fix(f"it meets {two.name!r}, whose units do not match")
        two.merged, one.fixed = one, one.fixed or two.fixed
        one.grain, one.kind = max(one.grain, two.grain), "head" if "head" in {one.kind, two.kind} else "channel"
        for mine, theirs in zip(one.slots(), two.slots(), strict=True):
            mine.extend(theirs)

    def split(self, grain: int) -> None:
        """Take ``grain`` consecutive features as one unit."""
        if self.grain not in {1, grain}:
            self.fix("its features are split in two ways")
        self.grain = grain

    def slots(self) -> tuple[list[Slot], ...]:
        return self.weights, self.incoming, self.statistics, self.outgoing

    def group(self) -> Group:
        own, incoming, statistics, outgoing = (
            tuple(replace(s, repeat=s.repeat * self.grain) for s in slots) for slots in self.slots()
        )
        return Group(
            self.name, self.size // self.grain, own, incoming, statistics, outgoing, self.kind, self.family
        )  # fmt: skip


@dataclass(frozen=True)
class _Flow:
    """The units along the channel axis of a value: their space, their form, and how often flattening repeats them.

    The form says where units are: ``channels`` along dimension 1, ``features`` along the last, ``sequence`` in a
    recurrent layer's output (batch, steps, features), ``states`` in the tuple it returns, ``heads`` in split features.
    """

    space: _Space
    form: Form
    flat: Literal["", "each", "all"] = ""

    def inputs(self, width: int) -> tuple[int, int]:
        """Return (repeat, tiles) of the units in a layer with ``width`` inputs."""
        times = width // self.space.root().size
        return (times, 1) if self.flat == "each" else (1, times) if self.flat == "all" else (1, 1)


class _Walk:
    """One pass over a trace, in order."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.modules = dict(model.named_modules())
        self.flows: dict[fx.Node, _Flow] = {}
        self.made: list[_Space] = []
        self.numbers: set[fx.Node] = set()
        self.whole: dict[str, str] = {}
        calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
        owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
        self.shared = {name for name in calls if calls.count(name) > 1} | {
            name for name in calls for p in self.modules[name].parameters() if owners.count(id(p)) > 1
        }
        for node in graph.nodes:
            flow = self.visit(node)
            if flow is not None:
                self.flows[node] = flow

    def spaces(self) -> Iterator[_Space]:
        """Iterate all spaces, each once, in forward order."""
        return iter(dict.fromkeys(space.root() for space in self.made))

    def visit(self, node: fx.Node) -> _Flow | None:
        """Return the flow of a node's value; None if nothing is known about its channels."""
        if node.op == "output":
            return self.fix(node, OUTPUT)
        if not node.users and called(node) == "getitem":  # what unpacking a tuple leaves unused
            return None
        flow = self.flows.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        if node.op == "call_module":
            return self.module(node, flow)
        if node.op in {"call_function", "call_method"}:
            return self.call(node, flow)
        return None

    def fix(self, node: fx.Node, reason: str) -> _Flow | None:
        """Make the units that enter a node unremovable; its own value has no flow."""
        for entering in node.all_input_nodes:
            if entering in self.flows:
                self.flows[entering].space.fix(reason)
        return None

    def module(self, node: fx.Node, flow: _Flow | None) -> _Flow | None:
        name = str(node.target)
        module = self.modules[name]
        if name in self.shared:
            self.whole[name] = "it is used more than once"
            return self.fix(node, f"{name!r} is used more than once")
        handlers: tuple[tuple[tuple[type, ...], Callable[..., _Flow | None]], ...] = (
            (CONVS, self.conv), ((nn.Linear,), self.linear), (tuple(GATES), self.recurrent),
            ((*BATCH_NORMS, nn.GroupNorm), self.norm),
        )  # fmt: skip
        for types, handle in handlers:
            if isinstance(module, types):
                made = handle(name, module, flow) if len(node.all_input_nodes) == 1 else None
                return made or self.refuse(node, name)
        if flow is not None and isinstance(module, POINTWISE):
            return flow
        if flow is not None and isinstance(module, POOLS) and flow.form == "channels":
            return flow
        if flow is not None and isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return _flattened(flow)
        self.made += _inner_layers(name, module)
        return self.refuse(node, name)

    def refuse(self, node: fx.Node, name: str) -> _Flow | None:
        """Make the units that enter a module unremovable, and those that it makes itself."""
        module = self.modules[name]
        if any(True for _ in module.parameters()) and not isinstance(module, NORMS):
            self.whole[name] = f"units of this kind of {type(module).__name__} cannot be removed"
        return self.fix(node, f"{name!r} ({type(module).__name__}) mixes its channels")

    def call(self, node: fx.Node, flow: _Flow | None) -> _Flow | None:
        if _is_number(node) or (node.all_input_nodes and self.numbers.issuperset(node.all_input_nodes)):
            self.numbers.add(node)
            return None
        entering = [self.flows.get(n) for n in node.all_input_nodes if n not in self.numbers]
        if node.target in SUMS and len(entering) == 2 and not node.kwargs:
            return self.joined(entering) or self.fix(node, "it is added to what has no such units")
        if node.target is ATTENTION and len(entering) == 3:
            return self.attended(entering) or self.fix(node, "its heads do not match")
        passed = None if flow is None or len(entering) > 1 else _passed(node, flow)
        return passed or self.fix(node, f"{called(node)} mixes its channels")

    def attended(self, flows: list[_Flow | None]) -> _Flow | None:
        """Return the flow of attention's output: the heads of its queries, keys and values."""
        joined = self.joined(flows)
        if joined is None or joined.form != "heads_first":
            return None
        joined.space.root().kind = "head"
        return joined

    def joined(self, flows: list[_Flow | None]) -> _Flow | None:
        """Return the joined flow of values that are combined elementwise; None if they differ in form."""
        known = [flow for flow in flows if flow is not None]
        if len(known) < len(flows) or len({(flow.form, flow.flat) for flow in known}) > 1:
            return None
        for flow in known[1:]:
            known[0].space.join(flow.space)
        return known[0]

    def made_by(self, name: str, size: int, weight: list[Slot], bias: list[Slot], family: str = "") -> _Space:
        space = _Space(name, size, len(self.made), family=family, weights=weight, incoming=weight + bias)
        self.made.append(space)
        return space

    def conv(self, name: str, module: nn.Conv2d, flow: _Flow | None) -> _Flow | None:
        weight, bias = [Slot(f"{name}.weight", 0)], _bias(name, module)
        if module.groups > 1:
            depthwise = module.groups == module.in_channels == module.out_channels
            if flow is None or flow.form != "channels" or not depthwise:
                return None
            flow.space.root().incoming += weight + bias
            return flow
        if flow is not None:
            self.enter(flow, f"{name}.weight", module.in_channels, form="channels")
        return _Flow(self.made_by(name, module.out_channels, weight, bias), "channels")

    def linear(self, name: str, module: nn.Linear, flow: _Flow | None) -> _Flow:
        if flow is not None:
            self.enter(flow, f"{name}.weight", module.in_features, form="features")
        weight = [Slot(f"{name}.weight", 0)]
        return _Flow(self.made_by(name, module.out_features, weight, _bias(name, module)), "features")

    def enter(self, flow: _Flow, weight: str, width: int, *, form: Form) -> None:
        """Record that a layer reads a flow's units along dimension 1 of ``weight``."""
        repeat, tiles = flow.inputs(width)
        fits = repeat * tiles * flow.space.root().size == width
        if not fits or flow.form not in {form, "sequence" if form == "features" else form}:
            return flow.space.fix(f"the inputs of {weight.rpartition('.')[0]!r} do not match its units")
        return flow.space.root().outgoing.append(Slot(weight, 1, repeat, tiles))

    def recurrent(self, name: str, module: nn.LSTM, flow: _Flow | None) -> _Flow | None:
        if module.bidirectional or module.proj_size or not module.batch_first:
            return None
        tiles, family, space = GATES[type(module)], name if module.num_layers > 1 else "", None
        for layer in range(module.num_layers):
            if layer == 0 and flow is not None:
                self.enter(flow, f"{name}.weight_ih_l0", module.input_size, form="features")
            elif space is not None:
                space.outgoing.append(Slot(f"{name}.weight_ih_l{layer}", 1))
            weights = [Slot(f"{name}.weight_{part}_l{layer}", 0, 1, tiles) for part in ("ih", "hh")]
            biases = [Slot(f"{name}.bias_{part}_l{layer}", 0, 1, tiles) for part in ("ih", "hh") if module.bias]
            label = f"{name}.{layer}" if family else name
            space = self.made_by(label, module.hidden_size, weights, biases, family)
            space.outgoing.append(Slot(f"{name}.weight_hh_l{layer}", 1))
        return _Flow(cast("_Space", space), "states")

    def norm(self, name: str, module: nn.GroupNorm, flow: _Flow | None) -> _Flow | None:
        """Add a norm's scale and shift to the units; otherwise a dead channel would not stay zero."""
        if flow is None or flow.form not in {"channels", "features"} or flow.flat or not module.affine:
            return None
        if len(module.weight) != flow.space.root().size:
            return None
        space = flow.space.root()
        space.incoming += [Slot(f"{name}.weight", 0), *_bias(name, module)]
        if isinstance(getattr(module, "running_mean", None), torch.Tensor):
            space.statistics += [Slot(f"{name}.{part}", 0) for part in ("running_mean", "running_var")]
        return flow


def _is_number(node: fx.Node) -> bool:
    """Return whether a call reads the size of a value, and not its channels."""
    call = node.args[1] if len(node.args) > 1 else None
    return called(node) in {"size", "dim"} or (
        called(node) == "getattr" and call in {"shape", "ndim", "device", "dtype"}
    )


def _bias(name: str, module: nn.Module) -> list[Slot]:
    return [Slot(f"{name}.bias", 0)] if isinstance(getattr(module, "bias", None), nn.Parameter) else []


def _passed(node: fx.Node, flow: _Flow) -> _Flow | None:  # noqa: PLR0911 -- one for each kind of call
    """Return the flow after a call that does not mix channels; None for any other call."""
    name = called(node)
    call: tuple[Any, ...] = (*node.args[1:], *node.kwargs.values())
    if node.target in POINTWISE_CALLS:
        return flow if flow.form != "states" else None
    if node.target in POOL_CALLS:
        return flow if flow.form == "channels" else None
    if name in {"flatten", "view", "reshape"}:
        return _reshaped(name, call, flow)
    if name == "getitem":
        return _picked(call[0], flow)
    if name == "mean":
        return _averaged(call, flow)
    if name == "unflatten" and flow.form == "features" and not flow.flat and call[0] == -1 and call[1][0] == -1:
        flow.space.root().split(int(call[1][1]))
        return replace(flow, form="heads")
    if name == "transpose" and set(call) == {1, 2} and flow.form in {"heads", "heads_first"}:
        return replace(flow, form="heads_first" if flow.form == "heads" else "heads")
    return None


def _reshaped(name: str, call: tuple[Any, ...], flow: _Flow) -> _Flow | None:
    if name == "flatten" and flow.form == "heads" and call in {(2,), (-2,), (2, -1), (2, 3)}:
        return replace(flow, form="features")
    rows_kept = call in {(1,), (1, -1)} if name == "flatten" else len(call) == 2 and call[1] == -1
    return _flattened(flow) if rows_kept else None


def _flattened(flow: _Flow) -> _Flow | None:
    if flow.form == "channels":
        return replace(flow, form="features", flat="each")
    return replace(flow, form="features", flat="all") if flow.form == "sequence" else None


def _picked(index: Any, flow: _Flow) -> _Flow | None:
    if flow.form == "states":
        return replace(flow, form="sequence") if index == 0 else None
    short = isinstance(index, tuple) and len(index) == 2
    return replace(flow, form="features") if flow.form == "sequence" and short else None


def _averaged(call: tuple[Any, ...], flow: _Flow) -> _Flow | None:
    dims = call[0] if call and isinstance(call[0], (tuple, list)) else call
    space_only = flow.form == "channels" and tuple(dims) in {(2, 3), (-2, -1), (-1, -2), (3, 2)}
    steps_only = flow.form == "sequence" and tuple(dims) == (1,)
    return replace(flow, form="features") if space_only or steps_only else None


def _inner_layers(name: str, module: nn.Module) -> Iterator[_Space]:
    """Iterate the units inside modules that a trace does not enter: the feed-forward layers of torch's encoder."""
    for inner, part in module.named_modules(prefix=name):
        if isinstance(part, nn.TransformerEncoderLayer) and part.activation in {functional.relu, functional.gelu}:
            weight, bias = [Slot(f"{inner}.linear1.weight", 0)], _bias(f"{inner}.linear1", part.linear1)
            outgoing = [Slot(f"{inner}.linear2.weight", 1)]
            size = part.linear1.out_features
            yield _Space(f"{inner}.linear1", size, weights=weight, incoming=weight + bias, outgoing=outgoing)
        elif isinstance(part, nn.MultiheadAttention):
            weight = [Slot(f"{inner}.in_proj_weight", 0)]
            reason = "nn.MultiheadAttention cannot hold fewer heads; linear layers for query, key and value can"
            yield _Space(inner, 1, weights=weight, incoming=weight, fixed=reason)
