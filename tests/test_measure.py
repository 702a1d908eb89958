"""Statistics of weights, against finite differences and by hand; criteria made of them, in whole runs."""

import copy

import pytest
import torch
from torch import nn

from helpers import model_of, play, rows_of, same, small, tiny_shards
from secateur.learning.gradients import gradient_statistic
from secateur.learning.optimiser import Training
from secateur.learning.resident import tensors_of
from secateur.learning.task import Data, Regression
from secateur.streams import Turn


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def lab():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, Data(torch.randn(12, 3, dtype=torch.double), torch.arange(12) % 2, kind="tabular")


def found_by(form, batches=1, size=12):
    model, data = lab()
    before = copy.deepcopy(model.state_dict())
    found, done = gradient_statistic(model, data, Training(batch_size=size), form, Turn(0, 0, 0), batches=batches)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    return found, done


def slopes(model, data):
    x, y = data.batch(slice(None))
    loss = nn.functional.cross_entropy(model(x), y)
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def test_saliency_and_square_are_made_of_the_gradient():
    model, data = lab()
    expected = slopes(model, data)
    for name, parameter in model.named_parameters():
        assert torch.allclose(found_by("gradient")[0][name], expected[name])
        assert torch.allclose(found_by("square")[0][name], expected[name] ** 2)
        assert torch.allclose(found_by("saliency")[0][name], (expected[name] * parameter).abs())
    assert found_by("saliency")[1].processed == 12


def test_curvature_is_the_gradients_own_slope_along_itself():
    model, data = lab()
    g, step, sides = slopes(model, data), 1e-5, []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter.add_(sign * step * g[name])
        sides.append(slopes(moved, data))
    found, done = found_by("curvature")
    for name in g:
        assert torch.allclose(found[name], (sides[0][name] - sides[1][name]) / (2 * step), atol=1e-7)
    assert done.processed == 24  # twice back


def test_curvature_of_a_part_that_does_not_bend_is_zero():
    model = nn.Linear(2, 1, bias=False)
    data = Data(torch.randn(4, 2), torch.zeros(4), kind="tabular", task=Regression())
    unused = nn.ModuleDict({"used": model, "idle": nn.Linear(1, 1)})
    unused.forward = model.__call__
    found, _ = gradient_statistic(unused, data, Training(batch_size=4), "curvature", Turn(0, 0, 0))
    assert found["used.weight"].abs().sum() > 0
    assert not found["idle.weight"].any()


@pytest.mark.parametrize("rows", [3, 0], ids=["a client's", "a server without rows"])
def test_flow_by_hand(rows):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [-3.0, 4.0]]))
        model[2].weight.copy_(torch.tensor([[-5.0, 6.0]]))
    data = Data(torch.randn(rows, 2), torch.zeros(rows, dtype=torch.int64), kind="tabular")
    found, done = gradient_statistic(model, data, Training(), "flow", Turn(0, 0, 0))
    # through the absolute weights ones become (3, 7): 5 * 3 + 6 * 7; the largest entry is 42
    assert found["2.weight"].mul(42).tolist() == [pytest.approx([15.0, 42.0])]
    assert found["0.weight"].mul(42).flatten().tolist() == pytest.approx([5.0, 10.0, 18.0, 24.0])
    assert found["0.weight"].dtype == torch.float32
    assert done.processed == 1
    assert model[0].weight[0, 1] == -2.0


def deep(layers=48, width=128):
    torch.manual_seed(0)
    return nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())])


