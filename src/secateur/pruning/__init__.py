"""The mathematics of pruning, on tensors alone; it knows no client, no exchange and no bytes."""
