"""Records what happens on the fake device: ops of torch, launches of Triton, and host reads.

Recorder keeps them in Sections, and counts the memory of live tensors. Read section, then
__torch_dispatch__, through which every op of torch passes.
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

# Ops that make a tensor without a kernel. Views start none either; func.is_view tells them.
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
NO_KERNEL = (*ALLOCATIONS, "_unsafe_view")
SYNCHRONIZE = "torch.cuda.synchronize"


class HostRead(Exception):
    """Raised where the host asks for a value of the device and must not."""


class Recorder(TorchDispatchMode):
    """Records what happens on the device into sections; outside of a section it records nothing."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it is slow

    def __init__(
        self,
        launch_options: Collection[str] = (),
        *,
        has_details: bool = True,
        unknown: int = 0,
    ):
        super().__init__()
        self.launch_options = launch_options  # keywords of a launch that no kernel declares
        self.has_details = has_details  # whether launches have shapes, bytes and FLOPs
        self.unknown = unknown  # the number that the host reads where a value is unknown
        self.sections: list[Section] = []
        self.current: Section | None = None
        self.memory = Memory()
        self.knows_values = True  # whether values are tracked (host_values.py)
        self.full_at = ""  # the first line at which a card would be out of memory
        self.on_wait: Callable[[str], None] = lambda _what: None  # called where the host waits

    @contextlib.contextmanager
    def section(self, name: str, *, may_read: bool, may_upload: bool = True) -> Iterator[Section]:
        """Records into a new section; an error in the outermost section becomes its fault."""
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
                return  # `read` has recorded it
            message = str(error).partition("\n")[0]
            stopped = f"stopped by {type(error).__name__} at {our_lines(error)}"
            section.faults.append(f"{stopped}: {message}")
        finally:
            self.current = outer

    def read(self, what: str) -> None:
        """Records that the host waits for the device; raises HostRead where it must not."""
        if self.current is None:
            return
        text = f"{what} at {our_line()}"
        self.on_wait(what)
        self.current.reads.append(text)
        if not self.current.may_read:
            self.current.faults.append(f"host read: {text}")
            raise HostRead(text)

    def upload(self, what: str) -> None:
        """Records that a tensor of the host is copied to the device, or used in a launch."""
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
        """Records a launch of a Triton kernel, instead of running it."""
        if self.current is None:
            return
        bound, sizes, faults = check_launch(signature, grid, args, kwargs, self.launch_options)
        self.current.faults += [f"{name} at {our_line()}: {fault}" for fault in faults]
        tensors = {key: x for key, x in bound.items() if isinstance(x, Tensor)}
        # Any float tensor may be an output. Kernels do not write to index tensors, so those stay
        # known.
        forget(x for x in tensors.values() if x.is_floating_point())
        if not self.has_details:
            self.current.launches.append(Launch(name))
            return
        shapes = ", ".join(f"{key} {label(x)}" for key, x in tensors.items())
        traffic = tuple(kernel_traffic(tensors))
        self.current.launches.append(Launch(name, shapes, sizes, traffic, kernel_flops(tensors)))

    def list_of(self, x: Tensor) -> Any:
        """Stands in for x.tolist()."""
        self.read(f"tolist of {label(x)}")
        return numbers_read(x, self.unknown)

    def backward(self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Does what roots[0].backward(gradients[0]) does, in a section of its own."""
        with self._backward_section(roots[0]):
            backward(roots, _or_ones(roots, gradients))

    def grad(
        self,
        roots: Sequence[Tensor],
        leaves: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> tuple[Tensor | None, ...]:
        """Returns what torch.autograd.grad returns, computed in a section of its own."""
        with self._backward_section(roots[0]):
            return grad(roots, leaves, _or_ones(roots, gradients))

    def _backward_section(self, root: Tensor) -> contextlib.AbstractContextManager[Section]:
        section = self.current
        assert section is not None, "a backward outside of a section"
        suffix = " of the layers" if root.dim() > 0 else ""  # from the gradient of hidden states
        name = f"{section.name}, backward{suffix}"
        return self.section(name, may_read=section.may_read, may_upload=section.may_upload)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Handles every op: runs those of the host, records those of the device.

        The order of the cases matters: cheap questions, the host's work, ops made of other ops,
        host reads, and finally a launch whose result is a FakeTensor.
        """
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # by far the most frequent call
        name = op_name(func)
        inputs = tensors_of((args, kwargs))
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type != "cuda" and not any(isinstance(x, FakeTensor) for x in inputs):
            if kwargs.get("pin_memory"):  # pinning needs a driver
                kwargs["pin_memory"] = False
            with unset_fake_temporarily():  # the host's own work
                return func(*args, **kwargs)
        if func.namespace == "socpo_fast":  # our own op: run its implementation, and record that
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)
        if func.namespace == "prim":  # a question about the tensor, no work
            return func(*args, **kwargs)
        # An op that is made of others. Autograd has usually decomposed it before; not within our
        # ops.
        with self:
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
        # Where all inputs are known, the op is also computed on the host (see host_values.py).
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
        """Counts new tensors of the device, and notes where a card would be full."""
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
        """Records one launch, unless the op makes a view, an empty tensor or nothing."""
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
        """Records operands on the host as uploads, except single numbers of element-wise ops."""
        takes_numbers = torch.Tag.pointwise in func.tags or name == "fill_"
        for x in inputs:
            if x.device.type == "cpu" and (x.dim() > 0 or not takes_numbers):
                self.upload(f"aten.{name} of {label(x)}")

    def _download(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Copies to the host; a non-blocking copy is no host read."""
        source = args[1] if name == "copy_" else args[0]
        if kwargs.get("non_blocking") or args[2:] == (True,):
            is_new = name != "copy_"  # a target of copy_ does not have the values yet
            return values_read(source, self.unknown, kwargs.get("dtype")) if is_new else args[0]
        self.read(f"aten.{name} of {label(source)} to the host")
        values = values_read(source, self.unknown, kwargs.get("dtype"))
        if name != "copy_":
            return values
        with unset_fake_temporarily():
            return args[0].copy_(values)

    def _without_masks(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Records ops whose result size only the device knows; replaces masks by indices."""
        if name not in ("index", "index_put_"):
            self.read(f"aten.{name} of {label(args[0])}")
            return args
        is_fill = name == "index_put_" and args[2].numel() == 1  # a fill by a mask needs no size
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
    """Replaces missing gradients by ones, as for the backward of a loss."""
    pairs = zip(roots, gradients, strict=True)
    return [torch.ones_like(root) if gradient is None else gradient for root, gradient in pairs]


def _target(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    """Returns the device to which a copy goes."""
    if name == "copy_":
        return args[0].device
    return torch.device(kwargs.get("device") or args[0].device)
