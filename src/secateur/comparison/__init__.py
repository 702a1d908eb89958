"""Suites of runs: made, controlled, run in parallel."""
