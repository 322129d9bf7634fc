"""Prepares Triton's interpreter for tests: versions that go together, a batch-invariant dot."""

from __future__ import annotations

import re
from typing import Any

import numpy as np


def incompatible_pair(triton: str | None, numpy: str) -> str | None:
    """Returns why two versions cannot run the interpreter together, None if they can.

    Before Triton 3.7 the interpreter converts arrays of size 1 with int(), which numpy refuses from
    2.4 on. Every kernel would then fail with the same TypeError from within Triton.
    """
    if triton is None or _release(triton) >= (3, 7) or _release(numpy) < (2, 4):
        return None
    minor = ".".join(map(str, _release(triton)))
    rule = f"numpy must be < 2.4 beside triton {minor}, got {numpy}"
    return f"tests: {rule}; pip install 'numpy<2.4'"


def make_dot_batch_invariant() -> None:
    """Replaces the interpreter's tl.dot by one whose rows do not depend on each other.

    The interpreter calls numpy's product in fp32. On some processors that sums the last rows of a
    tile in another order than the first ones, so that tests of a kernel's own batch invariance
    fail. Here a product of fp32 numbers is summed in fp64 and rounded once, which hides the order.
    """
    from triton.runtime import interpreter

    create_dot_in_fp32 = interpreter.InterpreterBuilder.create_dot

    def create_dot(builder: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if a.data.dtype != np.float32:
            return create_dot_in_fp32(builder, a, b, d, *precision)
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _release(version: str) -> tuple[int, int]:
    """Returns (major, minor); what follows them, as in 2.4.0rc1 or 3.7.1+git, is ignored."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)
