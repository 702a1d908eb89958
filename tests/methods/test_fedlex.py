"""FedLEx: the guidance by hand, guided updates, and what it reduces to."""

import pytest
import torch

from helpers import lab as helpers_lab
from helpers import model_of, play, rows_of, same, small, tiny_shards
from secateur.methods.fedlex import FedLEx


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def lab(folder):
    return helpers_lab(folder, small("fedlex", participation=0.5))


def test_guidance_is_min_max_of_each_explorer_then_the_mean(lab):
    state, _ = lab
    state.archive["deviation/0"] = {"a": torch.tensor([0.0, 1.0, 4.0]), "b": torch.tensor([5.0, 5.0])}
    state.archive["deviation/1"] = {"a": torch.tensor([10.0, 30.0, 20.0]), "b": torch.tensor([1.0, 3.0])}
    state.archive["deviation/3"] = {"a": torch.tensor([7.0, 0.0, 0.0]), "b": torch.tensor([1.0, 0.0])}
    found = FedLEx().guidance(state, (0, 1))  # client 3 is not in the cohort
    torch.testing.assert_close(found["a"], torch.tensor([0.0, (0.25 + 1.0) / 2, (1.0 + 0.5) / 2]))
    torch.testing.assert_close(found["b"], torch.tensor([0.0, 0.5]))
    half = FedLEx(strength=0.5).guidance(state, (0, 1))
    torch.testing.assert_close(half["b"], torch.tensor([0.5, 0.75]))
    alone = FedLEx().guidance(state, (2,))  # nobody of the cohort explored: all explorers speak
    torch.testing.assert_close(alone["b"], torch.tensor([1.0 / 3, 1.0 / 3]))


def test_an_update_is_scaled_entry_by_entry(lab):
    state, view = lab
    method = FedLEx()
    generator = torch.Generator().manual_seed(0)
    names = state.setting.layout.names("weight", "bias", "norm")
    for k in range(4):
        state.archive[f"deviation/{k}"] = {n: torch.rand(state.weights[n].shape, generator=generator) for n in names}
    state.notes["explore"] = 1
    ask = method.plan(state)
    assert ask.phase == "train"
    guided = method.respond(ask, view(1)).tensors
    plain, _ = view(1).train(state.weights, None, round_=1)
    for name, g in method.guidance(state, ask.clients).items():
        expected = state.weights[name] + g * (plain[name] - state.weights[name])
        torch.testing.assert_close(guided[name], expected)
        frozen = g == 0
        assert torch.equal(guided[name][frozen], state.weights[name][frozen])


def test_strength_zero_never_explores_and_is_the_aggregator_alone(folder, tmp_path):
    play(small("fedlex", "strength=0"), tmp_path / "off", folder)
    play(small("fedavg", "aggregator=server_momentum"), tmp_path / "momentum", folder)
    assert {row["phase"] for row in rows_of(tmp_path / "off")} == {"train"}
    assert same(model_of(tmp_path / "off"), model_of(tmp_path / "momentum"))


def test_guidance_is_counted_on_the_way_down_and_nothing_is_pruned(folder, tmp_path):
    play(small("fedlex"), tmp_path / "guided", folder)
    play(small("fedlex", "strength=0"), tmp_path / "off", folder)
    guided = [r for r in rows_of(tmp_path / "guided") if r["phase"] == "train"]
    for row, plain in zip(guided, rows_of(tmp_path / "off"), strict=True):
        assert 1.7 < row["down"]["values"] / plain["down"]["values"] < 2.3
        assert 0.8 < row["up"]["values"] / plain["up"]["values"] < 1.2
        assert row["sparsity"] == 0
    assert not same(model_of(tmp_path / "guided"), model_of(tmp_path / "off"))
