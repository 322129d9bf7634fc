"""The decoder: one set of fused weights for packed training and paged decoding.

Read top-down: Decoder -> Layer -> Attention, MLP -> RMSNorm -> rotary. Attention itself is handed in as `attend`,
because where keys come from is the only thing in which rollout and training differ: the engine writes them to
pages, the trainer gathers them from the packed rows. Tokens are always packed, [T, ..], never padded [B, L, ..].
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from socpo_fast.model.config import ModelConfig

UNSPLIT = 32768  # elements from which on torch shares element-wise work between threads (at::internal::GRAIN_SIZE)


class Attend(Protocol):
    """Causal attention of one layer over whatever the caller keeps: q [T, H, E], k and v [T, K, E] -> [T, H, E]."""

    def __call__(self, layer_idx: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor: ...


class Decoder(nn.Module):
    """Llama, Qwen2 and Qwen3 decoders; which one is a matter of three config fields (qkv_bias, qk_norm, head_dim)."""

    inv_freq: Tensor  # [E / 2] fp32, whatever the parameters' dtype

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight
        self.register_buffer("inv_freq", config.inverse_frequencies(), persistent=False)

    def forward(
        self, token_ids_T: Tensor, positions_T: Tensor, attend: Attend, *, checkpointing: bool = False
    ) -> Tensor:
        """Hidden states behind the last norm, [T, D]; the LM head is left to the caller, which needs few rows of it.

        token_ids_T [T] int64; positions_T [T] int64, place of the token in its own context; checkpointing
        recomputes each layer in the backward.
        """
        x_TD = self.embed(token_ids_T)
        rotary = rotary_tables(positions_T, self.inv_freq, self.config.rope_attention_factor, x_TD.dtype)
        for layer_idx, layer in enumerate(self.layers):
            if checkpointing and torch.is_grad_enabled():
                x_TD = checkpoint(layer, layer_idx, x_TD, rotary, attend, use_reentrant=False)
            else:
                x_TD = layer(layer_idx, x_TD, rotary, attend)
        return self.norm(x_TD)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, layer_idx: int, x_TD: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x_TD = x_TD + self.attention(layer_idx, self.attention_norm(x_TD), rotary, attend)
        return x_TD + self.mlp(self.mlp_norm(x_TD))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        heads = self.num_heads + 2 * self.num_kv_heads
        self.qkv = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.qkv_bias)
        self.o = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, layer_idx: int, x_TD: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        heads_THE = self.qkv(x_TD).unflatten(-1, (-1, self.head_dim))
        q_THE, k_TKE, v_TKE = heads_THE.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        q_THE, k_TKE = rotate(self.q_norm(q_THE), *rotary), rotate(self.k_norm(k_TKE), *rotary)
        return self.o(attend(layer_idx, q_THE, k_TKE, v_TKE).flatten(1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TI, up_TI = self.gate_up(x_TD).chunk(2, dim=-1)
        return self.down(GatedSilu.apply(gate_TI, up_TI) if x_TD.is_cpu else F.silu(gate_TI) * up_TI)


class GatedSilu(torch.autograd.Function):
    """silu(gate) * up of the two halves of [T, 2 I], a few rows at a time.

    torch's silu works on whole vectors and finishes a run of elements one by one, with other bits. Below UNSPLIT
    elements a run is a row; above, it ends where a thread's share ends, and bits would depend on the number of threads.
    """

    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TI, up_TI)
        return _silu(gate_TI).mul_(up_TI)

    @staticmethod
    def backward(ctx: Any, grad_TI: Tensor) -> tuple[Tensor, Tensor]:
        gate_TI, up_TI = ctx.saved_tensors
        grad_gate_TI = grad_TI * up_TI
        for grad, gate in zip(_few_rows(grad_gate_TI), _few_rows(gate_TI), strict=True):
            torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=grad)
        return grad_gate_TI, _silu(gate_TI).mul_(grad_TI)


def _silu(gate_TI: Tensor) -> Tensor:
    out_TI = torch.empty_like(gate_TI)
    for out, gate in zip(_few_rows(out_TI), _few_rows(gate_TI), strict=True):
        torch.ops.aten.silu.out(gate, out=out)
    return out_TI


def _few_rows(x_TI: Tensor) -> tuple[Tensor, ...]:
    return x_TI.split(max(1, (UNSPLIT - 1) // x_TI.shape[1]))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the statistics in at least fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_tables(positions_T: Tensor, inv_freq: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position x inverse frequency, [T, 1, E]; angles in fp32 whatever the model's dtype."""
    angles_TE = (positions_T[:, None].float() * inv_freq.float()).repeat(1, 2)[:, None]
    return (angles_TE.cos() * factor).to(dtype), (angles_TE.sin() * factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in Hugging Face's half-split layout; x [T, heads, E]."""
    half_1, half_2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-half_2, half_1), dim=-1) * sin
