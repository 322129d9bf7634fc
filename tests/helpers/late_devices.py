"""Stands in for the parts of torch.cuda around a capture and a read; needs no card."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from socpo_fast.engine import decode, steps


class FakeGraph:
    """A stand-in for a CUDA graph: each replay runs the captured round once."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.round: Callable[[], None] | None = None
        self.cuda = cuda
        self.device: Any = None  # of the capture
        self.stream: Any = None

    def capture_begin(self, *, pool: None, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local", "other threads may use the card meanwhile"
        self.device, self.stream = self.cuda.chosen[-1], self.cuda.streams[-1]
        self.cuda.note("capture")

    def capture_end(self) -> None:
        self.cuda.note("end of capture")

    def replay(self) -> None:
        assert self.round is not None
        self.round()

    def pool(self) -> None:
        return None


class FakeStream:
    """A stand-in for a stream, which notes when it waits for another one."""

    def __init__(self, device: Any, cuda: FakeCuda) -> None:
        self.device = device
        self.cuda = cuda

    def wait_stream(self, other: Any) -> None:
        assert other is not self
        self.cuda.note("the capture's stream waits")


class FakeCuda:
    """A stand-in for torch.cuda around a capture; notes on which device each step ran."""

    def __init__(self) -> None:
        self.chosen: list[Any] = []  # devices of the open `with torch.cuda.device(..)` blocks
        self.streams: list[Any] = []  # streams of the open `with torch.cuda.stream(..)` blocks
        self.steps: list[tuple[str, Any]] = []  # (step, current device)

    def note(self, step: str) -> None:
        self.steps.append((step, self.chosen[-1] if self.chosen else None))

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.chosen.append(device)
        yield
        self.chosen.pop()

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.streams.append(stream)
        yield
        self.streams.pop()

    def current_stream(self, _device: torch.device) -> Any:
        default = SimpleNamespace(wait_stream=lambda _other: self.note("the caller's stream waits"))
        return self.streams[-1] if self.streams else default

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts the stand-ins into torch.cuda for the rest of the test."""
        for name in ("device", "stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(device, self))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self))


class LateReadback:
    """A readback whose numbers arrive only after a random number of calls of is_ready."""

    rng = random.Random(0)

    def __init__(self, x: torch.Tensor) -> None:
        self._host, self._polls_left = x.clone(), self.rng.randrange(4)

    @property
    def is_ready(self) -> bool:
        self._polls_left -= 1
        return self._polls_left < 0

    def wait(self) -> torch.Tensor:
        return self._host


def make_reads_late(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Makes the numbers of every engine arrive late from now on."""
    monkeypatch.setattr(LateReadback, "rng", random.Random(seed))
    for module in (decode, steps):
        monkeypatch.setattr(module, "Readback", LateReadback)
