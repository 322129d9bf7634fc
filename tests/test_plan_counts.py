"""The memory and time plan, counted by hand.

D hidden size, I intermediate size, H query heads, K KV heads, E head size, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from socpo_fast.engine import Engine
from socpo_fast.model import Decoder, ModelConfig
from socpo_fast.report import sizes
from socpo_fast.report.batch_time import batch_seconds
from socpo_fast.report.memory_plan import TEACHER_PAGE_SIZE, Plan
from socpo_fast.training.packing import pack_rollouts
from tests.helpers.made_rollouts import make_rollout
from tests.helpers.plans import RAW, Planner, planner

__all__ = ["planner"]  # a fixture

GIB = 2**30


def model(name: str, **changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(RAW[name] | changes, where=name)


BIASED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": True,
    "mlp_bias": True,
}


@pytest.mark.parametrize(
    "config",
    [
        model("tiny"),
        model("small SmolLM2"),
        model("tiny", tie_word_embeddings=False, **BIASED),
        model("tiny", architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
    ],
    ids=["tied, norms of q and k", "untied", "biases everywhere", "biases of q, k, v"],
)
def test_parameters_are_the_decoders(config: ModelConfig) -> None:
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sizes.num_parameters(config) == sum(p.numel() for p in decoder.parameters())


def test_one_plan_counted_by_hand(planner: Planner) -> None:
    """Qwen3-0.6B in bf16: D 1024, I 3072, 28 layers, H 16, K 8, E 128, V 151936, tied."""
    plan = planner("Qwen3-0.6B", train__token_budget=8192, engine__kv_cache_gib=7.0)
    # A layer: qkv 4096 x 1024, o 2048 x 1024, mlp 3 x 3072 x 1024, norms 2 x 1024 + 2 x 128.
    num_parameters = 28 * (4_194_304 + 2_097_152 + 9_437_184 + 2_304) + 1_024 + 155_582_464
    assert num_parameters == 596_049_920
    # Prompt 2048, answers 1024, guidance 2048 and 32 of the bridge.
    assert plan.longest == (6176, 6176)
    # Graph pools of 256 rows. A layer: (4 x 1024 + 2 x 4096 + 2048) x 2 bytes, since attention
    # needs more than the MLP. Splits: 2 x 6176 keys are 49 splits of 256, each with 16 heads x 130
    # numbers in fp32.
    pools = 256 * 14_336 * 2 + 256 * 49 * 16 * 130 * 4
    assert plan.residents == {
        "weights": 2 * num_parameters,
        "low halves of the masters": 2 * num_parameters,
        "moments": 8 * num_parameters,
        "context, graph pools (estimate)": 1.25 * GIB + pools,
    }
    # Kept for each token and layer: (2 x 1024 + 4096 + 2048 + 2 x 3072) x 2 + 16 x 4 bytes. Before
    # and behind the layers: three hidden states, cos and sin of 128 in fp32, and 17 numbers of
    # together 88 bytes.
    kept_bytes = 28 * 28_736 + 3 * 2_048 + 1_024 + 88
    # The LM head: 2 GiB of workspace, dW in fp32, two dx in fp32. The backward of a layer needs
    # 18,432 bytes a token, which is less.
    head_bytes = 2 * GIB + 4 * 155_582_464 + 2 * 4 * 8192 * 1024
    assert plan.temporaries == {
        "update: activations, 8192 tokens": 8192 * kept_bytes,
        "update: LM head: workspace, dW, dx": head_bytes,
    }
    assert plan.gaps == GIB // 2 + int(0.05 * (8192 * kept_bytes + head_bytes))
    assert plan.gradients == 4 * num_parameters
    assert plan.page_bytes == 32 * 28 * 2 * 8 * 128 * 2
    assert plan.shared == 7 * GIB == 2048 * plan.page_bytes
    components = [
        *plan.residents.values(),
        *plan.temporaries.values(),
        plan.gaps,
        plan.shared,
        plan.left,
    ]
    assert sum(components) == int(79.1 * GIB)
    assert plan.peak_bytes == 12 * num_parameters + pools + 7 * GIB + 8192 * kept_bytes + head_bytes


# Peaks in GiB, counted on fake CUDA tensors over two microbatches and an optimizer step
# (tools/gpu_check/peak.py, a decoder with one op for norms and rotary). They have all tensors of
# the project's own code.
COUNTED = {
    ("Qwen3-0.6B", 8192, False): 17.66,
    ("Qwen3-0.6B", 8192, True): 12.39,
    ("Qwen3-4B", 6176, False): 77.94,
    ("Qwen3-4B", 6176, True): 65.59,
    ("Qwen3-4B", 16384, False): 102.02,
    ("Qwen3-4B", 16384, True): 69.25,
}


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_within_a_hundredth_of_the_counted_peak(
    planner: Planner, case: tuple[str, int, bool]
) -> None:
    name, token_budget, checkpointing = case
    update_settings = {"train__token_budget": token_budget, "train__checkpointing": checkpointing}
    settings = {"rollout__guidance_limit": 1024, "engine__kv_cache_gib": 1.0}
    plan = planner(name, "b200", **update_settings, **settings)
    assert plan.num_tokens == token_budget
    # The counted peaks have gradients, but neither the KV pages nor the graphs of an engine.
    pools = plan.residents["context, graph pools (estimate)"] - 1.25 * GIB
    planned = plan.peak_bytes - pools - plan.shared + plan.gradients
    assert planned / GIB == pytest.approx(COUNTED[case], rel=0.01)


def test_second_attempt_reads_a_prefix_of_the_first(planner: Planner) -> None:
    """Decode reads the KV of the context (2 bytes a number) and the weights once a step.

    There are 8 rollouts; half of them have a second attempt, which keeps 1000 tokens of the first.
    """
    batch = {"rollout__questions_per_batch": 1, "train__questions_per_update": 1}
    plan = planner("Qwen3-0.6B", rollout__max_new_tokens=4096, rollout__attempt_limit=1000, **batch)
    seconds = batch_seconds(plan, prompt=300, answer=4096, guidance=130)["rollouts: decode"]
    kv = 2 * 28 * 8 * 128 * 2
    weights = 2 * (plan_parameters(plan))
    token_pairs = 8 * 4096 * (300 + 2048) + 4 * 4096 * (300 + 1000 + 130 + 2048)
    # The prompt is read once for all rollouts of the group: 7 first attempts and 3 second ones need
    # no read of their own.
    shared_reads = (7 + 3) * 4096 * 300
    assert seconds == pytest.approx(
        ((token_pairs - shared_reads) * kv + 2 * 4096 * weights) / 3e12, rel=1e-6
    )


def plan_parameters(plan: Plan) -> int:
    """Returns the number of parameters; the LM head is tied, so a step reads each of them once."""
    return sizes.num_parameters(plan.model)


def test_no_attempt_behind_the_last_position(planner: Planner) -> None:
    batch = {"rollout__questions_per_batch": 1, "train__questions_per_update": 1}
    long_answers = {"rollout__max_new_tokens": 30000, "rollout__attempt_limit": 30000}
    two_attempts, nine_attempts = (
        batch_seconds(
            planner("Qwen3-0.6B", "h200", rollout__max_attempts=k, **long_answers, **batch),
            prompt=300,
            answer=30000,
            guidance=130,
        )
        for k in (2, 9)
    )
    assert two_attempts == nine_attempts
    # The second attempt ends at position 40,960; a token moves so many numbers in each of 28
    # layers.
    num_tokens = 300 + 8 * 30_000 + 4 * 130 + 4 * (40_960 - 30_430)
    moved = 2 * 28 * num_tokens * (20 * 1024 + 6 * 4096 + 9 * 3072)
    assert two_attempts["updates: elementwise"] == pytest.approx(moved / 4.8e12)


def test_a_template_s_context_counts_whole_attempts(planner: Planner) -> None:
    settings = {
        "rollout__max_attempts": 3,
        "rollout__max_new_tokens": 4096,
        "rollout__attempt_limit": 4096,
    }
    context, packed = planner("Qwen3-0.6B", rollout__context="template", **settings).longest
    assert context == planner("Qwen3-0.6B", **settings).longest[0]
    assert packed == context + 2 * 4096


def test_a_template_s_rollout_is_packed_as_planned(planner: Planner) -> None:
    """Each attempt is a leaf of the tree, and the bridge behind it repeats the attempt's start."""
    attempts = {
        "rollout__max_attempts": 3,
        "rollout__max_new_tokens": 50,
        "rollout__attempt_limit": 40,
    }
    limits = {"data__max_prompt_tokens": 20, "rollout__guidance_limit": 10}
    plan = planner("Qwen3-0.6B", rollout__context="template", **attempts, **limits)
    bridges = [40 + 10 + 32] * 2
    rollout = make_rollout(0, 0, [1] * 20, [50] * 3, bridges, cuts=[0, 0])
    [packed] = pack_rollouts([rollout], packing="tree", token_budget=1)
    # The last token of a leaf predicts nothing and is not forwarded.
    assert plan.longest == (rollout.context_length(2) + 50, packed.tokens_forwarded + 3)


