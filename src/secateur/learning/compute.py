"""Compute: the device, the precision and the stacks with which clients' steps are computed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from secateur.errors import ConfigError, check, need
from secateur.learning.task import Data

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Compute:
    """How clients' steps are computed; the choice changes only the last bits of a result, and the speed.

    Attributes:
        together: the number of clients in a stack, which are trained, measured and evaluated by one batched step; 1:
            each client alone, with the same bits for every engine and number of workers.
        device: the device for training: ``cpu``, ``cuda`` or ``cuda:N``.
        autocast: ``bf16`` computes forward and backward passes in bfloat16 in those operations that torch deems safe;
            weights, gradients and steps stay in float32.
        precision: ``double`` computes in float64; clients still receive and send float32.
        tf32: whether a GPU may round the factors of matrix products and convolutions to 10 bits (TensorFloat-32).

    Raises:
        ConfigError: a field is out of range.
    """

    together: int = 1
    device: str = "cpu"
    autocast: Literal["none", "bf16"] = "none"
    precision: Literal["single", "double"] = "single"
    tf32: bool = False

    def __post_init__(self) -> None:
        check(self.together >= 1, name="compute.together", value=self.together, must="be at least 1")
        kind, _, number = self.device.partition(":")
        known = kind in {"cpu", "cuda"} and (not number or (number.isdigit() and kind == "cuda"))
        check(known, name="compute.device", value=self.device, must="be cpu, cuda or cuda:N")
        check(
            self.precision in {"single", "double"}, name="compute.precision", value=self.precision,
            must="be single or double",
        )  # fmt: skip
        if self.precision == "double" and self.autocast != "none":
            raise ConfigError("compute.precision = double computes in float64 throughout: set compute.autocast = none")
        if self.tf32 and (self.device == "cpu" or self.precision == "double"):
            raise ConfigError("compute.tf32 = true rounds float32 on a GPU: set compute.device = cuda, in single")

    @property
    def stacks(self) -> bool:
        """Return whether clients are served in stacks, on whatever device."""
        return self.together > 1 or self.device != "cpu"

    @property
    def plain(self) -> bool:
        """Return whether a client alone is computed with the resident model as it is."""
        return self.device == "cpu" and self.precision == "single"

    @property
    def dtype(self) -> torch.dtype | None:
        """Return the dtype that floating-point tensors are converted to; None: they stay."""
        return torch.float64 if self.precision == "double" else None

    def check(self) -> None:
        """Refuse a device that is missing.

        Raises:
            ConfigError: torch finds no such device.
            MissingExtraError: greenlet is not installed.
        """
        if self.stacks:
            need("greenlet", extra="together")
        if self.device == "cpu":
            return
        if not torch.cuda.is_available():
            raise ConfigError(f"compute.device = {self.device!r}: torch finds no such device here; use cpu")
        number = int(self.device.partition(":")[2] or 0)
        if number >= torch.cuda.device_count():
            found = ", ".join(f"cuda:{k}" for k in range(torch.cuda.device_count()))
            raise ConfigError(f"compute.device = {self.device!r}: torch finds {found} here")

    def model(self, model: nn.Module) -> nn.Module:
        """Return a model to compute with: the same one, or a copy on the device in the precision."""
        return model if self.plain else copy.deepcopy(model).to(self.device, self.dtype)

    def data(self, data: Data) -> Data:
        """Return rows on the device, whose batches have the precision."""
        return data if self.plain else replace(data, x=self.tensor(data.x), y=self.tensor(data.y), dtype=self.dtype)

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the device, in its own dtype."""
        return tensor.to(self.device)

    def moved(self, part: _Part) -> _Part:
        """Return masks, settings or hooks with all tensors in them on the device."""
        return part if self.device == "cpu" else _moved(part, self.device)

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """Let a GPU use deterministic kernels alone inside the block, and TensorFloat-32 only if it may."""
        if self.device == "cpu":
            yield
            return
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
        strict = torch.are_deterministic_algorithms_enabled()
        cudnn.deterministic, cudnn.benchmark = True, False
        cudnn.allow_tf32 = matmul.allow_tf32 = self.tf32
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
            torch.use_deterministic_algorithms(strict)

    @contextlib.contextmanager
    def draws(self, seed: int) -> Iterator[None]:
        """Seed the device's own generator inside the block; the CPU's is that of ``streams``."""
        if self.device == "cpu":
            yield
            return
        with torch.random.fork_rng(devices=[self.device]):
            torch.cuda.manual_seed(seed)
            yield


def _moved(part: Any, device: str) -> Any:
    if isinstance(part, torch.Tensor):
        return part.to(device)
    if isinstance(part, dict):
        return {name: _moved(inner, device) for name, inner in part.items()}
    if isinstance(part, (list, tuple)):
        return type(part)(_moved(inner, device) for inner in part)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = {f.name: _moved(getattr(part, f.name), device) for f in dataclasses.fields(part) if f.init}
        return dataclasses.replace(part, **fields)
    return part
