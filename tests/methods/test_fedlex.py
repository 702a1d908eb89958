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


def test_guidance_is_min_max_of_the_mean_over_explorers(lab):
    state, _ = lab
    state.archive["deviation/0"] = {"a": torch.tensor([0.0, 1.0, 4.0]), "b": torch.tensor([5.0, 5.0])}
    state.archive["deviation/1"] = {"a": torch.tensor([10.0, 30.0, 20.0]), "b": torch.tensor([1.0, 3.0])}
    state.archive["deviation/3"] = {"a": torch.tensor([7.0, 0.0, 0.0]), "b": torch.tensor([1.0, 0.0])}
    found = FedLEx().guidance(state, (0, 1))  # client 3 is not in the cohort; means 5, 15.5, 12 and 3, 4
    torch.testing.assert_close(found["a"], torch.tensor([0.0, 1.0, 7.0 / 10.5]))
    torch.testing.assert_close(found["b"], torch.tensor([0.0, 1.0]))
    half = FedLEx(strength=0.5).guidance(state, (0, 1))
    torch.testing.assert_close(half["a"], torch.tensor([0.5, 1.0, 0.5 + 3.5 / 10.5]))
    alone = FedLEx().guidance(state, (2,))  # nobody of the cohort explored: all explorers speak; means 7/3, 8/3
    torch.testing.assert_close(alone["b"], torch.tensor([0.0, 1.0]))


def guided(folder, **training):
    """Return the state before round 1 with random guidance, what client 1 answers, and what plain training makes."""
    state, view = helpers_lab(folder, small("fedlex", training={"epochs": 1, "batch_size": 64} | training))
    draw = torch.Generator().manual_seed(0)
    for k in range(4):
        deviation = {n: torch.rand(state.weights[n].shape, generator=draw) for n in state.setting.layout.trainable}
        state.archive[f"deviation/{k}"] = deviation
    state.notes["explore"] = 1
    ask = FedLEx().plan(state)
    assert ask.phase == "train"
    answer = FedLEx().respond(ask, view(1)).tensors
    plain, _ = view(1).train(state.weights, None, round_=1)
    return state.weights, FedLEx().guidance(state, ask.clients), answer, plain


def test_a_step_of_sgd_is_scaled_entry_by_entry(folder):
    sent, guidance, answer, plain = guided(folder, lr=0.1)  # one batch of all rows is one step
    for name, g in guidance.items():
        torch.testing.assert_close(answer[name], sent[name] + g * (plain[name] - sent[name]))
        assert torch.equal(answer[name][g == 0], sent[name][g == 0])


def test_adam_divides_guidance_out_again(folder):
    sent, guidance, answer, plain = guided(folder, lr=0.01, optimiser="adam")
    for name, g in guidance.items():
        moved = (g > 0.01) & ((plain[name] - sent[name]).abs() > 0.0099)  # elsewhere Adam's epsilon is felt
        assert moved.any()
        torch.testing.assert_close(answer[name][moved], plain[name][moved], rtol=0, atol=1e-4)
        assert torch.equal(answer[name][g == 0], sent[name][g == 0])


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
