"""Attention over a tree of rows as we and as others compute it, each in its preferred layout.

A contender converts tensors from the tree's rows to its own layout (`take`), is timed there, and
converts outputs and gradients back (`give`). Work that a trainer would repeat in every layer is
part of the timed forward. Gathering ancestors is such work. Copying rows is not: a trainer that
needs copies makes them once, before the first layer. trees.py has drawings of the layouts.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from socpo_fast.ops import TreeMask, tree_attention
from socpo_fast.socratic import plugin
from tools.gpu_check.check import Check, Skipped
from tools.gpu_check.trees import TreeShape, ancestors, copied_rows

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Layout = Callable[[Tensor], Tensor]


def _as_it_is(x: Tensor) -> Tensor:
    """Returns the tensor: for a layout that is the tree's own."""
    return x


@dataclass(frozen=True)
class Contender:
    """One way to compute attention over a tree.

    once is 1 at the first copy of each row of the tree, 0 at further copies and at padding. With it
    every row is compared once, and the gradients of a row's copies add up to those of the tree.
    """

    name: str
    forward: Attention  # of q, k and v in the contender's layout
    take: Layout = _as_it_is  # from [T, heads, E] to the contender's layout
    give: Layout = _as_it_is  # back to [T, heads, E], summing copies
    once: Tensor | float = 1.0
    has_backward: bool = True


@contextlib.contextmanager
def skip_on_peer_error() -> Iterator[None]:
    """Turns an error in somebody else's code into a skip: it must not fail our check."""
    try:
        yield
    except Skipped:
        raise
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise Skipped(f"torch {torch.__version__}: {type(error).__name__}: {first_line}") from error


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raises TimeoutError when time is up, even through code that catches every Exception."""
    try:
        with plugin.time_limit(seconds):
            yield
    except plugin.TookTooLong as error:
        raise TimeoutError(f"{what} took more than {seconds:g} s") from error


def ours(tree: TreeMask, scale: float) -> Contender:
    """Returns our op, over the tree's own rows."""
    return Contender("ours", partial(tree_attention, tree=tree, scale=scale))


def over_copied_rows(check: Check, shape: TreeShape, scale: float) -> Contender:
    """Returns SDPA's flash kernel over [rollouts, longest]; padding at the end needs no mask."""
    # index_RL[r, l] is the row of the tree that copy l of rollout r stands for.
    index_RL, once_RL = (x.to(check.device) for x in copied_rows(shape))

    def forward(q_RHLE: Tensor, k_RKLE: Tensor, v_RKLE: Tensor) -> Tensor:
        options: dict[str, Any] = {"is_causal": True, "scale": scale, "enable_gqa": True}
        # Fails instead of silently falling back to a slower backend.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q_RHLE, k_RKLE, v_RKLE, **options)

    def give(x_RHLE: Tensor) -> Tensor:
        rows = x_RHLE.transpose(1, 2).flatten(0, 1).float()
        # In fp32, since a prompt's gradient is the sum over all of its copies.
        return rows.new_zeros(shape.num_rows, *rows.shape[1:]).index_add_(
            0, index_RL.flatten(), rows
        )

    return Contender(
        "copied rows",
        forward,
        take=lambda x_THE: x_THE[index_RL].transpose(1, 2).contiguous(),
        give=give,
        once=once_RL[:, None, :, None],
    )


def varlen(check: Check, shape: TreeShape, scale: float, *, is_grouped: bool) -> Contender:
    """Returns torch's varlen_attn over gathered ancestors; not every version has enable_gqa."""
    if not check.is_cuda:
        raise Skipped("varlen_attn runs on a card only")
    with skip_on_peer_error():
        from torch.nn.attention.varlen import varlen_attn
    index, ends_q, ends_k = (x.to(check.device) for x in ancestors(shape)[:3])
    longest = ancestors(shape)[3]
    # A window with nothing to the right is the causal mask, aligned at the last key of each
    # segment.
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    if is_grouped and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True

    def forward(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        keys = k_TKE.index_select(0, index)
        values = v_TKE.index_select(0, index)
        if not is_grouped:
            share = q_THE.shape[1] // k_TKE.shape[1]
            keys, values = (x.repeat_interleave(share, dim=1) for x in (keys, values))
        o = varlen_attn(q_THE, keys, values, ends_q, ends_k, *longest, **options)
        assert isinstance(o, Tensor)
        return o

    return Contender("varlen" if is_grouped else "varlen, heads repeated", forward)


def flex(check: Check, shape: TreeShape, until_T: Tensor, scale: float) -> Contender:
    """Returns FlexAttention with the tree's rule as mask; compiled on a card, plain on a CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # The tree's rule: a key is visible to later rows until its own segment, or its group, ends.
        return (key <= query) & (query < until_T[key])

    size = shape.num_rows
    block_mask = create_block_mask(sees, None, None, size, size, device=str(check.device))
    attend: Callable[..., Any] = flex_attention
    if check.is_cuda:
        torch.compiler.reset()  # earlier shapes count towards the limit of recompilations
        attend = torch.compile(flex_attention, dynamic=False)

    def forward(q_1HTE: Tensor, k_1KTE: Tensor, v_1KTE: Tensor) -> Tensor:
        o: Tensor = attend(
            q_1HTE, k_1KTE, v_1KTE, block_mask=block_mask, scale=scale, enable_gqa=True
        )
        return o

    return Contender(
        "FlexAttention",
        forward,
        take=lambda x_THE: x_THE.transpose(0, 1)[None],
        give=lambda x_1HTE: x_1HTE[0].transpose(0, 1),
        has_backward=check.is_cuda,
    )
