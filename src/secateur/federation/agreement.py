"""The agreement on a schema: what a federation's sites are asked about their tables before the first round.

Four asks of phase ``schema``, each answered by every site:

    columns   -> the outline of its table; the server makes one schema of them, and leaves out who does not fit
    sums      -> of each column, over training rows, the number of its cells, their sum, and the sum of |x|: the means
    squares   -> of each column their number and the sum of ((x - mean) / size)^2: the scales; the size is a power of 2
                 near the mean of |x|, so that no square is too large or too small for a message
    agreed    -> the complete schema has arrived, and the site's rows are made by it

Sums are reduced as replies to any ask are. A sum of float64 travels as two tensors of float32 that add up to it, so
that 48 of its bits arrive and a sum over sites stays a sum. Two passes keep the scale of a column with a large mean.
Means are sums over sites, medians are not, which is why missing cells become means. No guard stands before these sums:
each site's own sums are seen by the server, and a hostile site can shift a mean.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.contract.ask import Ask
from secateur.contract.reducer import Reduced, Reducer
from secateur.contract.reduction import Sum
from secateur.contract.reply import Reply
from secateur.contract.spool import Spool
from secateur.contract.state import Setting, State
from secateur.data.outline import Outline, outline
from secateur.data.raw_table import RawTable
from secateur.data.schema import Schema, agree
from secateur.engines import Failure
from secateur.errors import DataError, WireError
from secateur.federation.records import Row, check_any, short
from secateur.pruning.structure import Layout
from secateur.wire.codec import decode, encode, part_sizes
from secateur.wire.head import context_of
from secateur.wire.message import Expected, Message, Scalar, Spec, Tensors

PHASE = "schema"
"""The phase of these asks in a run's records; their round is 0."""

SECONDS = "seconds"
_STEP, _TEXT = "step", "text"
_COLUMNS, _SUMS, _SQUARES, _AGREED = "columns", "sums", "squares", "agreed"
_PIECE, _PIECES = 16_000, 60  # characters of a text in one scalar, and how many of these a message may have
_MOST_ROWS = 2**40
_CONSTANT = 1e-12  # of the mean: a scale below it is what rounding made of a column of one value

Carry = Callable[[Iterable[tuple[int, bytes]]], Iterator[tuple[int, bytes | Failure]]]
"""What carries each client's request there, and its reply back, in any order."""


@dataclass(frozen=True)
class Agreed:
    """What a federation agreed on.

    Attributes:
        schema: the schema.
        rows: the records of the asks.
        clients: the clients that take part.
        notes: what each of them says of itself with its last reply.
    """

    schema: Schema
    rows: tuple[Row, ...]
    clients: tuple[int, ...]
    notes: Mapping[int, str]


class Site:
    """A site's end of the agreement.

    Args:
        train: its training rows.
        whole: all its rows.
        take: called with the complete schema; returns what the site says of itself.
    """

    def __init__(self, train: RawTable, whole: RawTable, take: Callable[[Schema], str] = lambda _schema: "") -> None:
        self._train, self._whole, self._take = train, whole, take

    def answer(self, request: bytes) -> bytes:
        """Return the reply to a request.

        Raises:
            WireError: the request is none of these.
            DataError: this site's table does not fit the schema that came.
        """
        begun = time.perf_counter()
        asked = decode(request, Expected({})).scalars
        scalars, tensors = self._respond(str(asked.get(_STEP)), asked)
        scalars = {**scalars, SECONDS: time.perf_counter() - begun}
        return encode(Message(tensors, None, scalars), context=context_of(request))

    def _respond(self, step: str, asked: Mapping[str, Scalar]) -> tuple[dict[str, Scalar], Tensors]:
        if step == _COLUMNS:
            return _pieces(outline(self._train, self._whole).to_json()), {}
        if step not in {_SUMS, _SQUARES, _AGREED}:
            raise WireError(f"a request of phase {PHASE!r} is for {step[:40]!r}, which this version does not know")
        schema = Schema.from_json(_text(asked))
        if step == _AGREED:
            return _pieces(self._take(schema)), {}
        cells = _cells(schema, self._train)
        filled = ~np.isnan(cells)
        tensors = {"filled": torch.from_numpy(filled.sum(axis=0).astype(np.int64))}
        if step == _SQUARES:
            mean, size = [*schema.mean, schema.target_mean], [*schema.scale, schema.target_scale]
            cells = np.square((cells - np.array(mean)) / np.array(size))
        else:
            tensors["size"] = torch.from_numpy(np.abs(np.where(filled, cells, 0.0)).sum(axis=0)).float()
        return {"samples": len(cells)}, {**tensors, **_halves(np.where(filled, cells, 0.0).sum(axis=0))}


