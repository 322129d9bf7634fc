"""What happens on the fake device: every op of torch, every launch of Triton, every host read.

Recorder writes them down in Sections, and counts the memory of tensors as they come and go.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from tools.gpu_check.fake_ops import SIZED_BY_VALUES, result_of
from tools.gpu_check.graph import backward, grad
from tools.gpu_check.host_values import (
    assume_true,
    call_on_host,
    count_true,
    forget,
    keep_values,
    numbers_read,
    values_read,
)
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
)
from tools.gpu_check.lines import our_line, our_lines
from tools.gpu_check.memory import Memory

# They make a tensor and start no kernel; views are known by themselves.
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
NO_KERNEL = (*ALLOCATIONS, "_unsafe_view")
SYNCHRONIZE = "torch.cuda.synchronize"


class HostRead(Exception):
    """The host asked for a value of the device where it must not."""


class Recorder(TorchDispatchMode):
    """What happened on the device, section by section; outside of a section nothing is recorded."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to guard against it takes time

    def __init__(
        self,
        launch_options: Collection[str] = (),
        *,
        has_details: bool = True,
        unknown: int = 0,
    ):
        super().__init__()
        self.launch_options = launch_options  # keywords of a launch that no kernel declares
        self.has_details = has_details  # of launches: shapes, bytes and products
        self.unknown = unknown  # what the host reads where it cannot know
        self.sections: list[Section] = []
        self.current: Section | None = None
        self.memory = Memory()
        self.knows_values = True  # of what the host has uploaded
        self.full_at = ""  # the line at which more lived than a card has
        self.on_wait: Callable[[str], None] = lambda _what: None  # where the host waits

    @contextlib.contextmanager
    def section(self, name: str, *, may_read: bool, may_upload: bool = True) -> Iterator[Section]:
        """Records into a new section; what is raised in the outermost one becomes its fault."""
        outer = self.current
        section = Section(name, may_read, may_upload)
        self.sections.append(section)
        self.current = section
        try:
            yield section
        except Exception as error:
            if outer is not None:
                raise
            if isinstance(error, HostRead):
                return  # recorded where it was raised
            message = str(error).partition("\n")[0]
            stopped = f"stopped by {type(error).__name__} at {our_lines(error)}"
            section.faults.append(f"{stopped}: {message}")
        finally:
            self.current = outer

    def read(self, what: str) -> None:
        """The host waits for the device."""
        if self.current is None:
            return
        text = f"{what} at {our_line()}"
        self.on_wait(what)
        self.current.reads.append(text)
        if not self.current.may_read:
            self.current.faults.append(f"host read: {text}")
            raise HostRead(text)

    def upload(self, what: str) -> None:
        """A tensor of the host is copied to the device, or takes part in a launch."""
        if self.current is None:
            return
        text = f"{what} at {our_line()}"
        self.on_wait(what)
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
        forget(x for x in tensors.values() if x.is_floating_point())  # to an index none writes
        if not self.has_details:
            self.current.launches.append(Launch(name))
            return
        shapes = ", ".join(f"{key} {label(x)}" for key, x in tensors.items())
        traffic = tuple(kernel_traffic(tensors))
        self.current.launches.append(Launch(name, shapes, sizes, traffic, kernel_flops(tensors)))

    def list_of(self, x: Tensor) -> Any:
        self.read(f"tolist of {label(x)}")
        return numbers_read(x, self.unknown)

    def backward(self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """What roots[0].backward(gradients[0]) does, in a section of its own."""
        with self._backward_section(roots[0]):
            backward(roots, _or_ones(roots, gradients))

    def grad(
        self,
        roots: Sequence[Tensor],
        leaves: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> tuple[Tensor | None, ...]:
        """What torch.autograd.grad returns, in a section of its own."""
        with self._backward_section(roots[0]):
            return grad(roots, leaves, _or_ones(roots, gradients))

    def _backward_section(self, root: Tensor) -> contextlib.AbstractContextManager[Section]:
        section = self.current
        assert section is not None, "a backward outside of a section"
        whose = " of the layers" if root.dim() > 0 else ""  # from the gradient of hidden states
        name = f"{section.name}, backward{whose}"
        return self.section(name, may_read=section.may_read, may_upload=section.may_upload)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # most questions are this one
        name = op_name(func)
        inputs = tensors_of((args, kwargs))
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type != "cuda" and not any(isinstance(x, FakeTensor) for x in inputs):
            if kwargs.get("pin_memory"):  # the driver would pin it
                kwargs["pin_memory"] = False
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
            return name == "equal" or numbers_read(args[0], self.unknown)
        if name in ("_to_copy", "copy_") and _target(name, args, kwargs).type == "cpu":
            return self._download(name, args, kwargs)
        if func._schema.is_mutable:
            forget(inputs)
        call = None
        if self.knows_values and name not in SIZED_BY_VALUES:
            call = call_on_host(func, args, kwargs, inputs)
        if torch.Tag.dynamic_output_shape in func.tags or name == "index_put_":
            args = self._without_masks(name, args)
        self._check_operands(func, name, inputs)
        out = result_of(func, args, kwargs, inputs)
        outputs = tensors_of(out)
        if call is not None and name not in NO_KERNEL:
            keep_values(func, call, outputs)
        elif name == "all" and not func._schema.is_mutable:
            assume_true(out)
        self._count_memory(outputs)
        self._record(func, args, kwargs, inputs, outputs)
        return out

    def _count_memory(self, outputs: list[Tensor]) -> None:
        for x in outputs:
            if isinstance(x, FakeTensor) and x.device.type == "cuda":
                self.memory.add(x)
        if self.memory.is_full and not self.full_at:
            self.full_at = our_line()

    def _record(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        """One launch, unless the op makes a view, an empty tensor or nothing."""
        name = op_name(func)
        has_elements = any(x.numel() for x in outputs or inputs)
        if self.current is None or func.is_view or name in NO_KERNEL or not has_elements:
            return
        if not self.has_details:
            self.current.launches.append(Launch(f"aten.{name}"))
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
        if kwargs.get("non_blocking") or args[2:] == (True,):
            is_new = name != "copy_"  # what is copied into does not hold it yet
            return values_read(source, self.unknown, kwargs.get("dtype")) if is_new else args[0]
        self.read(f"aten.{name} of {label(source)} to the host")
        values = values_read(source, self.unknown, kwargs.get("dtype"))
        if name != "copy_":
            return values
        with unset_fake_temporarily():
            return args[0].copy_(values)

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
            rows = index.new_empty(count_true(index), dtype=torch.int64)
            indices += [rows] * index.dim()
        return (args[0], indices, *args[2:])


def _or_ones(roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """A loss may leave its gradient out."""
    pairs = zip(roots, gradients, strict=True)
    return [torch.ones_like(root) if given is None else given for root, given in pairs]


def _target(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    """Where a copy goes."""
    if name == "copy_":
        return args[0].device
    return torch.device(kwargs.get("device") or args[0].device)
