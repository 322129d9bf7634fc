"""The decoder: one set of fused weights for packed training and paged decoding.

Read top-down: Decoder -> packed_forward -> Layer -> Attention, MLP -> Linear, RMSNorm. Attention
itself is handed in as `attend`, because where keys come from is the only thing in which rollout and
training differ: the engine writes them to pages, training reads them from the packed rows. Tokens
are always packed, [T, ..], never padded [B, L, ..].
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from socpo_fast.device import choose_vector_functions, upload
from socpo_fast.model.accumulate import (
    AccumulatingEmbedding,
    AccumulatingLinear,
    RotatedTreeAttention,
    Source,
    accumulates,
    is_accumulating,
)
from socpo_fast.model.config import ModelConfig
from socpo_fast.ops import TreeMask, linear, rms_norm, swiglu, tree_attention
from socpo_fast.ops.rotary import Rope, split_qkv_and_apply_rope
from socpo_fast.ops.tree_attention import pick_tree_impl

Tables = tuple[Tensor, Tensor]  # cos and sin, [T, E] fp32 each
# Causal attention of one layer over whatever the caller keeps: layer_idx, qkv [T, H + 2 K, E] as
# the GEMM gives it, neither normed nor rotated, and rope -> [T, H, E].
Attend = Callable[[int, Tensor, Rope], Tensor]


class Decoder(nn.Module):
    """Llama, Qwen2 and Qwen3 decoders; which one is a matter of three config fields (qkv_bias,
    qk_norm, head_dim).
    """

    inv_freq: Tensor  # [E / 2] fp32, whatever the parameters' dtype

    def __init__(self, config: ModelConfig):
        super().__init__()
        choose_vector_functions()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight
        self.register_buffer("inv_freq", config.inverse_frequencies(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What .to(), .bfloat16(), .to_empty() and their like do; inv_freq stays right and in fp32.

        A change of dtype would round the angle of every position, and .to_empty() would leave
        whatever was in memory; so only the device is taken from what fn made of the buffer.
        """
        before = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq is not before:
            self.inv_freq = self.config.inverse_frequencies().to(self.inv_freq.device)
        return self

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        *,
        checkpointing: bool = False,
    ) -> Tensor:
        """Hidden states behind the last norm, [T, D]; the LM head is left to the caller, which
        needs few rows of it.

        token_ids_T [T] int64; positions_T [T] int64, place of the token in its own context;
        checkpointing recomputes each layer in the backward.
        """
        x_TD, tables = self.first_layer_inputs(token_ids_T, positions_T)
        delta_TD = None
        for layer_idx, layer in enumerate(self.layers):
            if checkpointing and torch.is_grad_enabled():
                x_TD, delta_TD = checkpoint(
                    layer, layer_idx, x_TD, delta_TD, tables, attend, use_reentrant=False
                )
            else:
                x_TD, delta_TD = layer(layer_idx, x_TD, delta_TD, tables, attend)
        return self.norm(delta_TD, x_TD)[0]

    def first_layer_inputs(self, token_ids_T: Tensor, positions_T: Tensor) -> tuple[Tensor, Tables]:
        """The tokens' embeddings [T, D], and cos and sin [T, E] of their positions."""
        x_TD = self.embed(token_ids_T)
        return x_TD.to(computing_dtype(x_TD)), rotary_tables(positions_T, self.inv_freq)


