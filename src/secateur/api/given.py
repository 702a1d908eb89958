"""From what somebody gives in Python to a study, and to the objects that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.api.objects import Rows, rows_of
from secateur.data.held import HeldArrays
from secateur.data.sources import options_of
from secateur.errors import ConfigError
from secateur.models.held import HeldModel, hold
from secateur.study.sections import DataSection
from secateur.study.shorthand import written_out
from secateur.study.study import Study, put

_IMAGES = 4  # dimensions of rows that are images


@dataclass(frozen=True)
class Given:
    """What a run or a comparison is given.

    Attributes:
        settings: the settings that follow from the objects, by path.
        rows: the rows.
        model: the model, where it is an object.
    """

    settings: Mapping[str, Any]
    rows: Rows
    model: HeldModel | None = field(default=None)

    @property
    def more(self) -> tuple[str, ...]:
        """Return the paths of settings that there are beside a study's own: the options of its rows."""
        own = options_of(str(self.settings.get("data.source", ""))) - DataSection.model_fields.keys()
        return tuple(f"data.options.{name}" for name in sorted(own))

    def study(self, method: object, settings: Mapping[str, Any]) -> Study:
        """Return the study of a method, with settings by full or by short path.

        Raises:
            ConfigError: a setting is unknown, ambiguous or wrong.
        """
        if not isinstance(method, str):
            raise ConfigError(f"method is a {type(method).__name__}: give a name of secateur list, or a dotted path")
        values: dict[str, Any] = {"method": method}
        for path, value in {**self.settings, **written_out(settings, method, self.more)}.items():
            put(values, path, value.item() if isinstance(value, np.generic) else value)
        return Study.model_validate(values)


def given(model: object, clients: object, test: object, data: object) -> Given:
    """Hold what somebody gives, and return it.

    Args:
        model: a module, which starts from a copy of its own weights; a class or a function that makes one, whose
            weights each seed draws anew; a name; None: the study's default, and ``mlp`` for rows that are no images.
        clients, test, data: see ``rows_of``.

    Raises:
        ConfigError, DataError, ModelError: they cannot be used.
    """
    rows = rows_of(clients, test, data)
    if model is None and isinstance(rows.held, HeldArrays) and rows.held.rows.ndim < _IMAGES:
        model = "mlp"
    if model is None or isinstance(model, str):
        return Given({**rows.settings, **({} if model is None else {"model.name": model})}, rows)
    held = hold(model)
    settings = {**rows.settings, "model.name": held.name, "model.init": "torch"}
    if isinstance(rows.held, HeldArrays) and _reads_tokens(model, rows.held.rows):
        settings["data.options.kind"] = "tokens"
    return Given(settings, rows, held)


def _reads_tokens(model: object, x: np.ndarray) -> bool:
    """Return whether whole numbers, given as rows, are what a model looks up in an embedding."""
    looks_up = isinstance(model, nn.Module) and any(isinstance(part, torch.nn.Embedding) for part in model.modules())
    return looks_up and x.dtype.kind in "iu" and x.ndim == 2
