"""What defines a result, and what only makes it faster."""
