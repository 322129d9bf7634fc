"""Provides a fake CUDA device: the project's code runs on it, and every launch is recorded.

`fake_cuda` enters the modes and replaces all functions that would ask a driver. recorder.py records
what happens:

    project code --op--> Recorder --> FakeTensor with a shape, no memory
                 --@triton.jit--> Recorder.launch: arguments checked, nothing run
                 --.item(), .cpu()--> Recorder.read: listed, or a fault

- A tensor on "cuda" is a FakeTensor: shape, dtype and strides without memory. A tensor on the CPU
  is an ordinary one, so the host's own work (packing, block tables) is really computed.
- A host read has no value to return. Where reads are forbidden it is a fault and ends the section.
  Elsewhere it is listed, returns zeros, and takes every mask as all true, the largest case.
- Autograd's engine does not work here, since it asks the device for its streams. Tensor.backward
  and torch.autograd.grad are replaced by those of graph.py, which call the graph's nodes one by
  one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from socpo_fast.ops import _checks
from tools.gpu_check.graph import saved_until_read
from tools.gpu_check.recorder import SYNCHRONIZE, Recorder

CARD = SimpleNamespace(
    name="an H100 that is not there",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=int(79.1 * 2**30),
    L2_cache_size=50 * 2**20,
    shared_memory_per_block=48 * 2**10,
)


@contextlib.contextmanager
def fake_cuda(**options: Any) -> Iterator[Recorder]:
    """Runs the block on the fake device and yields its Recorder, whose options these are.

    TRITON_INTERPRET must be off.
    """
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.runtime.jit import JITFunction

    signature_of = functools.cache(inspect.signature)
    recorder = Recorder(CUDAOptions.__dataclass_fields__, **options)

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        recorder.launch(kernel.fn.__name__, signature_of(kernel.fn), grid, args, kwargs)

    def nothing(*_args: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def list_of(x: Tensor) -> Any:
        return recorder.list_of(x)

    def synchronize(_device: object = None) -> None:
        recorder.read(SYNCHRONIZE)

    def event() -> SimpleNamespace:
        """Returns an event that is always done; waiting for it counts as a host read."""
        wait = functools.partial(recorder.read, "Event.synchronize")
        return SimpleNamespace(record=nothing, query=lambda: True, synchronize=wait)

    def backward_of(root: Tensor, gradient: Tensor | None = None) -> None:
        recorder.backward([root], [gradient])

    def grad_of(
        outputs: Tensor | Sequence[Tensor],
        inputs: Tensor | Sequence[Tensor],
        grad_outputs: Tensor | Sequence[Tensor] | None = None,
    ) -> tuple[Tensor | None, ...]:
        roots, leaves = ([x] if isinstance(x, Tensor) else x for x in (outputs, inputs))
        gradients = [grad_outputs] if isinstance(grad_outputs, Tensor) else grad_outputs
        return recorder.grad(roots, leaves, gradients or [None] * len(roots))

    stand_ins: list[tuple[Any, str, Any]] = [
        (JITFunction, "run", launch),
        (torch.cuda, "device", nothing),
        (torch.cuda, "device_of", nothing),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "current_stream", lambda _device=None: None),
        (torch.cuda, "Event", event),
        (torch.cuda, "get_device_capability", lambda _device=None: (CARD.major, CARD.minor)),
        (torch.cuda, "get_device_properties", lambda _device=None: CARD),
        (torch.cuda, "synchronize", synchronize),
        # FakeTensorMode initialises CUDA where a card seems to be present.
        (fake_tensor, "init_gpu_context", nothing),
        (FakeTensorMode, "avoid_device_init", True),
        (FakeTensor, "tolist", list_of),
        (FakeTensor, "data_ptr", lambda _: 0),  # 0 is aligned, as real memory is
        (_checks, "FakeTensor", ()),  # so that checks of ops are made, and recorded as launches
        (Tensor, "backward", backward_of),
        (torch.autograd, "grad", grad_of),
        (Tensor, "pin_memory", lambda x: x),  # pinning needs a driver
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(saved_until_read())
        stack.enter_context(recorder)
        yield recorder