def packed_forward(
    student: Decoder,
    token_ids_T: Tensor,
    positions_T: Tensor,
    tree: Tensor | TreeMask,
    *,
    checkpointing: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Computes the hidden states of packed tokens, each of which sees its ancestors and itself:
    training's forward.

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
    config = student.config
    device = student.lm_head.weight.device
    mask = tree if isinstance(tree, TreeMask) else TreeMask.of(tree, where="packed_forward")
    mask = mask.to(device)
    scale = config.head_dim**-0.5

    def attend(layer_idx: int, qkv_TXE: Tensor, rope: Rope) -> Tensor:
        picked = pick_tree_impl(impl, qkv_TXE)
        if picked != "ref" and is_accumulating():
            return RotatedTreeAttention.apply(
                qkv_TXE, *rope, mask, config.num_kv_heads, scale, picked
            )
        q_THE, k_TKE, v_TKE = split_qkv_and_apply_rope(qkv_TXE, rope, config.num_kv_heads)
        return tree_attention(q_THE, k_TKE, v_TKE, mask, scale=scale, impl=impl)

    hidden_TD = student(
        upload(token_ids_T, device),
        upload(positions_T, device),
        attend,
        checkpointing=checkpointing,
    )
    return hidden_TD.to(student.lm_head.weight.dtype)  # wider only for bf16 weights on a CPU


def computing_dtype(weight: Tensor) -> torch.dtype:
    """What a model computes in: bf16 weights on a CPU, which has no arithmetic for them, are only
    read.
    """
    return torch.float32 if weight.is_cpu and weight.dtype == torch.bfloat16 else weight.dtype


class Layer(nn.Module):
    """From the stream of residuals and what is still to be added to it to the same one layer on."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        layer_idx: int,
        x_TD: Tensor,
        delta_TD: Tensor | None,
        tables: Tables,
        attend: Attend,
    ) -> tuple[Tensor, Tensor]:
        if delta_TD is None:
            normed_TD = self.attention_norm(x_TD)
        else:
            normed_TD, x_TD = self.attention_norm(delta_TD, x_TD)
        source = self.attention_norm.source_of(x_TD)
        normed_TD, x_TD = self.mlp_norm(
            self.attention(layer_idx, normed_TD, tables, attend, source), x_TD
        )
        return x_TD, self.mlp(normed_TD, self.mlp_norm.source_of(x_TD))


class Attention(nn.Module):
    """q_norm and k_norm only hold weights and eps, which attend applies: they are never called."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = Linear(config.hidden_size, heads * self.head_dim, bias=config.qkv_bias)
        self.o = Linear(config.num_heads * self.head_dim, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        layer_idx: int,
        x_TD: Tensor,
        tables: Tables,
        attend: Attend,
        source: Source | None = None,
    ) -> Tensor:
        rope = Rope(*tables)
        if self.q_norm is not None and self.k_norm is not None:
            rope = Rope(*tables, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        qkv_TXE = self.qkv(x_TD, source).unflatten(-1, (-1, self.head_dim))
        return self.o(attend(layer_idx, qkv_TXE, rope).flatten(1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = Linear(
            config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias
        )
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_TD: Tensor, source: Source | None = None) -> Tensor:
        gate_up_TJ = self.gate_up(x_TD, source)
        return self.down(swiglu(gate_up_TJ), Source(swiglu, gate_up_TJ))


class Embedding(nn.Embedding):
    """Rows of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        if accumulates(self.weight):
            return AccumulatingEmbedding.apply(input, self.weight)
        return super().forward(input)


class Linear(nn.Linear):
    """Rows [T, D] as ops/linear.py computes them; source says how to compute them again."""

    def forward(self, input: Tensor, source: Source | None = None) -> Tensor:
        if accumulates(self.weight):
            return AccumulatingLinear.apply(input, self.weight, self.bias, source)
        return linear(input, self.weight, self.bias)


class RMSNorm(nn.Module):
    """The norm of x, or (norm of x + residual, x + residual); see ops/rms_norm.py."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return rms_norm(x, self.weight, eps=self.eps, residual_TD=residual)

    def source_of(self, x: Tensor) -> Source | None:
        """Returns how a backward recomputes norm(x); None for a hooked norm: it would run twice."""
        return None if has_hooks([self]) else Source(self, x)


def has_hooks(modules: list[nn.Module]) -> bool:
    """Whether somebody listens to one of these modules, whom other ways of computing it would not
    call.
    """
    hooks = torch.nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or any(m._forward_pre_hooks or m._forward_hooks for m in modules)
    )


def rotary_tables(positions_T: Tensor, inv_freq: Tensor) -> Tables:
    """cos and sin of position x inverse frequency, [T, E] fp32 whatever the model's dtype; the
    halves are equal.
    """
    angles_TE = (positions_T[:, None].float() * inv_freq.float()).repeat(1, 2)
    return angles_TE.cos(), angles_TE.sin()
