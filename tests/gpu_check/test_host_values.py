"""Checks which values of fake tensors the host knows, and what it reads for unknown ones.

Small tensors that were uploaded are known, and so is what ops compute from them. Everything else is
unknown, and reads as the number `unknown` of the recorder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tools.gpu_check.host_values import MAX_ELEMENTS, value_of
from tools.gpu_check.recorder import Recorder

CUDA = "cuda:0"
aten = torch.ops.aten


@contextlib.contextmanager
def on_device(unknown: int = 0) -> Iterator[Recorder]:
    """Yields a recorder of the fake device; the block must record no fault."""
    recorder = Recorder(unknown=unknown)
    section = recorder.section("test", may_read=True)
    with FakeTensorMode(allow_non_fake_inputs=True), recorder, section as recorded:
        yield recorder
    assert recorded.faults == []


def seq_lens() -> Tensor:
    return torch.tensor([3, 0, 5]).to(CUDA)


def test_uploaded_values_are_known() -> None:
    """Uploaded values and what ops compute from them are read back, and they determine shapes."""
    with on_device():
        x = seq_lens()
        assert aten.max.default(x).item() == 5 and bool((x > -1).all())
        assert x.cpu().tolist() == [3, 0, 5]
        assert aten.cumsum.default(x, 0).cpu().tolist() == [3, 3, 8]
        assert (torch.arange(3, device=CUDA) * 2 + x).cpu().tolist() == [3, 2, 9]
        assert aten.nonzero.default(x).shape == (2, 1)
        assert aten.index.Tensor(x, [x > 0]).shape == (2,)


def test_values_computed_from_unknown_are_unknown() -> None:
    with on_device(unknown=7):
        x = seq_lens()
        drawn = torch.empty(3, device=CUDA)
        assert drawn.cpu().tolist() == [7.0, 7.0, 7.0]
        assert (x + drawn).cpu().tolist() == [7.0, 7.0, 7.0]
        assert aten.nonzero.default(drawn).shape == (3, 1)  # the largest possible result
        assert not bool((drawn > 3).any()) and bool(drawn.isfinite().all())
        assert torch.ones(3).copy_(drawn).tolist() == [7.0, 7.0, 7.0]


def test_a_tensor_that_was_written_to_is_unknown() -> None:
    """An op in place makes a tensor and its views unknown."""
    with on_device(unknown=7):
        x = seq_lens()
        view = aten.view.default(x, [3, 1])
        assert value_of(x) is not None and value_of(view) is not None
        x.add_(1)
        assert value_of(x) is None and value_of(view) is None
        assert x.cpu().tolist() == [7, 7, 7]


def test_large_and_random_tensors_are_not_kept() -> None:
    with on_device() as recorder:
        assert value_of(torch.zeros(MAX_ELEMENTS, device=CUDA)) is not None
        assert value_of(torch.zeros(MAX_ELEMENTS + 1, device=CUDA)) is None
        assert value_of(torch.rand(3, device=CUDA)) is None
        recorder.knows_values = False  # as in a capture
        assert value_of(seq_lens()) is None


def test_a_failed_assert_on_the_device_is_an_error() -> None:
    """torch._assert_async raises if known values break it, and passes if they are unknown."""
    with on_device():
        is_positive = (seq_lens() > 0).all()
        with pytest.raises(RuntimeError, match="must be positive"):
            torch._assert_async(is_positive, "lengths must be positive")
        unknown = (torch.empty(3, device=CUDA) > 0).all()
        torch._assert_async(unknown, "lengths must be positive")
