"""Every method, its clients in stacks and one by one, in double precision: the same weights, masks and figures.

Clients get and send float32, so that a difference of the order of a double's rounding vanishes in what they send. Two
rounds from the same start; a mask that differs in one entry is a flip, and none is allowed here: no two of these scores
are so close that the order of a sum decides between them.
"""

from collections import Counter

import pytest

from helpers import model_of, play, rows_of, small, tiny_shards
from secateur import methods
from secateur.learning import batched, stacked
from secateur.learning.compute import Compute

NEEDS = {"ist": ["parts=2"]}
ALONE = {"fedmef": "PrunedActivations acts on single clients' forward passes: such clients go one by one on cpu"}
MORE = [
    ("fedsparsify", "granularity=channel"), ("autoflip", "granularity=channel"), ("heterofl", "levels=2"),
]  # fmt: skip
NETWORK = {"name": "smallcnn", "options": {"width": 4, "features": 8}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("batched") / "shards", size=8, rows=70)  # of different sizes


@pytest.mark.parametrize(("method", "setting"), [*((name, "") for name in methods.names()), *MORE])
def test_stacked_clients_are_the_same_clients(method, setting, shards, tmp_path, monkeypatch):
    stacks, said, whole = Counter(), set(), stacked.together

    def counted(jobs, *rest):
        stacks[len(jobs)] += 1
        return whole(jobs, *rest)

    monkeypatch.setattr(stacked, "together", counted)
    monkeypatch.setattr(batched, "warn_once", said.add)
    settings = [*NEEDS.get(method, []), *([setting] if setting else [])]
    for name, together in (("alone", 1), ("stacked", 4)):
        compute = Compute(together=together, precision="double")
        study = small(method, *settings, rounds=2, participation=1.0, model=NETWORK, compute=compute)
        play(study, tmp_path / name, shards)
    assert max(stacks) == 4
    assert said == ({ALONE[method]} if method in ALONE else set())
    one, other = model_of(tmp_path / "alone"), model_of(tmp_path / "stacked")
    assert max(float((one[n] - other[n]).abs().max()) for n in one) <= 1e-7
    assert sum(int(((one[n] == 0) != (other[n] == 0)).sum()) for n in one) == 0
    for row, twin in zip(rows_of(tmp_path / "alone"), rows_of(tmp_path / "stacked"), strict=True):
        assert twin["left_out"] == row["left_out"] == []
        assert twin["up"] == row["up"]
        assert twin.get("loss") == (None if row.get("loss") is None else pytest.approx(row["loss"], abs=1e-7))
