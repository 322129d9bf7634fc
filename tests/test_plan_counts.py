"""The memory and time plan, counted by hand."""

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
from socpo_fast.train.packing import pack_rollouts
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
    # 256 rows of one layer: (4 x 1024 + 2 x 4096 + 2048) x 2 bytes, the attention's half being the
    # larger; 49 splits of 256 keys in 2 x 6176, each 16 heads x 130 numbers in fp32.
    pools = 256 * 14_336 * 2 + 256 * 49 * 16 * 130 * 4
    assert plan.residents == {
        "weights": 2 * num_parameters,
        "low halves of the masters": 2 * num_parameters,
        "moments": 8 * num_parameters,
        "context, graph pools (estimate)": 1.25 * GIB + pools,
    }
    # A token and layer: (2 x 1024 + 4096 + 2048 + 2 x 3072) x 2 + 16 x 4 bytes. At the ends three
    # hidden states, cos and sin of 128 in fp32, 17 numbers of 88 bytes.
    kept = 28 * 28_736 + 3 * 2_048 + 1_024 + 88
    # The head: 2 GiB of workspace, dW in fp32, two dx in fp32; a layer's backward has 18,432 bytes
    # a token, which is less.
    head = 2 * GIB + 4 * 155_582_464 + 2 * 4 * 8192 * 1024
    assert plan.temporaries == {
        "update: activations, 8192 tokens": 8192 * kept,
        "update: LM head: workspace, dW, dx": head,
    }
    assert plan.gaps == GIB // 2 + int(0.05 * (8192 * kept + head))
    assert plan.gradients == 4 * num_parameters
    assert plan.page_bytes == 32 * 28 * 2 * 8 * 128 * 2
    assert plan.shared == 7 * GIB == 2048 * plan.page_bytes
    parts = [
        *plan.residents.values(),
        *plan.temporaries.values(),
        plan.gaps,
        plan.shared,
        plan.left,
    ]
    assert sum(parts) == int(79.1 * GIB)
    assert plan.peak_bytes == 12 * num_parameters + pools + 7 * GIB + 8192 * kept + head


# Counted on the fake card, GiB: the largest moment of two microbatches and a step, all tensors of
# the project's own code (tools/gpu_check/peak.py, decoder with one op for norms and rotary).
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
    fixed = {"train__token_budget": token_budget, "train__checkpointing": checkpointing}
    lengths = {"rollout__guidance_limit": 1024, "engine__kv_cache_gib": 1.0}
    plan = planner(name, "b200", **fixed, **lengths)
    assert plan.num_tokens == token_budget
    # What was counted has gradients, but neither an engine's pages nor its graphs.
    pools = plan.residents["context, graph pools (estimate)"] - 1.25 * GIB
    planned = plan.peak_bytes - pools - plan.shared + plan.gradients
    assert planned / GIB == pytest.approx(COUNTED[case], rel=0.01)


def test_a_second_attempt_sees_the_head_of_the_first(planner: Planner) -> None:
    """Decode, by hand: 2 bytes of KV a number, and the weights once a step; 8 rollouts, half
    resumed.
    """
    batch = {"rollout__questions_per_batch": 1, "train__questions_per_update": 1}
    plan = planner("Qwen3-0.6B", rollout__max_new_tokens=4096, rollout__attempt_limit=1000, **batch)
    took = batch_seconds(plan, prompt=300, answer=4096, guidance=130)["rollouts: decode"]
    kv = 2 * 28 * 8 * 128 * 2
    weights = 2 * (plan_parameters(plan))
    pairs = 8 * 4096 * (300 + 2048) + 4 * 4096 * (300 + 1000 + 130 + 2048)
    # The prompt is read once for the rollouts of the group: 7 of the first, 3 of the second
    # attempts.
    shared = (7 + 3) * 4096 * 300
    assert took == pytest.approx(((pairs - shared) * kv + 2 * 4096 * weights) / 3e12, rel=1e-6)


def plan_parameters(plan: Plan) -> int:
    """Of a tied head: each number is read once a step."""
    return sizes.num_parameters(plan.model)


def test_no_attempt_behind_the_last_position(planner: Planner) -> None:
    batch = {"rollout__questions_per_batch": 1, "train__questions_per_update": 1}
    long = {"rollout__max_new_tokens": 30000, "rollout__attempt_limit": 30000}
    two, nine = (
        batch_seconds(
            planner("Qwen3-0.6B", "h200", rollout__max_attempts=k, **long, **batch),
            prompt=300,
            answer=30000,
            guidance=130,
        )
        for k in (2, 9)
    )
    assert two == nine
    # The second attempt ends at position 40,960; a token moves so many numbers in each of 28
    # layers.
    num_tokens = 300 + 8 * 30_000 + 4 * 130 + 4 * (40_960 - 30_430)
    moved = 2 * 28 * num_tokens * (20 * 1024 + 6 * 4096 + 9 * 3072)
    assert two["updates: elementwise"] == pytest.approx(moved / 4.8e12)


