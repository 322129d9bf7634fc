"""One planned step through whole layers at a time, each a single call of the C++: for a CPU, without gradients.

At one token a step Python would take a quarter of the time to call a layer's ops one by one. The
order of the ops is that of model/decoder.py's Layer; csrc/decoder_layer.cpp repeats it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from socpo_fast.engine.sequence import Step
from socpo_fast.model.decoder import Decoder, Layer


def fused_weights(layer: Layer) -> list[Tensor | None]:
    """A layer's parameters in the order of torch.ops.socpo.decoder_layer."""
    attention, mlp = layer.attention, layer.mlp
    norms = [norm if norm is None else norm.weight for norm in (attention.q_norm, attention.k_norm)]
    qkv, o, gate_up, down = (
        [linear.weight, linear.bias] for linear in (attention.qkv, attention.o, mlp.gate_up, mlp.down)
    )
    return [layer.attention_norm.weight, *qkv, *norms, *o, layer.mlp_norm.weight, *gate_up, *down]


def has_hooks(modules: Sequence[nn.Module]) -> bool:
    """Whether somebody listens to one of these modules, which a fused layer would not call."""
    hooks = torch.nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or any(m._forward_pre_hooks or m._forward_hooks for m in modules)
    )


def run_fused_layers(
    student: Decoder,
    weights: Sequence[list[Tensor | None]],
    caches: Sequence[tuple[Tensor, Tensor]],
    step: Step,
    *,
    cascade: bool,
) -> Tensor:
    """Writes the tokens' KV and returns their hidden states [T, D]; weights and caches are by layer."""
    x_TD, rotary = student.first_layer_inputs(step.token_ids_T, step.positions_T)
    delta_TD = None
    for layer_weights, layer_caches in zip(weights, caches, strict=True):
        x_TD, delta_TD = torch.ops.socpo.decoder_layer(
            x_TD,
            delta_TD,
            layer_weights,
            student.config.rms_norm_eps,
            *rotary,
            *layer_caches,
            step.slots_T,
            step.block_table_BM,
            step.seq_lens_B,
            step.cu_seqlens_q,
            student.config.head_dim**-0.5,
            cascade,
        )
    return student.norm(delta_TD, x_TD)[0]
