"""Registers ops with PyTorch: `torch.ops.socpo_fast.X` is the one op behind the public function X.

A registered op is flat (tensors, numbers, words) and functional: its outputs never share memory
with its inputs. So the dispatcher, FakeTensor, autograd and torch.compile know what it does without
looking inside. `impl`, its last argument, is what pick_impl of _impl.py returned. The kernels that
run inside are in csrc (`torch.ops.socpo.*`) and in kernels/.

    X(..)  ->  torch.ops.socpo_fast.X  ->  Autograd key: _autograd_kernel, or passed by
                                       ->  any device:   `kernel` of define_op
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

LIBRARY = torch.library.Library("socpo_fast", "DEF")


def define_op(
    schema: str,
    kernel: Callable,
    *,
    fake: Callable,
    derivative: tuple[Callable[[Any, tuple, Any], Any], Callable[..., tuple]] | None = None,
) -> Callable[..., Any]:
    """Registers an op and returns it.

    Args:
        schema:     its name and signature in the language of torch.library.
        kernel:     computes the outputs, on any device; runs below autograd.
        fake:       returns empty outputs of the right shapes, dtypes and devices.
        derivative: save and backward; None for ops without a gradient, whose outputs never require
                    one.

    save(ctx, inputs, outputs) keeps what the backward needs. If it returns something, the caller
    gets that instead of the outputs: an op whose forward forms gradients keeps them in ctx this
    way. backward(ctx, *grad_outputs) returns one gradient, or None, for each input. It may call
    registered ops and plain torch only, since torch.compile traces it.
    """
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.socpo_fast, name).default
    mutated = [i for i, argument in enumerate(op._schema.arguments) if argument.is_write]

    def run_below_autograd(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if torch._C._is_any_autocast_enabled():
                # The public function has cast what autocast casts. Plain torch inside a kernel must
                # not cast again: fp32 tensors are fp32 for a reason.
                with torch._C._DisableAutocast():
                    outputs = kernel(*inputs)
            else:
                outputs = kernel(*inputs)
        # A graph that saved an input must fail in its backward rather than use the new contents.
        for i in mutated:
            if inputs[i] is not None:
                torch.autograd.graph.increment_version(inputs[i])
        return outputs

    LIBRARY.impl(name, run_below_autograd, "CompositeExplicitAutograd")
    torch.library.register_fake(f"socpo_fast::{name}", fake, lib=LIBRARY)
    # Without a derivative the dispatcher skips autograd, which saves one call into Python.
    autograd_kernel = (
        torch.library.fallthrough_kernel
        if derivative is None
        else _autograd_kernel(op, *derivative)
    )
    LIBRARY.impl(name, autograd_kernel, "Autograd")
    return op


def _autograd_kernel(op: Any, save: Callable, backward: Callable) -> Callable:
    """Returns the kernel of the Autograd key.

    torch.library.register_autograd would do the same, at 8 us more a call.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = op(*inputs)
            replacement = save(ctx, inputs, outputs)
            return outputs if replacement is None else replacement

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple:
            return backward(ctx, *grad_outputs)

    def kernel(*inputs: Any) -> Any:
        # Without a gradient to compute, building an autograd node would cost time for nothing.
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return Differentiable.apply(*inputs)
        if forward_ad._current_level >= 0 and any(
            forward_ad.unpack_dual(x).tangent is not None for x in tensors
        ):
            raise NotImplementedError(f"{op}: has no derivative in forward mode; use impl='ref'")
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return kernel
