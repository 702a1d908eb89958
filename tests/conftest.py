"""The suite takes more processes than there are cores: each computes in one thread; set before torch is imported."""

import importlib
import logging
import os
import random

import pytest

os.environ |= {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Let what mostly waits, for minutes, begin first: others have something to do beside it."""
    items.sort(key=lambda item: "test_deployment" not in item.nodeid)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Have Flower's grid asked often, and its draws repeat; caches are this test's own."""
    engine = importlib.import_module("secateur.flower.engine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(engine, "_PULL_EVERY", 0.001)
    monkeypatch.setattr(engine, "_LOOK_EVERY", 0.01)
    random.seed(0)


@pytest.fixture
def said(caplog):
    """Collect what is logged, Flower's logger included, which does not pass its lines on."""
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="flwr")
    # a logger that does pass its lines on brings each twice
    yield lambda: [record.getMessage() for record in {id(record): record for record in caplog.records}.values()]
    logger.removeHandler(caplog.handler)
