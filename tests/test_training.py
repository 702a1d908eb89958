"""The local loop: against a plain PyTorch loop, and its own promises."""

import contextlib
import copy
import math

import pytest
import torch
from torch import nn

from secateur.errors import ConfigError, DataError
from secateur.learning.evaluate import evaluate
from secateur.learning.gradients import gradient_statistic
from secateur.learning.hook import Hook, Steps
from secateur.learning.loop import Effort, batches, fit
from secateur.learning.optimiser import Training
from secateur.learning.resident import enforce, load, tensors_of
from secateur.learning.task import Data, Regression, find
from secateur.streams import Turn, derive


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def data(n=20, task="classification", kind="tabular"):
    g = torch.Generator().manual_seed(7)
    x = torch.randn(n, 6, generator=g)
    y = torch.randint(0, 3, (n,), generator=g) if task == "classification" else torch.randn(n, generator=g)
    return Data(x, y, kind=kind, scale=1.0, task=find(task))


def moved(one, other):
    """Return the distance between two models' parameters."""
    with torch.no_grad():
        return math.dist(*(torch.cat([p.flatten() for p in m.parameters()]).tolist() for m in (one, other)))


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_equals_a_plain_loop(optimiser):
    settings = Training(epochs=3, batch_size=8, optimiser=optimiser, lr=0.05, decay=0.5)
    ours, plain = model(), model()
    done = fit(ours, data(), settings, Turn(3, 2, 4))
    make = torch.optim.SGD if optimiser == "sgd" else torch.optim.Adam
    steps = make(plain.parameters(), lr=0.025)  # eta_2 = lr * decay
    shuffle = torch.Generator().manual_seed(derive(3, "batches", 2, 4))
    for _ in range(3):
        for index in torch.randperm(20, generator=shuffle).split(8):
            steps.zero_grad()
            nn.functional.cross_entropy(plain(data().x[index]), data().y[index]).backward()
            steps.step()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    assert (done.samples, done.processed, done.steps, done.epochs) == (20, 60, 9, 3)


@pytest.mark.parametrize("optimiser", [{"momentum": 0.9}, {"optimiser": "adam", "lr": 0.01}, {"weight_decay": 0.1}])
def test_pruned_weights_are_zero_after_every_step_even_with_momentum(optimiser):
    net = model()
    mask = {
        "1.weight": torch.rand(5, 6, generator=torch.Generator().manual_seed(1)) > 0.5,
        "3.bias": torch.ones(3, dtype=torch.bool),
    }
    fit(net, data(), Training(epochs=2), Turn(0, 1, 0))  # momentum has somewhere to come from
    enforce(net, mask)
    seen = []
    net[1].register_forward_pre_hook(lambda module, _: seen.append(module.weight.detach().clone()))
    fit(net, data(), Training(epochs=2, batch_size=4, **{"lr": 0.1, **optimiser}), Turn(0, 1, 0), mask=mask)
    assert len(seen) == 10
    assert all((w[~mask["1.weight"]] == 0).all() for w in [*seen, net[1].weight])
    assert not torch.signbit(net[1].weight[~mask["1.weight"]]).any()
    assert (net[1].weight[mask["1.weight"]] != 0).all()


def normed(norm):
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), norm, nn.Linear(5, 3))