def test_a_template_s_context_counts_whole_attempts(planner: Planner) -> None:
    long = {
        "rollout__max_attempts": 3,
        "rollout__max_new_tokens": 4096,
        "rollout__attempt_limit": 4096,
    }
    context, packed = planner("Qwen3-0.6B", rollout__context="template", **long).longest
    assert context == planner("Qwen3-0.6B", **long).longest[0]
    assert packed == context + 2 * 4096


def test_a_template_s_rollout_is_packed_as_planned(planner: Planner) -> None:
    """Each attempt stays a leaf, and its head is written anew in the bridge behind it."""
    lengths = {
        "rollout__max_attempts": 3,
        "rollout__max_new_tokens": 50,
        "rollout__attempt_limit": 40,
    }
    limits = {"data__max_prompt_tokens": 20, "rollout__guidance_limit": 10}
    plan = planner("Qwen3-0.6B", rollout__context="template", **lengths, **limits)
    bridges = [40 + 10 + 32] * 2
    rollout = make_rollout(0, 0, [1] * 20, [50] * 3, bridges, cuts=[0, 0])
    [packed] = pack_rollouts([rollout], packing="tree", token_budget=1)
    # The last token of a leaf predicts nothing and is not forwarded.
    assert plan.longest == (rollout.context_length(2) + 50, packed.tokens_forwarded + 3)


def test_checkpointing_and_long_texts_by_hand(planner: Planner) -> None:
    """Qwen3-1.7B, fp32: D 2048, I 6144; the MLP's half of a backward is the larger here."""
    plan = planner("Qwen3-1.7B", "h200", student__dtype="float32", train__checkpointing=True)
    assert "low halves of the masters" not in plan.residents
    config = plan.model
    kept = (2 * 2048 + 4096 + 2048 + 2 * 6144) * 4 + 16 * 4
    assert sizes.kept_bytes(config, 4) == kept
    by_layer = sizes.activation_bytes(config, 4, checkpointing=False)
    inputs = sizes.activation_bytes(config, 4, checkpointing=True)
    assert by_layer - inputs == 28 * kept - (2 * 28 - 1) * 2048 * 4
    assert sizes.backward_bytes(config, 4, checkpointing=False) == 3 * 6144 * 4
    assert sizes.backward_bytes(config, 4, checkpointing=True) == 3 * 6144 * 4 + kept
    # Few tokens fill no workspace, and in fp32 logits become their own gradient.
    logits = 100 * 4 * (151936 + 2 * 2048)
    assert sizes.head_bytes(config, 4, 100, 2 * GIB) == logits + 4 * 151936 * 2048 + 8 * 100 * 2048


def test_the_longest_rollout(planner: Planner) -> None:
    lengths = {"data__max_prompt_tokens": 100, "rollout__guidance_limit": 50}
    three = {
        "rollout__max_attempts": 3,
        "rollout__max_new_tokens": 1000,
        "rollout__attempt_limit": 600,
    }
    plan = planner("Qwen3-0.6B", **lengths, **three)
    context = 100 + 2 * (600 + 50 + 32) + 1000
    assert plan.longest == (context, context + 2 * 400)  # the unseen ends of two cut attempts
    assert planner("Qwen3-0.6B", **lengths, rollout__max_attempts=1).longest == (1124, 1124)
    cut = planner("Qwen3-0.6B", "h200", rollout__max_new_tokens=36000)  # 40960 positions
    assert cut.longest == (40960, 40960 + 36000 - 1024)


ORDINARY = {"prompt": 300, "answer": 1000, "guidance": 130}


