"""Connects other trainers, such as TRL or verl.

episode.py plays an episode with any generator. tensors.py pads rollouts to tensors and returns
their advantages.
"""
