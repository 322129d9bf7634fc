"""Describes kernel launches: checks their arguments, counts their bytes and their FLOPs.

All functions depend on shapes, dtypes and strides only. Bytes are a lower bound: an op of torch is
taken to read and write each tensor once, and each pointer of a Triton kernel counts once, be it
read or written.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Traffic = list[tuple[str, int]]  # (tensor as it lies in memory, bytes read and written)

SHORT = {"bfloat": "bf", "float": "f", "int": "i", "uint": "u", "complex": "c"}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
PICKS = ("embedding", "index", "index_select", "gather")  # read only the elements they return
SCATTERS = ("index_put_", "index_copy_", "index_add_", "scatter_", "scatter_add_")
OVERWRITES = ("copy_", "fill_", "zero_")  # write a tensor without reading it
PAGED = (
    "k_ptr",
    "v_ptr",
    "k_cache_ptr",
    "v_cache_ptr",
)  # pools, in kernels with a block table or slots
GRID_LIMITS = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: str  # a Triton kernel's name, or aten.mm
    shapes: str = ""  # of its tensors
    grid: tuple[int, ...] = ()  # empty for an op of torch
    traffic: tuple[tuple[str, int], ...] = ()
    flops: int = 0

    @property
    def is_torch(self) -> bool:
        return self.kernel.startswith("aten.")

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.traffic)


@dataclass
class Section:
    """One code path. Reads and uploads name the op and the line of our code."""

    name: str
    may_read: bool
    may_upload: bool
    launches: list[Launch] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def check_launch(
    signature: inspect.Signature,
    grid: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    launch_options: Collection[str],
) -> tuple[dict[str, Any], tuple[int, ...], list[str]]:
    """Returns the arguments by name, the grid, and everything that a card would reject or misread.

    launch_options are keywords that every launch accepts, such as num_warps.
    """
    unknown = kwargs.keys() - signature.parameters.keys() - set(launch_options)
    faults = [f"unknown keyword {name}" for name in sorted(unknown)]
    declared = {name: value for name, value in kwargs.items() if name in signature.parameters}
    try:
        # Fails on missing or repeated arguments, as Triton would at run time.
        bound = signature.bind(*args, **declared)
    except TypeError as error:
        return {}, (), [*faults, str(error)]
    bound.apply_defaults()
    # A kernel without stride arguments assumes that its tensors are contiguous.
    may_have_strides = any("stride" in name for name in signature.parameters)
    for name, parameter in signature.parameters.items():
        value = bound.arguments[name]
        is_constant = "constexpr" in str(parameter.annotation)
        faults += _argument_faults(name, value, is_constant, may_have_strides)
    if callable(grid):
        grid = grid(bound.arguments)
    sizes = tuple(grid) if isinstance(grid, tuple | list) else (grid,)
    if not 1 <= len(sizes) <= 3:
        faults.append(f"grid must have 1 to 3 sizes, got {sizes}")
    for axis, size, limit in zip("xyz", sizes, GRID_LIMITS, strict=False):
        if not (isinstance(size, int) and 0 < size <= limit):
            faults.append(f"grid {axis} must be in [1, {limit}], got {size}")
    return dict(bound.arguments), sizes, faults


def _argument_faults(name: str, value: Any, is_constant: bool, may_have_strides: bool) -> list[str]:
    """Returns what is wrong with one argument; names of pointers end in _ptr."""
    if is_constant:
        if isinstance(value, Tensor):
            return [f"{name} is a constant and must be no tensor, got {label(value)}"]
        # tl.arange needs a power of two.
        if name.startswith("BLOCK_") and not (isinstance(value, int) and value.bit_count() == 1):
            return [f"{name} must be a power of two, got {value}"]
        return []
    if not name.endswith("_ptr"):
        if type(value) not in (int, float, bool):
            return [f"{name} must be a number, got {type(value).__name__}"]
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return [f"{name} must fit into 64 bits, got {value}"]
        return []
    if value is None:
        return []
    if not isinstance(value, Tensor):
        return [f"{name} must be a tensor or None, got {type(value).__name__}"]
    faults = []
    if value.device.type != "cuda":
        faults.append(f"{name} must be on cuda, got {label(value)} on {value.device}")
    is_dense = value.is_contiguous() or (may_have_strides and _has_dense_rows(value))
    if not is_dense:
        strides = list(value.stride())
        faults.append(f"{name} must be contiguous, got {label(value)} with strides {strides}")
    return faults


def _has_dense_rows(x: Tensor) -> bool:
    """Whether all axes but the first are contiguous; the kernel gets the first axis's stride."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def kernel_traffic(tensors: Mapping[str, Tensor]) -> Traffic:
    """Counts a Triton launch's bytes: each tensor once, of page pools only the pages in use."""
    pools = [x for name, x in tensors.items() if name in PAGED]
    num_tokens = None
    for name, x in tensors.items():
        if "table" in name and pools:
            num_tokens = x.numel() * pools[0].shape[1]
        elif "slots" in name:
            num_tokens = x.numel()
    traffic = []
    for name, x in tensors.items():
        size = tensor_bytes(x)
        if name in PAGED and num_tokens is not None:
            # A pool is as large as the cache, but a launch reads only the pages that it is given.
            size = min(size, num_tokens * x.shape[2] * x.shape[3] * x.element_size())
        traffic.append((memory_label(x), size))
    return traffic


