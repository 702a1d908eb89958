"""AutoFLIP: the acceptance tests of its specification, and its options."""

import itertools

import pytest
import torch

from helpers import INLINE, Wrapped, model_of, play, rows_of, same, small, tiny_shards
from secateur import cost
from secateur.contract.reducer import reduce
from secateur.contract.state import State
from secateur.data.shards import open_shards
from secateur.federation import checkpoint, client, server
from secateur.learning.resident import load, tensors_of
from secateur.methods.autoflip import AutoFLIP
from secateur.methods.kit import exploration
from secateur.pruning import mask as masks
from secateur.pruning.structure import plan
from secateur.pruning.surgery import shrink
from secateur.study.options import build, flatten
from secateur.wire.codec import encode
from secateur.wire.message import Message


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


class Lab:
    """One server and its clients in this process, without bytes: methods called directly."""

    def __init__(self, study, shards):
        self.participant = client.Participant(study, open_shards(shards))
        self.method, self.setting = self.participant.method, self.participant.setting
        self.theta = tensors_of(self.participant.model)

    def start(self):
        return self.method.start(self.setting, {n: t.clone() for n, t in self.theta.items()}, {})

    def reply(self, ask, k):
        p = self.participant
        view = client.Client(k, self.setting, p.model, p.data(k), p.study.training)
        return self.method.respond(ask, view)

    def step(self, state, order=None):
        ask = self.method.plan(state)
        replies = {k: self.reply(ask, k) for k in (order or ask.clients)}
        return ask, self.method.absorb(state, reduce(ask, state, [(k, replies[k]) for k in ask.clients]))


def explored(lab, order=None):
    state = lab.start()
    while exploration.ask(lab.method.criterion.explore, state) is not None:
        _, state = lab.step(state, order)
    return state


def test_1_explorers_are_isolated_and_theta_0_is_unchanged(shards):
    lab = Lab(small("autoflip"), shards)
    one, other = explored(lab, (0, 1, 2, 3)), explored(lab, (3, 1, 0, 2))
    assert len(one.archive) == 4
    for key, deviation in one.archive.items():
        assert same(deviation, other.archive[key])
        assert all((d >= 0).all() for d in deviation.values())
    assert same(one.weights, lab.theta)
    distinct = [one.archive[f"deviation/{k}"]["fc1.weight"] for k in range(4)]
    assert all(not torch.equal(a, b) for i, a in enumerate(distinct) for b in distinct[:i])


def test_2_quantile_reaches_the_level_and_constant_tensors_survive(shards):
    lab = Lab(small("autoflip", "granularity.rho=0", "schedule.sparsity=0.3"), shards)
    state = explored(lab)
    mask = lab.method.plan(state).message.mask
    assert masks.sparsity(mask) == pytest.approx(0.3, abs=1 / masks.size(mask) + 1e-9)
    constant = {k: {**d, "fc1.bias": torch.zeros_like(d["fc1.bias"])} for k, d in state.archive.items()}
    frozen = lab.method.plan(State(lab.setting, 0, state.weights, notes=state.notes, archive=constant)).message.mask
    assert frozen["fc1.bias"].all()


def test_3_masks_are_binary_and_pruned_weights_zero_in_uploads(shards):
    lab = Lab(small("autoflip", "schedule.sparsity=0.5"), shards)
    state = explored(lab)
    for _ in range(3):
        ask, state = lab.step(state)
        mask = ask.message.mask
        assert all(m.dtype == torch.bool for m in mask.values())
        for k in ask.clients:
            upload = lab.reply(ask, k)
            assert all((upload.tensors[n][~m] == 0).all() for n, m in mask.items())
            assert same(masks.apply(masks.apply(masks.apply(upload.tensors, mask), mask), mask), upload.tensors)


def test_4_pruning_off_is_fedavg_bit_for_bit(tmp_path, shards):
    off = small("autoflip", "schedule.sparsity=0", "granularity.rho=0")
    never = small("autoflip", "schedule=never")
    dense = small("fedavg", "aggregator=server_momentum")
    for name, study in {"off": off, "never": never, "dense": dense}.items():
        play(study, tmp_path / name, shards)
    assert same(model_of(tmp_path / "off"), model_of(tmp_path / "dense"))
    assert same(model_of(tmp_path / "never"), model_of(tmp_path / "dense"))
    for name in ("never", "off"):
        assert "explore" not in {row["phase"] for row in rows_of(tmp_path / name)}
    assert off.dense().options == dense.complete().options