def test_checkpointing_and_long_texts_by_hand(planner: Planner) -> None:
    """Qwen3-1.7B, fp32: D 2048, I 6144. Here the MLP's backward needs more than attention's."""
    plan = planner("Qwen3-1.7B", "h200", student__dtype="float32", train__checkpointing=True)
    assert "low halves of the masters" not in plan.residents
    config = plan.model
    kept_bytes = (2 * 2048 + 4096 + 2048 + 2 * 6144) * 4 + 16 * 4
    assert sizes.kept_bytes(config, 4) == kept_bytes
    not_checkpointed = sizes.activation_bytes(config, 4, checkpointing=False)
    checkpointed = sizes.activation_bytes(config, 4, checkpointing=True)
    assert not_checkpointed - checkpointed == 28 * kept_bytes - (2 * 28 - 1) * 2048 * 4
    assert sizes.backward_bytes(config, 4, checkpointing=False) == 3 * 6144 * 4
    assert sizes.backward_bytes(config, 4, checkpointing=True) == 3 * 6144 * 4 + kept_bytes
    # 100 tokens need less than the workspace, and in fp32 the gradient overwrites the logits.
    logits = 100 * 4 * (151936 + 2 * 2048)
    assert sizes.head_bytes(config, 4, 100, 2 * GIB) == logits + 4 * 151936 * 2048 + 8 * 100 * 2048


