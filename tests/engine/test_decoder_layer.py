"""Checks the fused layer (torch.ops.socpo.decoder_layer) against the layer op by op, bitwise.

The engine calls the fused C++ op where no hook sits on the layer. All model families are compared,
since each adds weights of its own to the op's arguments.
"""

import pytest
import torch

from socpo_fast import Engine, SamplingParams
from socpo_fast.engine.runner import fused_weights
from socpo_fast.model import Decoder, ModelConfig
from tests.helpers.elementwise import needs_cpp
from tests.helpers.error_rule import assert_bitwise_equal
from tests.helpers.tiny import generate_same, make_student

FAMILIES = {
    "llama": {},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 8},
}


def student_of(family: str, dtype: torch.dtype) -> Decoder:
    """Returns a tiny student of one family; norm weights are around 1, all others around 0."""
    plain = make_student().config
    student = Decoder(
        ModelConfig(
            **{name: getattr(plain, name) for name in plain.__dataclass_fields__} | FAMILIES[family]
        )
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in student.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator) + (
            parameter.ndim == 1
        )
    return student.to(dtype)


def generate(student: Decoder, *, is_fused: bool) -> list[tuple[list[int], torch.Tensor]]:
    """Returns tokens and log-probs of a few attempts, by the fused op or by the layer's modules."""
    engine = Engine(student, kv_cache_gib=0.001, page_size=4)
    assert engine.runner.layer_weights
    if not is_fused:
        engine.runner.layer_weights = []
    params = SamplingParams(n=3, temperature=1.0, max_new_tokens=9, eos_ids=(), ignore_eos=True)
    groups = generate_same(engine, [[1, 2, 3, 4, 5, 6, 7], [8]], params)
    return [(attempt.token_ids, attempt.logprobs) for group in groups for attempt in group]


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layer_equals_op_by_op(family: str, dtype: torch.dtype) -> None:
    student = student_of(family, dtype)
    for fused, op_by_op in zip(
        *(generate(student, is_fused=is_fused) for is_fused in (True, False)), strict=True
    ):
        assert fused[0] == op_by_op[0]
        assert_bitwise_equal(fused[1], op_by_op[1], name=family)


@needs_cpp
def test_layer_hooks_and_new_parameters_take_effect() -> None:
    """A hook makes the engine call the module; a replaced parameter is used from the next bump."""
    student = student_of("llama", torch.float32)
    rows = []
    engine = Engine(student, kv_cache_gib=0.001, page_size=4)
    student.layers[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[1])))
    params = SamplingParams(temperature=0.0, max_new_tokens=4, eos_ids=(), ignore_eos=True)
    old_attempt = generate_same(engine, [[1, 2, 3]], params)[0][0]
    assert sum(rows) == 3 + 3  # three prompt tokens, three sampled ones; the last is not forwarded
    new_weight = student_of("biases", torch.float32).layers[1].mlp.down.weight
    student.layers[1].mlp.down.weight = torch.nn.Parameter(-3 * new_weight.detach())
    engine.bump_policy_version()
    actual = generate_same(engine, [[1, 2, 3]], params)[0][0]
    assert not torch.equal(old_attempt.logprobs, actual.logprobs)
    expected = generate_same(Engine(student, kv_cache_gib=0.001, page_size=4), [[1, 2, 3]], params)[
        0
    ][0]
    assert actual.token_ids == expected.token_ids and torch.equal(
        actual.logprobs, expected.logprobs
    )


@needs_cpp
def test_opcheck() -> None:
    student = student_of("qwen3", torch.float32)
    config = student.config
    normal = torch.randn
    caches = [torch.zeros(3, 4, config.num_kv_heads, config.head_dim) for _ in range(2)]
    # One sequence of four tokens: their slots, its block table and its length.
    page_inputs = (
        torch.arange(4),
        torch.arange(3, dtype=torch.int32)[None],
        torch.tensor([4], dtype=torch.int32),
    )
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    weights = [x if x is None else x.detach() for x in fused_weights(student.layers[0])]
    x = normal(4, config.hidden_size)
    rotary = (normal(4, config.head_dim), normal(4, config.head_dim))
    args = (x, x.clone(), weights, 1e-6, *rotary, *caches, *page_inputs, cu_seqlens, 0.3, True)
    torch.library.opcheck(torch.ops.socpo.decoder_layer, args)
