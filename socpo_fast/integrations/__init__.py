"""Connects other trainers, such as TRL or verl.

tensors.py      pads rollouts to tensors and returns their advantages
episode.py      plays episodes with any generator
trl.py          a GRPOTrainer with SocraticPO; needs TRL 1.16
trl_loss.py     its loss, inside the model's forward
trl_checks.py   what it refuses
"""
