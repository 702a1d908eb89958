"""Allocations: counts are exact, ties included."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import ConfigError
from secateur.pruning.allocation import (
    LAMP,
    Given,
    Global,
    Quantile,
    RateDistortion,
    Threshold,
    Uniform,
    UniformPlus,
    kept_by_guard,
    lowest,
    pruned_count,
    uniform_plus,
)
from secateur.pruning.knapsack import knapsack
from secateur.pruning.ranking import lamp
from secateur.pruning.structure import Layout

scores_lists = st.lists(st.integers(-3, 3), min_size=1, max_size=60)


def test_lowest_prunes_the_later_of_equal_scores():
    flags = lowest(torch.tensor([1.0, 0.0, 1.0, 1.0, 2.0]), 3)
    assert flags.tolist() == [False, True, True, True, False]
    assert lowest(torch.tensor([1.0, 0.0]), 0).tolist() == [False, False]


@given(scores_lists, st.floats(0, 0.999))
def test_lowest_against_a_sort(values, share):
    count = int(share * len(values))
    flags = lowest(torch.tensor(values, dtype=torch.float64), count)
    order = sorted(range(len(values)), key=lambda i: (values[i], -i))  # lowest first, later index first
    assert sorted(i for i, f in enumerate(flags.tolist()) if f) == sorted(order[:count])


@pytest.mark.parametrize(("s", "n", "count"), [(0.29, 100, 29), (0.2, 10, 2), (0.95, 20, 19), (0.3, 7, 2), (0, 5, 0)])
def test_pruned_count(s, n, count):
    assert pruned_count(s, n) == count


@given(scores_lists, scores_lists, st.floats(0, 0.99), st.booleans())
def test_global_count_is_exact_over_all_tensors(one, two, s, guard):
    scores = {"a": torch.tensor(one, dtype=torch.float32), "b": torch.tensor(two, dtype=torch.float32)[None]}
    mask = Global(guard=guard).keep(scores, s)
    total = len(one) + len(two)
    assert sum(int(m.sum()) for m in mask.values()) == total - math.floor(s * total + 1e-6)
    assert [m.shape for m in mask.values()] == [v.shape for v in scores.values()]


def test_global_by_hand():
    scores = {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([4.0, 2.0, 3.0])}
    mask = Global(guard=False).keep(scores, 0.4)
    assert mask["a"].tolist() == [True, False]
    assert mask["b"].tolist() == [True, False, True]


def two_rows():
    """Return 80 scores: a row of 40 large ones, 79 to 40, and a row of 40 small ones of which the third is largest."""
    scores = {"w": torch.stack([torch.arange(79.0, 39.0, -1.0), torch.arange(40.0) / 100])}
    scores["w"][1, 2] = 0.9
    return scores


def test_guard_keeps_the_best_weight_of_each_unit_within_the_same_count():
    """Budget 40 for two rows: the 40 largest are the first row; its least gives way to the best of the second."""
    plain = Global(guard=False).keep(two_rows(), 0.5)
    assert plain["w"].sum(1).tolist() == [40, 0]
    guarded = Global(guard=True).keep(two_rows(), 0.5)
    assert guarded["w"][0].tolist() == [True] * 39 + [False]
    assert guarded["w"][1].nonzero().flatten().tolist() == [2]
    assert kept_by_guard(guarded, plain) == 1


def test_guard_stands_back_where_fewer_than_twenty_weights_may_stay_for_each_unit():
    assert Global().keep(two_rows(), 41 / 80)["w"].sum(1).tolist() == [39, 0]  # 39 < 20 * 2
    many = {"last": torch.tensor([[4.0], [3.0], [2.0], [1.0]]), "first": torch.tensor([[1.5], [2.5]])}
    assert Global().keep(many, 0.5)["last"].flatten().tolist() == [True, True, False, False]
    assert Global().keep(many, 0.5)["first"].flatten().tolist() == [False, True]  # 4, 3, 2.5, whichever tensor is first


def test_guard_lets_dead_units_stay_dead_and_does_not_count_them():
    """Budget 20 for one living row: the guard holds, and lifts the best of that row above the least of the bias."""
    dead = {"w": torch.tensor([[0.1, 0.2], [-torch.inf, -torch.inf]]), "b": torch.arange(1.0, 37.0)}
    assert Global(guard=False).keep(dead, 0.5)["b"].tolist() == [False] * 16 + [True] * 20
    mask = Global().keep(dead, 0.5)
    assert mask["w"].tolist() == [[False, True], [False, False]]
    assert mask["b"].tolist() == [False] * 17 + [True] * 19


def test_rows_of_an_embedding_are_tokens_and_not_guarded():
    """Budget 40: on the model the two rows of ``fc`` are guarded; without it 20 (2 + 2) > 40, and nobody is."""
    layout = Layout({"e.weight": "weight", "fc.weight": "weight"}, tokens=frozenset({"e.weight"}))
    scores = {"e.weight": torch.arange(90.0, 40.0, -1.0).reshape(2, 25), "fc.weight": torch.full((2, 15), 0.5)}
    scores["fc.weight"][1, 2] = 0.6
    mask = Global().on(layout).keep(scores, 0.5)
    assert mask["e.weight"].flatten().tolist() == [True] * 38 + [False] * 12
    assert [row.nonzero().flatten().tolist() for row in mask["fc.weight"]] == [[0], [2]]
    assert Global().keep(scores, 0.5)["e.weight"].flatten().tolist() == [True] * 40 + [False] * 10
    for other in (Global(guard=False), Uniform()):
        assert other.on(layout) is other


@given(st.data(), st.floats(0, 0.999))
def test_guard_is_exact_and_gives_way_to_plain_scores(data, s):
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 60)), min_size=1, max_size=3))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    lift = data.draw(st.sampled_from([0, 5]))  # the first tensor above the others, or ties everywhere
    scores = {f"t{k}": torch.randint(-3, 4, shape, generator=draw) + lift * (k == 0) for k, shape in enumerate(shapes)}
    total, rows = sum(v.numel() for v in scores.values()), sum(len(v) for v in scores.values())
    budget = total - math.floor(s * total + 1e-6)
    mask, plain = Global().keep(scores, s), Global(guard=False).keep(scores, s)
    assert sum(int(m.sum()) for m in mask.values()) == budget
    if budget < rows:
        assert all(torch.equal(mask[n], plain[n]) for n in scores)
    if budget >= 20 * rows:
        assert all(bool(m.any(1).all()) for m in mask.values())
    assert kept_by_guard(mask, plain) <= budget / 20


def test_guard_accepts_empty_tensors():
    assert Global().keep({"w": torch.zeros(0, 3)}, 0.5)["w"].shape == (0, 3)
    assert Global().keep({}, 0.5) == {}


def test_uniform_is_exact_in_each_tensor():
    mask = Uniform().keep({"a": torch.arange(10.0), "b": torch.arange(5.0).reshape(5, 1)}, 0.4)
    assert mask["a"].tolist() == [False] * 4 + [True] * 6
    assert mask["b"].flatten().tolist() == [False, False, True, True, True]


def test_quantile_matches_torch_quantile_on_distinct_scores():
    g = torch.randperm(1000, generator=torch.Generator().manual_seed(1)).float()
    for level in (0.1, 0.3, 0.5):
        mask = Quantile().keep({"a": g[:400], "b": g[400:]}, level)
        kept = torch.cat([mask["a"], mask["b"]])
        assert torch.equal(kept, g > torch.quantile(g, level))
        assert abs((~kept).float().mean().item() - level) <= 1 / 1000 + 1e-9


def test_quantile_prunes_ties_at_the_threshold_and_zero_prunes_nothing():
    g = {"a": torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0])}
    assert Quantile().keep(g, 0.2)["a"].tolist() == [False, False, False, True, True]
    assert Quantile().keep(g, 0.0)["a"].all()
    assert Quantile().keep({}, 0.3) == {}


def test_threshold_reads_the_level_as_a_score():
    g = {"a": torch.tensor([0.1, 0.3, 0.4])}
    assert Threshold().keep(g, 0.3)["a"].tolist() == [False, False, True]
    assert Threshold().keep(g, 0.0)["a"].all()


def test_lamp_by_hand_keeps_the_best_of_every_tensor():
    scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([0.02, 0.01])}
    # a: 9/9, 1/14, 4/13; b: 4/4, 1/5: in ascending order a[1], b[1], a[2]
    assert lamp(scores["a"]).tolist() == pytest.approx([1.0, 1 / 14, 4 / 13])
    keep = LAMP().keep(scores, 0.6)
    assert keep["a"].tolist() == [True, False, False]
    assert keep["b"].tolist() == [True, False]


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=30), st.integers(0, 5))
def test_lamp_against_its_definition(values, pruned):
    scores = torch.tensor(values, dtype=torch.float64)
    scores[:pruned] = -torch.inf
    found = lamp(scores)
    for u, s in enumerate(scores.tolist()):
        if s == -torch.inf:
            assert found[u] == -torch.inf
            continue
        above = sum(t * t for v, t in enumerate(scores.tolist()) if t > s or (t == s and v <= u))
        assert float(found[u]) == pytest.approx(s * s / above if above > 1e-300 else 0.0, rel=1e-9)


# ---- uniform_plus, rate_distortion


def test_the_ends_keep_more():
    shapes = {"conv": (4, 1, 3, 3), "a": (20, 10), "b": (10, 20), "end": (10, 5)}
    kept = uniform_plus(shapes, 0.9)
    assert kept["conv"] == 36
    assert kept["end"] == 10
    assert sum(kept.values()) == 486 - 437
    assert {kept["a"], kept["b"]} == {2, 1}
    assert uniform_plus(shapes, 0.0) == {"conv": 36, "a": 200, "b": 200, "end": 50}
    linear = uniform_plus({"a": (20, 10), "b": (10, 20), "end": (10, 5)}, 0.5)
    assert linear == {"a": 100, "b": 100, "end": 25}  # no convolution: the front is like the others


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=5),
    st.floats(0, 0.999),
)
def test_uniform_plus_is_exact(sizes, sparsity):
    scores = {f"t{k}": torch.rand(shape) for k, shape in enumerate(sizes)}
    total = sum(s.numel() for s in scores.values())
    mask = UniformPlus().keep(scores, sparsity)
    assert sum(int(m.sum()) for m in mask.values()) == total - pruned_count(sparsity, total)


def brute(sizes, curves, target):
    """Return the least sum of distortions over all choices of levels that prune at least ``target``."""
    best = float("inf")
    for levels in itertools.product(*(range(len(c)) for c in curves.values())):
        gone = sum(sizes[n] * k // (len(curves[n]) - 1) for n, k in zip(curves, levels, strict=True))
        if gone >= target:
            best = min(best, sum(curves[n][k] for n, k in zip(curves, levels, strict=True)))
    return best


@given(st.data())
def test_the_knapsack_is_the_least_of_all_choices(data):
    names = ["a", "b", "c"]
    sizes = {n: 4 * data.draw(st.integers(1, 5)) for n in names}
    curves = {n: [0.0, *sorted(data.draw(st.lists(st.floats(0, 9), min_size=4, max_size=4)))] for n in names}
    target = data.draw(st.integers(0, sum(sizes.values()) // 4)) * 4
    sparsity = target / sum(sizes.values())
    gone = knapsack(sizes, curves, pruned_count(sparsity, sum(sizes.values())))
    assert sum(gone.values()) == target
    if all(count % (sizes[n] // 4) == 0 for n, count in gone.items()):  # nothing had to be given back
        found = sum(curves[n][count // (sizes[n] // 4)] for n, count in gone.items())
        assert found == pytest.approx(brute(sizes, curves, target))


def test_what_is_gone_stays_gone():
    curves = {"a": [0.0, 0.0, 9.0], "b": [0.0, 1.0, 2.0]}
    assert knapsack({"a": 10, "b": 10}, curves, 10) == {"a": 5, "b": 5}
    assert knapsack({"a": 10, "b": 10}, curves, 10, least={"a": 8})["a"] >= 8
    scores = {"a": torch.arange(10.0), "b": torch.arange(10.0)}
    scores["a"][:8] = -torch.inf

    class Hand:
        """A model whose outputs move by the square root of these distortions, by how much of a tensor is gone."""

        def outputs(self, changed, inputs):
            gone = {name: int((tensor == 0).sum()) // 5 for name, tensor in changed.items()}
            return torch.tensor([[curves[name][gone.get(name, 0)] ** 0.5 for name in curves]]).expand(inputs, 2)

    weights = {"a": torch.ones(10), "b": torch.ones(10)}
    mask = RateDistortion(levels=2, proxies=3).measured(scores, weights, Hand()).keep(scores, 0.5)
    assert not mask["a"][:8].any()
    assert sum(int(m.sum()) for m in mask.values()) == 10


def test_given_counts_are_kept_whatever_the_sparsity():
    scores = {"a": torch.tensor([[3.0, 1.0, 2.0]]), "b": torch.tensor([5.0, 4.0])}
    mask = Given("2, 1").keep(scores, 0.9)
    assert mask["a"].tolist() == [[True, False, True]]
    assert mask["b"].tolist() == [True, False]
    for wrong in ("", "2", "2,1,1", "4,1"):
        with pytest.raises(ConfigError, match="a count for each tensor: a 3, b 2"):
            Given(wrong).keep(scores, 0.5)
    with pytest.raises(ConfigError, match="must be counts"):
        Given("two")