@pytest.mark.parametrize("model", ["mlp", "smallcnn", "twocnn"])
def test_5_the_shrunken_model_equals_the_masked_one(model, tmp_path):
    options = {
        "twocnn": {"hidden": 4, "features": 16},
        "mlp": {"hidden": (12, 8)},
        "smallcnn": {"width": 4, "features": 8},
    }
    lab = Lab(
        small("autoflip", "schedule.sparsity=0.5", model={"name": model, "options": options[model]}),
        tiny_shards(tmp_path, size=8),
    )
    state = lab.method.final(explored(lab))
    net = lab.participant.model
    load(net, state.model())
    removal = plan(state.mask, lab.setting.layout.groups)
    assert removal.cuts  # something was really removed
    slim = shrink(net, removal)
    x = torch.randn(5, *lab.participant.shards.input_shape)
    assert torch.allclose(net.eval()(x), slim.eval()(x), atol=1e-5)
    assert all(p.numel() > 0 for p in slim.parameters())


def test_6_bytes_match_hand_counts_and_exploration_has_its_own_line(tmp_path, shards):
    study = small("autoflip", "schedule.sparsity=0.5")
    summary = play(study, tmp_path / "run", shards)
    lab = Lab(study, shards)
    weights = sum(t.numel() for t in lab.theta.values())
    explore, *train = rows_of(tmp_path / "run")
    assert explore["phase"] == "explore"
    # four explorers, dense float32 in four planes, of which none can grow and that of the exponents shrinks
    assert all(3 * weights < explore[way]["values"] / 4 <= 4 * (1 + weights) for way in ("down", "up"))
    assert explore["down"]["mask"] == explore["up"]["mask"] == 0
    bitmaps = sum((t.numel() + 7) // 8 for t in lab.theta.values())
    frame = 1 + 1 + 1 + 1 + 4 + 2 * len(lab.theta)  # lengths, who is covered, a form and a mode for each tensor
    assert all(3 * 16 <= row["down"]["mask"] <= 3 * (16 + frame + bitmaps) for row in train)
    assert all(row["up"]["mask"] == 3 * 16 for row in train)  # the mask is known: its hash
    for row, way in itertools.product(train, ("down", "up")):
        assert 3 * 3 * row["kept"] < row[way]["values"] <= 3 * 4 * (1 + row["kept"])
    assert set(summary["phases"]) == {"explore", "train"}
    epochs = explore["processed"]
    uses = cost.uses(lab.participant.model, torch.zeros(1, 1, 4, 4))
    assert explore["train_macs"] == 3 * epochs * cost.macs(uses, lab.theta, None)
    kept_macs = [3 * r["processed"] * r["macs"] for r in train]
    assert [r["train_macs"] for r in train] == kept_macs


def test_7_round_1_starts_from_theta_0(shards):
    """No leak of explored weights: what the first cohort gets is theta_0 under its mask."""
    lab = Lab(small("autoflip"), shards)
    ask = lab.method.plan(explored(lab))
    assert ask.round == 1
    assert same(ask.message.tensors, masks.apply(lab.theta, ask.message.mask))


def test_guidance_uses_the_explorers_among_the_participants(shards):
    lab = Lab(small("autoflip", "granularity.rho=0", participation=0.5), shards)
    state = explored(lab)
    ask = lab.method.plan(state)
    here = [state.archive[f"deviation/{k}"] for k in ask.clients]
    scores = lab.method.criterion.scores(state.weights, here, seed=0)
    flat = torch.cat([s.flatten() for s in scores.values()])
    q = torch.quantile(flat, 0.3, interpolation="lower")
    assert all(torch.equal(ask.message.mask[n], s > q) for n, s in scores.items())
    static = Lab(small("autoflip", "consensus.static=true", participation=0.5), shards)
    again = explored(static)
    first = static.method.plan(again).message.mask
    _, later = static.step(again)
    assert same(first, static.method.plan(later).message.mask)
    assert same(first, static.method.final(later).mask)


def test_explorers_outside_the_cohort_and_silent_explorers(tmp_path, shards):
    lab = Lab(small("autoflip", "criterion.explore.fraction=0.25", participation=0.25), shards)
    state = explored(lab)
    assert len(state.archive) == 1
    assert lab.method.plan(state).message.mask is not None  # falls back to all explorers

    class Mute(Wrapped):
        def exchange(self, requests, deadline=None):
            for who, reply in self.inner.exchange(requests, deadline):
                yield who, b"" if self.first else reply
            type(self).first = False

        first = True

    study = small("autoflip", "criterion.explore.warm_start=true")
    play(study, tmp_path / "run", shards, open_engine=Mute.open)
    rows = rows_of(tmp_path / "run")
    assert [(row["phase"], len(row["left_out"])) for row in rows[:3]] == [("explore", 4), ("explore", 0), ("train", 0)]
    assert rows[2]["sparsity"] > 0  # they were asked again


@pytest.mark.parametrize(
    ("options", "asks"),
    [
        (("criterion.explore.base=epoch",), [(0, 1, 2, 3), (0, 1, 2, 3)]),
        (("criterion.explore.start=sequential",), [(0,), (1,), (2,), (3,)]),
        (("criterion.explore.warm_start=true",), [(0, 1, 2, 3)]),
    ],
)
def test_exploration_variants(options, asks, shards):
    lab = Lab(small("autoflip", *options), shards)
    state, seen, starts = lab.start(), [], []
    while (ask := exploration.ask(lab.method.criterion.explore, state)) is not None:
        seen.append(ask.clients)
        starts.append(ask.message.tensors)
        _, state = lab.step(state)
    assert seen == asks
    assert "base" not in state.memory
    assert len([k for k in state.archive if k.startswith("deviation/")]) == 4
    moved = not same(state.weights, lab.theta)
    assert moved == ("warm_start" in options[0])
    if len(starts) > 1:
        assert not same(starts[0], starts[1])  # a common epoch, or the explorer before, moved the start
    plain = explored(Lab(small("autoflip"), shards))
    assert same(plain.archive["deviation/0"], state.archive["deviation/0"]) == ("base" not in options[0])
    if "sequential" in options[0]:  # deviations are measured from theta_0, so the last includes all drift
        assert state.archive["deviation/3"]["fc1.weight"].sum() > plain.archive["deviation/3"]["fc1.weight"].sum()


def test_warm_start_is_the_mean_of_explored_weights(shards):
    lab = Lab(small("autoflip", "criterion.explore.warm_start=true"), shards)
    ask = lab.method.plan(lab.start())
    replies = [lab.reply(ask, k) for k in range(4)]
    mean = torch.stack([r.tensors["explored/fc1.weight"] for r in replies]).mean(0)
    assert torch.allclose(explored(lab).weights["fc1.weight"], mean, atol=1e-6)


def test_without_enforcement_clients_train_and_return_the_dense_model(tmp_path, shards):
    study = small("autoflip", "consensus.enforce=false")
    play(study, tmp_path / "run", shards)
    train = rows_of(tmp_path / "run")[1:]
    assert all(row["up"]["values"] > row["down"]["values"] for row in train)
    assert all(row["up"]["mask"] == 0 for row in train)


def test_shadow_keeps_pruned_weights_on_the_server(shards):
    lab = Lab(small("autoflip", "schedule.sparsity=0.5"), shards)
    state = explored(lab)
    ask, after = lab.step(state)
    gone = ~ask.message.mask["fc1.weight"]
    assert torch.equal(after.weights["fc1.weight"][gone], lab.theta["fc1.weight"][gone])
    assert (after.model()["fc1.weight"][gone] == 0).all()


def test_options_of_every_open_point_round_trip():
    options = flatten(AutoFLIP())
    named = [
        "criterion.explore.start", "criterion.explore.base", "criterion.explore.warm_start", "criterion.normalise",
        "criterion.scope", "allocation", "granularity.rule", "granularity.floor", "consensus.static",
        "aggregator.pruned", "consensus.enforce", "granularity.biases",
        "criterion.explore.data", "criterion.explore.fraction"    ]  # fmt: skip
    assert set(named) <= set(options)
    assert build(AutoFLIP, options) == AutoFLIP()


def test_the_run_ships_the_mask_of_all_explorers(tmp_path, shards):
    study = small("autoflip")
    play(study, tmp_path / "run", shards)
    lab = Lab(study, shards)
    saved = checkpoint.load(tmp_path / "run", lab.setting)
    final = lab.method.final(saved.state)
    shipped = model_of(tmp_path / "run")
    assert all(torch.equal(shipped[f"mask/{n}"].bool(), m) for n, m in final.mask.items())
    assert len(encode(Message(final.model(), final.mask))) > 0
    assert server.resume(tmp_path / "run", INLINE, shards=shards)["final"]["sparsity"] == masks.sparsity(final.mask)
