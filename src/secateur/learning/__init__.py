"""Local training: the loop, its optimisers, gradient statistics, evaluation, and training several clients at once."""
