"""A CUDA device that is not there: the project's code runs on it, every launch is recorded.

Read top-down: fake_cuda enters the modes and replaces what would ask a driver; Recorder sees every
op of torch and every launch of Triton, and writes them down in Sections.

- A tensor on "cuda" is a FakeTensor: shape, dtype and strides without memory. A tensor on the CPU
  is an ordinary one, so what the host computes (packing, block tables) is computed.
- A host read has no value to return. Where none may happen it is a fault and ends the section;
  elsewhere it is listed, reads zeros, and takes every mask as all true, the largest case.
- Autograd's engine does not work here, since it asks the device for its streams; Tensor.backward
  becomes graph.backward, which calls the nodes of the graph one by one.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from socpo_fast.ops import _checks
from tools.gpu_check.graph import backward
from tools.gpu_check.launches import (
    Launch,
    Section,
    check_launch,
    kernel_flops,
    kernel_traffic,
    label,
    op_name,
    op_traffic,
    product_flops,
    tensors_of,
    wide_product,
)
from tools.gpu_check.revision import ROOT

CARD = SimpleNamespace(
    name="an H100 that is not there",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 10**9,
)
OUR_FOLDERS = ("socpo_fast", "kernels", "bench", "tests")
# They make a tensor and start no kernel; views are known by themselves.
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
NO_KERNEL = (*ALLOCATIONS, "_unsafe_view")


class HostRead(Exception):
    """The host asked for a value of the device where it must not."""


@contextlib.contextmanager
def fake_cuda() -> Iterator[Recorder]:
    """Everything inside runs on the fake device; TRITON_INTERPRET must be off."""
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.runtime.jit import JITFunction

    recorder = Recorder(CUDAOptions.__dataclass_fields__)

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        recorder.launch(kernel.fn.__name__, inspect.signature(kernel.fn), grid, args, kwargs)

    def nothing(*_args: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def list_of(x: Tensor) -> Any:
        return recorder.list_of(x)

    def backward_of(loss: Tensor, *_args: Any, **_kwargs: Any) -> None:
        recorder.backward(loss)

    stand_ins: list[tuple[Any, str, Any]] = [
        (JITFunction, "run", launch),
        (torch.cuda, "device", nothing),
        (torch.cuda, "device_of", nothing),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_capability", lambda _device=None: (CARD.major, CARD.minor)),
        (torch.cuda, "get_device_properties", lambda _device=None: CARD),
        (torch.cuda, "synchronize", lambda _device=None: recorder.read("torch.cuda.synchronize")),
        (FakeTensor, "tolist", list_of),
        (FakeTensor, "data_ptr", lambda _: 0),  # aligned, as an allocator's memory is
        (_checks, "FakeTensor", ()),  # as on a card, where a door's checks are launches
        (Tensor, "backward", backward_of),
        (Tensor, "pin_memory", lambda x: x),  # which a driver does
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(recorder)
        yield recorder


class Recorder(TorchDispatchMode):
    """What happened on the device, section by section; outside of a section nothing is recorded."""

    def __init__(self, launch_options: Collection[str] = ()):
        super().__init__()
        self.launch_options = launch_options  # keywords of a launch that no kernel declares
        self.sections: list[Section] = []
        self.current: Section | None = None

    @contextlib.contextmanager
    def section(self, name: str, *, may_read: bool, may_upload: bool = True) -> Iterator[Section]:
        """Records into a new section of that name; whatever is raised inside becomes its fault."""
        outer, section = self.current, Section(name, may_read, may_upload)
        self.sections.append(section)
        self.current = section
        try:
            yield section
        except HostRead:
            pass  # recorded where it was raised
        except Exception as error:  # noqa: BLE001 - what it was is the result
            frames = traceback.extract_tb(error.__traceback__)
            lines = [line for frame in frames if (line := _line(frame.filename, frame.lineno))]
            where = lines[-1] if lines else "an unknown line"
            message = str(error).partition("\n")[0]
            section.faults.append(f"stopped by {type(error).__name__} at {where}: {message}")
        finally:
            self.current = outer

    def read(self, what: str) -> None:
        """The host waits for the device."""
        if self.current is None:
            return
        text = f"{what} at {our_line()}"
        self.current.reads.append(text)
        if not self.current.may_read:
            self.current.faults.append(f"host read: {text}")
            raise HostRead(text)

    def upload(self, what: str) -> None:
        """A tensor of the host is copied to the device, or takes part in a launch."""
        if self.current is None:
            return
        text = f"{what} at {our_line()}"
        self.current.uploads.append(text)
        if not self.current.may_upload:
            self.current.faults.append(f"host tensor: {text}")

    def launch(
        self,
        name: str,
        signature: inspect.Signature,
        grid: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        """One launch of a Triton kernel, instead of running it."""
        if self.current is None:
            return
        bound, sizes, faults = check_launch(signature, grid, args, kwargs, self.launch_options)
        self.current.faults += [f"{name} at {our_line()}: {fault}" for fault in faults]
        tensors = {key: x for key, x in bound.items() if isinstance(x, Tensor)}
        shapes = ", ".join(f"{key} {label(x)}" for key, x in tensors.items())
        traffic = tuple(kernel_traffic(tensors))
        self.current.launches.append(Launch(name, shapes, sizes, traffic, kernel_flops(tensors)))

    def list_of(self, x: Tensor) -> Any:
        """What x.tolist() returns."""
        self.read(f"tolist of {label(x)}")
        return torch.zeros(x.shape, dtype=x.dtype).tolist()

    def backward(self, loss: Tensor) -> None:
        """What loss.backward() does, in a section of its own."""
        section = self.current
        assert section is not None, "a backward outside of a section"
        whose = " of the layers" if loss.dim() > 0 else ""  # from the gradient of hidden states
        name = f"{section.name}, backward{whose}"
        with self.section(name, may_read=section.may_read, may_upload=section.may_upload):
            backward([loss], [torch.ones_like(loss)])

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs, name = kwargs or {}, op_name(func)
        inputs = tensors_of((args, kwargs))
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type != "cuda" and not any(isinstance(x, FakeTensor) for x in inputs):
            with unset_fake_temporarily():  # the host's own work
                return func(*args, **kwargs)
        if func.namespace == "socpo_fast":  # our own op: what its kernel does on the device
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)
        if func.namespace == "prim":  # a question about the tensor, no work
            return func(*args, **kwargs)
        with self:  # an op made of others; outside of our own, autograd has taken it apart before
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if name in ("_local_scalar_dense", "equal"):
            self.read(f"aten.{name} of {label(args[0])}")
            with unset_fake_temporarily():
                return name == "equal" or torch.zeros((), dtype=args[0].dtype).item()
        if name in ("_to_copy", "copy_") and _target(name, args, kwargs).type == "cpu":
            return self._download(name, args, kwargs)
        if torch.Tag.dynamic_output_shape in func.tags or name == "index_put_":
            args = self._without_masks(name, args)
        self._check_operands(func, name, inputs)
        out = wide_product(func, args, kwargs)
        if name == "nonzero":  # as many rows as there can be
            out = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if out is None:
            out = func(*args, **kwargs)
        self._record(func, args, kwargs, tensors_of(out))
        return out

    def _record(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: list[Tensor]
    ) -> None:
        """One launch, unless the op makes a view, an empty tensor or nothing."""
        name, inputs = op_name(func), tensors_of((args, kwargs))
        has_elements = any(x.numel() for x in outputs or inputs)
        if self.current is None or func.is_view or name in NO_KERNEL or not has_elements:
            return
        is_in_place = any(x.alias_info and x.alias_info.is_write for x in func._schema.returns)
        new = [] if is_in_place else outputs
        shapes = ", ".join(map(label, inputs))
        if new:
            shapes += " -> " + ", ".join(map(label, new))
        traffic = tuple(op_traffic(func, args, kwargs, new))
        flops = product_flops(name, [x.shape for x in tensors_of(args)])
        self.current.launches.append(Launch(f"aten.{name}", shapes.strip(), (), traffic, flops))

    def _check_operands(self, func: Any, name: str, inputs: list[Tensor]) -> None:
        """A single number may lie on the host as operand of an element-wise op, nothing else."""
        takes_numbers = torch.Tag.pointwise in func.tags or name == "fill_"
        for x in inputs:
            if x.device.type == "cpu" and (x.dim() > 0 or not takes_numbers):
                self.upload(f"aten.{name} of {label(x)}")

    def _download(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """A copy to the host; one that does not block is no read."""
        source = args[1] if name == "copy_" else args[0]
        if not kwargs.get("non_blocking") and args[2:] != (True,):
            self.read(f"aten.{name} of {label(source)} to the host")
        if name == "copy_":
            return args[0]
        with unset_fake_temporarily():
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)

    def _without_masks(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Notes ops whose result has a size that only the device knows; masks become all true."""
        if name not in ("index", "index_put_"):
            self.read(f"aten.{name} of {label(args[0])}")
            return args
        is_fill = name == "index_put_" and args[2].numel() == 1  # that one needs no size
        indices: list[Tensor | None] = []
        for index in args[1]:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                indices.append(index)
                continue
            if not is_fill:
                self.read(f"aten.{name} by a mask {label(index)}")
            rows = index.new_empty(index.numel(), dtype=torch.int64)
            indices += [rows] * index.dim()
        return (args[0], indices, *args[2:])


def _target(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    """Where a copy goes."""
    if name == "copy_":
        return args[0].device
    return torch.device(kwargs.get("device") or args[0].device)


def our_line() -> str:
    """The innermost line of the project's code that is running, as file:line."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if line := _line(frame.f_code.co_filename, frame.f_lineno):
            return line
        frame = frame.f_back
    return "an unknown line"


def _line(filename: str, number: int | None) -> str | None:
    """The line, if the file is the project's and not this tool's."""
    path = Path(filename)
    if not path.is_relative_to(ROOT):
        return None
    relative = path.relative_to(ROOT)
    return f"{relative}:{number}" if relative.parts[0] in OUR_FOLDERS else None
