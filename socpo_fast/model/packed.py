"""The forward of training: packed tokens, a tree in depth-first order, in one pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from socpo_fast.device import upload
from socpo_fast.model.accumulate import is_accumulating
from socpo_fast.model.decoder import Decoder, Rope, split_qkv_and_apply_rope
from socpo_fast.ops import TreeMask, tree_attention
from socpo_fast.ops.rotary import rotary_qkv_backward_op
from socpo_fast.ops.tree_attention import pick_tree_impl, tree_attention_backward_op, tree_attention_op


def packed_forward(
    student: Decoder,
    token_ids_T: Tensor,
    positions_T: Tensor,
    tree: Tensor | TreeMask,
    *,
    checkpointing: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Computes the hidden states of packed tokens, each of which sees its ancestors and itself.

    Args:
        token_ids_T, positions_T: [T] int64 on any device; a position is a depth along a path.
        tree:            visible_until_T [T] int32 or a TreeMask, as of ops.tree_attention.
        checkpointing:   recompute each layer in the backward.
        impl:            of the attention.

    Returns:
        hidden_TD [T, D] behind the last norm, on the student's device, in the parameters' dtype.

    Raises:
        ValueError: the tree breaks the rules of ops.TreeMask.
    """
    config, device = student.config, student.lm_head.weight.device
    mask = tree if isinstance(tree, TreeMask) else TreeMask.of(tree, where="packed_forward")
    mask, scale = mask.to(device), config.head_dim**-0.5

    def attend(layer_idx: int, qkv_TXE: Tensor, rope: Rope) -> Tensor:
        picked = pick_tree_impl(impl, qkv_TXE)
        if picked != "ref" and is_accumulating():
            weights, fixed = (rope.q_weight_E, rope.k_weight_E), (mask, config.num_kv_heads)
            return RotatedTreeAttention.apply(qkv_TXE, *weights, rope, *fixed, scale, picked)
        qkv = split_qkv_and_apply_rope(qkv_TXE, rope, config.num_kv_heads)
        return tree_attention(*qkv, mask, scale=scale, impl=impl)

    token_ids_T, positions_T = upload(token_ids_T, device), upload(positions_T, device)
    hidden_TD = student(token_ids_T, positions_T, attend, checkpointing=checkpointing)
    return hidden_TD.to(student.lm_head.weight.dtype)  # wider only for bf16 weights on a CPU


class RotatedTreeAttention(torch.autograd.Function):
    """Computes tree_attention of raw qkv, by a kernel; keeps neither rotated q nor rotated k.

    In its backward they are rotated again, which is element-wise. Attention is not computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv_TXE: Tensor,
        q_weight_E: Tensor | None,
        k_weight_E: Tensor | None,
        rope: Rope,
        mask: TreeMask,
        num_kv_heads: int,
        scale: float,
        impl: str,
    ) -> Tensor:
        qkv = split_qkv_and_apply_rope(qkv_TXE, rope, num_kv_heads)
        o_THE, logsumexp_TH = tree_attention_op(*qkv, *mask, scale, impl)
        ctx.save_for_backward(qkv_TXE, o_THE, logsumexp_TH)
        ctx.rope, ctx.mask = rope, mask  # of all layers
        ctx.num_kv_heads, ctx.scale, ctx.impl = num_kv_heads, scale, impl
        return o_THE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THE: Tensor) -> tuple[Tensor | None, ...]:
        qkv_TXE, o_THE, logsumexp_TH = ctx.saved_tensors
        qkv = split_qkv_and_apply_rope(qkv_TXE, ctx.rope, ctx.num_kv_heads)
        kept = *ctx.mask, o_THE, logsumexp_TH
        grads = tree_attention_backward_op(grad_THE, *qkv, *kept, ctx.scale, ctx.impl)
        del qkv  # before there is a gradient as large
        grad_TXE, of_weights = rotary_qkv_backward_op(*grads, qkv_TXE, *ctx.rope, ctx.impl)
        return grad_TXE, *(of_weights.unbind() or (None, None)), *[None] * 5
