"""The suite takes more processes than there are cores: each computes in one thread; set before torch is imported."""

import os

import pytest

os.environ |= {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Let what mostly waits, for minutes, begin first: others have something to do beside it."""
    items.sort(key=lambda item: "test_deployment" not in item.nodeid)
