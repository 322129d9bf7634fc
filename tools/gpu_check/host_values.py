"""Values of small tensors on the fake device, as far as the host can work them out.

What the host has uploaded is known, and so is what ops make of known tensors alone: lengths, block
tables, masks. A read of them gives what a card would give, so the code behind it goes its real way.
What depends on an unknown number, was written to, or was made in a capture is unknown; only what
`all` finds out of unknown numbers is taken to hold, such as whether weights are finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

MAX_ELEMENTS = 2**16
Call = tuple[list[Any], dict[str, Any]]
_UNKNOWN = None, None


def value_of(x: Tensor) -> Tensor | None:
    """The value on the host; None when it is unknown."""
    if not isinstance(x, FakeTensor):
        return x
    version, value = getattr(x, "_host_value", _UNKNOWN)
    return value if value is not None and version == x._version else None


def values_read(x: Tensor, unknown: int, dtype: torch.dtype | None = None) -> Tensor:
    """What a copy to the host gives; an unknown number is `unknown`, an unknown answer no."""
    value = value_of(x)
    with unset_fake_temporarily():
        if value is None:
            value = torch.full(x.shape, 0 if x.dtype == torch.bool else unknown, dtype=x.dtype)
        return value.to(dtype or x.dtype, copy=True)


def numbers_read(x: Tensor, unknown: int) -> Any:
    """What x.tolist() gives; of a tensor without axes that is x.item()."""
    value = values_read(x, unknown)
    with unset_fake_temporarily():
        return value.tolist()


def count_true(mask: Tensor) -> int:
    """How many rows a mask picks: all, where the host cannot know."""
    if (value := value_of(mask)) is None:
        return mask.numel()
    with unset_fake_temporarily():
        return int(value.count_nonzero())


def forget(tensors: Iterable[Tensor]) -> None:
    """They may have been written to."""
    for x in tensors:
        if isinstance(x, FakeTensor):
            x._host_value = _UNKNOWN  # type: ignore[attr-defined]


def assume_true(x: Tensor) -> None:
    """The answer to a question about unknown numbers."""
    with unset_fake_temporarily():
        _note(x, torch.ones(x.shape, dtype=x.dtype))


def call_on_host(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Sequence[Tensor]
) -> Call | None:
    """The same call with values in place of tensors; None where one of them is unknown."""
    if any(value_of(x) is None for x in inputs) or func._schema.is_mutable:
        return None
    if torch.Tag.nondeterministic_seeded in func.tags:
        return None
    values = _with_values(dict(kwargs))
    if "device" in values:
        values["device"] = torch.device("cpu")
    return _with_values(args), values


def keep_values(func: Any, call: Call, outputs: Sequence[Tensor]) -> None:
    """Calls the op on the host, and notes the values of its results."""
    if any(x.numel() > MAX_ELEMENTS for x in outputs):
        return
    with unset_fake_temporarily():
        result = func(*call[0], **call[1])
    values = [result] if isinstance(result, Tensor) else result or []
    for x, value in zip(outputs, values, strict=True):
        _note(x, value)


def _note(x: Tensor, value: Tensor) -> None:
    if not x.is_inference():  # those have no version
        x._host_value = x._version, value  # type: ignore[attr-defined]


def _with_values(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return value_of(tree)
    if isinstance(tree, tuple | list):
        return [_with_values(branch) for branch in tree]
    if isinstance(tree, dict):
        return {key: _with_values(branch) for key, branch in tree.items()}
    return tree
