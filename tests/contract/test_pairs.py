"""Pairs of method and architecture: every method and every architecture at least once, in two rounds on a few rows.

A pair runs to its end with all clients, and ships a slim model that computes what the masked one does; or it is refused
in one line before anybody has trained.
"""

import random
import warnings

import numpy as np
import pytest
import torch

from architectures import ZOO
from helpers import play, rows_of, small
from secateur import methods
from secateur.data.shards import make_shards
from secateur.data.sources import Source
from secateur.errors import SecateurError
from secateur.export import export
from secateur.study.options import flatten

CLIENTS, ROWS = 3, 24


def pairs():
    """Return the pairs, drawn once and for all: each architecture with a method, methods in turn."""
    names = [*methods.names()]
    draw = random.Random(22)
    draw.shuffle(names)
    architectures = [*ZOO]
    draw.shuffle(architectures)
    count = max(len(names), len(architectures))
    return [(names[n % len(names)], architectures[n % len(architectures)]) for n in range(count)]


def shards_of(name, folder):
    """Write the shards of rows that fit an architecture, of three classes or, of tokens, as many as its vocabulary."""
    entry, draw = ZOO[name], np.random.default_rng(5)
    kind = "tokens" if entry.tokens else "image" if len(entry.shape) == 3 else "tabular"
    y = np.arange(ROWS) % 3
    if entry.tokens:
        x = draw.integers(0, entry.outputs, (ROWS, *entry.shape)).astype(np.uint8)
    elif kind == "image":
        x = draw.integers(0, 256, (ROWS, *entry.shape)).astype(np.uint8)
    else:
        x = draw.normal(size=(ROWS, *entry.shape)).astype(np.float32)
    folder.mkdir()
    source = Source(name, x, y, x[:6], y[:6], None, entry.outputs, kind)
    parts = [np.arange(client, ROWS, CLIENTS) for client in range(CLIENTS)]
    make_shards(source, parts, test_fraction=0.2, seed=0, folder=folder, public=np.arange(6))
    return folder


def study_of(method, name):
    """Return a study of two rounds, of whole channels where the method lets one choose."""
    known = flatten(methods.find(method)())
    settings = ["granularity=channel"] if known.get("granularity") == "weight" else []
    settings += [f"{path}=1" for path in known if path.endswith("epochs") and known[path]]
    data = {"clients": CLIENTS, "partition": "iid", "test_fraction": 0.2}
    return small(
        method, *settings, rounds=2, participation=1.0, data=data, model={"name": f"architectures:{name}"},
        training={"epochs": 1, "batch_size": 4, "lr": 0.01},
    )  # fmt: skip


def refusal(study, folder, shards):
    """Run a study; return the line with which it is refused, or nothing."""
    try:
        play(study, folder, shards)
    except SecateurError as refused:
        return str(refused)
    return ""


@pytest.mark.parametrize(("method", "name"), pairs())
def test_a_pair_ships_a_slim_model_or_is_refused_at_once(method, name, tmp_path):
    shards, folder = shards_of(name, tmp_path / "shards"), tmp_path / "run"
    refused = refusal(study_of(method, name), folder, shards)
    if refused:
        assert "\n" not in refused
        assert not (folder / "rounds.jsonl").exists() or not rows_of(folder), refused
        return
    assert not [row["left_out"] for row in rows_of(folder) if row["left_out"]]
    shipped = export.read(folder)
    entry = ZOO[name]
    x = torch.randint(0, entry.outputs, (4, *entry.shape)) if entry.tokens else torch.randn(4, *entry.shape)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        expected, found = shipped.masked(x), shipped.slim(x)
    assert torch.allclose(expected, found, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max())))


def test_every_method_and_every_architecture_is_in_a_pair():
    drawn_methods, drawn_names = zip(*pairs(), strict=True)
    assert set(drawn_methods) == set(methods.names())
    assert set(drawn_names) == set(ZOO)
