"""The data formats, one file each, found by listing this package.

A format is a module with a function ``load(argument, seed)`` that returns a ``Source``. The first line of its docstring
says what to type; ``secateur list`` shows it.
"""
