"""Sweeps and the tables of RESULTS.md: `python -m experiments NAME`."""
