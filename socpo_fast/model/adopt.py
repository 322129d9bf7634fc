"""Makes a decoder of a live transformers model, with a copy of its weights or on its storage."""

import json
from typing import Any

import torch
from torch import nn

from socpo_fast.model.config import ARCHITECTURES, ModelConfig
from socpo_fast.model.decoder import Decoder
from socpo_fast.model.hf_views import LM_HEAD, hf_rows, hf_views
from socpo_fast.model.shared import Parts, SharedWeights
from socpo_fast.model.weights import DTYPES
from socpo_fast.ops._checks import check_rule, is_sharded

WHERE = "adopt_student"


def adopt_student(model: Any, *, share: bool = False) -> Decoder:
    """Returns the decoder of a live transformers model.

    Args:
        model: a transformers LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or
               Qwen3ForCausalLM, on one device and in one dtype.
        share: False: the decoder has a copy of the weights; `Engine.update_weights` refreshes it.
               True: the model's parameters become views of the decoder's, so a step of any
               optimizer on the model is a step of the decoder. The parameters stay the same
               objects, so optimizers made before keep working, and save_pretrained writes what it
               wrote before. Each .grad becomes a view by policy_gradients.

    Raises:
        ValueError: the model is of another class, wrapped, sharded, quantised, on several devices,
            without data, or has other parameters than its config asks for, such as an adapter's.

    Memory: of a shared model, one tensor more at a time; of a copied one, the weights again.
    """
    params = _check_model(model)
    raw = json.loads(model.config.to_json_string(use_diff=False))
    raw["architectures"] = [type(model).__name__]
    config = ModelConfig.from_hf(raw, where=f"{WHERE}: model.config")
    with torch.device("meta"):
        student = Decoder(config)
    _check_params(params, student)
    # inv_freq is no parameter; it is computed, not copied.
    student.inv_freq = config.inverse_frequencies().to(next(iter(params.values())).device)
    parts: Parts = []
    for name, hf_parts in list(hf_rows(student)):
        weight = torch.cat([params[hf_name].detach() for hf_name, _ in hf_parts])
        if share:
            for hf_name, rows in hf_parts:
                # The parameter stays the same object; only its storage is another one.
                params[hf_name].data = weight[rows]
        is_trained = any(params[hf_name].requires_grad for hf_name, _ in hf_parts)
        table, leaf = _slot(student, name)
        parameter = nn.Parameter(weight, requires_grad=is_trained)
        table[leaf] = parameter
        parts.append((parameter, [(*_slot(model, hf_name), rows) for hf_name, rows in hf_parts]))
    if config.tie_word_embeddings:
        student.lm_head.weight = student.embed.weight
        entries = next(entries for param, entries in parts if param is student.embed.weight)
        entries.append((*_slot(model, LM_HEAD), slice(None)))
    if share:
        student.shared = SharedWeights(model, parts)
    return student


def _slot(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Returns where a model keeps a parameter: the table of a module, and the name there."""
    module_name, _, leaf = name.rpartition(".")
    return model.get_submodule(module_name)._parameters, leaf


def _check_model(model: Any) -> dict[str, nn.Parameter]:
    """Returns the model's parameters by name; refuses a model that is wrapped, sharded or empty."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{WHERE}: model must be a transformers model, got {type(model).__name__}; read a "
            "folder with load_student"
        )
    params = dict(model.named_parameters())
    kind = type(model).__name__
    is_fsdp = any(is_sharded(param) for param in params.values()) or "FullySharded" in kind
    if is_fsdp or any("_fsdp_wrapped_module" in name for name in params):
        raise ValueError(
            f"{WHERE}: parameters must be whole, got FSDP shards, which no engine can read in "
            "place; gather them into a model of your own, adopt that one with share=False, and "
            "refresh it with Engine.update_weights"
        )
    if any("lora_" in name for name in params) or "Peft" in kind:
        raise ValueError(
            f"{WHERE}: model must be without an adapter, got one; merge it first (peft: "
            "merge_and_unload)"
        )
    check_rule(
        WHERE,
        "class of the model",
        kind,
        kind in ARCHITECTURES,
        f"one of {', '.join(ARCHITECTURES)}",
        "unwrap it (.module, accelerator.unwrap_model) if it is wrapped",
    )
    for name, param in params.items():
        # DeepSpeed's ZeRO-3 leaves parameters with no element on a rank.
        has_data = not param.is_meta and param.numel() > 0
        check_rule(WHERE, name, list(param.shape), has_data, "loaded, with data of its own")
    for what in ("dtype", "device"):
        values = sorted({str(getattr(param, what)) for param in params.values()})
        check_rule(WHERE, f"{what} of the parameters", values, len(values) == 1, "the same for all")
    dtype = next(iter(params.values())).dtype
    check_rule(WHERE, "dtype", dtype, dtype in DTYPES.values(), f"one of {', '.join(DTYPES)}")
    return params


def _check_params(params: dict[str, nn.Parameter], student: Decoder) -> None:
    """Checks that the model's parameters are those of the decoder, each in its shape."""
    expected = {name: list(view.shape) for name, view in hf_views(student)}
    # A head that the config ties but the model does not would be a parameter of its own.
    odd = sorted(expected.keys() ^ params.keys())
    if odd:
        must_tie = f"; {LM_HEAD} must be tied as config.tie_word_embeddings says"
        advice = must_tie if LM_HEAD in odd else ""
        raise ValueError(
            f"{WHERE}: parameters must be those that the config asks for, got {len(odd)} missing "
            f"or extra, {odd[0]} first{advice}"
        )
    for name, shape in expected.items():
        actual = list(params[name].shape)
        check_rule(WHERE, f"shape of {name}", actual, actual == shape, f"{shape} by the config")
