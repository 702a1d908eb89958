"""Learned resizing: a convolution over a weight tensor makes it smaller, a transposed one restores its size.

The first two dimensions of a tensor (outputs, inputs) are treated as an image, the others (kernel positions) as its
batch. The kernels are as large as the difference in size, so they are applied by Fourier transforms.

Reference: FedConv, "A Learning-on-Model Paradigm for Heterogeneous Federated Clients", arXiv 2502.20639.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from secateur.contract.client import Client
from secateur.learning import loop, resident
from secateur.learning.optimiser import Training
from secateur.learning.supermask import Effective, learn
from secateur.pruning.mask import Tensors
from secateur.pruning.structure import Plan, slim, widen
from secateur.pruning.surgery import shrink

Shapes = Mapping[str, tuple[int, ...]]

_RISE, _FALL = 0.85, 0.001  # the slopes of the activation of the published code
_MIX, _KERNEL, _GAIN = "mix.", "kernel.", "gain."


def identity(large: Shapes, small: Shapes) -> dict[str, torch.Tensor]:
    """Return parameters with which ``compressed`` cuts the leading entries out and ``dilated`` puts them back.

    Each tensor whose shapes differ has three: ``mix`` (2,), slope and offset of the residual 1x1 convolution, the
    offset in standard deviations of the tensor; ``kernel``, one larger than the difference of the shapes in each of the
    first two dimensions, which is divided by the root of its size and added to an impulse, so that a step moves large
    kernels no further than small ones; ``gain`` (), the norm of the resulting kernel.
    """
    made: dict[str, torch.Tensor] = {}
    for name, shape in small.items():
        if shape != large[name]:
            size = [a - b + 1 for a, b in zip(large[name][:2], shape[:2], strict=True)]
            made |= {_MIX + name: torch.zeros(2), _KERNEL + name: torch.zeros(size), _GAIN + name: torch.ones(())}
    return made


def compressed(tensors: Tensors, learnt: Tensors, small: Shapes) -> dict[str, torch.Tensor]:
    """Return tensors with the shapes of ``small``: x + f(a x + b), convolved with a kernel of norm g."""
    resized = {}
    for name, shape in small.items():
        x = tensors[name]
        if _KERNEL + name in learnt:
            slope, offset = learnt[_MIX + name].unbind()
            inner = slope * x + offset * x.detach().std(correction=0)
            image = _image(x + torch.where(inner > 0, _RISE * inner, _FALL * inner))
            around, kernel = image.shape[-2:], _normed(learnt, name)
            made = _inverse(_forward(image, around) * _forward(kernel, around).conj(), around)
            x = _tensor(made[:, : shape[0], : _inputs(shape)], shape)
        resized[name] = x
    return resized


def dilated(tensors: Tensors, learnt: Tensors, large: Shapes) -> dict[str, torch.Tensor]:
    """Return tensors with the shapes of ``large``: the transposed convolution of x with a kernel of norm g."""
    resized = {}
    for name, shape in large.items():
        x = tensors[name]
        if _KERNEL + name in learnt:
            image, around = _image(x), torch.Size([shape[0], _inputs(shape)])
            made = _inverse(_forward(image, around) * _forward(_normed(learnt, name), around), around)
            x = _tensor(made, shape)
        resized[name] = x
    return resized


@dataclass
class ServerResizing:
    """Learns resizing at the server, by the loss of the resized model on the public rows.

    Running statistics are not learnt: they are cut, put back and averaged unchanged.

    Attributes:
        server: the server seen as a client, with the model and the public rows.
        how: the settings of the training.
        round: the number of the last round.
    """

    server: Client
    how: Training
    round: int

    def compress(self, weights: Tensors, cut: Plan, learnt: Tensors) -> tuple[Tensors, Tensors]:
        """Return the smaller model, in the leading entries of full-size tensors, and the learnt parameters."""
        parts, cut_parts = self._parts(weights), slim(weights, cut)
        small = {n: tuple(cut_parts[n].shape) for n in parts}
        learnt = learnt or identity(self._shapes(parts), small)
        model = shrink(self.server.model, cut)
        learnt = self._learn(model, cut_parts, learnt, lambda p: compressed(parts, p, small))
        made = {**cut_parts, **compressed(parts, learnt, small)}
        return widen(made, cut, {n: torch.zeros_like(t) for n, t in weights.items()}), learnt

    def dilate(self, model: Tensors, cut: Plan, learnt: Tensors) -> tuple[Tensors, Tensors]:
        """Return the full-size model of a smaller one, given in leading entries, and the learnt parameters."""
        if not cut:
            return model, learnt
        small, large = self._parts(slim(model, cut)), self._shapes(self._parts(model))
        learnt = learnt or identity(large, self._shapes(small))
        learnt = self._learn(self.server.model, model, learnt, lambda p: dilated(small, p, large))
        return {**model, **dilated(small, learnt, large)}, learnt

    def merge(
        self, large: Mapping[int, Tensors], rows: Mapping[int, float], cuts: Mapping[int, Plan], before: Tensors
    ) -> dict[str, torch.Tensor]:
        """Return sum_l n_l v_l W_l / sum_l n_l with learnt shares v_l; weights that no width held stay as before.

        The shares start as those of the average over the holders of a weight.
        """
        held = {level: self._held(cuts[level], before) for level in large}
        total = {n: sum(rows[level] * held[level][n] for level in large) for n in before}
        base = {n: torch.where(torch.as_tensor(total[n]) > 0, 0.0, t) for n, t in before.items()}
        shares = {
            f"{level}.{n}": rows[level] * held[level][n] / torch.as_tensor(total[n]).clamp(min=1)
            for level in large
            for n in before
        }

        def made(shares: Tensors) -> dict[str, torch.Tensor]:
            names = {name.partition(".")[2] for name in shares}
            return {n: base[n] + sum(shares[f"{k}.{n}"] * large[k][n] for k in large) for n in before if n in names}

        start = made(shares)
        parts = set(self._parts(before))
        learnt = self._learn(
            self.server.model, start, {n: s for n, s in shares.items() if n.partition(".")[2] in parts}, made
        )
        return {**start, **made(learnt)}

    def tune(self, weights: Tensors, how: Training) -> dict[str, torch.Tensor]:
        """Return the model's own weights after training on the public rows."""
        server = self.server
        resident.load(server.model, weights)
        loop.fit(server.model, server.data, how, server.turn(self.round))
        return resident.tensors_of(server.model)

    def _learn(self, model: nn.Module, tensors: Tensors, learnt: Tensors, effective: Effective) -> Tensors:
        resident.load(model, tensors)
        server = self.server
        return learn(model, server.data, self.how, learnt, effective, server.turn(self.round))[0]

    def _parts(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        names = self.server.setting.layout.trainable
        return {n: tensors[n] for n in names if n in tensors}

    @staticmethod
    def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
        return {n: tuple(t.shape) for n, t in tensors.items()}

    @staticmethod
    def _held(cut: Plan, like: Tensors) -> dict[str, torch.Tensor]:
        """Return tensors that are 1 at the entries of a width, 0 elsewhere."""
        ones = {n: torch.ones_like(t) for n, t in like.items()}
        return widen(slim(ones, cut), cut, {n: torch.zeros_like(t) for n, t in like.items()})


def _normed(learnt: Tensors, name: str) -> torch.Tensor:
    added = learnt[_KERNEL + name]
    impulse = torch.zeros_like(added)
    impulse.view(-1)[0] = 1.0
    kernel = impulse + added / added.numel() ** 0.5
    unit: torch.Tensor = kernel / torch.linalg.vector_norm(kernel)
    return learnt[_GAIN + name] * unit.reshape(unit.shape[0], -1)


def _image(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in the shape (positions, outputs, inputs); a vector has one input."""
    wide = tensor.reshape(tensor.shape[0], _inputs(tensor.shape), -1)
    return wide.permute(2, 0, 1)


def _tensor(image: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return image.permute(1, 2, 0).reshape(shape)


def _inputs(shape: tuple[int, ...] | torch.Size) -> int:
    return shape[1] if len(shape) > 1 else 1


def _forward(image: torch.Tensor, size: torch.Size) -> torch.Tensor:
    made: torch.Tensor = torch.fft.rfft2(image, s=tuple(size))
    return made


def _inverse(spectrum: torch.Tensor, size: torch.Size) -> torch.Tensor:
    made: torch.Tensor = torch.fft.irfft2(spectrum, s=tuple(size))
    return made
