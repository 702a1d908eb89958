"""FedConv: the server learns to make smaller dense models from its large one, and large ones from the trained ones.

    widths     client k has width r^(k mod L), by number of units
    compress   w_l = C_l(W): of each tensor x + f(a x + b) is convolved with a kernel of the size that it loses;  a, b
               and the kernel are learnt by the loss of w_l on public rows
    train      client k trains the dense w_l of its width; it sees an ordinary model
    dilate     W_l = D_l(mean of the cohort's w_l): transposed convolutions, learnt by the loss of W_l
    merge      W <- sum_l n_l (v_l W_l) / sum_l n_l per weight, the v_l learnt in the same way
    tune       some epochs of W on the public rows

Paper symbol -> option: shrinkage ratio: ratio; server epochs: epochs; rates of C, D, v: server_lr; of W: tuning_lr.

Reference: Shen et al., "FedConv: A Learning-on-Model Paradigm for Heterogeneous Federated Clients", arXiv 2502.20639.
*Read*: the published code (lemingshen/FedConv: strategy.py, utils/federated_settings.py), which chooses epochs and
restarts by test accuracy; here nothing is chosen.
Departures: in the code f is applied twice after the convolution, and the residual x + a x + b before it, for weights of
convolutions alone; here f is within the residual, so that nothing is squashed at the start. Widths are rounded up, in
the code down. Each width has one dilation, of the mean by rows of its clients. All that is learnt starts as HeteroFL's
slices and average, and is kept from round to round. The rows are data.public, which no client has.
Not reproduced: 35 % more accuracy on average is claimed; the bundled results were chosen on test rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from secateur.contract.ask import Ask
from secateur.contract.client import Client
from secateur.contract.reducer import Reduced
from secateur.contract.reduction import Grouped, Mean
from secateur.contract.state import Setting, State
from secateur.errors import check
from secateur.learning.optimiser import Training
from secateur.methods.kit.learned_resize import ServerResizing
from secateur.methods.kit.submodels import Parts
from secateur.pruning.structure import Plan, plan


@dataclass(frozen=True)
class FedConv(Parts):
    """Trains sub-models of several widths, which the server makes by learnt convolutions.

    Attributes:
        levels: L, the number of widths 1, r, r^2, ...; 1 is FedAvg.
        ratio: r, the ratio of one width to the next larger one.
        epochs: the epochs over the public rows for each compressor, dilator and merge that the server learns.
        server_lr: the learning rate (Adam) of compressors, dilators and shares.
        tuning_lr: the learning rate (Adam) of the large model; 0: it is not tuned.
    """

    levels: int = 3
    ratio: float = 0.75
    epochs: int = 2
    server_lr: float = 1e-3
    tuning_lr: float = 1e-4

    def __post_init__(self) -> None:
        check(1 <= self.levels <= 16, name="levels", value=self.levels, must="be 1 to 16")
        check(0 < self.ratio < 1, name="ratio", value=self.ratio, must="be in (0, 1)")
        check(self.epochs >= 1, name="epochs", value=self.epochs, must="be at least 1")
        check(self.server_lr > 0, name="server_lr", value=self.server_lr, must="be above 0")
        check(self.tuning_lr >= 0, name="tuning_lr", value=self.tuning_lr, must="be 0 or more")

    @property
    def refines(self) -> bool:
        """Return whether the server learns; not if there is one width."""
        return self.levels > 1

    @property
    def wants_public(self) -> bool:
        """Return whether the server trains on public rows, which it does if it learns."""
        return self.refines

    def units_by_client(self, setting: Setting, round_: int) -> Mapping[int, Mapping[str, torch.Tensor]]:
        """Return the leading units of each layer, by each client's width."""
        return {k: self.leading(setting, self.ratio ** (k % self.levels)) for k in setting.cohort(round_)}

    def plan(self, state: State) -> Ask | None:
        """Send each client of the next cohort the model that was made for its width."""
        ask = super().plan(state)
        if ask is None or self.levels == 1:
            return ask
        made = {level: state.memory[f"model {level}"] for level in range(1, self.levels)}
        ask = replace(ask, reduce={"means": Grouped(Mean(), {k: k % self.levels for k in ask.clients})})
        return replace(ask, own={k: made[k % self.levels] for k in ask.clients if k % self.levels})

    def absorb(self, state: State, reduced: Reduced) -> State:
        """Average the models of each width; ``refine`` merges the widths."""
        if self.levels == 1:
            return super().absorb(state, reduced)
        means = {f"mean {level}": mean for level, mean in reduced["means"].items() if mean}
        rows = Counter({f"rows {level}": 0.0 for level in range(self.levels)})
        for client, count in reduced.rows.items():
            rows[f"rows {client % self.levels}"] += count
        return replace(state, round=reduced.ask.round, notes={**state.notes, **rows}, memory={**state.memory, **means})

    def refine(self, state: State, server: Client) -> tuple[State, int]:
        """Dilate and merge the mean of each width, tune the large model, and compress it for the next round."""
        means = {k: state.memory[f"mean {k}"] for k in range(self.levels) if f"mean {k}" in state.memory}
        memory = {name: held for name, held in state.memory.items() if not name.startswith("mean ")}
        resizing = ServerResizing(server, self.learning(server, self.server_lr), state.round)
        weights, tasks = dict(state.weights), self.levels - 1
        cuts, large = {level: self.cut(server.setting, level) for level in range(self.levels)}, {}
        for level, mean in means.items():
            key = f"dilate {level}"
            large[level], memory[key] = resizing.dilate(mean, cuts[level], memory.get(key, {}))
        if means:
            rows = {level: float(state.notes[f"rows {level}"]) for level in means}
            weights, tasks = resizing.merge(large, rows, cuts, weights), tasks + 1 + sum(1 for level in means if level)
            if self.tuning_lr:
                weights, tasks = resizing.tune(weights, self.learning(server, self.tuning_lr)), tasks + 1
        for level in range(1, self.levels):
            name, key = f"model {level}", f"compress {level}"
            memory[name], memory[key] = resizing.compress(weights, cuts[level], memory.get(key, {}))
        return replace(state, weights=weights, memory=memory), tasks * self.epochs * len(server.data)

    def cut(self, setting: Setting, level: int) -> Plan:
        """Return the plan by which the large model is cut to a width."""
        mask = self.mask(setting, self.leading(setting, self.ratio**level))
        return plan(mask, setting.layout.groups)

    def learning(self, server: Client, lr: float) -> Training:
        """Return the settings of the server's training."""
        return Training(self.epochs, server.training.batch_size, "adam", lr)
