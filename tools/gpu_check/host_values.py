"""Tracks values of small tensors on the fake device, as far as the host can compute them.

Known are tensors that the host has uploaded, and results of ops on known tensors only: lengths,
block tables, masks. Reading them gives what a card would give, so code that depends on them takes
its real path. Unknown is what depends on an unknown number, was written to, or was made in a
capture. One exception: `all` of unknown values counts as true, for checks such as "weights are
finite".

A known value is kept on the FakeTensor as `_host_value`: (version of the tensor, value).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

MAX_ELEMENTS = 2**16  # larger results are not computed on the host
Call = tuple[list[Any], dict[str, Any]]
_UNKNOWN = None, None


def value_of(x: Tensor) -> Tensor | None:
    """Returns the value on the host; None if it is unknown or the tensor has changed since."""
    if not isinstance(x, FakeTensor):
        return x
    version, value = getattr(x, "_host_value", _UNKNOWN)
    return value if value is not None and version == x._version else None


def values_read(x: Tensor, unknown: int, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the result of a copy to the host; unknown numbers are `unknown`, bools False."""
    value = value_of(x)
    with unset_fake_temporarily():
        if value is None:
            value = torch.full(x.shape, 0 if x.dtype == torch.bool else unknown, dtype=x.dtype)
        return value.to(dtype or x.dtype, copy=True)


def numbers_read(x: Tensor, unknown: int) -> Any:
    """Returns the result of x.tolist(), which for a tensor without axes is x.item()."""
    value = values_read(x, unknown)
    with unset_fake_temporarily():
        return value.tolist()


def count_true(mask: Tensor) -> int:
    """Returns how many rows a mask picks: all of them where the mask is unknown."""
    if (value := value_of(mask)) is None:
        return mask.numel()
    with unset_fake_temporarily():
        return int(value.count_nonzero())


def forget(tensors: Iterable[Tensor]) -> None:
    """Marks tensors as unknown, since they may have been written to."""
    for x in tensors:
        if isinstance(x, FakeTensor):
            x._host_value = _UNKNOWN  # type: ignore[attr-defined]


def assume_true(x: Tensor) -> None:
    """Sets a result to true: the assumed answer to a question about unknown numbers."""
    with unset_fake_temporarily():
        _note(x, torch.ones(x.shape, dtype=x.dtype))


def call_on_host(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Sequence[Tensor]
) -> Call | None:
    """Returns the same call with values in place of tensors; None if one of them is unknown."""
    if any(value_of(x) is None for x in inputs) or func._schema.is_mutable:
        return None
    # A random number of the device is not that of the host.
    if torch.Tag.nondeterministic_seeded in func.tags:
        return None
    values = _with_values(dict(kwargs))
    if "device" in values:
        values["device"] = torch.device("cpu")
    return _with_values(args), values


def keep_values(func: Any, call: Call, outputs: Sequence[Tensor]) -> None:
    """Calls the op on the host, and keeps the values of its results."""
    # Large tensors are activations in practice; computing them on the host would take too long.
    if any(x.numel() > MAX_ELEMENTS for x in outputs):
        return
    with unset_fake_temporarily():
        result = func(*call[0], **call[1])
    values = [result] if isinstance(result, Tensor) else result or []
    for x, value in zip(outputs, values, strict=True):
        _note(x, value)


def _note(x: Tensor, value: Tensor) -> None:
    if not x.is_inference():  # inference tensors have no version counter
        x._host_value = x._version, value  # type: ignore[attr-defined]


def _with_values(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return value_of(tree)
    if isinstance(tree, tuple | list):
        return [_with_values(branch) for branch in tree]
    if isinstance(tree, dict):
        return {key: _with_values(branch) for key, branch in tree.items()}
    return tree
