"""What controls need to know of a model: the sizes of its weights, and its MACs at other widths."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from secateur import cost
from secateur.data.shards import Shape
from secateur.federation.client import example, make_model, make_setting
from secateur.methods.narrow import Narrow
from secateur.pruning.roles import stored
from secateur.pruning.structure import plan, sizes
from secateur.study.sections import ModelSection
from secateur.study.study import Study


@dataclass(frozen=True)
class Network:
    """The size of each prunable weight, and the MACs at each width in 64ths (empty if no units can be removed)."""

    weights: Mapping[str, int]
    macs: Mapping[float, int]


@functools.lru_cache
def network(section: str, shape: Shape) -> Network:
    """Return the sizes and MACs that controls need of a model; cached, as tracing takes a second."""
    made = Study(model=ModelSection.model_validate_json(section))
    model, inputs = make_model(made, shape), example(shape)
    setting, uses = make_setting(made, model, 1, inputs), cost.uses(model, inputs)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored(model).items()}

    def macs(width: float) -> int:
        narrow = Narrow(width)
        mask = narrow.mask(setting, narrow.leading(setting, width))
        return cost.physical(uses, sizes(shapes, plan(mask, setting.layout.groups)))

    steps = [step / 64 for step in range(1, 65)] if setting.layout.layers else []
    weights = {name: setting.specs[name].size for name in setting.layout.names("weight")}
    return Network(weights, {width: macs(width) for width in steps})