def kernel_flops(tensors: Mapping[str, Tensor]) -> int:
    """Counts the FLOPs of kernels that multiply rows by the LM head; attention is left out."""
    if "row_keys_ptr" in tensors and "weight_ptr" in tensors:
        return 2 * tensors["row_keys_ptr"].numel() * tensors["weight_ptr"].numel()
    return 0


def op_traffic(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    new: Sequence[Tensor],
) -> Traffic:
    """Counts the bytes of an op that returns `new` tensors, reads and writes by its schema."""
    name = op_name(func)
    arguments = func._schema.arguments
    values = list(zip(arguments, args, strict=False))
    values += [(a, kwargs[a.name]) for a in arguments[len(args) :] if a.name in kwargs]
    picked = sum(map(tensor_bytes, new))
    if name in SCATTERS:  # the values are the last tensor
        picked = tensor_bytes(tensors_of(args)[-1])
    traffic = [(memory_label(x), tensor_bytes(x)) for x in new]
    for position, (argument, value) in enumerate(values):
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        is_read = not is_written or not (argument.is_out or name in OVERWRITES)
        # addmm with beta = 0 does not read the matrix that it would add.
        if name in PRODUCTS and argument.name == "self" and kwargs.get("beta", 1) == 0:
            is_read = False
        for x in tensors_of(value):
            size = tensor_bytes(x)
            # Of an embedding table only the rows that are picked are read.
            if position == 0 and name in PICKS + SCATTERS:
                size = min(size, picked)
            traffic.append((memory_label(x), size * (is_written + is_read)))
    return traffic


def product_flops(name: str, shapes: Sequence[Sequence[int]]) -> int:
    """Returns 2 M N K of a matrix product, 4 M N K of fused attention (causal or not), or 0."""
    if name.startswith("_scaled_dot_product") and not name.endswith("backward"):
        (batch, heads, num_queries, head_dim), keys = shapes[0], shapes[1]
        return 4 * batch * heads * num_queries * keys[2] * head_dim
    if name not in PRODUCTS:
        return 0
    left, right = shapes[1:3] if name in ("addmm", "baddbmm") else shapes[:2]
    return 2 * math.prod(left) * right[-1]


def wide_product(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Returns the result of a product with an out_dtype; None for other ops.

    FakeTensor gets these wrong: PyTorch 2.11 decomposes them for shapes and passes beta twice.
    """
    name = op_name(func)
    if name not in PRODUCTS or not func._schema.overload_name.startswith("dtype"):
        return None
    factors = tensors_of(args)[-2:]
    out_dtype = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype))
    shape = (*factors[0].shape[:-1], factors[1].shape[-1])
    out = kwargs.get("out")
    if out is None:
        out = factors[0].new_empty(shape, dtype=out_dtype)
    same = factors[0].shape[-1] == factors[1].shape[-2] and factors[0].dtype == factors[1].dtype
    if not same or tuple(out.shape) != shape or out.dtype != out_dtype:
        texts = ", ".join(map(label, (*factors, out)))
        raise RuntimeError(f"{name} into {out_dtype}: shapes and dtypes must agree, got {texts}")
    return out


def op_name(func: Any) -> str:
    """Returns the short name of an op: mm of aten::mm.default."""
    return func._schema.name.partition("::")[2]


def tensors_of(tree: Any) -> list[Tensor]:
    """Returns all tensors in nested tuples, lists and dicts, such as an op's arguments."""
    tensors: list[Tensor] = []
    _collect(tree, tensors)
    return tensors


def _collect(tree: Any, tensors: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        tensors.append(tree)
    elif isinstance(tree, tuple | list):
        for branch in tree:
            _collect(branch, tensors)
    elif isinstance(tree, dict):
        for branch in tree.values():
            _collect(branch, tensors)


def tensor_bytes(x: Tensor) -> int:
    """Returns the bytes of a tensor in memory: an axis of stride 0 repeats the same elements."""
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or not size]
    return math.prod(sizes) * x.element_size()


def label(x: Tensor) -> str:
    """Returns dtype and shape, such as bf16[256, 1024]."""
    return _short(x.dtype) + str(list(x.shape))


def memory_label(x: Tensor) -> str:
    """Returns the same with axes in memory order, so that a transpose has the same label."""
    strides = x.stride()
    axes = sorted(range(x.dim()), key=lambda axis: -strides[axis])
    return _short(x.dtype) + str([x.shape[axis] for axis in axes])


def _short(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    kind = re.split(r"\d", name)[0]
    return SHORT.get(kind, kind) + name.removeprefix(kind)
