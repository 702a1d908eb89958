"""What torch's calls do to the units of their inputs: one module a family, one small function a kind of call."""

from secateur.pruning.following import (  # noqa: F401 -- each adds its functions to the table
    attention,
    convolutions,
    elementwise,
    movements,
    norms,
    pools,
    products,
    recurrent,
)
from secateur.pruning.following.walk import Walk

__all__ = ["Walk"]
