"""The forward of training: packed tokens, a tree in depth-first order, in one pass."""

from torch import Tensor

from socpo_fast.device import upload
from socpo_fast.model.accumulate import RotatedTreeAttention, is_accumulating
from socpo_fast.model.decoder import Decoder
from socpo_fast.ops import TreeMask, tree_attention
from socpo_fast.ops.rotary import Rope, split_qkv_and_apply_rope
from socpo_fast.ops.tree_attention import pick_tree_impl


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
            fixed = mask, config.num_kv_heads, scale, picked
            return RotatedTreeAttention.apply(qkv_TXE, *rope, *fixed)
        q_THE, k_TKE, v_TKE = split_qkv_and_apply_rope(qkv_TXE, rope, config.num_kv_heads)
        return tree_attention(q_THE, k_TKE, v_TKE, mask, scale=scale, impl=impl)

    token_ids_T, positions_T = upload(token_ids_T, device), upload(positions_T, device)
    hidden_TD = student(token_ids_T, positions_T, attend, checkpointing=checkpointing)
    return hidden_TD.to(student.lm_head.weight.dtype)  # wider only for bf16 weights on a CPU
