"""A run: the round loop, exchanges, the client side, checkpoints and a run's folder."""
