"""Computes attention of the packed rows of training, a tree in depth-first order.

Read TreeMask -> tree_attention_ref -> tree_attention. Departs from attention over padded sequences:
the prefix that several rollouts share is packed once, and one number a row, `visible_until`, says
which rows see it. The result equals attention over separate sequences within rounding.

    row             0  1  2  3  4  5  6        rows 0, 1: the prompt
                    p  p  a  a  b  b  b        rows 2, 3: rollout a;  rows 4 to 6: rollout b
    visible_until   7  7  4  4  7  7  7        row t sees row s if s <= t < visible_until[s]
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from socpo_fast.device import upload
from socpo_fast.kernels._tree_plan import HEAD_DIMS, plan_tree
from socpo_fast.ops._checks import FLOATS, TensorChecker, autocast, check_rule, has_no_values
from socpo_fast.ops._impl import kernels_of, pick_impl
from socpo_fast.ops._register import define_op

REF_SCORES = 1 << 25  # entries of the mask that the reference has at a time
INT32 = (torch.int32,)


class TreeMask(NamedTuple):
    """Which rows see which in a tree, checked once for all layers of a microbatch.

    The last two fields are a plan for the kernels of a GPU: which tiles of (queries, keys) they
    skip and which need a mask, from the smallest and largest visible_until of each block of rows;
    kernels/_tree_plan.py explains it. Use `of` to make one: the plan must fit visible_until_T.
    """

    visible_until_T: Tensor  # int32: the first row that no longer sees row s
    key_blocks_NM: Tensor  # int32: the blocks of keys that each block of queries visits
    query_ranges_P7: Tensor  # int32: the blocks of queries that visit each block of keys

    @classmethod
    def of(cls, visible_until_T: Tensor, *, where: str = "TreeMask.of") -> Self:
        """Checks visible_until_T [T] int32, each in (its row, T], and adds the plan.

        Raises:
            ValueError: a shape, dtype or value breaks the rules above (a value on a GPU: a device
                        assert; under torch.compile values are not checked).
        """
        check = TensorChecker(where)
        check("visible_until_T", visible_until_T, INT32)
        num_rows = visible_until_T.shape[0]
        if not has_no_values(visible_until_T):
            rows_T = torch.arange(num_rows, device=visible_until_T.device)
            holds = (visible_until_T > rows_T) & (visible_until_T <= num_rows)
            check.every("visible_until_T", visible_until_T, holds, f"in (its row, T={num_rows}]")
        return cls(visible_until_T, *plan_tree(visible_until_T))

    def to(self, device: torch.device) -> Self:
        """Returns the mask on a device; the host does not wait for the copies."""
        return type(self)(*(upload(x, device) for x in self))


def visible_until_of_sequences(lengths: Sequence[int]) -> Tensor:
    """Returns visible_until_T of sequences side by side that do not see each other."""
    seq_lens_B = torch.tensor(lengths, dtype=torch.int64)
    return seq_lens_B.cumsum(0).repeat_interleave(seq_lens_B).int()


def num_pairs(visible_until_T: Tensor) -> int:
    """Returns the number of pairs of a query row and a key row that it sees, of one head.

    A pair costs 4 E FLOPs in the forward and 10 E in the backward.
    """
    rows_T = torch.arange(visible_until_T.shape[0], device=visible_until_T.device)
    return int((visible_until_T - rows_T).sum())


def tree_attention_ref(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    visible_until_T: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Computes `tree_attention`, unchecked, with torch's masked attention, by blocks of queries."""
    group = q_THE.shape[1] // k_TKE.shape[1]
    # Keys and values are repeated for each query head, since those of torch's kernels that take a
    # mask do not support grouped heads.
    k_HTE, v_HTE = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k_TKE, v_TKE))
    rows_T = torch.arange(q_THE.shape[0], device=q_THE.device)
    num_rows = max(1, REF_SCORES // max(1, q_THE.shape[0]))
    outputs = []
    for begin in range(0, max(1, q_THE.shape[0]), num_rows):
        end = min(begin + num_rows, q_THE.shape[0])
        # Rows after `end` are in the future of all queries of the block.
        queries = rows_T[begin:end, None]
        is_seen = (rows_T[:end] <= queries) & (queries < visible_until_T[:end])
        q_HTE = q_THE[begin:end].transpose(0, 1)
        keys_and_values = k_HTE[None, :, :end], v_HTE[None, :, :end]
        o_1HTE = F.scaled_dot_product_attention(q_HTE[None], *keys_and_values, is_seen, scale=scale)
        outputs.append(o_1HTE[0].transpose(0, 1))
    return torch.cat(outputs)


def tree_attention(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    tree: Tensor | TreeMask,
    *,
    scale: float,
    impl: str = "auto",
) -> Tensor:
    """Computes attention of packed rows in which every row sees its ancestors in a tree and itself.

        seen(t) = rows s with s <= t < visible_until[s]
        o[t]    = sum over s in seen(t) of softmax over seen(t)(scale q[t] . k[s]) v[s]

    Args:
        q_THE: [T, H, E] fp32, fp64, bf16 or fp16 (cpp: fp32); H a multiple of K.
        k_TKE: [T, K, E], same dtype. Query head h attends to key and value head h // (H / K).
        v_TKE: [T, K, E], same dtype.
        tree:  visible_until_T, [T] int32 with s < visible_until[s] <= T; or TreeMask.of(it), which
               many layers can share. Rows of a tree are in depth-first order.
        scale: > 1e-37 and < 1e37, usually E ** -0.5.
        impl:  "auto", "ref", "cpp", or "triton" for E 32, 64 or 128; for any other E "auto" is
               "ref" on a GPU.

    Returns:
        o_THE [T, H, E], dtype of q.

    Raises:
        ValueError: a shape, dtype, device, the tree or the scale breaks the rules above (values of
                    a tree on a GPU: a device assert; under torch.compile they are not checked).

    Gradient: q, k, v. Memory: q, k, v, o and one number per row and head are kept for the backward.
    cpp: a thread holds the scores of one block of rows. triton: the backward holds two more numbers
    per row and head, and partial sums of dK and dV, for 8192 rows at most. Bitwise: same inputs,
    same bits; cpp: thread-invariant. NaN or infinity in a row may reach rows that do not see it,
    except in cpp.
    """
    q_THE, k_TKE, v_TKE = autocast(q_THE, k_TKE, v_TKE)
    check = TensorChecker("tree_attention")
    check("q_THE", q_THE, FLOATS)
    check.each((q_THE.dtype,), k_TKE=k_TKE, v_TKE=v_TKE)
    heads, kv_heads, head_dim = (check.sizes[letter] for letter in "HKE")
    check_rule(
        check.where,
        "H",
        heads,
        heads > 0 and kv_heads > 0 and heads % kv_heads == 0,
        f"a multiple of K={kv_heads}",
    )
    check_rule(check.where, "E", head_dim, head_dim > 0, ">= 1")
    # A scale that is 0 or infinite in fp32 would make every score NaN.
    check_rule(check.where, "scale", scale, 1e-37 < scale < 1e37, "> 1e-37 and < 1e37")
    visible_until_T = tree.visible_until_T if isinstance(tree, TreeMask) else tree
    check("visible_until_T", visible_until_T, INT32)
    if not isinstance(tree, TreeMask):
        tree = TreeMask.of(tree, where=check.where)
    picked = pick_tree_impl(impl, q_THE)
    if picked == "ref":
        return tree_attention_ref(q_THE, k_TKE, v_TKE, tree.visible_until_T, scale=scale)
    return tree_attention_op(q_THE, k_TKE, v_TKE, *tree, scale, picked)[0]


def pick_tree_impl(impl: str, q_THE: Tensor) -> str:
    """Returns pick_impl's choice, but "ref" for "auto" if triton does not support the head dim."""
    picked = pick_impl("tree_attention", impl, q_THE)
    head_dim = q_THE.shape[-1]
    if picked == "triton" and head_dim not in HEAD_DIMS:
        rule = "32, 64 or 128 for impl='triton'"
        check_rule("tree_attention", "E", head_dim, impl == "auto", rule, "use impl='ref'")
        return "ref"
    return picked


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    key_blocks: Tensor,
    query_ranges: Tensor,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    plan = () if impl == "cpp" else (key_blocks, query_ranges)
    return kernels_of("tree_attention", impl).tree_attention(q, k, v, visible_until, *plan, scale)


def _save(ctx: Any, inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
    # With logsumexp the backward computes probabilities again instead of keeping [T, T] of them.
    *tensors, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *outputs)
    ctx.mark_non_differentiable(outputs[1])


def _backward(ctx: Any, grad_o: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """Computes dq, dk and dv; the gradient of a score is p (grad . v - grad . o).

    p = exp(score - logsumexp) is its probability.
    """
    grads = tree_attention_backward_op(grad_o, *ctx.saved_tensors, ctx.scale, ctx.impl)
    return *grads, *[None] * 5


def _backward_kernel(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    key_blocks: Tensor,
    query_ranges: Tensor,
    o: Tensor,
    logsumexp: Tensor,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    saved = () if impl == "cpp" else (key_blocks, query_ranges, o, logsumexp)
    return kernels_of("tree_attention", impl).tree_attention_backward(
        grad_o,
        q,
        k,
        v,
        visible_until,
        *saved,
        scale,
    )


# logsumexp [T, H], over the scores of a row, is all that the backward needs of the softmax.
tree_attention_op = define_op(
    "tree_attention(Tensor q, Tensor k, Tensor v, Tensor visible_until, Tensor key_blocks, "
    "Tensor query_ranges, float scale, str impl) -> (Tensor o, Tensor logsumexp)",
    _kernel,
    fake=lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)),
    derivative=(_save, _backward),
)
tree_attention_backward_op = define_op(
    "tree_attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor visible_until, "
    "Tensor key_blocks, Tensor query_ranges, Tensor o, Tensor logsumexp, float scale, str impl) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    _backward_kernel,
    fake=lambda _, *qkv: tuple(x.new_empty(x.shape) for x in qkv[:3]),
)
