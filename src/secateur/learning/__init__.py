"""Local training: the loop, its optimisers, gradients, and several clients in one."""
