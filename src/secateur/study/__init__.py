"""A Study defines the result of a run; a Runtime only makes it faster."""
