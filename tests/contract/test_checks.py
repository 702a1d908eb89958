"""What replies must be: each check by hand, and every method's asks with replies that lie within a tensor's dtype."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from helpers import lab, small, tiny_shards
from secateur import methods
from secateur.contract.ask import EVALUATE, SCORES, TRAIN, Ask
from secateur.contract.checks import Complement, Kept, KeptByTensor, Range, Signs
from secateur.contract.reducer import reduce
from secateur.contract.reply import Sent
from secateur.errors import WireError
from secateur.federation import client_scores
from secateur.federation.intake import COST_SCALARS, Intake, Job
from secateur.guards.bounds import Bounds
from secateur.guards.norms import Norms
from secateur.learning.metrics import ACCURACY, AUROC
from secateur.methods.frl import Permutations
from secateur.methods.kit.merging import merged
from secateur.pruning.consensus import floored, vote
from secateur.pruning.ranking import packed
from secateur.wire.codec import encode
from secateur.wire.message import Expected, Message
from secateur.wire.settings import Wire


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def flags(*kept):
    return torch.tensor(kept, dtype=torch.bool)


def test_a_range():
    square = Range(frozenset("d"), least=0.0)
    assert square.wrong(Message({"d": torch.tensor([0.0, 1e30])}), None) == ""
    assert "-1 to 2; 0 to inf" in square.wrong(Message({"d": torch.tensor([2.0, -1.0])}), None)
    assert square.wrong(Message({"d": torch.zeros(0)}), None) == ""
    assert square.bounded == frozenset()
    assert Range(frozenset("d"), 0.0, 1.0).bounded == {"d"}
    assert square.nearest(Message({"d": torch.tensor([-1e-3, 2.0])})).tensors["d"].tolist() == [0.0, 2.0]


def test_signs_are_signs_where_a_mask_keeps_them():
    signs, mask = Signs(frozenset("s")), {"s": flags(True, False, True)}
    assert signs.wrong(Message({"s": torch.tensor([1.0, 0.0, -1.0])}, mask), mask) == ""
    assert signs.wrong(Message({"s": torch.tensor([1.0, 0.0, 0.0])}, mask), mask)
    assert signs.wrong(Message({"s": torch.tensor([5.0, 0.0, 1.0])}, mask), mask)
    assert signs.wrong(Message({"s": torch.tensor([1.0, 0.0, 1.0])}), None)


def test_a_vote_has_the_budgets_size_or_that_of_the_mask_that_was_sent():
    two, three = {"a": flags(True, True, False, False)}, {"a": flags(True, True, True, False)}
    assert Kept(2, 2).wrong(Message({}, two), three) == ""
    assert "keeps 3 entries; 2 are expected" in Kept(2, 2).wrong(Message({}, three), three)
    assert Kept(2, 2, same=True).wrong(Message({}, three), three) == ""
    assert Kept(2, 2, same=True).wrong(Message({}, three), None)
    assert Kept(2, 2, same=True).wrong(Message({}, {"a": flags(True, True)}), None) == ""


def test_counts_by_tensor_and_complements():
    sent = {"a": flags(True, True, False), "b": flags(True, False, False)}
    other = {"a": flags(False, True, True), "b": flags(False, False, True)}
    assert KeptByTensor().wrong(Message({}, other), sent) == ""
    assert "of 'b'" in KeptByTensor().wrong(Message({}, {**other, "b": flags(False, True, True)}), sent)
    assert KeptByTensor((("a", 1, 2),)).wrong(Message({}, other), sent) == ""
    assert KeptByTensor((("a", 3, 3),)).wrong(Message({}, other), sent)
    rest = {name: ~kept for name, kept in sent.items()}
    assert Complement().wrong(Message({}, rest), sent) == ""
    assert Complement().wrong(Message({}, other), sent)


def test_ranks_are_a_permutation():
    check = Permutations((("w", (4,)),))
    assert check.wrong(Message(packed({"w": torch.tensor([2, 0, 3, 1])})), None) == ""
    for ranks in ([2, 0, 3, 3], [0, 0, 0, 0], [2, 0, 250, 3]):
        assert check.wrong(Message(packed({"w": torch.tensor(ranks)})), None)


def test_rules_for_statistics_by_hand():
    """Of four clients one is cut at each end, of twenty four: 4^2 to 15^2 stay; of two there is only the middle."""
    values = [torch.tensor([[1.0, 5.0], [2.0, -1e30], [3.0, 6.0], [1e30, 7.0]])[k] for k in range(4)]
    squares = [torch.tensor([k**2.0]) for k in range(20)]

    def by(rule, parts):
        return merged([{"a": part} for part in parts], rule)["a"].tolist()

    assert by("median", values) == by("trimmed", values) == [2.5, 5.5]
    assert by("median", squares) == [(81 + 100) / 2]
    assert by("trimmed", squares) == pytest.approx([sum(k * k for k in range(4, 16)) / 12])
    assert by("trimmed", squares[:2]) == by("median", squares[:2]) == [0.5]
    assert merged([], "median") == {}


@pytest.mark.parametrize(("honest", "lying"), [(3, 1), (4, 1), (5, 2), (6, 3), (7, 2)])
def test_how_many_liars_a_vote_bears(honest, lying):
    """Strict majority: safe to stay iff h > (H+f)/2, safe to go iff h <= (H-f)/2, over every choice of the liars."""
    total = honest + lying
    for kept in range(honest + 1):
        came = set()
        for lies in itertools.product([0, 1], repeat=lying):
            votes = {"w": torch.tensor([kept + sum(lies)])}
            came.add(bool(vote("majority", votes, total, {"w": torch.ones(1)}, 0)["w"]))
        assert (came == {True}) == (kept > total / 2)
        assert (came == {False}) == (kept <= (honest - lying) / 2)


def test_a_floor_brings_back_what_had_the_most_votes():
    """Of five entries that were there, three fifths stay: besides the one that won, the one with 2 votes and the larger
    of those with 1; what was pruned before stays away whatever its votes."""
    mask = {"w": flags(True, False, False, False, False, False)}
    votes = {"w": torch.tensor([4, 1, 2, 1, 0, 3])}
    size = {"w": torch.tensor([0.1, 0.2, 0.1, 0.9, 0.9, 9.0])}
    before = {"w": flags(True, True, True, True, True, False)}
    assert floored(mask, votes, size, before, 0.6)["w"].tolist() == [True, False, True, True, False, False]
    assert floored(mask, votes, size, before, 0.2)["w"].tolist() == mask["w"].tolist()


# ---- every method

FREE = {
    # why a float tensor that is no plain weight has no range: what it does is bounded in another way
    "fedtiny": "gradients have either sign; how many are sent is declared",
    "fedmef": "gradients have either sign; how many are sent is declared",
    "fedpub": "an embedding's length is divided out, so that no value weighs more than another",
    "fedcompress": "values of codebooks are bounded by guards.norms, as weights are",
    "rffl": "the server cuts each update to one norm (option norm) before it counts",
    "spafl": "thresholds are bounded by guards.norms, as weights are",
}


def asks_of(method, shards):
    """Yield one ask of each kind that a method makes, with an honest reply and the setting."""
    study = small(method, participation=1.0)
    state, view = lab(shards, study)
    made, found = study.build_method(), set()
    if made.refines:
        server = view(0)
        server.id = -1
        state, _ = made.refine(state, server)
    for _ in range(12):
        ask = made.plan(state)
        if ask is None:
            break
        replies = {}
        for client in ask.clients:
            tensors, mask = ask.request(client)
            one = type(ask)(ask.phase, ask.round, (client,), Message(tensors, mask, ask.message.scalars), Expected({}))
            replies[client] = made.respond(one, view(client))
        kind = (ask.phase, tuple(sorted(ask.expects.tensors)), ask.expects.mask)
        if kind not in found:
            yield ask, replies[ask.clients[0]], state.setting
        found.add(kind)
        state = made.absorb(state, reduce(ask, state, replies.items()))
        if made.refines and ask.phase == TRAIN:
            break


def taken(ask, reply, setting):
    """Return what the intake makes of a reply to an ask."""
    client = ask.clients[0]
    tensors, mask = ask.request(client)
    job = Job.of(ask, Wire(), {}, 0, guards=[Bounds()])
    known = ask.expects.known if ask.slices is None else mask
    told = Message(reply.tensors, reply.mask, {**reply.scalars, "seconds": 0.0, "measured": 0})
    payload = encode(told, known=known if job.known or job.same else None)
    sent = Sent(setting, lambda: (tensors, mask))
    return Intake(job, Wire(), setting, [Bounds()]).read(
        client, payload, sent, known=known, context=0, base=lambda: tensors
    )


@pytest.mark.parametrize("method", methods.names())
def test_what_a_method_asks_for_besides_weights_has_a_range_or_a_reason(method, shards):
    for ask, reply, setting in asks_of(method, shards):
        assert taken(ask, reply, setting).tensors.keys() == reply.tensors.keys()
        covered = set().union(*(getattr(check, "names", ()) for check in ask.expects.checks)) | ask.updated
        bare = {n for n, spec in ask.expects.tensors.items() if spec.dtype == torch.float32} - covered
        bare -= {n for n in bare if n.startswith("explored/")}
        masked_zero = ask.phase == TRAIN and not bare
        assert not bare or method in FREE or masked_zero, bare
        for check in ask.expects.checks:
            if not isinstance(check, Range | Signs):
                continue
            name = min(check.names & reply.tensors.keys())
            lie = reply.tensors[name].clone()
            lie.view(-1)[(reply.mask or {}).get(name, torch.ones_like(lie)).reshape(-1).nonzero()[:1]] = -1e30
            with pytest.raises(WireError, match=f"tensor '{name}'"):
                taken(ask, Message({**reply.tensors, name: lie}, reply.mask, reply.scalars), setting)


@pytest.mark.parametrize(("scalars", "words"), [
    ({"loss": 1e308}, "'loss' is 1e.308"), ({"loss": float("inf")}, "finite"), ({"processed": -1}, "'processed' is -1"),
    ({"samples": 2**24 + 1}, "at most 16777216 are believed"), ({"loss": -1e300}, "'loss'"),
])  # fmt: skip
def test_a_scalar_out_of_range_costs_its_sender_the_round(scalars, words, shards):
    ask, reply, setting = next(asks_of("fedavg", shards))
    with pytest.raises(WireError, match=words):
        taken(ask, Message(reply.tensors, reply.mask, {**reply.scalars, **scalars}), setting)


def test_a_scorers_rows_are_believed_up_to_the_bounds():
    ask = Ask(EVALUATE, 1, (0,), Message({}), Expected({}, scalars=SCORES), {})
    job = Job.of(ask, Wire(), {"metric": (0.0, 1.0)}, 0, guards=[Bounds(rows=100)])
    assert job.bounds["samples"] == job.bounds["validation_samples"] == (0, 100)
    assert set(COST_SCALARS) <= set(job.expects.scalars)


def test_one_scorer_weighs_no_more_than_three_others():
    """Of 10, 10 and 10^6 test rows the last counts as 30: (10 * .5 + 10 * .5 + 30 * 1) / 50; unguarded it is all."""
    exchange = SimpleNamespace(
        carried={},
        reply_scalars=[
            {
                "client": k, "samples": rows, "metric": metric, "loss": 1.0, "sparsity": 0.0, "validation_samples": 0,
                "validation": 0.0,
            }
            for k, (rows, metric) in enumerate([(10, 0.5), (10, 0.5), (10**6, 1.0)])
        ],
        down={}, up={}, relayed={}, guards=[Bounds(), Norms(rows=3.0)],
    )  # fmt: skip
    told = client_scores.scores(exchange, [ACCURACY], central=False)
    assert told["accuracy"] == pytest.approx(40 / 50)
    exchange.guards = [Bounds()]
    assert client_scores.scores(exchange, [ACCURACY], central=False)["accuracy"] > 0.99
    assert client_scores.bounds([ACCURACY, AUROC])["auroc"] == (0.0, 1.0)


def test_a_holder_without_rows_does_not_turn_a_weight_into_0(shards):
    """Before: with slices, a client that said samples = 0 and was the only holder set its weights to 0."""
    study = small("heterofl", participation=1.0)
    state, _ = lab(shards, study)
    ask = study.build_method().plan(state)
    alone = replace(ask, clients=ask.clients[:1])
    _, mask = ask.request(ask.clients[0])
    lie = Message({name: torch.zeros(spec.shape) for name, spec in state.setting.specs.items()}, mask, {"samples": 0})
    mean = reduce(alone, state, [(ask.clients[0], lie)])["mean"]
    assert not mean or all(torch.equal(mean[name], state.weights[name]) for name in mean)
    after = study.build_method().absorb(state, reduce(alone, state, [(ask.clients[0], lie)]))
    assert all(torch.equal(after.weights[name], tensor) for name, tensor in state.weights.items())
