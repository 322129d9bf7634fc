"""Defines the decoder: one set of fused weights for packed training and for paged decoding.

Read top-down: Decoder -> packed_forward -> Layer -> Attention, MLP -> Linear, RMSNorm. Attention
itself is passed in as `attend`, because rollout and training differ only in where keys and values
are: the engine has them in pages, training in the packed rows. Tokens are always packed, [T, ..],
never padded [B, L, ..].

A residual is added by the norm that follows, in one op. So a layer takes and returns two tensors,
the residual stream x and the last sublayer's output delta, which is not yet added to x:

    x, delta  ->  norm(x += delta)  ->  attention  ->  delta
    x, delta  ->  norm(x += delta)  ->  MLP        ->  delta, for the next layer or the final norm
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
from socpo_fast.model.shared import SharedWeights
from socpo_fast.ops import TreeMask, linear, rms_norm, swiglu, tree_attention
from socpo_fast.ops.rotary import Rope, split_qkv_and_apply_rope
from socpo_fast.ops.tree_attention import pick_tree_impl

Tables = tuple[Tensor, Tensor]  # cos and sin, [T, E] fp32 each
# Causal attention of one layer: (layer_idx, qkv_TXE, rope) -> output [T, H, E]. qkv [T, H + 2 K, E]
# is as the GEMM writes it, neither normed nor rotated; attend does both, in one op.
Attend = Callable[[int, Tensor, Rope], Tensor]


class Decoder(nn.Module):
    """A Llama, Mistral, Qwen2 or Qwen3 decoder.

    They differ only in config fields: biases, qk_norm and head_dim.
    """

    inv_freq: Tensor  # [E / 2] fp32, whatever the parameters' dtype
    # Set by adopt_student(share=True): the live module whose parameters are views of these.
    shared: SharedWeights | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        # Before the first rotary table: a process's first parallel cos may have wrong results.
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
        """Does what .to(), .bfloat16(), .to_empty() and others ask for, but keeps inv_freq exact.

        A change of dtype would round the angle of every position, and .to_empty() would leave it
        uninitialized. So inv_freq is computed again, on the device to which fn moved it.
        """
        old_inv_freq = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq is not old_inv_freq:
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
        """Returns the hidden states after the final norm, [T, D].

        The LM head is left to the caller, which needs logits of few rows only.

        Args:
            token_ids_T:   [T] int64.
            positions_T:   [T] int64, the position of each token in its own context.
            attend:        computes the attention of a layer.
            checkpointing: recompute each layer in the backward.
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
        """Returns the tokens' embeddings [T, D], and cos and sin [T, E] of their positions."""
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
    """Computes training's forward: the hidden states of packed tokens, each seeing its ancestors.

    Args:
        token_ids_T:     [T] int64 on any device.
        positions_T:     [T] int64 on any device: the depth of a token along its path in the tree.
        tree:            visible_until_T [T] int32 or a TreeMask, as in ops.tree_attention.
        checkpointing:   recompute each layer in the backward.
        impl:            implementation of the attention.

    Returns:
        hidden_TD [T, D] after the final norm, on the student's device, in the parameters' dtype.

    Raises:
        ValueError: the tree breaks the rules of ops.TreeMask.
    """
    config = student.config
    device = student.lm_head.weight.device
    mask = tree if isinstance(tree, TreeMask) else TreeMask.of(tree, where="packed_forward")
    mask = mask.to(device)
    scale = config.head_dim**-0.5

    def attend(layer_idx: int, qkv_TXE: Tensor, rope: Rope) -> Tensor:
        impl_name = pick_tree_impl(impl, qkv_TXE)
        # Only kernels have a backward op to call by hand; the reference is left to autograd.
        if impl_name != "ref" and is_accumulating():
            return RotatedTreeAttention.apply(
                qkv_TXE, *rope, mask, config.num_kv_heads, scale, impl_name
            )
        q_THE, k_TKE, v_TKE = split_qkv_and_apply_rope(qkv_TXE, rope, config.num_kv_heads)
        return tree_attention(q_THE, k_TKE, v_TKE, mask, scale=scale, impl=impl)

    hidden_TD = student(
        upload(token_ids_T, device),
        upload(positions_T, device),
        attend,
        checkpointing=checkpointing,
    )
    # A cast only for bf16 weights on a CPU, which compute in fp32.
    return hidden_TD.to(student.lm_head.weight.dtype)


