"""Heart disease at four hospitals: each SuperNode reads its own folder, and no row leaves it.

The rows are those of the UCI heart disease data (processed.*.data): 13 features, "?" where one is missing, and the
diagnosis, 0 for none. The hospitals agree on the scale of each feature beforehand, so that nobody has to ask for
another's mean; what is missing becomes that mean, and a second column says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from secateur.flower import client_app, server_app

if TYPE_CHECKING:
    from secateur.data import Source

# age, sex, chest pain, blood pressure, cholesterol, blood sugar, ECG, heart rate, angina, ST depression and slope,
# vessels, thallium
MEAN = np.array([54, 0.8, 3, 130, 240, 0.15, 0.6, 140, 0.4, 1, 1.7, 0.7, 5])
SCALE = np.array([9, 0.4, 1, 20, 50, 0.4, 0.8, 25, 0.5, 1, 0.6, 1, 2])
NEVER_ZERO = [3, 4]  # a pressure or cholesterol of 0 was not measured


def load(folder: str, seed: int) -> Source:
    """Return the rows of all files in a hospital's folder; secateur holds a part of them out itself."""
    from secateur.data import Source  # noqa: PLC0415 -- torch comes with it, and a message's process needs none

    del seed
    files = sorted(Path(folder).glob("*.data"))
    if not files:
        raise FileNotFoundError(f"no *.data file in {folder}")
    lines = [line for file in files for line in file.read_text().split() if line]
    rows = np.array([[np.nan if cell == "?" else float(cell) for cell in line.split(",")] for line in lines])
    features, diagnosis = rows[:, :13], rows[:, 13]
    features[:, NEVER_ZERO] = np.where(features[:, NEVER_ZERO] == 0, np.nan, features[:, NEVER_ZERO])
    missing = np.isnan(features)
    scaled = np.where(missing, 0.0, (features - MEAN) / SCALE)
    x, y = np.concatenate([scaled, missing], axis=1).astype(np.float32), (diagnosis > 0).astype(np.int64)
    return Source("heart disease", x, y, x[:0], y[:0], None, outputs=2, kind="tabular")


server = server_app()
client = client_app()
