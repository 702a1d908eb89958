"""The Python interface: runs and comparisons of models and rows that are objects of a script or a notebook."""