def test_longest_rollout_counted_by_hand(planner: Planner) -> None:
    limits = {"data__max_prompt_tokens": 100, "rollout__guidance_limit": 50}
    three_attempts = {
        "rollout__max_attempts": 3,
        "rollout__max_new_tokens": 1000,
        "rollout__attempt_limit": 600,
    }
    plan = planner("Qwen3-0.6B", **limits, **three_attempts)
    context = 100 + 2 * (600 + 50 + 32) + 1000
    # Each of two cut attempts has 400 tokens that the next attempt does not see. They are trained.
    assert plan.longest == (context, context + 2 * 400)
    assert planner("Qwen3-0.6B", **limits, rollout__max_attempts=1).longest == (1124, 1124)
    capped = planner("Qwen3-0.6B", "h200", rollout__max_new_tokens=36000)  # 40960 positions
    assert capped.longest == (40960, 40960 + 36000 - 1024)


ORDINARY = {"prompt": 300, "answer": 1000, "guidance": 130}


def test_seconds_counted_by_hand(planner: Planner) -> None:
    """Qwen3-0.6B in bf16 on an H100: 3.0 TB/s, 798 TFLOP/s. 256 first attempts, 128 second ones."""
    plan = planner("Qwen3-0.6B", train__token_budget=8192)
    assert 256 * 1300 < plan.kv_pages * 32 > 128 * 2430, "all run at once"
    seconds = batch_seconds(plan, **ORDINARY)
    # Both rounds of attempts read the weights 1000 times. A token sees its context and on average
    # half of its attempt. The rollouts of each of the 32 groups share their prompt, which is read
    # once.
    keys_read = 256 * 800 + 128 * 1930 - (256 - 32) * 300 - (128 - 32) * 300
    num_bytes = 2000 * 2 * 596_049_920 + 1000 * keys_read * 114_688
    assert seconds["rollouts: decode"] == pytest.approx(num_bytes / 3.0e12)
    layers = 596_049_920 - 155_582_464
    lm_head = 155_582_464
    prefilled = 32 * 300 + 128 * 130
    assert seconds["rollouts: prefill"] == pytest.approx(2 * layers * prefilled / 798e12)
    num_tokens = prefilled + 384 * 1000
    loss_tokens = 384 * 1000
    pairs = 32 * 300 * 150 + 1000 * (256 * 800 + 128 * 1930) + 128 * 130 * (1300 + 65)
    attention = 2 * pairs * 28 * 16 * 128
    flops = 6 * (layers * num_tokens + lm_head * loss_tokens) + 7 * attention
    assert seconds["updates: products"] == pytest.approx(flops / 798e12)
    forward_flops = 2 * (layers * num_tokens + lm_head * loss_tokens) + 2 * attention
    # The first update has 8 of 32 questions; only the other ones need log-probs before.
    assert seconds["log-probs before"] == pytest.approx(0.75 * forward_flops / 798e12)
    passes = 20 * 1024 + 6 * 4096 + 9 * 3072
    elementwise = 2 * 28 * num_tokens * passes / 3.0e12
    assert seconds["updates: elementwise"] == pytest.approx(elementwise)
    optimizer = 596_049_920 * (4 * 32 + 8 * num_tokens / 8192) / 3.0e12
    assert seconds["updates: optimizer, sums of gradients"] == pytest.approx(optimizer)
    assert len(seconds) == 6


def seconds_of(plan: Plan, phase: str) -> float:
    """Returns the seconds of one phase for texts of ordinary length."""
    return batch_seconds(plan, **ORDINARY)[phase]


