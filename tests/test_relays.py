"""Relays: whatever their number, and whoever dies, the model and the records are those of a run without."""

import pytest

from helpers import model_of, play, rows_of, same, small, tiny_shards
from secateur.study.runtime import Runtime


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("forty"), clients=40, rows=640)


def wide(method, *settings, **more):
    top = {"rounds": 2, "participation": 1.0, "data": {"clients": 40, "partition": "iid", "test_fraction": 0.2}}
    return small(method, *settings, **(top | more))


def records(folder, *, but=("relayed",)):
    return [{k: v for k, v in row.items() if "seconds" not in k and k not in but} for row in rows_of(folder)]


@pytest.mark.parametrize("method", ["fedavg", "fedsparsify", "heterofl", "autoflip"])
@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_relays_gives_the_same_bits_and_records(method, workers, forty, tmp_path):
    study = wide(method)
    play(study, tmp_path / "none", forty)
    for relays in (1, 3):
        folder = tmp_path / str(relays)
        play(study, folder, forty, runtime=Runtime(workers=workers, relays=relays))
        assert same(model_of(folder), model_of(tmp_path / "none"))
        assert records(folder) == records(tmp_path / "none")
        print([row["relayed"] for row in rows_of(folder)], rows_of(folder)[-1]["bytes_up"])
