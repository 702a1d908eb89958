"""A run: the round loop, exchanges, the client's side, checkpoints and the run's folder."""
