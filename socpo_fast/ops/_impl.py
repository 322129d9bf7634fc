"""Decides which implementation of an op runs: IMPLS is the table, pick_impl the decision.

    ref      plain torch, any device
    cpp      the compiled extension `socpo_fast._C`, on the CPU
    triton   the kernels of socpo_fast/kernels, on a GPU, and on the CPU under TRITON_INTERPRET=1
    flash    the package flash-attn, on a GPU
    auto     the fastest one of ours that can run on the tensor's device and dtype

Naming an implementation that cannot run is an error, never a silent fallback.
"""

import functools
import importlib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FP32 = (torch.float32,)
_HALVES = (torch.bfloat16, torch.float16)
_ANY = (*_FP32, *_HALVES, torch.float64)

# The dtypes of the op's first tensor that each implementation supports; ref supports all.
IMPLS: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "adamw": {"cpp": (*_FP32, torch.bfloat16), "triton": _FP32 + _HALVES},
    "decay_rewards": {"cpp": _ANY, "triton": _ANY},
    "compute_advantages": {"cpp": _ANY, "triton": _ANY},
    "linear": {"cpp": _FP32},
    "linear_logprob": {"cpp": _ANY, "triton": _ANY},
    "linear_policy_loss": {"cpp": _ANY, "triton": _ANY},
    "linear_sample": {"cpp": _FP32, "triton": _FP32 + _HALVES},
    "policy_loss": {},  # plain torch only; its fast form is linear_policy_loss
    "paged_attention": {"cpp": _FP32, "triton": _FP32 + _HALVES, "flash": _HALVES},
    "rms_norm": {"cpp": _FP32, "triton": _FP32 + _HALVES},
    "rotary": {"cpp": _FP32, "triton": _FP32 + _HALVES},
    "rotary_qkv": {"cpp": _FP32, "triton": _FP32 + _HALVES},
    "rotary_write": {"cpp": _FP32, "triton": _FP32 + _HALVES},
    "sample": {"cpp": _ANY},
    "swiglu": {"cpp": _FP32, "triton": _FP32 + _HALVES},
    "tree_attention": {"cpp": _FP32, "triton": _FP32 + _HALVES},
}
FASTEST = {"cpu": "cpp", "cuda": "triton"}  # what auto picks on a device, if it supports the dtype
_BUILD = "`pip install --no-build-isolation -e .`"
_DEVICES = {"cpp": "cpu", "triton": "cuda", "flash": "cuda"}
_RUNS_ON = {
    "cpp": "the CPU",
    "triton": "a GPU, and on the CPU under TRITON_INTERPRET=1",
    "flash": "a GPU",
}


def pick_impl(op: str, impl: str, x: Tensor) -> str:
    """Returns the implementation that runs for a tensor like x; `impl` is "auto" or a name.

    Raises:
        ValueError: `impl` does not exist for this op and dtype, or does not run on this device.
        RuntimeError: the extension is not built, or triton not installed.
    """
    device = x.device.type
    dtypes = IMPLS[op]
    if impl == "auto":
        fastest = FASTEST.get(device, "ref")
        return fastest if x.dtype in dtypes.get(fastest, ()) and _INSTALLED[fastest] else "ref"
    if impl == "ref":
        return impl
    if x.dtype not in dtypes.get(impl, ()):
        known = ["auto", "ref", *(name for name, takes in dtypes.items() if x.dtype in takes)]
        for_dtype = f" for {str(x.dtype).removeprefix('torch.')}" if impl in dtypes else ""
        raise ValueError(f"{op}: impl must be one of {', '.join(known)}{for_dtype}, got {impl!r}")
    if device != _DEVICES[impl] and not (impl == "triton" and device == "cpu" and INTERPRETS):
        raise ValueError(
            f"{op}: impl must be auto or ref for tensors on {x.device}, got {impl!r}, which runs "
            f"on {_RUNS_ON[impl]}"
        )
    if impl in _INSTALLED and not _INSTALLED[impl]:
        raise RuntimeError(f"{op}: impl {impl!r} needs {_INSTALL_ADVICE[impl]}, or use impl='ref'")
    return impl


@functools.cache
def kernels_of(stem: str, impl: str) -> Any:
    """Returns the namespace that launches an op: torch.ops.socpo, or a module of kernels/."""
    # Imported at the first launch, not above: a module of kernels/ imports triton.
    if impl == "cpp":
        return torch.ops.socpo
    return importlib.import_module(f"socpo_fast.kernels.{stem}")


def available_impls(device: torch.device | str = "cpu") -> dict[str, str]:
    """Returns, for each op, the implementation that `auto` picks for fp32 tensors on `device`."""
    like = torch.empty(0, device=device)
    return {op: pick_impl(op, "auto", like) for op in IMPLS}


@functools.cache
def extension_is_built() -> bool:
    """Whether `socpo_fast._C` exists; importing it registers `torch.ops.socpo.*`.

    Raises:
        RuntimeError: it is built for another torch.
        ImportError: it does not load for another reason.
    """
    try:
        _check_torch_of_extension()
        importlib.import_module("socpo_fast._C")
    except ModuleNotFoundError:
        return False
    return True


def _check_torch_of_extension() -> None:
    """Raises a RuntimeError if `socpo_fast._C` is built for another minor release of torch.

    The C++ interface of torch changes with each. csrc/bindings.cpp leaves the release in the file,
    where it is read without loading the library: that would end in an undefined symbol or a crash.
    """
    extension = importlib.util.find_spec("socpo_fast._C")
    if extension is None or extension.origin is None:
        return
    library = Path(extension.origin).read_bytes()
    built_for = re.search(rb"socpo_fast\._C is built for torch (\d+\.\d+)", library)
    if built_for and not torch.__version__.startswith(f"{built_for[1].decode()}."):
        release = built_for[1].decode()
        raise RuntimeError(
            f"ops: the extension socpo_fast._C must be built for torch {torch.__version__}, got "
            f"one for torch {release}; build it again with {_BUILD}, or install torch {release}"
        )


# Evaluated once, at import: pick_impl is then plain Python, which torch.compile can trace.
# find_spec does not import triton, which is slow; the kernels import it when they are picked.
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
_INSTALLED = {"cpp": extension_is_built(), "triton": importlib.util.find_spec("triton") is not None}
_INSTALL_ADVICE = {
    "cpp": f"the extension socpo_fast._C; build it with {_BUILD}",
    "triton": "the package triton; pip install triton",
}
