"""Every method learns something easy, trained as it recommends: clearly above chance, and above where it began.

A fault of scale (a threshold that moves by the wrong amount, frozen weights that let the signal die) leaves masks,
bytes and bits in order, so nothing else would notice. Handwritten digits and a small convolutional network: ten
classes, and deep enough that a signal which shrinks in each layer is gone at the end.
"""

import pytest

from helpers import INLINE, lab
from secateur import methods
from secateur.data.shards import open_shards
from secateur.federation import prepare, server
from secateur.federation.client import wrap
from secateur.learning.evaluate import evaluate
from secateur.learning.resident import load
from secateur.study.options import flatten
from secateur.study.study import assign, parse_study

CHANCE = 0.1
CLEARLY = 0.3  # accuracy: three times chance
ROUNDS = 12

# Efforts that the paper's settings make long, by the end of their path.
CUT = {"explore.epochs": 5, "every": 3, "candidates": 3}

# What a method needs beside its own recommendation, in so few rounds.
NEEDS = {
    "fedconv": {"data.public": 100, "epochs": 1},
    "fedcompress": {"epochs": 1},
    "bristle": {"data.public": 100},
    "ist": {"parts": 2},
}

# Where a fault of scale showed at a density alone; all others run at half of their weights.
AT = {"frl": (0.5, 0.9)}


def easy(name, sparsity):
    """Return the study: half of the weights, or the sparsity that is asked for, where a method has one."""
    values = {
        "method": name, "rounds": ROUNDS, "participation": 1.0, "evaluate_every": ROUNDS,
        "data": {"clients": 4, "partition": "iid"},
        "model": {"name": "smallcnn", "init": "kaiming_normal", "options": {"width": 8, "features": 32}},
        "training": {"epochs": 2, "batch_size": 16},
    }  # fmt: skip
    known = flatten(methods.find(name)())
    for path, value in known.items():
        last = path.rpartition(".")[2]
        cut = next((short for end, short in CUT.items() if path.endswith(end)), None)
        if cut is not None and isinstance(value, int) and value > cut:
            assign(values, f"{path}={cut}")
        if last in {"sparsity", "target"} and value:
            assign(values, f"{path}={sparsity}")
    for path, value in NEEDS.get(name, {}).items():
        if path in known or path.startswith("data."):
            assign(values, f"{path}={value}")
    return parse_study(values)


@pytest.mark.parametrize(
    ("name", "sparsity"), [(name, level) for name in methods.names() for level in AT.get(name, (0.5,))]
)
def test_a_method_learns(name, sparsity, tmp_path):
    made = easy(name, sparsity)
    with prepare.federation(made) as folder:
        state, view = lab(folder, made)
        rows, model = open_shards(folder), view(0).model
        load(model, state.model())
        start = evaluate(model, wrap(rows, *rows.server_test())).metric
        final = server.start(made, INLINE, tmp_path / "run", shards=folder)["final"]
    assert final["accuracy"] > CLEARLY, f"{name} at {sparsity}: {final['accuracy']:.3f}, chance is {CHANCE}"
    assert final["accuracy"] > start + 0.2, f"{name} at {sparsity}: {final['accuracy']:.3f}, began at {start:.3f}"
