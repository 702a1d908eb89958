"""The headline of a page: which method under which budget of bytes, and what is shown of it."""

import dataclasses

import pytest

from secateur.learning.metrics import ACCURACY, MAE
from secateur.report.headline import as_good_as_dense, budgets, by_budget, headline, saved
from secateur.report.outcomes import Outcome
from secateur.report.verdicts import DENSE, Group, compare_groups


def group(name, scores, cost, *, control="", metric=ACCURACY, baseline="", size=1000, sparsity=0.0):
    one = Outcome(metric, 0.0, 0.5, 0.2, sparsity, cost, 2.0, 50, 80, 10, client_bytes=cost, size=size)
    runs = {seed: dataclasses.replace(one, quality=score) for seed, score in enumerate(scores)}
    return Group(name, control, runs, baseline)


def lines(*groups):
    return compare_groups("iid", groups)


BEST, LESS = (0.80, 0.81, 0.85), (0.70, 0.70, 0.73)
"""Differences 0.10, 0.11, 0.12: t = 0.11 sqrt(3) / 0.01 = 19.05; with two degrees of freedom the two-sided p is
1 - t / sqrt(2 + t²) = 0.00274."""


def test_a_budget_is_round_and_the_best_within_it_is_named():
    assert budgets([1.3e6, 4.1e6, 5.2e6]) == [(2e6, 0), (5e6, 1), (1e7, 2)]
    assert budgets([1.3e6, 1.4e6]) == [(2e6, 1)]  # both fit: the better one, which is the dearer
    assert budgets([900.0, 90_000.0]) == [(50_000.0, 0), (100_000.0, 1)]  # the largest that the dearer does not fit
    many = budgets([10.0**power for power in range(4, 13)])
    assert len(many) <= 5
    assert many[-1][1] == 8


def test_what_is_best_within_a_budget_and_shown_to_be():
    found = lines(group("A 90 %", BEST, 4_000_000), group("B", LESS, 3_000_000))
    assert by_budget(found) == [
        "Up to 5 MB a client: A 90 %, accuracy 82.0 ± 6.6 %; shown to be better than all else that fits."
    ]


def test_with_more_pairs_the_same_difference_is_not_shown():
    """B: 0.00274 * 21 pairs of seven lines = 0.058. The others: t = 14.3, p = 0.0048."""
    others = [group(f"C{n}", (0.1, 0.2, 0.3), 3_500_000) for n in range(5)]
    said = by_budget(lines(group("A", BEST, 4_000_000), group("B", LESS, 3_500_000), *others))
    assert said == ["Up to 5 MB a client: A, accuracy 82.0 ± 6.6 %; not shown to be better than B, C0, C1 and 3 more."]


def test_one_seed_shows_nothing():
    said = by_budget(lines(group("A", [0.8], 900), group("B", [0.7], 30)))
    assert said == [
        "Up to 500 B a client: B, accuracy 70.0 %; nothing else fits.",
        "Up to 1 kB a client: A, accuracy 80.0 %, one seed: not shown to be better than anything else.",
    ]


def test_of_errors_the_lowest_is_best():
    said = by_budget(lines(group("A", [4.0], 900, metric=MAE), group("B", [7.0], 900, metric=MAE)))
    assert said == ["Up to 1 kB a client: A, MAE 4.00, one seed: not shown to be better than anything else."]


def test_as_good_as_dense_is_shown_or_not():
    """A differs from dense by -0.001 ± 0.0005 around, B by -0.1; the margin is 0.01."""
    dense = group("FedAvg", (0.900, 0.910, 0.920), 10_000_000, control=DENSE)
    good = group("A", (0.8990, 0.9085, 0.9195), 2_500_000, baseline="FedAvg")
    bad = group("B", (0.80, 0.81, 0.83), 1_000_000, baseline="FedAvg")
    [said] = as_good_as_dense(lines(dense, good, bad))
    assert said.startswith("Shown to be as good as dense FedAvg (no more than 1 point worse), for the fewest bytes: ")
    assert said.endswith("bytes: A, with 2.5 MB a client, 25 % of FedAvg's.")
    assert as_good_as_dense(lines(dense, bad)) == [
        "No method is shown to be as good as dense FedAvg (no more than 1 point worse)."
    ]


def test_a_single_run_says_what_it_saved():
    dense = group("FedAvg", [0.9], 1000, control=DENSE)
    ours = group("A", [0.8], 250, baseline="FedAvg", size=100, sparsity=0.9)
    found = headline(lines(dense, ours))
    reached, beside, took = found["sentences"]
    assert (reached, beside) == (
        "A reached accuracy 80.0 %, 90.0 % of its weights removed.",
        "Beside dense FedAvg, with accuracy 90.0 %: -10.0 points (above 0 is better), one seed: nothing is shown.",
    )
    assert took == (
        "Of what dense FedAvg took, it took 25 % of the bytes carried, 100 % of the client seconds, "
        "10 % of the shipped bytes, 100 % of the MACs, zeros skipped, 100 % of the MACs, units removed."
    )
    assert found["figure"]["views"][0]["data"][0]["x"] == pytest.approx([25, 100, 10, 100, 100])


def test_without_a_dense_twin_nothing_is_said_to_be_saved():
    ours = group("A", [0.8], 250)
    found = headline(lines(ours))
    assert found["sentences"][1] == "No dense FedAvg was run beside it: what it saved is not known."
    assert found["figure"] == {}
    going = group("A", [0.8], 250, size=0)
    assert saved(lines(going)[0], []) == ["Not finished: A has reached accuracy 80.0 % so far."]
