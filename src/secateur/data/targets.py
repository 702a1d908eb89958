"""Numbers to learn that are no table's: brought to the mean 0 and the scale 1, as a table's schema does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from secateur.data.source import Source
from secateur.errors import DataError

_CONSTANT = 1e-9  # of the mean: a spread below it is what single precision made of one value


def standardised(source: Source, train: np.ndarray) -> Source:
    """Return a source whose numbers to learn have the mean 0 and the scale 1 over all clients' training rows.

    Other tasks are returned as they are, and numbers of which a loader says itself how they were scaled.

    Args:
        source: the source.
        train: the training rows of all clients, by number.

    Raises:
        DataError: every training row has the same number.
    """
    if source.task != "regression" or (source.target_mean, source.target_scale) != (0.0, 1.0):
        return source
    values = source.y_train[train].astype(np.float64)
    mean, scale = float(values.mean()), float(values.std())
    if scale <= _CONSTANT * abs(mean):
        raise DataError(
            f"data {source.name!r}: the target is {mean:g} in every training row: there is nothing to learn"
        )
    y_train, y_test = (((y - mean) / scale).astype(np.float32) for y in (source.y_train, source.y_test))
    return replace(source, y_train=y_train, y_test=y_test, target_mean=mean, target_scale=scale)
