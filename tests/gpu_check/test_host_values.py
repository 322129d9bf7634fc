"""What the host knows of tensors on the fake device, and what it reads of those it does not."""

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
    recorder = Recorder(unknown=unknown)
    section = recorder.section("test", may_read=True)
    with FakeTensorMode(allow_non_fake_inputs=True), recorder, section as recorded:
        yield recorder
    assert recorded.faults == []


def lengths() -> Tensor:
    return torch.tensor([3, 0, 5]).to(CUDA)


def test_what_was_uploaded_is_read_back() -> None:
    with on_device():
        x = lengths()
        assert aten.max.default(x).item() == 5 and bool((x > -1).all())
        assert x.cpu().tolist() == [3, 0, 5]
        assert aten.cumsum.default(x, 0).cpu().tolist() == [3, 3, 8]
        assert (torch.arange(3, device=CUDA) * 2 + x).cpu().tolist() == [3, 2, 9]
        assert aten.nonzero.default(x).shape == (2, 1)
        assert aten.index.Tensor(x, [x > 0]).shape == (2,)


def test_what_follows_from_unknown_numbers_is_unknown() -> None:
    with on_device(unknown=7):
        x = lengths()
        drawn = torch.empty(3, device=CUDA)
        assert drawn.cpu().tolist() == [7.0, 7.0, 7.0]
        assert (x + drawn).cpu().tolist() == [7.0, 7.0, 7.0]
        assert aten.nonzero.default(drawn).shape == (3, 1)  # the largest case
        assert not bool((drawn > 3).any()) and bool(drawn.isfinite().all())
        assert torch.ones(3).copy_(drawn).tolist() == [7.0, 7.0, 7.0]


def test_a_tensor_that_was_written_to_is_unknown() -> None:
    with on_device(unknown=7):
        x = lengths()
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
        assert value_of(lengths()) is None


def test_a_check_on_the_device_that_fails_is_an_error() -> None:
    with on_device():
        holds = (lengths() > 0).all()
        with pytest.raises(RuntimeError, match="must be positive"):
            torch._assert_async(holds, "lengths must be positive")
        unknown = (torch.empty(3, device=CUDA) > 0).all()
        torch._assert_async(unknown, "lengths must be positive")
