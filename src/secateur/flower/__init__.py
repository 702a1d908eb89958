"""secateur on Flower: apps that run a whole study, and pruning for an existing app."""

from secateur.flower.apps import server_app
from secateur.flower.mod import keep_pruned, prune
from secateur.flower.node import client_app
from secateur.flower.strategy import Pruned

__all__ = ["Pruned", "client_app", "keep_pruned", "prune", "server_app"]