def settle(
    clients: Sequence[int], carry: Carry, *, seed: int = 0, classes: bool | None = None,
    notify: Callable[[int, str], None] = lambda _client, _reason: None,
) -> Agreed:  # fmt: skip
    """Ask sites until they agree on a schema.

    Args:
        clients: who is asked, ascending.
        carry: carries requests and replies.
        seed: of the run.
        classes: see ``schema.agree``.
        notify: called with each client that is left out, and why.

    Raises:
        NobodyTrainedError: no reply of any site counted in one of the asks.
        DataError: no site's table fits.
    """
    asking = _Asking(carry, seed, notify)
    said = asking.texts(_COLUMNS, tuple(clients), "")
    outlines = dict[int, Outline]()
    for who, text in said.items():
        try:
            outlines[who] = Outline.from_json(text)
        except DataError as broken:
            asking.leave(who, str(broken))
    schema, unlike = agree(outlines, classes=classes)
    for who, why in unlike.items():
        asking.leave(who, why)
    size = len(schema.features)
    schema = replace(schema, mean=(0.0,) * size, scale=(1.0,) * size, marked=(False,) * size)
    reduced = asking.sums(_SUMS, tuple(who for who in outlines if who not in unlike), schema)
    schema = _with_means(schema, reduced)
    reduced = asking.sums(_SQUARES, reduced.clients, schema)
    schema = _with_scales(schema, reduced)
    notes = asking.texts(_AGREED, reduced.clients, schema.to_json())
    return Agreed(schema, tuple(asking.rows), tuple(notes), notes)


def last_request(schema: Schema) -> bytes:
    """Return the request of the last ask, for a site that comes later or has lost the schema."""
    return encode(_message(_AGREED, schema.to_json()))


def _message(step: str, text: str) -> Message:
    return Message({}, None, {"phase": PHASE, "round": 0, _STEP: step, **_pieces(text)})


def _with_means(schema: Schema, reduced: Reduced) -> Schema:
    filled, sums = _totals(reduced)
    mean = (sums / np.maximum(filled, 1)).tolist()
    marked = tuple((filled[:-1] < sum(reduced.rows.values())).tolist())
    absolute = reduced["sums"]["size"].numpy() / np.maximum(filled, 1)
    size = np.exp2(np.round(np.log2(np.where(absolute > 0, absolute, 1.0)))).tolist()
    return replace(
        schema, mean=tuple(mean[:-1]), target_mean=mean[-1], marked=marked, scale=tuple(size[:-1]),
        target_scale=size[-1],
    )  # fmt: skip


def _with_scales(schema: Schema, reduced: Reduced) -> Schema:
    filled, squares = _totals(reduced)
    size = np.array([*schema.scale, schema.target_scale])
    scale = np.sqrt(squares / np.maximum(filled, 1)) * size
    constant = scale <= _CONSTANT * np.abs([*schema.mean, schema.target_mean])
    scales = np.where(constant, 1.0, scale).tolist()
    return replace(schema, scale=tuple(scales[:-1]), target_scale=scales[-1])