def test_settings_change_seconds_as_counted(planner: Planner) -> None:
    plan = planner("Qwen3-0.6B")
    products = "updates: products"
    two_epochs = planner("Qwen3-0.6B", train__epochs=2)
    assert seconds_of(two_epochs, products) == pytest.approx(2 * seconds_of(plan, products))
    old_logprobs = "log-probs before"
    assert seconds_of(two_epochs, old_logprobs) == pytest.approx(
        seconds_of(plan, old_logprobs) / 0.75
    )
    with_kl = planner("Qwen3-0.6B", loss__kl_coef=0.1, loss__old_logprobs="sampler")
    assert seconds_of(with_kl, old_logprobs) == pytest.approx(seconds_of(two_epochs, old_logprobs))
    in_fp32 = planner("Qwen3-0.6B", student__dtype="float32")
    slowdown = 798 / 66.9 / 32 / 0.75  # fp32 FLOPs of one question of 32 in place of those of 24
    assert seconds_of(in_fp32, old_logprobs) == pytest.approx(
        seconds_of(plan, old_logprobs) * slowdown
    )
    recomputing = planner("Qwen3-0.6B", train__checkpointing=True)
    assert 1.2 < seconds_of(recomputing, products) / seconds_of(plan, products) < 1.4
    small_cache = planner("Qwen3-0.6B", engine__kv_cache_gib=7.0)  # 65,536 tokens
    waves = 256 / (65536 / 800) + 128 / (65536 / 1930)  # at their mean context lengths
    decode = "rollouts: decode"
    extra_seconds = seconds_of(small_cache, decode) - seconds_of(plan, decode)
    assert extra_seconds == pytest.approx((waves - 2) * 1000 * 2 * 596_049_920 / 3.0e12)
    few_running = planner("Qwen3-0.6B", engine__max_running=64)
    weights = 3 * 2000 * 2 * 596_049_920 / 3.0e12  # 4 + 2 waves of 64 instead of 1 + 1
    extra_seconds = seconds_of(few_running, decode) - seconds_of(plan, decode)
    assert extra_seconds == pytest.approx(weights - 2000 * 596_049_920 * 2 / 3.0e12, rel=1e-3)


def test_a_local_teacher_has_its_engine_s_defaults(planner: Planner) -> None:
    teacher = {"teacher__kind": "local", "teacher__path": str(planner.model("Qwen3-1.7B"))}
    plan = planner("Qwen3-0.6B", **teacher, engine__token_budget=512)
    defaults = inspect.signature(Engine).parameters
    assert defaults["page_size"].default == TEACHER_PAGE_SIZE
    # Of one layer: (4 x 2048 + 3 x 6144) x 2 bytes a token.
    step = plan.residents["local teacher: a step (estimate)"]
    assert step == defaults["token_budget"].default * (4 * 2048 + 3 * 6144) * 2


def test_tokens_of_a_local_teacher_are_capped(planner: Planner) -> None:
    teacher = {"teacher__kind": "local", "teacher__path": str(planner.model("Qwen3-1.7B"))}
    capped = planner(
        "Qwen3-0.6B", **teacher, teacher__kv_cache_gib=28.0, teacher__max_new_tokens=65
    )
    num_bytes = 65 * 2 * 1_720_574_976 + 128 * 65 * (1500 + 32.5) * 114_688
    flops = 2 * (1_720_574_976 - 151936 * 2048) * 128 * 1500
    assert seconds_of(capped, "rollouts: local teacher") == pytest.approx(
        num_bytes / 3.0e12 + flops / 798e12
    )


def test_seconds_of_a_local_teacher(planner: Planner) -> None:
    teacher = {"teacher__kind": "local", "teacher__path": str(planner.model("Qwen3-1.7B"))}
    plan = planner("Qwen3-0.6B", **teacher, teacher__kv_cache_gib=28.0)
    assert plan.residents["local teacher: weights"] == 2 * 1_720_574_976
    assert plan.residents["local teacher: KV"] == 28 * GIB
    elsewhere = planner("Qwen3-0.6B", **teacher, teacher__device="cuda:1")
    assert not any(name.startswith("local teacher") for name in elsewhere.residents)
    # 128 requests behind 200 + 300 + 1000 tokens, all at once: 130 steps.
    num_bytes = 130 * 2 * 1_720_574_976 + 128 * 130 * (1500 + 65) * 114_688
    flops = 2 * (1_720_574_976 - 151936 * 2048) * 128 * 1500
    expected = num_bytes / 3.0e12 + flops / 798e12
    assert seconds_of(plan, "rollouts: local teacher") == pytest.approx(expected)
    one_attempt = planner("Qwen3-0.6B", **teacher, rollout__max_attempts=1)
    assert one_attempt.teacher is None
    assert not [name for name in batch_seconds(one_attempt, **ORDINARY) if "teacher" in name]
