"""Stand-ins for the parts of torch.cuda around a capture and a read, which need no card."""

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
    """What a CUDA graph does here: the round that was captured, once a replay."""

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
    """A stream of a device, which notes whom it waits for."""

    def __init__(self, device: Any, cuda: FakeCuda) -> None:
        self.device = device
        self.cuda = cuda

    def wait_stream(self, other: Any) -> None:
        assert other is not self
        self.cuda.note("the capture's stream waits")


class FakeCuda:
    """torch.cuda around a capture; notes on which device each of its steps ran."""

    def __init__(self) -> None:
        self.chosen: list[Any] = []  # the devices of the `with torch.cuda.device(..)` that are open
        self.streams: list[Any] = []  # and the streams
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
        for name in ("device", "stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(device, self))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self))


class LateReadback:
    """Numbers that are on their way for a random number of looks."""

    rng = random.Random(0)

    def __init__(self, x: torch.Tensor) -> None:
        self._host, self._looks_left = x.clone(), self.rng.randrange(4)

    @property
    def is_ready(self) -> bool:
        self._looks_left -= 1
        return self._looks_left < 0

    def wait(self) -> torch.Tensor:
        return self._host


def make_reads_late(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Every engine's numbers come late from now on."""
    monkeypatch.setattr(LateReadback, "rng", random.Random(seed))
    for module in (decode, steps):
        monkeypatch.setattr(module, "Readback", LateReadback)