def _totals(reduced: Reduced) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return of each feature, and of the target, how many cells all sites have, and the sum over them."""
    sums = reduced["sums"]
    return sums["filled"].numpy(), (sums["high"] + sums["low"]).numpy()


def _cells(schema: Schema, table: RawTable) -> NDArray[np.float64]:
    """Return the numbers of each feature and of the target, (rows, features + 1); 0 for words, NaN where missing."""
    raw = schema.raw(table)
    words = np.array([bool(f.categories) for f in schema.features], dtype=bool)
    raw[:, words] = np.where(np.isnan(raw[:, words]), np.nan, 0.0)
    target = np.zeros(len(raw)) if schema.classes else table.target.values.astype(np.float64)
    return np.column_stack([raw, target])


def _halves(sums: NDArray[np.float64]) -> dict[str, torch.Tensor]:
    """Return sums as two tensors of float32 that add up to them.

    Raises:
        DataError: a sum is beyond float32.
    """
    largest = float(np.abs(sums).max(initial=0.0))
    if not largest < torch.finfo(torch.float32).max:
        raise DataError(
            f"the cells of a column add up to {largest:.3g}, which cannot be sent: mend its cells or its unit"
        )
    high = torch.from_numpy(sums).float()
    return {"high": high, "low": (torch.from_numpy(sums) - high.double()).float()}


@dataclass
class _Asking:
    """The server's end: asks, their records, and who was left out."""

    carry: Carry
    seed: int
    notify: Callable[[int, str], None]

    def __post_init__(self) -> None:
        self.rows: list[Row] = []

    def leave(self, who: int, reason: str) -> None:
        """Leave a client out after its reply to the last ask."""
        self.rows[-1]["left_out"].append({"client": who, "reason": short(reason)})
        self.notify(who, short(reason))

    def texts(self, step: str, clients: tuple[int, ...], text: str) -> dict[int, str]:
        """Send a text to clients; return the text of each one's reply."""
        ask = self._ask(step, clients, text, {})
        return dict(sorted((who, _text(reply.scalars)) for who, reply in self._replies(ask, None)))

    def sums(self, step: str, clients: tuple[int, ...], schema: Schema) -> Reduced:
        """Send a schema to clients; return the sums of their replies."""
        size = (len(schema.features) + 1,)
        specs = {"high": Spec(size), "low": Spec(size), "filled": Spec(size, torch.int64)}
        specs |= {"size": Spec(size)} if step == _SUMS else {}
        ask = self._ask(step, clients, schema.to_json(), specs)
        setting = Setting(self.seed, 1, max(clients, default=0) + 1, 1.0, Layout({}), specs)
        with Spool() as spool:
            reducer = Reducer(ask, setting, spool)
            for who, reply in self._replies(ask, {"samples": int, SECONDS: float}):
                rows = int(reply.scalars["samples"])
                reducer.add(Reply(who, rows, reply.tensors, None, reply.scalars))
            return reducer.finish(State(setting, 0, {}))

    def _ask(self, step: str, clients: tuple[int, ...], text: str, specs: Mapping[str, Spec]) -> Ask:
        return Ask(
            PHASE, 0, clients, _message(step, text), Expected(specs, values="fp32"), {"sums": Sum()} if specs else {}
        )

    def _replies(self, ask: Ask, scalars: Mapping[str, type] | None) -> Iterator[tuple[int, Message]]:
        """Yield the replies that count, and write the record of the ask."""
        begun = time.perf_counter()
        request = encode(ask.message)
        expects = replace(ask.expects, scalars=scalars, context=context_of(request))
        down, up, left = Counter[str](), Counter[str](), dict[int, str]()
        each, spent = dict[int, list[int]](), dict[int, float]()
        for who, answer in self.carry((who, request) for who in ask.clients):
            if not isinstance(answer, Failure) or answer.sent:
                down.update(part_sizes(request))
                each[who] = [len(request), 0]
            if isinstance(answer, Failure):
                left[who] = short(answer.reason)
                continue
            each[who][1] = len(answer)
            try:
                reply = decode(answer, expects)
                _sane(reply)
            except WireError as broken:
                up["refused"] += len(answer)
                left[who] = short(str(broken))
                continue
            up.update(part_sizes(answer))
            spent[who] = float(reply.scalars[SECONDS])
            yield who, reply
        for who in sorted(left):
            self.notify(who, left[who])
        self._note(ask, left, (down, up), each, spent, time.perf_counter() - begun)
        check_any(PHASE, len(ask.clients), self.rows[-1]["left_out"])

    def _note(
        self, ask: Ask, left: Mapping[int, str], carried: tuple[Counter[str], Counter[str]],
        each: Mapping[int, list[int]], spent: Mapping[int, float], seconds: float,
    ) -> None:  # fmt: skip
        down, up = carried
        self.rows.append({
            "phase": PHASE, "round": 0, "clients": list(ask.clients),
            "left_out": [{"client": who, "reason": left[who]} for who in sorted(left)],
            "bytes_down": sum(down.values()), "bytes_up": sum(up.values()), "down": dict(down), "up": dict(up),
            "each": [[who, *part] for who, part in sorted(each.items())],
            "each_seconds": [[who, spent[who]] for who in sorted(spent)],
            "client_seconds": sum(spent.values()), "seconds": seconds, "processed": 0,
            "train_macs": 0, "train_macs_physical": 0, "train_loss": None, "lost_state": [],
        })  # fmt: skip


def _sane(reply: Message) -> None:
    """Refuse counts and sums that no table has.

    Raises:
        WireError: one is beyond its bounds.
    """
    if not 0 <= float(reply.scalars.get(SECONDS, math.nan)) < math.inf:
        raise WireError(f"scalar {SECONDS!r} is missing or no time")
    if not reply.tensors:
        _text(reply.scalars)
        return
    rows, filled = int(reply.scalars["samples"]), reply.tensors["filled"]
    if not 1 <= rows <= _MOST_ROWS or not bool(((filled >= 0) & (filled <= rows)).all()):
        raise WireError(f"scalar 'samples' is {rows}, and the cells counted are {filled.min()} to {filled.max()}")


def _pieces(text: str) -> dict[str, Scalar]:
    """Return a text as scalars.

    Raises:
        DataError: it is too long for a message.
    """
    pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
    if len(pieces) > _PIECES:
        raise DataError(
            f"a description of {len(text)} characters does not fit a message: leave columns out of the table"
        )
    return {f"{_TEXT}{number}": piece for number, piece in enumerate(pieces)}


def _text(scalars: Mapping[str, Scalar]) -> str:
    """Return the text of ``_pieces``.

    Raises:
        WireError: a piece of it is missing.
    """
    pieces = {name: piece for name, piece in scalars.items() if name.startswith(_TEXT)}
    wanted = [f"{_TEXT}{number}" for number in range(len(pieces))]
    if set(wanted) != set(pieces) or not all(isinstance(piece, str) for piece in pieces.values()):
        raise WireError("the pieces of a text do not follow each other")
    return "".join(str(pieces[name]) for name in wanted)
