"""The machine: which device a run uses, and how many of its threads."""

from __future__ import annotations

import torch


def select_device(name: str) -> torch.device:
    """The torch device of "cpu", "cuda" or "cuda:INDEX"; refused when this machine has none such."""
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"run.device: {name} must be a device of this machine, which has {torch.cuda.device_count()} CUDA devices; "
            "use cpu, or a torch build and driver that see the card"
        )
    return device


def set_threads(num_threads: int) -> None:
    """Set the number of threads of CPU kernels; 0 = torch's choice (all cores, or OMP_NUM_THREADS)."""
    if num_threads:
        torch.set_num_threads(num_threads)