def test_seconds_counted_by_hand(planner: Planner) -> None:
    """Qwen3-0.6B in bf16 on an H100: 3.0 TB/s, 798 TFLOP/s. 256 first attempts, 128 second ones."""
    plan = planner("Qwen3-0.6B", train__token_budget=8192)
    assert 256 * 1300 < plan.kv_pages * 32 > 128 * 2430, "all run at once"
    seconds = batch_seconds(plan, **ORDINARY)
    # Both rounds read the weights 1000 times; a token sees its context and half of its attempt,
    # but of the prompt, which 32 groups share, only one rollout's part is read.
    seen = 256 * 800 + 128 * 1930 - (256 - 32) * 300 - (128 - 32) * 300
    num_bytes = 2000 * 2 * 596_049_920 + 1000 * seen * 114_688
    assert seconds["rollouts: decode"] == pytest.approx(num_bytes / 3.0e12)
    layers = 596_049_920 - 155_582_464
    head = 155_582_464
    read = 32 * 300 + 128 * 130
    assert seconds["rollouts: prefill"] == pytest.approx(2 * layers * read / 798e12)
    num_tokens = read + 384 * 1000
    loss_tokens = 384 * 1000
    pairs = 32 * 300 * 150 + 1000 * (256 * 800 + 128 * 1930) + 128 * 130 * (1300 + 65)
    attention = 2 * pairs * 28 * 16 * 128
    flops = 6 * (layers * num_tokens + head * loss_tokens) + 7 * attention
    assert seconds["updates: products"] == pytest.approx(flops / 798e12)
    forward = 2 * (layers * num_tokens + head * loss_tokens) + 2 * attention
    # of all questions but the first update's 8 of 32
    assert seconds["log-probs before"] == pytest.approx(0.75 * forward / 798e12)
    passes = 20 * 1024 + 6 * 4096 + 9 * 3072
    elementwise = 2 * 28 * num_tokens * passes / 3.0e12
    assert seconds["updates: elementwise"] == pytest.approx(elementwise)
    optimizer = 596_049_920 * (4 * 32 + 8 * num_tokens / 8192) / 3.0e12
    assert seconds["updates: optimizer, sums of gradients"] == pytest.approx(optimizer)
    assert len(seconds) == 6


def took(plan: Plan, phase: str) -> float:
    return batch_seconds(plan, **ORDINARY)[phase]


def test_what_settings_change_about_seconds(planner: Planner) -> None:
    plan = planner("Qwen3-0.6B")
    products = "updates: products"
    twice = planner("Qwen3-0.6B", train__epochs=2)
    assert took(twice, products) == pytest.approx(2 * took(plan, products))
    before = "log-probs before"
    assert took(twice, before) == pytest.approx(took(plan, before) / 0.75)
    held = planner("Qwen3-0.6B", loss__kl_coef=0.1, loss__old_logprobs="sampler")
    assert took(held, before) == pytest.approx(took(twice, before))
    single = planner("Qwen3-0.6B", student__dtype="float32")
    slower = 798 / 66.9 / 32 / 0.75  # fp32 FLOPs of one question of 32 in place of those of 24
    assert took(single, before) == pytest.approx(took(plan, before) * slower)
    recomputing = planner("Qwen3-0.6B", train__checkpointing=True)
    assert 1.2 < took(recomputing, products) / took(plan, products) < 1.4
    tight = planner("Qwen3-0.6B", engine__kv_cache_gib=7.0)  # 65,536 tokens
    waves = 256 / (65536 / 800) + 128 / (65536 / 1930)  # at their mean lengths
    more = took(tight, "rollouts: decode") - took(plan, "rollouts: decode")
    assert more == pytest.approx((waves - 2) * 1000 * 2 * 596_049_920 / 3.0e12)
    few = planner("Qwen3-0.6B", engine__max_running=64)
    weights = 3 * 2000 * 2 * 596_049_920 / 3.0e12  # 3 x 64 more at once before
    more = took(few, "rollouts: decode") - took(plan, "rollouts: decode")
    assert more == pytest.approx(weights - 2000 * 596_049_920 * 2 / 3.0e12, rel=1e-3)


def test_a_local_teacher_has_its_engine_s_defaults(planner: Planner) -> None:
    teacher = {"teacher__kind": "local", "teacher__path": str(planner.model("Qwen3-1.7B"))}
    plan = planner("Qwen3-0.6B", **teacher, engine__token_budget=512)
    defaults = inspect.signature(Engine).parameters
    assert defaults["page_size"].default == TEACHER_PAGE_SIZE
    # Of one layer: (4 x 2048 + 3 x 6144) x 2 bytes a token.
    step = plan.residents["local teacher: a step (estimate)"]
    assert step == defaults["token_budget"].default * (4 * 2048 + 3 * 6144) * 2


def test_a_local_teacher_says_no_more_than_it_may(planner: Planner) -> None:
    teacher = {"teacher__kind": "local", "teacher__path": str(planner.model("Qwen3-1.7B"))}
    cut = planner("Qwen3-0.6B", **teacher, teacher__kv_cache_gib=28.0, teacher__max_new_tokens=65)
    num_bytes = 65 * 2 * 1_720_574_976 + 128 * 65 * (1500 + 32.5) * 114_688
    flops = 2 * (1_720_574_976 - 151936 * 2048) * 128 * 1500
    assert took(cut, "rollouts: local teacher") == pytest.approx(
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
    assert took(plan, "rollouts: local teacher") == pytest.approx(expected)
    alone = planner("Qwen3-0.6B", **teacher, rollout__max_attempts=1)
    assert alone.teacher is None
    assert not [name for name in batch_seconds(alone, **ORDINARY) if "teacher" in name]
