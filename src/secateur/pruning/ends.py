"""The end of a model: the linear layer that runs last."""

from __future__ import annotations

import copy

from torch import fx, nn


def features(model: nn.Module) -> int:
    """Return how many features enter the linear layer that runs last; 0: none runs, or the model cannot be traced."""
    # a trace leaves its own objects in attributes
    model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception:  # noqa: BLE001 -- fx raises whatever the model's own forward raises on a proxy
        return 0
    modules = dict(model.named_modules())
    called = [modules[str(node.target)] for node in graph.nodes if node.op == "call_module"]
    widths = [layer.in_features for layer in called if isinstance(layer, nn.Linear)]
    return widths[-1] if widths else 0
