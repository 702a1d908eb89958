"""Schedules against the formula and the values of the FedSparsify paper's code."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import ConfigError
from secateur.methods.kit.schedule import Cubic, EveryRound, Geometric, Never, OneShot, PQIndex

# sparsity at round t for S_T = .95, n = 3, computed independently from the published formula
PUBLISHED = {
    40: {2: 0.071, 5: 0.263, 10: 0.518, 20: 0.822, 30: 0.934},
    100: {10: 0.236, 20: 0.449, 50: 0.828},
    200: {10: 0.123, 50: 0.543, 100: 0.829, 150: 0.935},
}


@pytest.mark.parametrize(("rounds", "t", "level"), [(r, t, v) for r, ts in PUBLISHED.items() for t, v in ts.items()])
def test_cubic_values(rounds, t, level):
    assert Cubic(sparsity=0.95).after(t, rounds) == pytest.approx(level, abs=6e-4)


def test_cubic_starts_strictly_after_t0_and_ends_exactly():
    ramp = Cubic(sparsity=0.9, start=1)
    assert ramp.after(0, 10) is None
    assert ramp.after(1, 10) is None
    assert ramp.after(2, 10) == pytest.approx(0.9 * (1 - (8 / 9) ** 3))
    assert ramp.after(10, 10) == 0.9


def test_every_f_rounds_and_the_forced_last_level():
    ramp = Cubic(sparsity=0.95, every=15)
    assert [t for t in range(101) if ramp.after(t, 100) is not None] == [15, 30, 45, 60, 75, 90, 100]
    assert ramp.after(100, 100) == 0.95
    assert ramp.after(90, 100) == pytest.approx(0.95 * (1 - (1 - 89 / 99) ** 3))


def test_tail_leaves_rounds_at_the_final_mask():
    ramp = Cubic(sparsity=0.9, end=-3)
    assert ramp.after(7, 10) == 0.9
    assert [ramp.after(t, 10) for t in (8, 9, 10)] == [None, None, None]
    assert Cubic(end=-30).after(1, 10) == 0.9  # a tail longer than the run: one cut after round 1


@given(st.floats(0, 0.99), st.integers(2, 60), st.floats(1, 12))
def test_cubic_never_falls_and_never_exceeds_the_target(target, rounds, exponent):
    levels = [
        x for t in range(rounds + 1) if (x := Cubic(sparsity=target, exponent=exponent).after(t, rounds)) is not None
    ]
    assert levels == sorted(levels)
    assert all(level <= target for level in levels)
    assert levels[-1] == target


def test_initial_sparsity_is_where_the_ramp_begins():
    assert Cubic(sparsity=0.9, initial=0.5).after(2, 1000) == pytest.approx(0.5, abs=2e-3)


def test_one_shot_at_start_at_a_round_and_from_the_end():
    assert OneShot(0.5, at=0).after(0, 10) == 0.5
    assert OneShot(0.5, at=3).after(3, 10) == 0.5
    assert OneShot(0.5, at=-4).after(6, 10) == 0.5
    assert OneShot(0.5, at=-40).after(0, 10) == 0.5
    assert OneShot(0.5, at=-4).after(7, 10) is None


def test_never_and_every_round():
    assert Never().after(3, 5) is None
    assert EveryRound(0.3).after(3, 5) == 0.3


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cubic(sparsity=1.0), lambda: Cubic(initial=0.95), lambda: Cubic(start=-1), lambda: Cubic(every=0),
        lambda: Cubic(exponent=0), lambda: Cubic(end=3), lambda: OneShot(-0.1), lambda: EveryRound(1.5),
    ],
)  # fmt: skip
def test_out_of_bounds_names_the_setting(make):
    with pytest.raises(ConfigError, match=r"schedule\.\w+ = .* must be"):
        make()


def test_geometric_by_hand():
    tickets = Geometric(sparsity=0.5, share=0.2, every=3)
    levels = {t: tickets.after(t, 20) for t in range(21)}
    assert {t: v for t, v in levels.items() if v is not None} == pytest.approx({3: 0.2, 6: 0.36, 9: 0.488, 12: 0.5})
    short = Geometric(sparsity=0.9, share=0.2, every=3)
    assert {t: v for t in range(9) if (v := short.after(t, 8)) is not None} == pytest.approx({3: 0.2, 6: 0.36, 8: 0.9})
    assert [Geometric(sparsity=0.0).after(t, 5) for t in range(6)] == [None] * 6


@given(st.floats(0.01, 0.95), st.floats(0.05, 0.9), st.integers(1, 9), st.integers(1, 80))
def test_geometric_never_falls_and_ends_at_the_target(target, share, every, rounds):
    schedule = Geometric(sparsity=target, share=share, every=every)
    levels = [x for t in range(rounds + 1) if (x := schedule.after(t, rounds)) is not None]
    assert levels == sorted(levels)
    assert levels[-1] == target


@pytest.mark.parametrize("bad", [{"share": 0.0}, {"share": 1.0}, {"every": 0}])
def test_geometric_bounds(bad):
    with pytest.raises(ConfigError, match=f"schedule.{next(iter(bad))}"):
        Geometric(**bad)


# ---- PQ index


def test_equal_weights_lose_nothing_and_one_large_weight_loses_the_rest():
    assert PQIndex().goes(torch.ones(100)) == pytest.approx(0.0)
    lonely = torch.zeros(100)
    lonely[3] = 5.0
    assert PQIndex(beta=1.0).goes(lonely) == pytest.approx(0.99)  # m = 1
    assert PQIndex(beta=0.5).goes(lonely) == 0.5
    assert PQIndex().goes(torch.zeros(4)) == 0.0


def test_the_share_by_hand():
    # |w|_1/2 = (2 + 1)^2 = 9, |w|_1 = 5, d = 2: I = 1 - 2^-1 9/5 = 0.1; m/d = (1 - I)^1 = 0.9
    assert PQIndex().goes(torch.tensor([4.0, -1.0])) == pytest.approx(0.1)
    assert PQIndex(gamma=1.2).goes(torch.tensor([4.0, -1.0])) == pytest.approx(0.12)
    assert PQIndex(eta=1.0).goes(torch.tensor([4.0, -1.0])) == pytest.approx(1 - 0.9 / 4)


@pytest.mark.parametrize(
    ("draw", "share"),
    [(torch.distributions.Normal(0, 1), 0.153), (torch.distributions.Laplace(0, 1), 0.215)],
)
def test_known_distributions(draw, share):
    """15.3 % of Gaussian weights and 21.5 % of Laplace weights go in one step."""
    torch.manual_seed(0)
    assert PQIndex().goes(draw.sample((400_000,))) == pytest.approx(share, abs=0.003)


def test_events_come_every_few_rounds():
    schedule = PQIndex(every=3, most=0.8)
    assert [t for t in range(8) if schedule.due(t, 7)] == [3, 6]
    assert not PQIndex(most=0.0).due(3, 7)
