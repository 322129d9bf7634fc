"""Checks arguments on entry to an op: dtype, shape and device of tensors, ranges of numbers.

TensorChecker checks tensors, check_rule and check_word check numbers and words. Every error is one
line: where, what, the rule, the value, and what to do. The other functions look at what a tensor
is: without values, sharded, under torch.autocast.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE_FLOATS = (torch.float32, torch.float64)
INDEX = (torch.int64,)


class TensorChecker:
    """Checks tensors against the shape letters that end their names.

    A letter stands for the size with which it was first seen; later tensors must agree with it.

        check = TensorChecker("linear_logprob")
        check("hidden_TD", hidden_TD, FLOATS)      # T and D are known from here on
        check("weight_VD", weight_VD, FLOATS)      # must have the same D
    """

    def __init__(self, where: str):
        self.where = where
        self.sizes: dict[str, int] = {}
        self.device: torch.device | None = None

    def __call__(self, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.where}: {name} must be a torch.Tensor, got {type(x).__name__}")
        if is_sharded(x):
            raise ValueError(
                f"{self.where}: {name} must be a whole tensor, got a DTensor, which may be a "
                "shard of one; call its full_tensor()"
            )
        letters = name.rpartition("_")[2]
        # Into a copy: a tensor that is refused must not define what its letters mean.
        sizes = dict(self.sizes)
        fits = x.dtype in dtypes and len(x.shape) == len(letters)
        if not fits or any(
            sizes.setdefault(c, size) != size for c, size in zip(letters, x.shape, strict=True)
        ):
            rule = "/".join(_dtype_name(dtype) for dtype in dtypes)
            shapes = ", ".join(f"{c}={self.sizes[c]}" if c in self.sizes else c for c in letters)
            got = f"{_dtype_name(x.dtype)} {list(x.shape)}"
            raise ValueError(f"{self.where}: {name} must be {rule} [{shapes}], got {got}")
        self.sizes = sizes
        if self.device is None:
            self.device = x.device
        elif x.device != self.device:
            raise ValueError(
                f"{self.where}: {name} must be on {self.device}, got {x.device}; move it there "
                "first"
            )

    def each(self, dtypes: tuple[torch.dtype, ...], **tensors: Tensor) -> None:
        """Checks several tensors, passed by name, that may have the same dtypes."""
        for name, x in tensors.items():
            self(name, x, dtypes)

    def optional(self, dtypes: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
        """Checks the tensors that are not None."""
        self.each(dtypes, **{name: x for name, x in tensors.items() if x is not None})

    def flat(self, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
        """Checks a contiguous tensor of any shape as if it were flattened to one dimension."""
        if isinstance(x, Tensor):
            check_rule(
                self.where, f"strides of {name}", x.stride(), x.is_contiguous(), "contiguous"
            )
            x = x.view(-1)
        self(name, x, dtypes)

    def index_range(self, name: str, index: Tensor, size: int) -> None:
        """Checks that every entry is in [0, size)."""
        # `every` has the same test, but building the message there would turn the size into a
        # constant of the graph under torch.compile, and each new size would be compiled again.
        if not has_no_values(index):
            self.every(name, index, (index >= 0) & (index < size), f"in [0, {size})")

    def finite(self, name: str, x: Tensor, *, at_least: float | None = None) -> None:
        """Checks that every entry is finite and, unless it is None, not below `at_least`."""
        # inf - inf and nan - nan are nan. On a GPU this takes half the launches of isfinite.
        holds = x - x == 0 if at_least is None else (x - x == 0) & (x >= at_least)
        self.every(name, x, holds, "finite" if at_least is None else f"finite and >= {at_least:g}")

    def every(self, name: str, x: Tensor, holds: Tensor, rule: str) -> None:
        """Checks that `holds` is True for every entry of x.

        On a GPU the check runs on the device and fails there (a device assert), so that the host
        does not wait for the answer. Tensors without values (under torch.compile, FakeTensor, meta)
        are not checked.
        """
        if has_no_values(x):
            return
        if x.is_cuda:
            torch._assert_async(holds.all(), f"{self.where}: {name} must be {rule}")
        elif not holds.all():
            first_bad = int((~holds).int().argmax())
            raise ValueError(
                f"{self.where}: {name} must be {rule}, got {x[first_bad].item()} at {first_bad}"
            )


def has_no_values(x: Tensor) -> bool:
    """Whether x has no values: under torch.compile, in FakeTensorMode or on the meta device."""
    return torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor)


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor; tested by name, since torch.distributed is slow to import."""
    return type(x).__name__ == "DTensor"


def whole(where: str, name: str, weight: Any) -> Tensor:
    """Returns the full tensor of a DTensor, and any other tensor as it is.

    Raises:
        ValueError: the gradient would have to go back to the shards of several ranks. Only the
                    caller knows whether to sum it over ranks (each sees different rows) or not.
    """
    if not is_sharded(weight):
        return weight
    if weight.requires_grad and torch.is_grad_enabled() and weight.device_mesh.size() > 1:
        raise ValueError(
            f"{where}: {name} must be whole or need no gradient, got a DTensor on "
            f"{weight.device_mesh.size()} ranks; pass its full_tensor(grad_placements=[Partial()]) "
            "where ranks hold different rows, [Replicate()] where they hold the same"
        )
    return weight.full_tensor()


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Returns a context in which torch.autocast is off, so that fp32 tensors stay fp32."""
    return torch.autocast(x.device.type, enabled=False) if is_autocasting(x) else nullcontext()


def is_autocasting(x: Tensor) -> bool:
    """Whether torch.autocast is on for the device of x."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors cast to torch.autocast's dtype if it is on, as torch.matmul does."""
    if not is_autocasting(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors
    )


def check_rule(
    where: str,
    name: str,
    value: object,
    holds: bool,
    rule: str,
    advice: str = "",
) -> None:
    """Raises a ValueError unless `holds`; `rule` is in words, `advice` says what to do."""
    if not holds:
        advice = f"; {advice}" if advice else ""
        raise ValueError(f"{where}: {name} must be {rule}, got {value!r}{advice}")


def check_word(where: str, name: str, value: object, known: tuple[str, ...]) -> None:
    """Raises a ValueError unless the value is one of the known words."""
    check_rule(where, name, value, value in known, f"one of {', '.join(known)}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