def test_a_last_batch_of_one_row_joins_the_one_before_it_under_batch_norm():
    """9 rows in batches of 4: 4 and 5, where torch's own loop would fail at the last row."""
    settings, rows = Training(epochs=2, batch_size=4, lr=0.05), data(9)
    ours, plain = (normed(nn.BatchNorm1d(5)) for _ in range(2))
    done = fit(ours, rows, settings, Turn(3, 1, 4))
    steps = torch.optim.SGD(plain.parameters(), lr=0.05)
    shuffle = torch.Generator().manual_seed(derive(3, "batches", 1, 4))
    losses = []
    for _ in range(2):
        order = torch.randperm(9, generator=shuffle)
        for index in (order[:4], order[4:]):
            steps.zero_grad()
            loss = nn.functional.cross_entropy(plain(rows.x[index]), rows.y[index])
            loss.backward()
            steps.step()
            losses.append(loss.item() * len(index))
    pairs = zip(ours.state_dict().values(), plain.state_dict().values(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    assert (done.samples, done.processed, done.steps) == (9, 18, 4)
    assert done.loss == pytest.approx(sum(losses[2:]) / 9, abs=1e-6)
    lengths = []
    grouped = normed(nn.GroupNorm(1, 5))
    grouped[1].register_forward_pre_hook(lambda _, given: lengths.append(len(given[0])))
    fit(grouped, rows, settings, Turn(3, 1, 4))
    assert lengths == [4, 4, 1] * 2  # it needs no other rows


@pytest.mark.parametrize(
    ("count", "size", "most", "lengths"),
    [(9, 4, None, [4, 5]), (9, 4, 3, [4, 5]), (9, 4, 2, [4, 4]), (8, 4, None, [4, 4]), (1, 4, None, [1]),
     (5, 4, 1, [4]), (5, 4, 2, [5]), (3, 1, None, [1, 1, 1]), (3, 2, None, [3])],
)  # fmt: skip
def test_batches_take_each_row_once(count, size, most, lengths):
    parts = batches(torch.arange(count), size, paired=True, most=most)
    assert [len(part) for part in parts] == lengths
    assert torch.cat(parts).tolist() == list(range(sum(lengths)))
    alone = batches(torch.arange(count), size, paired=False, most=most)
    assert [part.tolist() for part in alone] == [part.tolist() for part in torch.arange(count).split(size)[:most]]


def test_statistics_are_measured_with_a_last_batch_of_one_row_too():
    settings = Training(batch_size=4)
    squares, done = gradient_statistic(normed(nn.BatchNorm1d(5)), data(9), settings, "square", Turn(0, 1, 2), batches=9)
    assert done.processed == 9
    net = normed(nn.BatchNorm1d(5)).train()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(derive(0, "gradients", 1, 2)))
    parts = []
    for index in (order[:4], order[4:]):
        loss = nn.functional.cross_entropy(net(data(9).x[index]), data(9).y[index])
        parts.append(torch.autograd.grad(loss, net[1].weight)[0].square())
    assert torch.allclose(squares["1.weight"], (parts[0] + parts[1]) / 2, atol=1e-7)


def test_a_client_without_rows_says_so():
    with pytest.raises(DataError, match="this client has no training rows"):
        fit(model(), data(0), Training(), Turn(0, 1, 0))


def test_a_full_mask_changes_no_bit():
    one, other = model(), model()
    fit(one, data(), Training(), Turn(0, 1, 0))
    fit(other, data(), Training(), Turn(0, 1, 0), mask={"1.weight": torch.ones(5, 6, dtype=torch.bool)})
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_streams_differ_by_round_and_client_and_global_state_is_untouched():
    def trained(round_, client):
        net = nn.Sequential(model(), nn.Dropout(0.5))
        fit(net, data(), Training(epochs=1), Turn(0, round_, client))
        return tensors_of(net)["0.1.weight"]

    before = torch.random.get_rng_state()
    assert torch.equal(trained(1, 1), trained(1, 1))
    assert not torch.equal(trained(1, 1), trained(2, 1))
    assert not torch.equal(trained(1, 1), trained(1, 2))
    model()
    torch.random.set_rng_state(before)
    state = torch.random.get_rng_state()
    net = nn.Dropout(0.5)
    fit(nn.Sequential(copy.deepcopy(model()), net), data(), Training(epochs=1), Turn(0, 1, 0))
    torch.random.set_rng_state(state)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_prox_pulls_towards_the_start():
    def distance(mu):
        net, start = model(), model()
        fit(net, data(), Training(epochs=20, lr=0.1, prox=mu), Turn(0, 1, 0))
        return moved(net, start)

    assert distance(0.0) > 2 * distance(1.0)


def test_prox_gradient_by_hand():
    """One weight, zero data gradient: w = 1 + step; the proximal term pulls back by lr * mu * (w - anchor)."""
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(1.0)
    rows = Data(torch.ones(2, 1), torch.tensor([3.0, 3.0]), "tabular", 1.0, Regression())
    fit(net, rows, Training(epochs=1, batch_size=1, lr=0.1, prox=2.0), Turn(0, 1, 0))
    # step 1: grad 2(1-3) = -4, prox 0      -> w = 1.4
    # step 2: grad 2(1.4-3) = -3.2, prox 2(1.4-1) = .8 -> w = 1.4 + .1 * 2.4 = 1.64
    assert net.weight.item() == pytest.approx(1.64)


def test_clipping_bounds_the_step():
    net, start = model(), model()
    fit(net, data(), Training(epochs=1, batch_size=20, lr=1.0, clip=0.01), Turn(0, 1, 0))
    assert moved(net, start) == pytest.approx(0.01, rel=1e-3)


def test_patience_stops_and_share_uses_fewer_rows():
    flat = Data(torch.zeros(10, 6), torch.zeros(10), "tabular", 1.0, Regression())
    net = nn.Linear(6, 1)
    with torch.no_grad():
        net.bias.zero_()
    done = fit(net, flat, Training(), Turn(0, 0, 0), effort=Effort(50, patience=3))
    assert done.epochs == 4  # the first epoch is the best; three more do not improve on a loss of 0
    part = fit(model(), data(), Training(batch_size=5), Turn(0, 0, 0), effort=Effort(1, share=0.3))
    assert (part.samples, part.processed) == (20, 6)


def test_evaluate_by_hand():
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.eye(2))
    rows = Data(torch.tensor([[3.0, 0.0], [0.0, 3.0], [3.0, 0.0]]), torch.tensor([0, 1, 1]), "tabular")
    score = evaluate(net, rows, batch_size=2)
    good, bad = math.log(1 + math.exp(-3)), math.log(1 + math.exp(3))
    assert score.metric == pytest.approx(2 / 3)
    assert score.loss == pytest.approx((2 * good + bad) / 3, rel=1e-5)
    line = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        line.weight.fill_(1.0)
    errors = evaluate(line, Data(torch.tensor([[1.0], [2.0]]), torch.tensor([2.0, 5.0]), "tabular", 1.0, Regression()))
    assert (errors.metric, errors.loss) == (2.0, 5.0)
    assert evaluate(net, Data(torch.zeros(0, 2), torch.zeros(0))).samples == 0


