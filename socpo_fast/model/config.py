"""Reads from a Hugging Face `config.json` what the decoder needs, every field by its name.

Read top-down: ModelConfig -> from_hf -> the refusals -> the fields. A field may be absent only if
the weights would contradict a wrong guess (a bias, the number of KV heads, the head width: their
tensors would be extra, missing or misshapen). A field whose wrong value would be silent is
required, even if transformers has a default for it. Dropout fields are not read, because this
decoder has no dropout.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from socpo_fast.ops._checks import check_rule

ARCHITECTURES = {  # Hugging Face class -> model_type
    "LlamaForCausalLM": "llama",  # SmolLM2, Llama 2 and 3
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_RULES = {int: "an integer >= 1", float: "a finite number > 0", bool: "true or false"}
# Far beyond every published model. A larger number is a mistake, and building the decoder, even
# without its weights, would take all memory or never end.
_LIMITS = {
    "num_hidden_layers": 1_000,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "vocab_size": 2**24,
    "num_attention_heads": 2**12,
    "head_dim": 2**14,
    "max_position_embeddings": 10**9,
}
_Kind = TypeVar("_Kind", int, float, bool)


class Llama3Rope(NamedTuple):
    """RoPE scaling of Llama 3.1: divides low frequencies by `factor`, keeps high ones.

    low_freq_factor and high_freq_factor bound a range that is blended, in full rotations
    within the original context.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and switches that define a decoder."""

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
    llama3_rope: Llama3Rope | None = None
    # config.json as it was read. Saving writes it back, so fields unknown here are not lost.
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], *, where: str) -> Self:
        """Returns the checked config of one of ARCHITECTURES.

        Args:
            raw:   config.json as parsed, written by any transformers (`rope_parameters`, or the
                   older `rope_theta` with `rope_scaling`).
            where: what errors call it, for example its path.

        Raises:
            ValueError: a field is missing, breaks its rule, or asks for something this decoder does
                        not do.

        Fields that are absent or null get the values that transformers gives them:

            head_dim                    hidden_size / num_attention_heads; required for Qwen3, whose
                                        default in transformers is 128
            num_key_value_heads         num_attention_heads
            attention_bias, mlp_bias    false

        Mistral and Qwen2 have no bias fields. Mistral has no bias, Qwen2 has one on q, k and v.
        """
        architecture = _architecture(raw, where)
        _refuse_unsupported(raw, architecture, where)
        is_llama, is_qwen2, is_qwen3 = (
            architecture == f"{name}ForCausalLM" for name in ("Llama", "Qwen2", "Qwen3")
        )
        fields = _non_null_fields(raw)
        hidden_size = _read(fields, "hidden_size", int, where)
        num_heads = _read(fields, "num_attention_heads", int, where)
        derived = {"num_key_value_heads": num_heads, "attention_bias": False, "mlp_bias": False}
        # Later dictionaries win: what config.json sets overrides what is derived.
        fields = derived | ({} if is_qwen3 else {"head_dim": hidden_size // num_heads}) | fields
        num_kv_heads = _read(fields, "num_key_value_heads", int, where)
        head_dim = _read(fields, "head_dim", int, where)
        _require(
            where,
            "num_key_value_heads",
            num_kv_heads,
            num_heads % num_kv_heads == 0,
            f"a divisor of num_attention_heads={num_heads}",
        )
        _require(where, "head_dim", head_dim, head_dim % 2 == 0, "even, for rotary embeddings")
        attention_bias = (is_llama or is_qwen3) and _read(fields, "attention_bias", bool, where)
        rope_theta, llama3_rope = _rope(raw, where)
        return cls(
            architecture=architecture,
            vocab_size=_read(fields, "vocab_size", int, where),
            hidden_size=hidden_size,
            intermediate_size=_read(fields, "intermediate_size", int, where),
            num_layers=_read(fields, "num_hidden_layers", int, where),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=_read(fields, "max_position_embeddings", int, where),
            rms_norm_eps=_read(fields, "rms_norm_eps", float, where),
            rope_theta=rope_theta,
            tie_word_embeddings=_read(fields, "tie_word_embeddings", bool, where),
            qkv_bias=attention_bias or is_qwen2,
            o_bias=attention_bias,
            mlp_bias=is_llama and _read(fields, "mlp_bias", bool, where),
            qk_norm=is_qwen3,
            llama3_rope=llama3_rope,
            raw=dict(raw),
        )

    def inverse_frequencies(self) -> Tensor:
        """Returns [E / 2] fp32: theta ** (-2 i / E), with low frequencies scaled by llama3_rope.

        It is computed on the CPU, so that all devices get bitwise equal frequencies.
        """
        exponents = (
            torch.arange(0, self.head_dim, 2, dtype=torch.int64, device="cpu").float()
            / self.head_dim
        )
        inv_freq = 1.0 / self.rope_theta**exponents
        if self.llama3_rope is None:
            return inv_freq
        factor, low, high, original_length = self.llama3_rope
        # Full rotations of each dimension within the original context.
        rotations = original_length * inv_freq / (2 * math.pi)
        # 0: a low frequency, divided by factor. 1: a high one, kept.
        blend = ((rotations - low) / (high - low)).clamp(0, 1)
        return inv_freq * (blend + (1 - blend) / factor)


def _architecture(raw: Mapping[str, Any], where: str) -> str:
    """Returns the one entry of `architectures`, checked against model_type."""
    names = _required_field(raw, "architectures", where)
    is_known = isinstance(names, list) and len(names) == 1 and names[0] in ARCHITECTURES
    _require(where, "architectures", names, is_known, f"one of {', '.join(ARCHITECTURES)}")
    model_type = _required_field(raw, "model_type", where)
    _require(
        where,
        "model_type",
        model_type,
        model_type == ARCHITECTURES[names[0]],
        f"{ARCHITECTURES[names[0]]!r} for {names[0]}",
    )
    return names[0]


def _refuse_unsupported(raw: Mapping[str, Any], architecture: str, where: str) -> None:
    """Refuses settings under which this decoder would not compute what transformers does."""
    activation = _required_field(raw, "hidden_act", where)
    _require(where, "hidden_act", activation, activation == "silu", "'silu'")
    quantization = raw.get("quantization_config")
    _require(
        where,
        "quantization_config",
        quantization,
        quantization is None,
        "absent",
        "use the unquantised weights",
    )
    all_full = ["full_attention"] * _read(raw, "num_hidden_layers", int, where)
    kinds = raw.get("layer_types")
    _require(
        where, "layer_types", kinds, kinds in (None, all_full), "'full_attention' once a layer"
    )
    if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        has_window = _read(raw, "use_sliding_window", bool, where)
        _require(
            where,
            "use_sliding_window",
            has_window,
            not has_window,
            "false",
            "set it to false if contexts stay within the window",
        )
    # A window that is as long as the longest context hides nothing, so it may stay.
    if architecture == "MistralForCausalLM":
        window = _required_field(raw, "sliding_window", where)
        max_positions = _read(raw, "max_position_embeddings", int, where)
        _require(
            where,
            "sliding_window",
            window,
            window is None or _read(raw, "sliding_window", int, where) >= max_positions,
            f"null or >= max_position_embeddings={max_positions}",
            f"set max_position_embeddings to {window}: contexts up to there see no window",
        )


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, Llama3Rope | None]:
    """Returns (theta, scaling), from `rope_parameters` or from the older `rope_scaling`."""
    name = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    scaling = raw.get("rope_scaling")
    _require(
        where,
        "rope_scaling",
        scaling,
        name == "rope_scaling" or scaling is None,
        "absent beside rope_parameters",
        "keep one of the two",
    )
    rope = raw.get(name) or {}
    _require(where, name, rope, isinstance(rope, Mapping), "an object or null")
    # Newer files have the fields inside of the object, older ones and some writers beside it. The
    # ones inside win, as in transformers.
    fields = _non_null_fields(raw) | _non_null_fields(rope)
    theta = _read(fields, "rope_theta", float, where)
    rotary_factor = fields.get("partial_rotary_factor", 1.0)
    _require(where, "partial_rotary_factor", rotary_factor, rotary_factor == 1.0, "1 or absent")
    if rope and "rope_type" not in rope and "type" not in rope:
        raise ValueError(f"{where}: {name}.rope_type is missing; add 'default' or 'llama3'")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    _require(where, f"{name}.rope_type", rope_type, rope_type == "llama3", "'default' or 'llama3'")
    # For this one field the value outside of the object wins, again as in transformers.
    if "original_max_position_embeddings" in raw:
        fields["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    low = _read(fields, "low_freq_factor", float, where)
    high = _read(fields, "high_freq_factor", float, where)
    _require(where, "high_freq_factor", high, low < high, f"> low_freq_factor={low}")
    original_length = _read(fields, "original_max_position_embeddings", int, where)
    return theta, Llama3Rope(_read(fields, "factor", float, where), low, high, original_length)


def _non_null_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that are not null."""
    return {name: value for name, value in raw.items() if value is not None}


def _read(raw: Mapping[str, Any], name: str, kind: type[_Kind], where: str) -> _Kind:
    """Returns a required field of one of the kinds in _RULES; an integer is a valid float."""
    value = _required_field(raw, name, where)
    # type() and not isinstance: in Python true is an int, but no integer field may be true.
    has_type = type(value) is kind or (kind is float and type(value) is int)
    _require(where, name, value, has_type and (kind is bool or 0 < value < math.inf), _RULES[kind])
    limit = _LIMITS.get(name, math.inf)
    _require(where, name, value, value <= limit, f"<= {limit}", "correct config.json")
    return kind(value)


def _required_field(raw: Mapping[str, Any], name: str, where: str) -> Any:
    """Returns a field, which may be null; raises if it is absent."""
    if name not in raw:
        raise ValueError(
            f"{where}: {name} is missing; add it with the value the model was trained with"
        )
    return raw[name]


def _require(
    where: str,
    name: str,
    value: object,
    holds: bool,
    rule: str,
    advice: str = "nothing else is supported",
) -> None:
    """Raises ValueError unless `holds`; the default advice is that nothing else is supported."""
    check_rule(where, name, value, holds, rule, advice)
