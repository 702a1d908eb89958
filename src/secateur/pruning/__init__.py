"""Tensor mathematics of pruning; knows no client, no round trip, no bytes."""
