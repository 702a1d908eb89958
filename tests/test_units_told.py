"""The sparsity of units is told beside that of weights, with what a cut took along."""

import torch
from torch import nn

from helpers import play, small, tiny_shards
from secateur.federation.removal import remarks_on_units, units_left
from secateur.pruning.discovery import layout


def test_units_are_counted_by_hand():
    groups = layout(nn.Sequential(nn.Linear(2, 40), nn.ReLU(), nn.Linear(40, 4), nn.ReLU(), nn.Linear(4, 3))).layers
    assert [(group.name, group.units) for group in groups] == [("0", 40), ("2", 4)]
    mask = {
        "0.weight": torch.ones(40, 2, dtype=torch.bool), "0.bias": torch.ones(40, dtype=torch.bool),
        "2.weight": torch.ones(4, 40, dtype=torch.bool), "2.bias": torch.ones(4, dtype=torch.bool),
    }  # fmt: skip
    assert units_left(None, groups) == units_left(mask, groups) == {}
    mask["0.weight"][:38] = False
    mask["0.bias"][:37] = False  # the 38th has a bias, and is no zero
    assert units_left(mask, groups) == {"sparsity_units": 1 - 7 / 44, "units": {"0": [3, 40]}}
    mask["0.bias"][37] = False
    found = units_left(mask, groups) | {"sparsity": 0.9907}
    assert remarks_on_units(found) == [
        "86.4 % of the units are removed, 99.1 % of the weights: a unit takes its inputs and its outputs along",
        "0: 2 of 40 units are left; a cut within each layer (allocation=uniform) would leave more",
    ]
    mask["2.weight"][:3], mask["2.bias"][:3] = False, False
    assert "2: 1 of 4 units is left" in remarks_on_units(units_left(mask, groups) | found | {"units": {"2": [1, 4]}})[1]
    assert remarks_on_units({"sparsity": 0.5}) == []


def test_a_run_that_removes_units_says_so(tmp_path):
    shards = tiny_shards(tmp_path / "shards")
    summary = play(small("fedsparsify", "granularity=channel", "schedule.sparsity=0.97"), tmp_path / "pruned", shards)
    assert 0 < summary["final"]["sparsity_units"] < 1
    assert any("of the units are removed" in remark for remark in summary["remarks"])
    plain = play(small("fedavg"), tmp_path / "dense", shards)
    assert "sparsity_units" not in plain["final"]
