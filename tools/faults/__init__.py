"""Injects faults into real runs. Read __main__, then run.py, then one part after the other."""
