"""The parts of local training under one name."""

from secateur.learning.evaluate import Score, evaluate
from secateur.learning.loop import Effort, Fit, fit, forward, loop, orders
from secateur.learning.optimiser import Optimiser, Training
from secateur.learning.resident import enforce, lay_out, load, tensors_of
from secateur.learning.task import Data

__all__ = [
    "Data", "Effort", "Fit", "Optimiser", "Score", "Training", "enforce", "evaluate", "fit", "forward", "lay_out",
    "load", "loop", "orders", "tensors_of",
]  # fmt: skip
