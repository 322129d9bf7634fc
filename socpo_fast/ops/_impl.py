"""Which implementation of an op runs: one table, one choice, one error.

`ref` is plain torch on any device; `cpp` is the compiled extension `socpo_fast._C` on the CPU; `triton` is the kernels
of socpo_fast/kernels on a GPU, and on the CPU under TRITON_INTERPRET=1. `auto` takes the fastest one that can run on
the tensors' device; `flash`, the package flash-attn on a GPU, runs only where it is named. Naming one
that cannot run is an error, never a silent fallback.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

IMPLS: dict[str, tuple[str, ...]] = {
    "decay_rewards": ("ref", "cpp", "triton"),
    "compute_advantages": ("ref", "cpp", "triton"),
    "linear": ("ref", "cpp"),
    "linear_logprob": ("ref", "cpp", "triton"),
    "linear_policy_loss": ("ref", "cpp", "triton"),
    "linear_sample": ("ref", "cpp", "triton"),
    "policy_loss": ("ref",),
    "packed_attention": ("ref",),
    "paged_attention": ("ref", "cpp", "triton", "flash"),
    "rms_norm": ("ref", "cpp", "triton"),
    "rotary": ("ref", "cpp", "triton"),
    "rotary_write": ("ref", "cpp", "triton"),
    "sample": ("ref", "cpp"),
    "swiglu": ("ref", "cpp", "triton"),
}


def choose_impl(op: str, impl: str, available: tuple[str, ...], device: torch.device) -> str:
    """The implementation to run for `impl` = "auto" or a name in `available` (the op's row of IMPLS)."""
    if impl == "auto":
        if device.type == "cuda":
            return "triton" if "triton" in available and triton_is_installed() else "ref"
        return "cpp" if "cpp" in available and device.type == "cpu" and extension_is_built() else "ref"
    if impl not in available:
        raise ValueError(f"{op}: impl must be one of auto, {', '.join(available)}, got {impl!r}")
    if impl == "cpp" and device.type != "cpu":
        raise ValueError(f"{op}: impl must be auto or ref for tensors on {device}, got 'cpp', which runs on the CPU")
    if impl == "cpp" and not extension_is_built():
        raise RuntimeError(
            f"{op}: impl 'cpp' needs the extension socpo_fast._C; "
            "build it with `pip install --no-build-isolation -e .` or use impl='ref'"
        )
    if impl == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{op}: impl must be auto or ref for tensors on {device}, got 'triton', which runs on a GPU, "
            "and on the CPU under TRITON_INTERPRET=1"
        )
    if impl == "flash" and device.type != "cuda":
        raise ValueError(f"{op}: impl must be auto or ref for tensors on {device}, got 'flash', which runs on a GPU")
    if impl == "triton" and not triton_is_installed():
        raise RuntimeError(f"{op}: impl 'triton' needs the package triton; pip install triton or use impl='ref'")
    return impl


@functools.cache
def auto_impl(op: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """What `impl="auto"` means for such tensors; cached, for calls too many to choose each time."""
    return choose_impl(op, "auto", impls_of(op, dtype), torch.device(device_type))


def impls_of(op: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The implementations of an op for a dtype: fp64 is the reference's alone, cpp takes fp32 only."""
    left_out = {torch.float32: (), torch.float64: ("cpp", "triton")}.get(dtype, ("cpp",))
    return tuple(impl for impl in IMPLS[op] if impl not in left_out)


@functools.cache
def kernels_of(stem: str, impl: str) -> Any:
    """Where an op's launches are, under the same names: torch.ops.socpo, or the module of kernels/."""
    return torch.ops.socpo if impl == "cpp" else importlib.import_module(f"socpo_fast.kernels.{stem}")


def available_impls(device: torch.device | str = "cpu") -> dict[str, str]:
    """Op name -> the implementation `auto` picks for tensors on `device`."""
    return {op: choose_impl(op, "auto", available, torch.device(device)) for op, available in IMPLS.items()}


@functools.cache
def extension_is_built() -> bool:
    """True when `socpo_fast._C` imports, which registers `torch.ops.socpo.*`; a broken build raises."""
    try:
        importlib.import_module("socpo_fast._C")
    except ModuleNotFoundError:
        return False
    return True


@functools.cache
def triton_is_installed() -> bool:
    """True when `import triton` would find it; it is imported only by the kernels, and only when they are chosen."""
    return importlib.util.find_spec("triton") is not None