def test_batches_become_inputs_by_kind():
    image = Data(torch.tensor([[0, 255]], dtype=torch.uint8), torch.tensor([1], dtype=torch.uint8))
    x, y = image.batch(slice(0, 1))
    assert (x.tolist(), x.dtype, y.dtype) == ([[0.0, 1.0]], torch.float32, torch.int64)
    tokens = Data(torch.tensor([[3]], dtype=torch.uint8), torch.tensor([1]), "tokens")
    assert tokens.batch(slice(0, 1))[0].dtype == torch.int64


def test_load_and_tensors_round_trip_without_counters():
    net = nn.Sequential(nn.BatchNorm1d(2))
    tensors = tensors_of(net)
    assert list(tensors) == ["0.weight", "0.bias", "0.running_mean", "0.running_var"]
    load(net, {"0.running_mean": torch.tensor([1.0, 2.0])})
    assert net[0].running_mean.tolist() == [1.0, 2.0]
    assert tensors["0.running_mean"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "bad", [{"epochs": 0}, {"batch_size": 0}, {"lr": 0}, {"decay": 1.1}, {"prox": -1}, {"momentum": -1}, {"clip": -1}]
)
def test_bounds(bad):
    with pytest.raises(ConfigError, match=r"training\.\w+ = "):
        Training(**bad)


class Told(Hook):
    """A hook of one's own that notes when it is asked."""

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def begin(self, view, turn):
        assert set(view.parameters) == {"1.weight", "1.bias", "3.weight", "3.bias"}
        assert turn == Turn(0, 3, 2)
        return Noting(self, view)


class Noting(Steps):
    def __init__(self, hook, view):
        self.hook, self.view = hook, view

    def before(self):
        self.hook.notes.append(f"{self.hook.name} before")

    @contextlib.contextmanager
    def forward(self):
        self.hook.notes.append(f"{self.hook.name} enters")
        yield
        self.hook.notes.append(f"{self.hook.name} leaves")

    def gradients(self):
        self.hook.notes.append(f"{self.hook.name} gradients")
        self.view.parameters["3.bias"].grad.zero_()


def test_hooks_act_in_order_around_each_step_and_on_gradients():
    notes, net, start = [], model(), model()
    hooks = [Told("a", notes), Told("b", notes)]
    fit(net, data(8), Training(epochs=1, batch_size=8), Turn(0, 3, 2), hooks=hooks)
    assert notes == [
        "a before", "b before", "a enters", "b enters", "b leaves", "a leaves", "a gradients", "b gradients",
    ]  # fmt: skip
    assert torch.equal(net[3].bias, start[3].bias)  # what a hook zeroes does not move
    assert not torch.equal(net[3].weight, start[3].weight)


def test_a_hook_that_does_nothing_changes_no_bit():
    one, two = model(), model()
    fit(one, data(), Training(), Turn(0, 1, 0))
    fit(two, data(), Training(), Turn(0, 1, 0), hooks=[Hook()])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