def test_flow_of_a_deep_network_is_finite_and_conserved():
    """Without biases what flows through a layer is the same for all: sum |w| dR/d|w| = R (Tanaka et al.)."""
    model = deep()
    for layer in model[::2]:
        nn.init.kaiming_uniform_(layer.weight)  # as wide as He's: it passes float32's largest number
        nn.init.zeros_(layer.bias)
    data = Data(torch.zeros(1, 128), torch.zeros(1, dtype=torch.int64), kind="tabular")
    before = copy.deepcopy(model.state_dict())
    found, _ = gradient_statistic(model, data, Training(), "flow", Turn(0, 0, 0))
    sums = torch.stack([found[f"{i}.weight"].double().sum() for i in range(0, 96, 2)])
    assert sums.isfinite().all()
    torch.testing.assert_close(sums, sums[:1].expand(48), rtol=1e-4, atol=0)
    assert max(float(flow.max()) for flow in found.values()) == 1.0
    assert same(before, model.state_dict())
    # what it would be in float32
    for layer in model[::2]:
        layer.weight.data.abs_()
    assert model(torch.ones(1, 128)).isinf().any()


def test_snip_of_all_clients_is_salientgrads(tmp_path, shards):
    """Equal numbers of rows at each client: a mean by rows is the mean over clients."""
    options = ("criterion=snip", "criterion.each=true", "criterion.measure.clients=all", "schedule.at=0")
    play(small("oneshot", *options, "schedule.sparsity=0.5", rounds=2), tmp_path / "composed", shards)
    play(small("salientgrads", "sparsity=0.5", rounds=2), tmp_path / "method", shards)
    assert same(model_of(tmp_path / "composed"), model_of(tmp_path / "method"))
    first = rows_of(tmp_path / "composed")[0]
    assert (first["phase"], first["clients"]) == ("score", [0, 1, 2, 3])


@pytest.mark.parametrize("criterion", ["snip", "taylor", "fisher", "grasp", "synflow"])
@pytest.mark.parametrize("consensus", ["pooled", "majority", "participants"])
def test_gradients_are_measured_before_each_mask_and_counted(criterion, consensus, tmp_path, shards):
    study = small("fedsparsify", f"criterion={criterion}", f"consensus={consensus}", "schedule.every=2")
    summary = play(study, tmp_path / "run", shards)
    rows = rows_of(tmp_path / "run")
    phases = [(row["phase"], row["round"]) for row in rows]
    if criterion == "synflow" and consensus != "majority":  # it needs no data: the server measures it, and asks nobody
        assert {phase for phase, _ in phases} == {"train"}
        event = rows[1]  # before round 3's mask
        assert event["server_macs"] == 3 * summary["final"]["macs_dense"]  # one row, forward and back
        assert summary["final"]["sparsity"] == pytest.approx(0.9, abs=0.01)
    elif consensus == "pooled":  # events after rounds 2 and 4, measured on the merged model
        assert phases == [("train", 1), ("train", 2), ("score", 2), ("train", 3), ("train", 4), ("score", 4)]
        assert summary["final"]["sparsity"] == pytest.approx(0.9, abs=0.01)
    elif consensus == "majority":  # each client by its own gradients, within its training
        assert {phase for phase, _ in phases} == {"train"}
        assert rows[1]["processed"] > rows[0]["processed"]
    else:  # the cohort that is about to train
        assert phases[2:4] == [("score", 2), ("train", 3)]
        assert rows[2]["clients"] == rows[3]["clients"]
    scored = [row for row in rows if row["phase"] == "score"]
    assert all(row["bytes_up"] > 0 and row["train_macs"] > 0 for row in scored)
    assert not any(row["left_out"] for row in rows)


def test_who_answers_nothing_leaves_the_mask_as_it_was(shards):
    from secateur.contract.reducer import reduce
    from secateur.data.shards import open_shards
    from secateur.federation import client

    study = small("oneshot", "criterion=snip", "schedule.at=0")
    held = open_shards(shards)
    model = client.make_model(study, held)
    method = study.build_method()
    state = method.start(client.make_setting(study, model, held.clients, client.example(held)), tensors_of(model), {})
    ask = method.plan(state)
    assert ask.phase == "score"
    after = method.absorb(state, reduce(ask, state, []))
    assert after.mask is None
    assert method.plan(after).phase == "train"
