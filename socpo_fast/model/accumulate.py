"""Weight gradients that the backward itself adds to .grad, in fp32.

Departs from autograd, which would make each microbatch's gradient in the weight's dtype, as large
as the weight, and then add it. Autograd would also keep the input of each product; here it is
computed again from its Source, which some op before keeps anyway. That holds inside of
`accumulating`, which the trainer opens, and for parameters that accumulate_in_fp32 marked, whose
optimizer reads .grad; everywhere else gradients are ordinary returned ones.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from socpo_fast.ops import linear
from socpo_fast.ops._head import add_rows_, matmul_
from socpo_fast.ops.rotary import Rope, rotary_qkv_backward_op, split_qkv_and_apply_rope
from socpo_fast.ops.tree_attention import tree_attention_backward_op, tree_attention_op

MARK = "accumulates_in_fp32"  # an attribute of the parameter itself
_open: list[bool] = []  # one entry for each `accumulating`; autograd's threads read it, too


class Source(NamedTuple):
    """What a linear layer's input was computed from, by an element-wise function."""

    function: Callable[[Tensor], Tensor]
    x: Tensor


def accumulate_in_fp32(params: Iterable[nn.Parameter]) -> None:
    """Marks parameters: their .grad is fp32, and the trainer's backward adds to it in place."""
    for param in params:
        param.grad_dtype = torch.float32
        setattr(param, MARK, True)


@contextmanager
def accumulating() -> Iterator[None]:
    """Lets forwards and their backwards, within, add to .grad of marked parameters in place."""
    _open.append(True)
    try:
        yield
    finally:
        _open.pop()


def is_accumulating() -> bool:
    """Whether a forward whose backward is the trainer's own is under way."""
    return bool(_open) and torch.is_grad_enabled()


def accumulates(param: Tensor) -> bool:
    """Whether a gradient of this parameter is about to be added to its .grad in place."""
    return (
        is_accumulating()
        and param.requires_grad
        and hasattr(param, MARK)
        and param.grad_dtype == torch.float32  # which a pickled copy lacks, though it has the mark
    )


class AccumulatingLinear(torch.autograd.Function):
    """Computes ops.linear of x, a marked weight and a bias; keeps x, or what x comes from."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_ND: Tensor,
        bias_N: Tensor | None,
        source: Source | None,
    ) -> Tensor:
        ctx.function, kept = (None, x_TD) if source is None else source
        ctx.save_for_backward(kept)
        # Not saved: what checkpointing gives back for a saved weight is another tensor.
        ctx.weight_ND = weight_ND
        ctx.bias_N = bias_N
        ctx.version = weight_ND._version
        return linear(x_TD, weight_ND, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, None, None, None]:
        (kept,) = ctx.saved_tensors
        grad_TN = grad_TN.contiguous()
        weight_ND = ctx.weight_ND
        bias_N = ctx.bias_N
        if weight_ND._version != ctx.version:
            raise RuntimeError(
                "accumulating: a weight must stay as it was until the backward, got one that was "
                "changed in place; run the forward again"
            )
        has_grad = weight_ND.grad is not None
        total_ND = weight_ND.grad if has_grad else torch.empty_like(weight_ND, dtype=torch.float32)
        x_TD = kept if ctx.function is None else ctx.function(kept)
        matmul_(total_ND, grad_TN.t(), x_TD, accumulate=has_grad)
        del x_TD  # before there is a gradient as large
        weight_ND.grad = total_ND  # only now: what stops the product leaves no raw memory there
        if bias_N is not None and bias_N.requires_grad:
            _zeros_unless_there(bias_N).add_(grad_TN.sum(0, dtype=torch.float32))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        grad_x_TD = kept.new_empty((grad_TN.shape[0], weight_ND.shape[1]))
        matmul_(grad_x_TD, grad_TN, weight_ND.detach())
        return grad_x_TD, None, None, None


class RotatedTreeAttention(torch.autograd.Function):
    """Computes tree_attention of raw qkv, by a kernel; keeps neither rotated q nor rotated k.

    In its backward they are rotated again, which is element-wise. Attention is not computed twice.
    """

    @staticmethod
    def forward(ctx: Any, qkv_TXE: Tensor, *others: Any) -> Tensor:
        """others: those of Rope, a TreeMask, the number of KV heads, scale and impl."""
        # Kept as they are: all layers share them, or checkpointing would give back other tensors.
        *rope, ctx.mask, ctx.num_kv_heads, ctx.scale, ctx.impl = others
        ctx.rope = Rope(*rope)
        qkv = split_qkv_and_apply_rope(qkv_TXE, ctx.rope, ctx.num_kv_heads)
        o_THE, logsumexp_TH = tree_attention_op(*qkv, *ctx.mask, ctx.scale, ctx.impl)
        ctx.save_for_backward(qkv_TXE, o_THE, logsumexp_TH)
        return o_THE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THE: Tensor) -> tuple[Tensor | None, ...]:
        qkv_TXE, *of_attention = ctx.saved_tensors
        qkv = split_qkv_and_apply_rope(qkv_TXE, ctx.rope, ctx.num_kv_heads)
        grads = tree_attention_backward_op(
            grad_THE, *qkv, *ctx.mask, *of_attention, ctx.scale, ctx.impl
        )
        del qkv  # before there is a gradient as large
        grad_TXE, of_weights = rotary_qkv_backward_op(*grads, qkv_TXE, *ctx.rope, ctx.impl)
        return grad_TXE, None, None, *(of_weights.unbind() or (None, None)), *[None] * 5


class AccumulatingEmbedding(torch.autograd.Function):
    """Looks rows of a marked weight up."""

    @staticmethod
    def forward(ctx: Any, token_ids_T: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(token_ids_T)
        ctx.weight_VD = weight_VD
        return F.embedding(token_ids_T, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[None, None]:
        (token_ids_T,) = ctx.saved_tensors
        add_rows_(_zeros_unless_there(ctx.weight_VD), token_ids_T, grad_TD.float())
        return None, None


def _zeros_unless_there(param: Tensor) -> Tensor:
    """Returns the parameter's .grad, made where there is none."""
    if param.grad is None:
        param.grad = torch.zeros_like(param, dtype=torch.float32)
    return param.grad
