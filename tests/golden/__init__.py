"""Trajectories that were recorded once, and that every later version has to follow.

`python -m tests.golden.record` writes `results.json` anew. Do that only where a trajectory is meant to change,
and say in the commit which one and why.
"""