def computing_dtype(weight: Tensor) -> torch.dtype:
    """Returns the dtype of activations: the weights' own, but fp32 for bf16 weights on a CPU.

    CPU kernels have no bf16 arithmetic. They read such weights as stored and compute in fp32.
    """
    return torch.float32 if weight.is_cpu and weight.dtype == torch.bfloat16 else weight.dtype


class Layer(nn.Module):
    """One decoder layer: maps (residual stream x, delta not yet added to it) to the next pair."""

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
        # The first layer gets embeddings, to which nothing is to be added.
        if delta_TD is None:
            normed_TD = self.attention_norm(x_TD)
        else:
            normed_TD, x_TD = self.attention_norm(delta_TD, x_TD)
        # What the linear layer behind this norm keeps: x, from which its backward recomputes the
        # normed rows. The norm's own backward keeps x anyway.
        source = self.attention_norm.source_of(x_TD)
        normed_TD, x_TD = self.mlp_norm(
            self.attention(layer_idx, normed_TD, tables, attend, source), x_TD
        )
        return x_TD, self.mlp(normed_TD, self.mlp_norm.source_of(x_TD))


class Attention(nn.Module):
    """Fused qkv projection, attention by `attend`, output projection.

    q_norm and k_norm only hold weights and eps. They are never called: `attend` applies them,
    together with the rotation.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        num_heads = config.num_heads + 2 * config.num_kv_heads
        # Rows of the fused weight: H query heads, then K key heads, then K value heads.
        self.qkv = Linear(config.hidden_size, num_heads * self.head_dim, bias=config.qkv_bias)
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
        # Without norms the last three fields of Rope are None, and attend only rotates.
        rope = Rope(*tables)
        if self.q_norm is not None and self.k_norm is not None:
            rope = Rope(*tables, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        qkv_TXE = self.qkv(x_TD, source).unflatten(-1, (-1, self.head_dim))
        return self.o(attend(layer_idx, qkv_TXE, rope).flatten(1))


class MLP(nn.Module):
    """Fused gate and up projection, SwiGLU, down projection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = Linear(
            config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias
        )
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_TD: Tensor, source: Source | None = None) -> Tensor:
        # SwiGLU's backward keeps gate_up. So its output is not kept: down's backward recomputes it.
        gate_up_TJ = self.gate_up(x_TD, source)
        return self.down(swiglu(gate_up_TJ), Source(swiglu, gate_up_TJ))


class Embedding(nn.Embedding):
    """torch's Embedding, whose backward can add to the weight's .grad in place."""

    def forward(self, input: Tensor) -> Tensor:
        # Outside of training's backward this is an ordinary torch module, hooks and all.
        if accumulates(self.weight):
            return AccumulatingEmbedding.apply(input, self.weight)
        return super().forward(input)


class Linear(nn.Linear):
    """torch's Linear, computed by ops/linear.py, with a backward that can add to .grad in place.

    source: how that backward recomputes the input, which then need not be kept.
    """

    def forward(self, input: Tensor, source: Source | None = None) -> Tensor:
        if accumulates(self.weight):
            return AccumulatingLinear.apply(input, self.weight, self.bias, source)
        return linear(input, self.weight, self.bias)


class RMSNorm(nn.Module):
    """RMS norm: maps x to norm(x), or x and residual to (norm(x + residual), x + residual)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return rms_norm(x, self.weight, eps=self.eps, residual_TD=residual)

    def source_of(self, x: Tensor) -> Source | None:
        """Returns how to recompute norm(x); None if the norm has hooks, which would run twice."""
        return None if has_hooks([self]) else Source(self, x)


def has_hooks(modules: list[nn.Module]) -> bool:
    """Whether a module has forward hooks, which ways to compute it other than a call would skip."""
    hooks = torch.nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or any(m._forward_pre_hooks or m._forward_hooks for m in modules)
    )


def rotary_tables(positions_T: Tensor, inv_freq: Tensor) -> Tables:
    """Returns cos and sin of position * inverse frequency, [T, E] fp32 each.

    Always fp32: in bf16 the angles of long contexts would be wrong. The two halves along E are
    equal, since dimension i is rotated with i + E / 2 by the same angle.
    """
    angles_TE = (positions_T[:, None].float() * inv_freq.float()).repeat(1, 2)
    return angles_TE.cos(), angles_TE.sin()
