"""The client's side of ``Pruned``: a mod that translates between sparse messages and an app's dense arrays."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from secateur.contract.ask import TRAIN
from secateur.errors import ConfigError, MaskNotHeldError
from secateur.flower import codes, limits
from secateur.flower.messages import Array, ArrayRecord, Context, Error, Message, payload_of, with_arrays, with_payload
from secateur.flower.site import Site
from secateur.flower.strategy import EPOCHS, PHASE
from secateur.flower.ties import Held
from secateur.pruning.discovery import layout
from secateur.pruning.mask import apply
from secateur.wire import masks as packing
from secateur.wire.codec import decode, encode, lost
from secateur.wire.head import context_of
from secateur.wire.message import Expected, Masks, Spec
from secateur.wire.message import Message as Sparse

CallNext = Callable[[Message, Context], Message]
_HELD = "secateur-held"
_ERROR = 2  # Flower's code of an exception in a ClientApp
_mask: contextvars.ContextVar[Masks | None] = contextvars.ContextVar("mask", default=None)


def prune(model: nn.Module) -> Prune:
    """Return the mod for a ClientApp whose server runs ``Pruned``; messages without a sparse payload pass unchanged.

    Args:
        model: the app's model, for the names and shapes of its tensors; its weights do not matter.
    """
    return Prune(Held.of(model), tuple(layout(model).trainable))


@dataclass(frozen=True)
class Prune:
    """The mod that ``prune`` returns; it is a class so that instances can be sent to worker processes.

    Attributes:
        model: the tensors of the model.
        trained: the names of the tensors that the app trains.
    """

    model: Held
    trained: tuple[str, ...]

    def __call__(self, message: Message, context: Context, call_next: CallNext) -> Message:
        """Decode the message, let the app train within what the node's owner allows (``site``), and encode its reply.

        Whatever goes wrong is one line in the node's log; the reply is an error with a reason of ``codes`` then.
        """
        _, request = payload_of(message.content) if message.has_content() else ("", None)
        if request is None:
            return call_next(message, context)
        try:
            return limits.limited(
                context.node_config, lambda site: self._reply(message, request, context, call_next, site)
            )
        except (Exception, SystemExit) as broken:  # noqa: BLE001 -- Flower would send its text to the server
            return Message(Error(_ERROR, codes.heard(codes.refused(broken))), reply_to=message)

    def _reply(self, message: Message, request: bytes, context: Context, call_next: CallNext, site: Site) -> Message:
        limits.check_most("bytes", len(request), site.most.bytes)
        try:
            held, specs = _held(context, self.model.specs), self.model.specs
            expected = Expected(specs, mask="optional", known=held, infinite=self.model.infinite)
            sparse = decode(request, expected)
        except MaskNotHeldError:
            return Message(with_payload(message.content, lost(request)), reply_to=message)
        site.answering(str(sparse.scalars.get(PHASE)))
        limits.check_most("epochs", int(sparse.scalars.get(EPOCHS, 1)), site.most.epochs)
        if sparse.mask is not None:
            _hold(context, sparse.mask)
        token = _mask.set(sparse.mask)
        try:
            reply = _trained(message, context, call_next, sparse, self.model)
        finally:
            _mask.reset(token)
        if not reply.has_error():
            answer = self._answer(sparse, reply)
            payload = encode(answer, known=sparse.mask, template=self.model.specs, context=context_of(request))
            reply.content = with_payload(reply.content, payload)
        return reply

    def _answer(self, request: Sparse, reply: Message) -> Sparse:
        key, _ = payload_of(reply.content)
        tensors = self.model.once(reply.content.array_records[key].to_torch_state_dict())
        if request.scalars.get(PHASE) == TRAIN:
            return Sparse(apply(tensors, request.mask), request.mask)
        return Sparse({n: (request.tensors[n] - tensors[n]).square() for n in self.trained})


def keep_pruned(model: nn.Module) -> None:
    """Set the pruned weights of a model to 0; an app with the mod calls it after each optimiser step.

    Without it pruned weights may change during a client's training; the changes are dropped at its end.
    """
    mask = _mask.get() or {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in mask:
                parameter.masked_fill_(~mask[name].to(parameter.device), 0.0)


def _trained(message: Message, context: Context, call_next: CallNext, request: Sparse, model: Held) -> Message:
    """Run the app's own training; an exploration repeats it, each time from the weights of the last time."""
    arrays, content = ArrayRecord(torch_state_dict=model.by_all_names(request.tensors)), message.content
    for _ in range(int(request.scalars.get(EPOCHS, 1))):
        message.content = with_arrays(content, arrays)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        if len(reply.content.array_records) != 1:
            raise ConfigError(f"the app replied with {len(reply.content.array_records)} ArrayRecords; 1 is expected")
        (arrays,) = reply.content.array_records.values()
    return reply


def _held(context: Context, specs: Mapping[str, Spec]) -> Masks | None:
    record = context.state.get(_HELD)
    if not isinstance(record, ArrayRecord):
        return None
    packed = {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}
    return packing.unpack(packed, specs)


def _hold(context: Context, mask: Masks) -> None:
    context.state[_HELD] = ArrayRecord({n: Array(t.numpy()) for n, t in packing.pack(mask).items()})
