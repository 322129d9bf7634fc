"""What a decoder must know of a Hugging Face `config.json`, every field read by name.

Read top-down: ModelConfig -> from_hf -> the refusals -> the fields. A field may be absent only where the weights
themselves would contradict a wrong guess (a bias, the number of KV heads, the head width: their tensors would be
extra, missing or misshapen); where a wrong value would be silent it is asked for, even if transformers has a default.
Dropout fields are not read: nothing here drops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

ARCHITECTURES = {  # Hugging Face class -> model_type
    "LlamaForCausalLM": "llama",  # SmolLM2, Llama 2 and 3
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


class Llama3Rope(NamedTuple):
    """Rope scaling of Llama 3.1: long wavelengths are divided by `factor`, the middle is blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    architecture: str  # a key of ARCHITECTURES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope_attention_factor: float = 1.0
    llama3_rope: Llama3Rope | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # config.json as read, for saving

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], *, where: str) -> ModelConfig:
        """The config of one of ARCHITECTURES, checked.

        Args:
            raw:   config.json as parsed, written by any transformers (`rope_parameters`, or the older `rope_theta` with
                   `rope_scaling`).
            where: what errors call it, for example its path.

        Raises:
            ValueError: a field is missing, breaks its rule, or asks for something this decoder does not do.

        Derived when absent or null, as transformers does: head_dim = hidden_size / num_attention_heads (not Qwen3's,
        which is 128 there), num_key_value_heads = num_attention_heads, attention_bias and mlp_bias = false. Mistral and
        Qwen2 know no bias fields: no bias at all, and one on q, k, v.
        """
        architecture = _architecture(raw, where)
        _refuse_unsupported(raw, architecture, where)
        is_llama, is_qwen2, is_qwen3 = (architecture == f"{name}ForCausalLM" for name in ("Llama", "Qwen2", "Qwen3"))
        fields = _set_fields(raw)
        hidden_size = _read_int(fields, "hidden_size", where)
        num_heads = _read_int(fields, "num_attention_heads", where)
        derived = {"num_key_value_heads": num_heads, "attention_bias": False, "mlp_bias": False}
        fields = derived | ({} if is_qwen3 else {"head_dim": hidden_size // num_heads}) | fields
        num_kv_heads, head_dim = _read_int(fields, "num_key_value_heads", where), _read_int(fields, "head_dim", where)
        if num_heads % num_kv_heads != 0:
            _refuse(where, "num_key_value_heads", f"a divisor of num_attention_heads={num_heads}", num_kv_heads)
        if head_dim % 2 != 0:
            _refuse(where, "head_dim", "even, for rotary embeddings", head_dim)
        attention_bias = (is_llama or is_qwen3) and _read_bool(fields, "attention_bias", where)
        rope_theta, llama3_rope = _rope(raw, where)
        return cls(
            architecture=architecture,
            vocab_size=_read_int(fields, "vocab_size", where),
            hidden_size=hidden_size,
            intermediate_size=_read_int(fields, "intermediate_size", where),
            num_layers=_read_int(fields, "num_hidden_layers", where),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=_read_int(fields, "max_position_embeddings", where),
            rms_norm_eps=_read_float(fields, "rms_norm_eps", where),
            rope_theta=rope_theta,
            tie_word_embeddings=_read_bool(fields, "tie_word_embeddings", where),
            qkv_bias=attention_bias or is_qwen2,
            o_bias=attention_bias,
            mlp_bias=is_llama and _read_bool(fields, "mlp_bias", where),
            qk_norm=is_qwen3,
            llama3_rope=llama3_rope,
            raw=dict(raw),
        )

    def inverse_frequencies(self) -> Tensor:
        """[E / 2] fp32: theta ** (-2 i / E), stretched by llama3_rope. Made on the CPU: all devices share it."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device="cpu").float() / self.head_dim
        inv_freq = 1.0 / self.rope_theta**exponents
        if self.llama3_rope is None:
            return inv_freq
        factor, low, high, original_length = self.llama3_rope
        turns = original_length * inv_freq / (2 * math.pi)  # full turns within the original context
        blend = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, divided by factor; 1: fast, kept
        return inv_freq * (blend + (1 - blend) / factor)


def _architecture(raw: Mapping[str, Any], where: str) -> str:
    """The one entry of `architectures`, agreeing with model_type."""
    names = _present(raw, "architectures", where)
    if not (isinstance(names, list) and len(names) == 1 and names[0] in ARCHITECTURES):
        _refuse(where, "architectures", f"one of {', '.join(ARCHITECTURES)}", names)
    model_type = _present(raw, "model_type", where)
    if model_type != ARCHITECTURES[names[0]]:
        _refuse(where, "model_type", f"{ARCHITECTURES[names[0]]!r} for {names[0]}", model_type)
    return names[0]


def _refuse_unsupported(raw: Mapping[str, Any], architecture: str, where: str) -> None:
    """Settings under which this decoder would compute something else than transformers."""
    if _present(raw, "hidden_act", where) != "silu":
        _refuse(where, "hidden_act", "'silu'", raw["hidden_act"])
    if raw.get("quantization_config") is not None:
        _refuse(where, "quantization_config", "absent", raw["quantization_config"], "use the unquantised weights")
    full_attention = ["full_attention"] * _read_int(raw, "num_hidden_layers", where)
    if raw.get("layer_types") not in (None, full_attention):
        _refuse(where, "layer_types", "'full_attention' once a layer", raw["layer_types"])
    if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM") and _read_bool(raw, "use_sliding_window", where):
        _refuse(where, "use_sliding_window", "false", True, "set it to false if contexts stay within the window")
    if architecture == "MistralForCausalLM":
        window, context = _present(raw, "sliding_window", where), _read_int(raw, "max_position_embeddings", where)
        if window is not None and _read_int(raw, "sliding_window", where) < context:
            advice = f"set max_position_embeddings to {window}: contexts up to there see no window"
            _refuse(where, "sliding_window", f"null or >= max_position_embeddings={context}", window, advice)


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, Llama3Rope | None]:
    """(theta, scaling) from `rope_parameters`, or from the older `rope_scaling` beside `rope_theta`."""
    name = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    if name == "rope_parameters" and raw.get("rope_scaling") is not None:
        _refuse(where, "rope_scaling", "absent beside rope_parameters", raw["rope_scaling"], "keep one of the two")
    rope = raw.get(name) or {}
    if not isinstance(rope, Mapping):
        _refuse(where, name, "an object or null", rope)
    # Fields stand in the object, or (older files, some writers) beside it; inside wins, as in transformers.
    fields = _set_fields(raw) | _set_fields(rope)
    theta = _read_float(fields, "rope_theta", where)
    partial = fields.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        _refuse(where, "partial_rotary_factor", "1 or absent", partial)
    if rope and "rope_type" not in rope and "type" not in rope:
        raise ValueError(f"{where}: {name}.rope_type is missing; add 'default' or 'llama3'")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type != "llama3":
        _refuse(where, f"{name}.rope_type", "'default' or 'llama3'", rope_type)
    if "original_max_position_embeddings" in raw:  # here transformers lets the outer one win
        fields["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    low, high = _read_float(fields, "low_freq_factor", where), _read_float(fields, "high_freq_factor", where)
    if not low < high:
        _refuse(where, "high_freq_factor", f"> low_freq_factor={low}", high)
    original_length = _read_int(fields, "original_max_position_embeddings", where)
    return theta, Llama3Rope(_read_float(fields, "factor", where), low, high, original_length)


def _set_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null."""
    return {name: value for name, value in raw.items() if value is not None}


def _read_int(raw: Mapping[str, Any], name: str, where: str) -> int:
    value = _present(raw, name, where)
    if type(value) is not int or value < 1:
        _refuse(where, name, "an integer >= 1", value)
    return value


def _read_float(raw: Mapping[str, Any], name: str, where: str) -> float:
    value = _present(raw, name, where)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        _refuse(where, name, "a finite number > 0", value)
    return float(value)


def _read_bool(raw: Mapping[str, Any], name: str, where: str) -> bool:
    value = _present(raw, name, where)
    if type(value) is not bool:
        _refuse(where, name, "true or false", value)
    return value


def _present(raw: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in raw:
        raise ValueError(f"{where}: {name} is missing; add it with the value the model was trained with")
    return raw[name]


def _refuse(where: str, name: str, rule: str, value: object, advice: str = "nothing else is supported") -> NoReturn:
    raise ValueError(f"{where}: {name} must be {rule}, got {value!r}; {advice}")
