"""Stands in for the parts of torch.cuda that stages use: graphs, events, streams, memory.

`stage_stand_ins` replaces them all. A capture is held to the rules of a card: no host read, no
tensor of the host, no wait. A replay does nothing, since its kernels were recorded at the capture.
Times mean nothing; bytes come from memory.py and launches from the recorder.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tools.gpu_check.fake_cuda import CARD
from tools.gpu_check.recorder import SYNCHRONIZE, Recorder

aten = torch.ops.aten
_scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention


@contextlib.contextmanager
def stage_stand_ins(recorder: Recorder) -> Iterator[None]:
    """Replaces, inside of fake_cuda, what a stage uses of torch besides tensors and kernels."""
    card = Card(recorder)
    recorder.on_wait = card.on_wait
    stand_ins: list[tuple[Any, str, Any]] = [
        (torch, "Generator", Generator),
        (torch.profiler, "profile", lambda activities=(): Profile(recorder)),
        (torch.nn.functional, "scaled_dot_product_attention", attention),
        (FakeTensor, "data_ptr", address),
        (FakeTensor, "__deepcopy__", deep_copy),
        *((torch.cuda, name, stand_in) for name, stand_in in card.of_torch_cuda().items()),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(mock.patch.object(owner, name, stand_in, create=True))
        yield


class Card:
    """The state of the fake card."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.memory = recorder.memory
        self.is_capturing = False
        self.sync_mode = "default"

    def of_torch_cuda(self) -> dict[str, Any]:
        """Returns the stand-ins by their names in torch.cuda."""
        memory = self.memory
        return {
            "init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "get_device_name": lambda _device=None: CARD.name,
            "is_current_stream_capturing": lambda: self.is_capturing,
            "CUDAGraph": lambda: Graph(self),
            "graph": self.capture,
            "Event": self.event,
            "Stream": Stream,
            "stream": contextlib.nullcontext,
            "current_stream": Stream,
            "empty_cache": lambda: None,
            "mem_get_info": lambda _device=None: (
                CARD.total_memory - memory.held_bytes,
                CARD.total_memory,
            ),
            "memory_allocated": lambda _device=None: memory.live_bytes,
            "memory_reserved": lambda _device=None: memory.held_bytes,
            "max_memory_allocated": lambda _device=None: memory.peak_bytes,
            "max_memory_reserved": lambda _device=None: memory.most_bytes,
            "reset_peak_memory_stats": lambda _device=None: memory.reset_peak(),
            "get_sync_debug_mode": lambda: self.sync_mode,
            "set_sync_debug_mode": self.set_sync_mode,
        }

    @contextlib.contextmanager
    def capture(
        self, graph: Graph, pool: int | None = None, stream: object = None
    ) -> Iterator[None]:
        """Stands in for torch.cuda.graph: a host read or a tensor of the host is a fault."""
        # A capture tightens the rules of the section in which it happens.
        section = self.recorder.current
        assert section is not None, "a capture outside of a section"
        old_rules = section.may_read, section.may_upload
        section.may_read = section.may_upload = False
        self.is_capturing = True
        # Values of a capture would be those of one replay only: the next replay changes them.
        self.recorder.knows_values = False
        try:
            with self.memory.capture(graph, pool) as graph.pool_idx:
                yield
        finally:
            self.is_capturing = False
            self.recorder.knows_values = True
            section.may_read, section.may_upload = old_rules
        graph.is_captured = True

    def event(self, enable_timing: bool = False) -> Event:
        """Stands in for torch.cuda.Event: waiting for one counts as a host read."""
        return Event(enable_timing, lambda: self.recorder.read("Event.synchronize"))

    def set_sync_mode(self, mode: str) -> None:
        assert mode in ("default", "warn", "error"), mode
        self.sync_mode = mode

    def on_wait(self, what: str) -> None:
        """Warns or raises at a call that makes the host wait, as the debug mode asks."""
        # torch's debug mode ignores an explicit torch.cuda.synchronize.
        if what == SYNCHRONIZE or self.sync_mode == "default":
            return
        if self.sync_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
        warnings.warn(f"called a synchronizing CUDA operation: {what}", stacklevel=3)


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    is_captured = False
    pool_idx: int | None = None

    def __init__(self, card: Card | None = None):
        self.card = card
        self._capture = contextlib.ExitStack()

    def capture_begin(self, pool: int | None = None, capture_error_mode: str = "global") -> None:
        assert self.card is not None and capture_error_mode in ("global", "thread_local")
        self._capture.enter_context(self.card.capture(self, pool))

    def capture_end(self) -> None:
        self._capture.close()

    def replay(self) -> None:
        assert self.is_captured, "a graph is replayed that was not captured"

    def pool(self) -> int | None:
        return self.pool_idx


class Stream:
    """Stands in for torch.cuda.Stream."""

    def __init__(self, device: object = None, priority: int = 0):
        self.device = device
        self.priority = priority

    def wait_stream(self, other: Stream) -> None:
        """Does nothing: on the fake card everything happens in order."""


class Event:
    """Stands in for torch.cuda.Event; the time between any two is one millisecond."""

    def __init__(self, enable_timing: bool = False, on_wait: Callable[[], None] = lambda: None):
        self.enable_timing = enable_timing
        self.is_recorded = False
        self.synchronize = on_wait

    def record(self, stream: object = None) -> None:
        self.is_recorded = True

    def query(self) -> bool:
        return self.is_recorded

    def elapsed_time(self, end: Event) -> float:
        assert self.enable_timing and self.is_recorded and end.is_recorded
        return 1.0


class Generator(torch.Generator):
    """Stands in for torch.Generator: always of the host, as the fake device draws nothing."""

    def __new__(cls, device: object = "cpu") -> Generator:
        return super().__new__(cls, device="cpu")  # type: ignore[call-arg]


class Profile:
    """Stands in for torch.profiler.profile: the recorder's launches, one microsecond each."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def _counts(self) -> Counter[str]:
        sections = self.recorder.sections
        return Counter(launch.kernel for section in sections for launch in section.launches)

    def __enter__(self) -> Profile:
        # Only launches within the block are reported.
        self.before = self._counts()
        return self

    def __exit__(self, *_error: object) -> None:
        self.found = self._counts() - self.before

    def key_averages(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(
                key=kernel,
                count=count,
                device_type="DeviceType.CUDA",
                device_time_total=float(count),
                self_device_time_total=float(count),
            )
            for kernel, count in self.found.items()
        ]


def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
    """Stands in for SDPA: calls the backend that a stage has chosen, by name.

    PyTorch itself would choose the plain form, since the fake device supports no other.
    """
    # sdpa_kernel(..) turns all other backends off, so this tells whether one was chosen.
    if torch.backends.cuda.math_sdp_enabled():
        return _scaled_dot_product_attention(q, k, v, *args, **options)
    is_causal = options["is_causal"]
    if torch.backends.cuda.flash_sdp_enabled():
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal)[0]


def address(x: Tensor) -> int:
    """Returns an address that differs between live storages, so that a stage sees one move."""
    return x.untyped_storage()._cdata + x.storage_offset() * x.element_size()


def deep_copy(x: FakeTensor, memo: dict[int, Any]) -> Tensor:
    """Copies a tensor; Tensor.__deepcopy__ would copy its storage, which has no memory."""
    memo[id(x)] = copied = x.detach().clone().requires_grad_(x.requires_grad)
    return copied
