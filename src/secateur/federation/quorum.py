"""The quorum: how many replies an exchange needs, what follows if they do not come, and when a run has no result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from secateur.contract.ask import Ask
from secateur.contract.method import Method
from secateur.contract.state import State
from secateur.errors import ConfigError, DivergedError, NobodyTrainedError
from secateur.federation.endings import called
from secateur.federation.exchange import Exchange
from secateur.federation.records import ATTEMPT, BELOW, UNSOUND, Row, check_answers, common
from secateur.federation.soundness import unusable
from secateur.pruning.mask import Tensors
from secateur.study.study import Study

TRIES = 3
"""How often an exchange is tried before the run ends."""

EMPTY = "it says that it has no training rows"
_ASKS = 1000  # exchanges within one round, besides some for each client, after which a method is taken to be stuck
_GROWTH = 1000.0  # a loss so many times that of the initial weights is that of a model that diverged
_SUSPECT = 100.0  # below it no loss is compared with that of the initial weights


class Attempts:
    """Plans a run's asks, and lets other clients be asked where too few replies of an exchange counted.

    Args:
        study: says how many replies are needed.
        count: how often the next exchange was tried in vain, as a checkpoint says.
        records: returns the records so far.
    """

    def __init__(self, study: Study, count: int, records: Callable[[], list[Row]]) -> None:
        self._study, self.count, self._records = study, count, records
        self._why: list[Row] = []
        self._unsound = self._unusable = ""
        self._asked = self._in_round = self._needed = 0
        self._last: Ask | None = None
        self._before = count

    def plan(self, method: Method, state: State) -> tuple[Ask | None, State]:
        """Return the method's next ask, and the state that it was planned from: it draws the clients of this attempt.

        Raises:
            ConfigError: the method goes on beyond the last round, or never comes to the next one.
            NoResultError: its ``plan`` raises.
            NobodyTrainedError: clients were asked in turn, and none of them has answered.
        """
        state = replace(state, setting=replace(state.setting, attempt=self.count))
        ask, name = called(method.plan, state.round + 1, state), type(method).__name__
        if ask is not None and ask.round > self._study.rounds:
            raise ConfigError(
                f"method {name}: plan asks for round {ask.round} of {self._study.rounds}; it must return None once "
                "state.round is setting.rounds"
            )
        before, self._last = self._last, ask
        stays = ask is not None and before is not None and ask.round == before.round
        self._in_round = self._in_round + 1 if stays else 0
        if self._in_round > _ASKS + TRIES * state.setting.clients:
            raise ConfigError(
                f"method {name}: plan has asked {self._in_round} times within round {before and before.round}; absorb "
                "must return a state from which it goes on"
            )
        if before is not None and before.in_turn and not (ask and ask.in_turn):
            check_answers(self._records())
        return ask, state

    def usable(self, exchange: Exchange, unsound: str) -> bool:
        """Return whether what came of an exchange with enough replies can be used; if not, it is to be asked again.

        Args:
            exchange: the exchange.
            unsound: why not, see ``soundness.unsound``; empty: it can. The reason lies with no single client.
        """
        if unsound:
            self.count, self._unsound = self._before + 1, unsound
            self._asked += len(exchange.ask.clients)
        return not unsound

    def settle(self, exchange: Exchange) -> bool:
        """Return whether enough replies of an exchange counted; if not, it is to be asked again."""
        self._before, self._unsound, self._unusable = self.count, "", ""
        ask = exchange.ask
        counted = sum(1 for reply in exchange.reply_scalars if int(reply.get("samples", 1)))
        rules = [reduction.needs(counted) for reduction in (ask.reduce or {}).values()]
        self._needed = max([self.needed(len(ask.clients)), *rules])
        enough = not exchange.blameless and counted >= self._needed
        if ask.in_turn or enough:
            self.count, self._why, self._asked = 0, [], 0
            return True
        if exchange.blameless and (exchange.reply_scalars or ask.round > 1):
            self._unusable = unusable(len(ask.clients), len(exchange.blameless), ask.phase, ask.round)
        self._asked += len(ask.clients)
        self._why += [*exchange.left_out, *exchange.blameless]
        self._why += [
            {"client": reply["client"], "reason": EMPTY}
            for reply in exchange.reply_scalars
            if not int(reply.get("samples", 1))
        ]
        self.count += 1
        return False

    def needed(self, asked: int) -> int:
        """Return how many replies an exchange with so many clients needs."""
        return min(asked, max(1, math.ceil(self._study.quorum * asked - 1e-9)))

    def note(self, attempt: int) -> Row:
        """Return what the record of an exchange says of its quorum; nothing in the usual case."""
        row: Row = {ATTEMPT: attempt} if attempt else {}
        row |= {UNSOUND: self._unsound} if self._unsound else {}
        return row | {BELOW: self._needed} if self.count else row

    def check(self, ask: Ask) -> None:
        """End the run if its last exchanges were tried in vain too often.

        Raises:
            NobodyTrainedError: they were; the text names the most frequent reason.
            DivergedError: the last of them had replies, of which nothing usable came.
        """
        if not self.count or self.count % TRIES:
            return
        if self._unsound or self._unusable:
            raise DivergedError(
                f"{self._unusable or self._unsound}; phase {ask.phase!r} of round {ask.round} was tried {TRIES} times"
            )
        least = "of the quorum" if self._needed == self.needed(len(ask.clients)) else "that the robust rule needs"
        who = "no reply of any client" if self._needed == 1 else f"fewer than the {self._needed} replies {least}"
        raise NobodyTrainedError(
            f"{who} counted in phase {ask.phase!r} of round {ask.round}, which was asked for {TRIES} times in a row: "
            f"{common(self._why, self._asked)}"
        )


def beyond(loss: float, initial_loss: Callable[[], float]) -> bool:
    """Return whether a loss is not finite, or 1000 times that of the initial weights (above 100 in any case)."""
    return not math.isfinite(loss) or (loss > _SUSPECT and loss > _GROWTH * initial_loss() > 0)


def check_learnt(final: Row, model: Tensors, initial_loss: Callable[[], float]) -> None:
    """Refuse a run whose model is not usable.

    Args:
        final: the scores of the model at the end of the run.
        model: its tensors.
        initial_loss: returns the loss of the initial weights on the same rows; it is called only if the final loss is
            large, and NaN says that there is none.

    Raises:
        DivergedError: a tensor or the loss is not finite, or the loss is 1000 times that of the initial weights.
    """
    broken = next((n for n, t in model.items() if t.is_floating_point() and not bool(t.isfinite().all())), None)
    loss, why = float(final.get("loss", 0.0)), ""
    if broken is not None:
        why = f"tensor {broken!r} of its model holds NaN or infinity"
    elif beyond(loss, initial_loss):
        why = f"the loss of its model on test rows is {loss:.3g}, where the initial weights have {initial_loss():.3g}"
    if why:
        raise DivergedError(
            f"the run diverged, and has no result: {why}; lower training.lr, set training.clip, or scale the data"
        )
