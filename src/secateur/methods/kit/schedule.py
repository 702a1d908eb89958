"""Schedules: how sparse the model becomes, and at the end of which round.

Rounds count from 1; an event of round t happens at its end, and round 0 means before round 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.contract.state import State
from secateur.errors import check


class Schedule(ABC):
    """Base of schedules, which say when pruning happens and how sparse the model is after it; frozen dataclasses.

    Your own schedule derives from this class and writes ``level``, or derives from ``Planned`` if the sparsity follows
    from the round alone.
    """

    planned: ClassVar[bool] = False  # whether the sparsity follows from the round alone

    def due(self, done: int, rounds: int) -> bool:
        """Return whether there may be an event after ``done`` of ``rounds`` rounds.

        The server and the clients both call it before the weights of that round are known, so it must follow from the
        numbers alone. If False, nothing is measured, nobody votes and ``level`` is not called. The default is True,
        which costs a vote or a statistic in every round if other slots need one.
        """
        del done, rounds
        return True

    @abstractmethod
    def level(self, state: State) -> float | None:
        """Return the sparsity after ``state.round`` rounds, the pruned share of prunable entries; None or 0: no event.

        ``state.mask`` always names the prunable tensors and says which entries are left. If clients make masks, each
        client calls this with its own trained weights in ``state.weights``.
        """


class Planned(Schedule):
    """Base of schedules whose sparsity follows from the round alone."""

    planned = True

    @abstractmethod
    def after(self, done: int, rounds: int) -> float | None:
        """Return the sparsity after ``done`` of ``rounds`` rounds; None: no event."""

    def due(self, done: int, rounds: int) -> bool:
        """Return whether there is an event after ``done`` rounds."""
        return bool(self.after(done, rounds))

    def level(self, state: State) -> float | None:
        """Return the planned sparsity of the round."""
        return self.after(state.round, state.setting.rounds)


@dataclass(frozen=True)
class Never(Planned):
    """No pruning in any round."""

    def after(self, done: int, rounds: int) -> float | None:
        """Return None."""
        del done, rounds
        return None


@dataclass(frozen=True)
class OneShot(Planned):
    """One pruning to the final sparsity.

    Attributes:
        sparsity: the fraction of weights that is removed.
        at: the round at whose end weights are pruned; 0: before round 1; negative: counted from the last round
            (-10 leaves ten rounds to tune, FedSparsify's one-shot baseline).

    Reference: the OneShot baseline of FedSparsify, arXiv 2204.12430.
    """

    sparsity: float = 0.9
    at: int = -10

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)

    def after(self, done: int, rounds: int) -> float | None:
        """Return the sparsity at the round of the pruning.

        A negative ``at`` that reaches back before the first round prunes before round 1.
        """
        at = self.at if self.at >= 0 else max(0, rounds + self.at)
        return self.sparsity if done == at else None


@dataclass(frozen=True)
class EveryRound(Planned):
    """The same sparsity in every round, with a new mask before each (AutoFLIP).

    Attributes:
        sparsity: T_p of AutoFLIP (the paper's experiments: 0.30; ablation 0.1 to 0.5).

    Reference: AutoFLIP, arXiv 2405.10271.
    """

    sparsity: float = 0.30

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)

    def after(self, done: int, rounds: int) -> float | None:
        """Return the sparsity."""
        del done, rounds
        return self.sparsity


@dataclass(frozen=True)
class Geometric(Planned):
    """Iterative pruning: every ``every`` rounds a share of the weights that are left is removed, until S_T.

    s = min(S_T, 1 - (1 - share)^k) after the k-th event; S_T is forced at the last round if it was not reached.

    Attributes:
        sparsity: S_T, the final sparsity.
        share: p, the share of the weights left that an event removes (lottery tickets: 20 %).
        every: the number of rounds between events.

    With ``recovery = rewind`` these are lottery tickets.

    Reference: Frankle and Carbin, arXiv 1803.03635.
    """

    sparsity: float = 0.9
    share: float = 0.2
    every: int = 1

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        check(0 < self.share < 1, name="schedule.share", value=self.share, must="be in (0, 1)")
        check(self.every >= 1, name="schedule.every", value=self.every, must="be at least 1")

    def after(self, done: int, rounds: int) -> float | None:
        """Return the sparsity at the rounds of events."""
        before, now = (1 - (1 - self.share) ** k for k in ((done - 1) // self.every, done // self.every))
        if done == 0 or self.sparsity == 0 or before >= self.sparsity:
            return None
        if done == rounds:
            return self.sparsity
        return min(self.sparsity, now) if done % self.every == 0 else None


@dataclass(frozen=True)
class Cubic(Planned):
    """FedSparsify's ramp: s_t = S_T + (S_0 - S_T) (1 - (F floor(t/F) - t_0) / (T - t_0))^n.

    Attributes:
        sparsity: S_T, reached exactly at round ``end``.
        initial: S_0, where the ramp starts.
        start: t_0; the first event is strictly after it.
        every: F, the number of rounds between events; S_T is forced at the end if F does not divide it.
        exponent: n; larger prunes earlier (the paper studies 1, 3, 6, 12); 1 is a linear ramp.
        end: T of the formula; 0 means the last round, -k leaves k rounds of tuning at the final mask.

    Reference: FedSparsify, arXiv 2204.12430; forcing S_T at the end is ours (the published formula falls
    short when F does not divide T).
    """

    sparsity: float = 0.9
    initial: float = 0.0
    start: int = 1
    every: int = 1
    exponent: float = 3.0
    end: int = 0

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        check(
            0 <= self.initial <= self.sparsity, name="schedule.initial", value=self.initial, must="be in [0, sparsity]"
        )
        check(self.start >= 0, name="schedule.start", value=self.start, must="be 0 or more")
        check(self.every >= 1, name="schedule.every", value=self.every, must="be at least 1")
        check(self.exponent > 0, name="schedule.exponent", value=self.exponent, must="be above 0")
        check(self.end <= 0, name="schedule.end", value=self.end, must="be 0 or negative (counted from the last round)")

    def after(self, done: int, rounds: int) -> float | None:
        """Return s_t at the rounds of events."""
        last = max(1, rounds + self.end)
        if done == last:
            return self.sparsity
        if done <= self.start or done > last or done % self.every:
            return None
        level = (
            self.sparsity
            + (self.initial - self.sparsity) * (1 - (done - self.start) / (last - self.start)) ** self.exponent
        )
        return level if level > 0 else None


@dataclass(frozen=True)
class PQIndex(Schedule):
    """Sparsity-informed adaptive pruning: the share to prune follows from how unequal the surviving weights are.

    For the d surviving weights w of all tensors: I = 1 - d^(1/q - 1/p) |w|_p / |w|_q is their index of inequality,
    m = d (1 + eta)^(-q/(q-p)) (1 - I)^(q p/(q-p)), and the share min(gamma (1 - m/d), beta) of them is pruned.

    Attributes:
        most: the sparsity that is never exceeded.
        every: the number of rounds between prunings.
        p, q: the norms of the index, 0 < p < q.
        eta, gamma, beta: see the formulas.

    Reference: Diao et al., "Pruning Deep Neural Networks from a Sparsity Perspective", arXiv 2302.05601.
    """

    most: float = 0.99
    every: int = 5
    p: float = 0.5
    q: float = 1.0
    eta: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        check(0 <= self.most < 1, name="schedule.most", value=self.most, must="be in [0, 1)")
        check(self.every >= 1, name="schedule.every", value=self.every, must="be at least 1")
        check(0 < self.p < self.q, name="schedule.p", value=self.p, must="be above 0 and below schedule.q")
        check(self.eta >= 0, name="schedule.eta", value=self.eta, must="be 0 or more")
        check(self.gamma > 0, name="schedule.gamma", value=self.gamma, must="be above 0")
        check(0 < self.beta <= 1, name="schedule.beta", value=self.beta, must="be in (0, 1]")

    def due(self, done: int, rounds: int) -> bool:
        """Return whether weights are pruned after this round."""
        del rounds
        return bool(self.most and done and done % self.every == 0)

    def level(self, state: State) -> float | None:
        """Return the sparsity that follows from the surviving weights, at most ``most``."""
        held = state.mask or {}
        left = torch.cat([state.weights[name][kept] for name, kept in held.items()])
        total = sum(kept.numel() for kept in held.values())
        return min(self.most, 1 - left.numel() * (1 - self.goes(left)) / total)

    def goes(self, survivors: torch.Tensor) -> float:
        """Return the share of surviving weights to prune, from their values in any shape."""
        size = survivors.reshape(-1).double().abs()
        if not size.any():
            return 0.0
        p, q, count = self.p, self.q, size.numel()
        norms = (size**p).sum() ** (1 / p) / (size**q).sum() ** (1 / q)
        index = 1 - count ** (1 / q - 1 / p) * float(norms)
        kept = (1 + self.eta) ** (-q / (q - p)) * max(0.0, 1 - index) ** (q * p / (q - p))
        share: float = min(self.gamma * (1 - kept), self.beta)
        return max(0.0, share)


def _check_sparsity(value: float) -> None:
    check(0 <= value < 1, name="schedule.sparsity", value=value, must="be in [0, 1)")
