"""A layer in one call (torch.ops.socpo.decoder_layer) is the layer op by op, bit for bit, in every
family.
"""

import pytest
import torch

from socpo_fast import Engine, SamplingParams
from socpo_fast.engine.runner import fused_weights
from socpo_fast.model import Decoder, ModelConfig
from socpo_fast.ops._impl import extension_is_built
from tests.helpers.error_rule import assert_bitwise_equal
from tests.helpers.tiny import generate_same, make_student

FAMILIES = {
    "llama": {},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 8},
}


def student_of(family: str, dtype: torch.dtype) -> Decoder:
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


def generate(student: Decoder, *, whole_layers: bool) -> list[tuple[list[int], torch.Tensor]]:
    engine = Engine(student, kv_cache_gib=0.001, page_size=4)
    assert engine._runner.layer_weights
    if not whole_layers:
        engine._runner.layer_weights = []
    params = SamplingParams(n=3, temperature=1.0, max_new_tokens=9, eos_ids=(), ignore_eos=True)
    groups = generate_same(engine, [[1, 2, 3, 4, 5, 6, 7], [8]], params)
    return [(attempt.token_ids, attempt.logprobs) for group in groups for attempt in group]


@pytest.mark.skipif(not extension_is_built(), reason="extension not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_in_one_call_is_the_layer_op_by_op(family: str, dtype: torch.dtype) -> None:
    student = student_of(family, dtype)
    for one, other in zip(
        *(generate(student, whole_layers=whole) for whole in (True, False)), strict=True
    ):
        assert one[0] == other[0]
        assert_bitwise_equal(one[1], other[1], name=family)


@pytest.mark.skipif(not extension_is_built(), reason="extension not built")
def test_hooks_on_layers_and_replaced_parameters_are_heard() -> None:
    student = student_of("llama", torch.float32)
    rows = []
    engine = Engine(student, kv_cache_gib=0.001, page_size=4)
    student.layers[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[1])))
    params = SamplingParams(temperature=0.0, max_new_tokens=4, eos_ids=(), ignore_eos=True)
    before = generate_same(engine, [[1, 2, 3]], params)[0][0]
    assert sum(rows) == 3 + 3
    other = student_of("biases", torch.float32).layers[1].mlp.down.weight
    student.layers[1].mlp.down.weight = torch.nn.Parameter(-3 * other.detach())
    engine.bump_policy_version()
    after = generate_same(engine, [[1, 2, 3]], params)[0][0]
    assert not torch.equal(before.logprobs, after.logprobs)
    fresh = generate_same(Engine(student, kv_cache_gib=0.001, page_size=4), [[1, 2, 3]], params)[0][
        0
    ]
    assert after.token_ids == fresh.token_ids and torch.equal(after.logprobs, fresh.logprobs)


@pytest.mark.skipif(not extension_is_built(), reason="extension not built")
def test_opcheck() -> None:
    student = student_of("qwen3", torch.float32)
    config = student.config
    f = torch.randn
    caches = [torch.zeros(3, 4, config.num_kv_heads, config.head_dim) for _ in range(2)]
    places = (
        torch.arange(4),
        torch.arange(3, dtype=torch.int32)[None],
        torch.tensor([4], dtype=torch.int32),
    )
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    weights = [x if x is None else x.detach() for x in fused_weights(student.layers[0])]
    x = f(4, config.hidden_size)
    rotary = (f(4, config.head_dim), f(4, config.head_dim))
    given = (x, x.clone(), weights, 1e-6, *rotary, *caches, *places, cu_seqlens, 0.3, True)
    torch.library.opcheck(torch.ops.socpo.decoder_layer, given)
