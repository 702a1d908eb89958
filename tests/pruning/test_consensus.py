"""The majority vote against hand-worked cases."""

import pytest
import torch

from secateur.pruning.consensus import vote

# three clients, eight weights: who keeps which
CLIENTS = torch.tensor(
    [
        [1, 1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 0, 0],
        [1, 0, 1, 0, 0, 0, 1, 0],
    ]
)
# votes:  3  2  2  0  2  1  1  0


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("majority", [1, 1, 1, 0, 1, 0, 0, 0]),  # v > 1.5
        ("half", [1, 1, 1, 0, 1, 1, 1, 0]),  # v >= floor(3/2) = 1
        ("union", [1, 1, 1, 0, 1, 1, 1, 0]),
        ("intersection", [1, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_three_clients_by_eight_weights(rule, kept):
    votes = {"w": CLIENTS.sum(0)}
    mask = vote(rule, votes, 3, {"w": torch.ones(8)}, budget=4)["w"]
    assert mask.int().tolist() == kept


def test_ties_go_to_the_larger_mean_magnitude_while_there_is_room():
    votes = {"a": torch.tensor([2, 1, 1]), "b": torch.tensor([[1], [0]])}
    magnitude = {"a": torch.tensor([0.1, 0.5, 0.2]), "b": torch.tensor([[0.9], [9.0]])}
    by_budget = {
        budget: {n: m.flatten().tolist() for n, m in vote("majority", votes, 2, magnitude, budget).items()}
        for budget in (0, 1, 2, 3, 5)
    }
    assert by_budget[0] == by_budget[1] == {"a": [True, False, False], "b": [False, False]}
    assert by_budget[2] == {"a": [True, False, False], "b": [True, False]}
    assert by_budget[3] == {"a": [True, True, False], "b": [True, False]}
    assert by_budget[5] == {"a": [True, True, True], "b": [True, False]}


# two weights that all kept, one that nobody did, one in dispute between the first two voters
@pytest.mark.parametrize(
    ("rule", "voters", "votes", "kept"),
    [
        ("majority", 1, [1, 1, 0, 0], [1, 1, 0, 0]),
        ("half", 1, [1, 1, 0, 0], [1, 1, 0, 0]),  # floor(1/2) = 0 votes: the published code keeps all four
        ("union", 1, [1, 1, 0, 0], [1, 1, 0, 0]),
        ("intersection", 1, [1, 1, 0, 0], [1, 1, 0, 0]),
        ("majority", 2, [2, 2, 0, 1], [1, 1, 0, 0]),  # v > 1; the tie finds no room in a budget of 2
        ("half", 2, [2, 2, 0, 1], [1, 1, 0, 1]),  # v >= 1
        ("union", 2, [2, 2, 0, 1], [1, 1, 0, 1]),
        ("intersection", 2, [2, 2, 0, 1], [1, 1, 0, 0]),
        ("majority", 0, [0, 0, 0, 0], [1, 1, 1, 1]),  # nobody said anything: nothing goes
        ("half", 0, [0, 0, 0, 0], [1, 1, 1, 1]),
        ("union", 0, [0, 0, 0, 0], [1, 1, 1, 1]),
        ("intersection", 0, [0, 0, 0, 0], [1, 1, 1, 1]),
    ],
)
def test_one_voter_two_voters_and_none(rule, voters, votes, kept):
    mask = vote(rule, {"w": torch.tensor(votes)}, voters, {"w": torch.ones(4)}, budget=2)["w"]
    assert mask.int().tolist() == kept
