"""Accumulates weight gradients into .grad in fp32, inside the backward itself.

Read accumulates -> AccumulatingLinear -> RotatedTreeAttention. Two departures from autograd:

    autograd    dW = grad.T @ x in the weight's dtype, a tensor as large as W;  W.grad += dW
    here        W.grad (fp32) += grad.T @ x, in one product

    autograd    keeps x, the input of each linear layer, for the backward
    here        recomputes x from its Source, a tensor that an earlier op keeps anyway

This applies inside of `accumulating`, which the trainer opens, and only to parameters marked by
accumulate_in_fp32, whose optimizer reads .grad. Everywhere else gradients are ordinary ones that
the backward returns.
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
# One entry for each open `accumulating` block. A plain list and not a thread-local: forwards that
# checkpointing recomputes run in autograd's threads, which must see it as well.
_open_blocks: list[bool] = []


class Source(NamedTuple):
    """What a linear layer's input is computed from: function(x), cheap enough to repeat."""

    function: Callable[[Tensor], Tensor]
    x: Tensor


def accumulate_in_fp32(params: Iterable[nn.Parameter]) -> None:
    """Marks parameters, so that the trainer's backward adds to their fp32 .grad in place."""
    for param in params:
        param.grad_dtype = torch.float32
        setattr(param, MARK, True)


@contextmanager
def accumulating() -> Iterator[None]:
    """Lets forwards and backwards in a `with` block add to .grad of marked parameters in place."""
    _open_blocks.append(True)
    try:
        yield
    finally:
        _open_blocks.pop()


def is_accumulating() -> bool:
    """Whether a forward that runs now will have the trainer's accumulating backward."""
    return bool(_open_blocks) and torch.is_grad_enabled()


def accumulates(param: Tensor) -> bool:
    """Whether the backward of an op that runs now will add to this parameter's .grad in place."""
    return (
        is_accumulating()
        and param.requires_grad
        and hasattr(param, MARK)
        # A pickled copy keeps the mark, but not the dtype of its gradient.
        and param.grad_dtype == torch.float32
    )


class AccumulatingLinear(torch.autograd.Function):
    """Computes ops.linear with a marked weight; its backward adds to weight.grad in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_ND: Tensor,
        bias_N: Tensor | None,
        source: Source | None,
    ) -> Tensor:
        """Returns x @ weight.T + bias; keeps x, or what x is computed from if there is a source."""
        ctx.function, saved = (None, x_TD) if source is None else source
        ctx.save_for_backward(saved)
        # The weight is not saved with save_for_backward: checkpointing would give another tensor
        # back, and .grad must be the parameter's. So its version is checked by hand, too.
        ctx.weight_ND = weight_ND
        ctx.bias_N = bias_N
        ctx.version = weight_ND._version
        return linear(x_TD, weight_ND, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Adds to the gradients of weight and bias; returns only the gradient of x."""
        (saved,) = ctx.saved_tensors
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
        x_TD = saved if ctx.function is None else ctx.function(saved)
        # Without a .grad yet, the product is written instead of added, so nothing has to be zeroed.
        matmul_(total_ND, grad_TN.t(), x_TD, accumulate=has_grad)
        del x_TD  # freed before the gradient of x, which is as large, is allocated
        # Assigned only now: if the product fails, .grad must not hold uninitialized memory.
        weight_ND.grad = total_ND
        if bias_N is not None and bias_N.requires_grad:
            _grad_or_zeros(bias_N).add_(grad_TN.sum(0, dtype=torch.float32))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        grad_x_TD = saved.new_empty((grad_TN.shape[0], weight_ND.shape[1]))
        matmul_(grad_x_TD, grad_TN, weight_ND.detach())
        return grad_x_TD, None, None, None


class RotatedTreeAttention(torch.autograd.Function):
    """Computes tree_attention of raw qkv with a kernel, without keeping rotated q and k.

    forward     qkv -> rotated q, k -> attention        keeps qkv, the output and its logsumexp
    backward    qkv -> rotated q, k -> gradients        rotates again, which is element-wise;
                                                        attention is not computed twice
    """

    @staticmethod
    def forward(ctx: Any, qkv_TXE: Tensor, *rope_and_settings: Any) -> Tensor:
        """Takes qkv, the fields of Rope, a TreeMask, the number of KV heads, scale and impl."""
        # Not saved with save_for_backward. Angles and mask are shared by all layers anyway, and
        # checkpointing would return other tensors for the norms' weights.
        *rope, ctx.mask, ctx.num_kv_heads, ctx.scale, ctx.impl = rope_and_settings
        ctx.rope = Rope(*rope)
        qkv = split_qkv_and_apply_rope(qkv_TXE, ctx.rope, ctx.num_kv_heads)
        o_THE, logsumexp_TH = tree_attention_op(*qkv, *ctx.mask, ctx.scale, ctx.impl)
        ctx.save_for_backward(qkv_TXE, o_THE, logsumexp_TH)
        return o_THE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THE: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of qkv and of the two norm weights, if there are norms."""
        qkv_TXE, *o_and_logsumexp = ctx.saved_tensors
        qkv = split_qkv_and_apply_rope(qkv_TXE, ctx.rope, ctx.num_kv_heads)
        grads = tree_attention_backward_op(
            grad_THE, *qkv, *ctx.mask, *o_and_logsumexp, ctx.scale, ctx.impl
        )
        del qkv  # freed before the gradient of qkv, which is as large, is allocated
        grad_TXE, norm_grads = rotary_qkv_backward_op(*grads, qkv_TXE, *ctx.rope, ctx.impl)
        # One entry for each input of forward: qkv; cos, sin; the norms' two weights, whose gradient
        # is empty without norms; eps, mask, num_kv_heads, scale, impl.
        return grad_TXE, None, None, *(norm_grads.unbind() or (None, None)), *[None] * 5


class AccumulatingEmbedding(torch.autograd.Function):
    """Looks up rows of a marked weight; its backward adds to weight.grad in place."""

    @staticmethod
    def forward(ctx: Any, token_ids_T: Tensor, weight_VD: Tensor) -> Tensor:
        """Returns the embeddings [T, D] of the tokens."""
        ctx.save_for_backward(token_ids_T)
        ctx.weight_VD = weight_VD
        return F.embedding(token_ids_T, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[None, None]:
        """Adds each token's gradient to its row of weight.grad; returns no gradient."""
        (token_ids_T,) = ctx.saved_tensors
        # Gradients of a token that repeats are added in index order: the sum is deterministic.
        add_rows_(_grad_or_zeros(ctx.weight_VD), token_ids_T, grad_TD.float())
        return None, None


def _grad_or_zeros(param: Tensor) -> Tensor:
    """Returns the parameter's .grad; creates it as zeros if there is none."""
    if param.grad is None:
        param.grad = torch.zeros_like(param, dtype=torch.float32)
    return param.grad
