"""Finds Hugging Face's tensors in the decoder's fused parameters, and writes to them.

layers.3.attention.qkv.weight with H query and K key heads of width E holds
    model.layers.3.self_attn.q_proj.weight    rows 0 .. H E
    model.layers.3.self_attn.k_proj.weight    rows H E .. (H + K) E
    model.layers.3.self_attn.v_proj.weight    rows (H + K) E .. (H + 2 K) E
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from socpo_fast.model.decoder import Decoder
from socpo_fast.ops._checks import check_rule, is_sharded

EMBED = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
# Module of our decoder, in a layer or at the top -> Hugging Face's modules, in the order in which
# their rows are stacked.
_MODULES = {
    "embed": ("model.embed_tokens",),
    "norm": ("model.norm",),
    "lm_head": ("lm_head",),
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.o": ("self_attn.o_proj",),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


def hf_rows(student: Decoder) -> Iterator[tuple[str, list[tuple[str, slice]]]]:
    """Yields (name of a parameter of ours, [(Hugging Face tensor name, its rows)])."""
    config = student.config
    for name, parameter in student.named_parameters():
        module, _, leaf = name.rpartition(".")
        prefix = ""
        if module.startswith("layers."):
            _, layer, module = module.split(".", maxsplit=2)
            prefix = f"model.layers.{layer}."
        # The fused rows are split in these proportions: q, k and v by heads, the others equally.
        proportions = [1] * len(_MODULES[module])
        if module == "attention.qkv":
            proportions = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        unit_rows = parameter.shape[0] // sum(proportions)
        parts = []
        start = 0
        for hf_module, count in zip(_MODULES[module], proportions, strict=True):
            stop = start + count * unit_rows
            parts.append((f"{prefix}{hf_module}.{leaf}", slice(start, stop)))
            start = stop
        yield name, parts


def hf_views(student: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face tensor name, the slice of our parameter that holds this tensor)."""
    for name, parts in hf_rows(student):
        parameter = student.get_parameter(name).detach()
        for hf_name, rows in parts:
            yield hf_name, parameter[rows]


def copy_weights(
    student: Decoder, named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> None:
    """Copies tensors with Hugging Face names into the student's parameters, in place.

    Args:
        named_tensors: all of them or some; sharded ones (DTensor) are gathered. Under tied
            embeddings "lm_head.weight" means the embedding.

    Raises:
        ValueError: a name that the student does not have, or another shape. Tensors before it have
            been copied.
    """
    views = dict(hf_views(student))
    views.setdefault(LM_HEAD, views[EMBED])
    pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    for name, tensor in pairs:
        check_rule(
            "update_weights",
            "tensor name",
            name,
            name in views,
            f"one of the student's {len(views)} in Hugging Face's form, such as {EMBED}",
        )
        shape = list(tensor.shape)
        expected = list(views[name].shape)
        check_rule("update_weights", f"shape of {name}", shape, shape == expected, str(expected))
        source: Any = tensor.detach()
        # A view without gradient, so this counts as a write to the parameter itself.
        views[name].copy_(source.full_tensor() if is_sharded(source) else source)
