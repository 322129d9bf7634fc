"""Faults injected into real runs: read __main__, then run.py, then one part after the other."""
