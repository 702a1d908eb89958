"""Flower's own robust strategies around a pruned model, and Krum's scores against Flower's."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum, Strategy
from flwr.serverapp.strategy.multikrum import select_multikrum

from secateur.aggregation.krum import scores
from secateur.aggregation.median import Median
from secateur.aggregation.robust import without_highest
from secateur.errors import ConfigError
from secateur.flower import Pruned, prune
from secateur.methods.fedsparsify import FedSparsify
from secateur.methods.kit.schedule import Cubic
from test_flower import federate, net

ROBUST = {
    "median": FedMedian, "trimmed": lambda **more: FedTrimmedAvg(beta=0.2, **more),
    "krum": lambda **more: Krum(num_malicious_nodes=1, **more),
    "multikrum": lambda **more: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=4, **more),
    "bulyan": lambda **more: Bulyan(num_malicious_nodes=0, **more),
}  # fmt: skip


class Noting(Strategy):
    """A strategy around another one, which notes what that is given to merge and what it makes of it."""

    def __init__(self, inner):
        self.inner, self.rounds = inner, []

    def summary(self):
        pass

    def configure_train(self, *given):
        return self.inner.configure_train(*given)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        given = [next(iter(r.content.array_records.values())).to_torch_state_dict() for r in replies]
        arrays, metrics = self.inner.aggregate_train(server_round, replies)
        self.rounds.append((given, arrays.to_torch_state_dict()))
        return arrays, metrics

    def configure_evaluate(self, *given):
        return self.inner.configure_evaluate(*given)

    def aggregate_evaluate(self, *given):
        return self.inner.aggregate_evaluate(*given)


@pytest.mark.parametrize("name", ROBUST)
def test_flowers_robust_strategies_see_no_zeros_of_pruned_weights(name):
    """At a pruned weight all nodes have one value, the server's own: it adds to no distance, and no median sees zeros.

    At surviving weights what comes out lies among the nodes' values, and the model learns.
    """
    noting = Noting(ROBUST[name]())
    strategy = Pruned(noting, FedSparsify(schedule=Cubic(sparsity=0.75)), net())
    rounds = 3 if name == "bulyan" else 8  # Flower's Bulyan takes seconds for a round
    result, _ = federate(strategy, [prune(net())], rounds=rounds)
    assert result.evaluate_metrics_clientapp[rounds]["accuracy"] > (0.6 if rounds < 8 else 0.8)
    sparse = 0
    for given, made in noting.rounds:
        for tensor in made:
            values = torch.stack([arrays[tensor].double() for arrays in given])
            alike = (values == values[0]).all(dim=0)
            sparse += int(alike.sum())
            assert torch.allclose(made[tensor].double()[alike], values[0][alike], rtol=1e-6)
            assert bool((made[tensor].double() >= values.min(dim=0).values - 1e-6).all())
            assert bool((made[tensor].double() <= values.max(dim=0).values + 1e-6).all())
    prunable = sum(mask.numel() for mask in strategy.state.mask.values())
    pruned = sum(round(row["sparsity"] * prunable) for row in strategy.ledger[:-1])  # under which the next rounds went
    assert 0 < pruned <= sparse


def test_a_robust_rule_is_not_dropped_in_silence():
    """The wrapped strategy merges; a method that brings a robust rule is told which strategies have one."""
    with pytest.raises(ConfigError, match="aggregator median would be dropped: .* such as FedMedian"):
        Pruned(FedAvg(), FedSparsify(aggregator=Median()), net())


@pytest.mark.parametrize("seed", range(5))
def test_who_is_kept_is_whom_flowers_multikrum_keeps(seed):
    """Ten clients of 30 weights, two of them far away: an implementation that is not ours chooses the same eight."""
    draw = np.random.default_rng(seed)
    updates = draw.normal(size=(10, 30))
    updates[[3, 7]] += 2.0
    contents = [RecordDict({"arrays": ArrayRecord(torch_state_dict={"w": torch.tensor(u)})}) for u in updates]
    theirs = select_multikrum(contents, num_malicious_nodes=2, num_nodes_to_select=8)
    distances = torch.cdist(torch.tensor(updates), torch.tensor(updates)).square()
    ours = without_highest(scores(distances, 2), 2)
    assert [any(content is kept for kept in theirs) for content in contents] == ours.tolist()
    assert not ours[3]
