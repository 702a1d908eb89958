"""The client's side: bytes in, bytes out. The only thing that an engine calls."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import torch as safetensors
from torch import nn

from secateur import training
from secateur.config import Study
from secateur.data.shards import Shards, open_shards
from secateur.method import Ask, Client, Setting
from secateur.models import build as build_model
from secateur.pruning.structure import layout
from secateur.wire.codec import decode, encode
from secateur.wire.message import Expected, Message, Scalar, Spec

EVALUATE = "evaluate"
SECONDS = "seconds"
SCORES: dict[str, type] = {"samples": int, "metric": float, "loss": float}


def make_model(study: Study, shards: Shards) -> nn.Module:
    """Return the study's model with its seeded initial weights: theta_0, the same wherever it is made."""
    section = study.model
    return build_model(
        section.name, input_shape=shards.input_shape, outputs=shards.outputs,
        init=section.init, seed=study.seed, options=section.options, tokens=shards.kind == "tokens",
    )  # fmt: skip


def make_setting(study: Study, model: nn.Module, clients: int) -> Setting:
    """Return what the study's method may know; equal on the server and on every client."""
    found = layout(model)
    state = model.state_dict()
    specs = {name: Spec(tuple(state[name].shape), state[name].dtype) for name in found.roles}
    return Setting(study.seed, study.rounds, clients, study.participation, found, specs)


class Participant:
    """Serves any client of a study from one resident model; one of these lives in each worker."""

    def __init__(self, study: Study, shards: Shards) -> None:
        self.study = study
        self.shards = shards
        self.method = study.build_method()
        self.model = make_model(study, shards)
        self.setting = make_setting(study, self.model, shards.clients)
        self.accepts = self.method.accepts(self.setting)

    def __call__(self, client: int, request: bytes, state: bytes | None) -> tuple[bytes, bytes | None]:
        """Decode, respond, encode; return the reply and what the client keeps (None: nothing new)."""
        start = time.perf_counter()
        message = decode(request, self.accepts)
        scalars = dict(message.scalars)
        phase, round_ = str(scalars.pop("phase")), int(scalars.pop("round"))
        message = replace(message, scalars=scalars)
        ask = Ask(phase, round_, (client,), message, Expected({}))
        if phase == EVALUATE:
            reply, kept = self._evaluate(client, message), state
        else:
            memory = safetensors.load(state) if state else {}
            view = Client(client, self.setting, self.model, self.data(client), self.study.training, memory)
            reply = self.method.respond(ask, view)
            kept = safetensors.save(view.memory) if view.memory else None
        told: dict[str, Scalar] = {**reply.scalars, SECONDS: time.perf_counter() - start}
        answer = encode(replace(reply, scalars=told), values=self.study.wire.values, known=message.mask)
        return answer, kept if kept != state else None

    def data(self, client: int) -> training.Data:
        """Return the client's training rows."""
        return wrap(self.shards, *self.shards.train(client))

    def _evaluate(self, client: int, message: Message) -> Message:
        training.load(self.model, message.tensors)
        score = training.evaluate(self.model, wrap(self.shards, *self.shards.test(client)))
        metric, loss = (score.metric, score.loss) if score.samples else (0.0, 0.0)
        return Message({}, None, {"samples": score.samples, "metric": metric, "loss": loss})


def wrap(shards: Shards, x: torch.Tensor, y: torch.Tensor) -> training.Data:
    """Return rows of the shards with how they become model inputs."""
    return training.Data(x, y, shards.kind, shards.scale, shards.task)


def build(study: str, folder: str) -> Participant:
    """Return a participant in a worker process, from the study's JSON and the folder of its shards.

    One torch thread: the split of a reduction over threads would change its last bits.
    """
    torch.set_num_threads(1)
    return Participant(Study.model_validate_json(study), open_shards(Path(folder)))
