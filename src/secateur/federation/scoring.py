"""What is said of a run's model: its size and MACs, and its scores on the rows of the server and of the clients."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from secateur import cost
from secateur.contract.ask import GUARDED
from secateur.contract.method import Method
from secateur.contract.state import Setting, State
from secateur.data.shards import Shards
from secateur.errors import NoResultError, SecateurError
from secateur.federation import checkpoint, client, client_scores
from secateur.federation.exchange import Exchange
from secateur.federation.folder import LOG, PLAN
from secateur.federation.quorum import check_learnt
from secateur.federation.records import EMPTIED, METRIC, VALIDATION, Row, short
from secateur.federation.removal import sizes_after, units_left
from secateur.learning import resident
from secateur.learning import task as tasks
from secateur.learning.evaluate import Score, evaluate
from secateur.pruning import mask as masks
from secateur.pruning.mask import Mask, Tensors
from secateur.pruning.roles import stored
from secateur.pruning.structure import plan, sizes
from secateur.streams import global_streams
from secateur.study.study import Study


class Scoring:
    """Measures and scores a run's model.

    Args:
        study: what defines the run's result.
        shards: the rows.
        method: the run's method.
        setting: what the method knows of the model and the federation.
        model: which the scores are computed with.

    Attributes:
        local: puts tensors into the model.
        task: what is learnt, in the target's unit.
        central: whether the server's test rows give the run's score, rather than the clients'.
        uses: how the model's layers are used, for MACs.
        initial: the tensors that training begins with.
        base: the tensors that training leaves alone.
    """

    def __init__(self, study: Study, shards: Shards, method: Method, setting: Setting, model: nn.Module) -> None:
        self.study, self.shards, self.method, self.setting, self.model = study, shards, method, setting, model
        self.local = resident.LocalState(model)
        self.example = client.example(shards)
        self.task = tasks.find(shards.task).in_units(shards.target_scale, shards.unit)
        self.central = len(shards.server_test()[1]) > 0 and not method.personal
        self.uses = cost.uses(model, self.example)
        self.initial, self.base = resident.tensors_of(model), resident.base_of(model)

    def macs(self, mask: Mask | None) -> tuple[int, int]:
        """Return the MACs of one example under a mask: on surviving weights, and with units cut."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.whole(self.initial).items()}
        left = sizes(shapes, plan(mask or {}, self.setting.layout.groups))
        return cost.macs(self.uses, stored(self.model), mask), cost.physical(self.uses, left)

    def quality(self, state: State, *, evaluate: bool) -> Row:
        """Return what is left of a state's model and, if it is to be evaluated, its scores on the server's rows."""
        total = sum(t.numel() for t in state.weights.values())
        removed = 0 if state.mask is None else masks.size(state.mask) - masks.kept(state.mask)
        row: Row = {name: note for name, note in state.notes.items() if name == GUARDED} | {
            "sparsity": masks.sparsity(state.mask),
            "sparsity_all": removed / total,
            "kept": total - removed,
            "layers": {name: int(part.sum()) for name, part in (state.mask or {}).items()},
            "macs": cost.macs(self.uses, self.whole(state.weights), state.mask),
        }
        row |= units_left(state.mask, self.setting.layout.layers)
        row |= {EMPTIED: names} if (names := [name for name, kept in row["layers"].items() if not kept]) else {}
        if evaluate and self.central:
            score = self._score(state.model(), self.shards.server_test())
            main = self.task.metrics[0]
            row |= {main.name: score.metric, "loss": score.loss, **score.further, METRIC: dataclasses.asdict(main)}
            validation = self._score(state.model(), self.shards.server_validation())
            row |= {VALIDATION: validation.metric} if validation.samples else {}
        return row

    def _score(self, tensors: Tensors, rows: tuple[torch.Tensor, torch.Tensor]) -> Score:
        """Return the score of a model on some of the server's rows.

        Raises:
            NoResultError: the model's own code raises on them; what it raised is the cause.
        """
        self.local.load(tensors)
        try:
            with global_streams(self.study.seed, "score"):
                return evaluate(self.model, client.wrap(self.shards, *rows))
        except SecateurError:
            raise
        except Exception as broken:
            line = short(f"{type(broken).__name__}: {broken}")
            raise NoResultError(
                f"the model cannot be scored on the server's rows: {line}; its traceback is in {LOG}"
            ) from broken

    def whole(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Return the exchanged tensors together with those that never travel."""
        return {**self.base, **tensors}

    def widths(self, state: State) -> Row:
        """Return the scores and MACs of the narrower models within the shipped one."""
        widths = self.method.widths(state) if self.central else {}
        parts = {name: masks.apply(state.weights, mask) for name, mask in widths.items()}
        scores = {name: self._score(part, self.shards.server_test()).metric for name, part in parts.items()}
        macs = {name: self.macs(mask)[1] for name, mask in widths.items()}
        metric = self.task.metrics[0].name
        return {"widths": {name: {metric: scores[name], "macs_physical": macs[name]} for name in widths}}

    def check_learnt(self, final: Row, state: State) -> None:
        """Refuse a run whose model is not usable; see ``quorum.check_learnt``.

        Raises:
            DivergedError: it is not.
        """

        def initial_loss() -> float:
            return self._score(self.initial, self.shards.server_test()).loss

        check_learnt(final, state.model(), initial_loss)

    def structure(self, folder: Path, state: State) -> Row:
        """Write the plan of removed units; return parameters and MACs of the model before and after they are cut."""
        removal = plan(state.mask or {}, self.setting.layout.groups)
        self.local.load(state.model())
        checkpoint.put(folder, PLAN, removal.to_json().encode())
        return sizes_after(removal, self.model, self.example, cost.macs(self.uses, self.whole(state.weights), None))

    def clients(self, exchange: Exchange) -> Row:
        """Return the clients' scores, and the bytes of the exchange under ``evaluate_bytes``.

        If the server has no test set, their mean by rows is the run's score.
        """
        return client_scores.scores(exchange, self.task.metrics, central=self.central)
