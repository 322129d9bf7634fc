"""Holds the predictions and goals of all figures, so that a run shows what is surprising.

A prediction is a share of the limit (the roofline with ceilings measured in the same run) or, where
there is no limit, a plain number. Predictions were made without a card, for the reasons written
beside them. A figure far from its prediction teaches more than one that meets it. Goals come from
the design; None where there is none yet. Read make_figure first.
"""

from __future__ import annotations

from typing import NamedTuple

from tools.gpu_check.results import Better, Figure


class Expectation(NamedTuple):
    """What is expected of one kind of figure; shares of the limit, or plain numbers in `unit`."""

    unit: str
    better: Better
    reason: str
    share: float | None = None
    value: float | None = None
    goal_share: float | None = None
    goal: float | None = None


def _rate(
    reason: str, share: float | None = None, goal_share: float | None = None, unit: str = "GB/s"
) -> Expectation:
    """Returns a rate as a share of its limit; more is better."""
    return Expectation(unit, "more", reason, share=share, goal_share=goal_share)


def _time(reason: str, share: float | None = None, goal_share: float | None = None) -> Expectation:
    """Returns a time as a share of its limit; less is better."""
    return Expectation("ms", "less", reason, share=share, goal_share=goal_share)


def _least(unit: str, reason: str, value: float, goal: float | None = None) -> Expectation:
    """Returns a plain number; less is better."""
    return Expectation(unit, "less", reason, value=value, goal=goal)


def _most(unit: str, reason: str, value: float, goal: float | None = None) -> Expectation:
    """Returns a plain number; more is better."""
    return Expectation(unit, "more", reason, value=value, goal=goal)


# By the figure's key, or by "key: case" for a case with an expectation of its own.
EXPECTATIONS: dict[str, Expectation] = {
    # machine
    "machine.cpu_cores": _most("", "enough for pytest -n", 16),
    "machine.memory_gib": _most("GiB", "an H100 80 GB", 79),
    "machine.first_kernel_s": _least("s", "the C compiler's and Triton's first use", 5.0),
    "machine.memory_free_gib": _rate("nobody else is on it", 0.99, unit="GiB"),
    # ceilings
    "ceilings.copy_gb_s": _most("GB/s", "seen on such a card before", 3000, 2800),
    "ceilings.read_gb_s": _most("GB/s", "reads beat copies by a little", 3100, 2800),
    "ceilings.link_gb_s": _most("GB/s", "PCIe 5 x16, pinned", 50),
    "ceilings.bf16_tflop_s": _most("TFLOP/s", "seen on such a card before", 798, 700),
    "ceilings.fp32_tflop_s": _most("TFLOP/s", "FFMA, three quarters of 67", 50),
    "ceilings.tf32_tflop_s": _most("TFLOP/s", "half of bf16", 400),
    "ceilings.accumulate_tflop_s": _rate(
        "an fp32 tile more to read and write", 0.85, unit="TFLOP/s"
    ),
    "ceilings.linears_tflop_s": _rate("widths of 1024 to 2560", 0.75, unit="TFLOP/s"),
    # attention: FLOPs of unique pairs, 4 E in the forward and 14 E with the backward; limits in ms
    # are these FLOPs at the rate of one long row
    "attention.long_row_tflop_s": _rate("FlashAttention 2 on Hopper", 0.4, unit="TFLOP/s"),
    "attention.limit_tflop_s": _most("TFLOP/s", "8192 tokens: 350 forward, 270 backward", 290),
    "attention.limit_tflop_s: forward": _most("TFLOP/s", "FlashAttention 2, 8192 tokens", 350),
    "attention.row_error": _least("", "as by torch in bf16 on a CPU", 7e-3, 2e-2),
    "attention.forward_tflop_s": _rate("plain Triton; masks at edges", 0.55, 0.6, "TFLOP/s"),
    "attention.training_tflop_s": _rate("nine products for seven", 0.5, 0.6, "TFLOP/s"),
    "attention.forward_tflop_s: 8 x 100 to 300 behind 300": _rate(
        "240 blocks for 132 multiprocessors, each short", 0.25, None, "TFLOP/s"
    ),
    "attention.training_tflop_s: 8 x 100 to 300 behind 300": _rate(
        "the same, three launches", 0.25, None, "TFLOP/s"
    ),
    "attention.forward_tflop_s: 8 groups of the last": _rate(
        "half of the tiles lie at an edge", 0.42, None, "TFLOP/s"
    ),
    "attention.training_tflop_s: 8 groups of the last": _rate(
        "half of the tiles lie at an edge", 0.4, None, "TFLOP/s"
    ),
    "attention.forward_ms": _time("as its rate", 0.5),
    "attention.training_ms": _time("as its rate", 0.45),
    "attention.copied_rows_ms": _time("2.1 times the pairs, at 60 % of the limit", 0.3),
    "attention.copied_rows_ms: training, copied rows, 8 x 300 behind 1000": _time(
        "2.1 times the pairs at 80 % of the limit", 0.39
    ),
    "attention.copied_rows_ms: training, copied rows, 8 x 1000 behind 1000": _time(
        "1.3 times the pairs at 88 % of the limit", 0.69
    ),
    "attention.varlen_ms": _time("equal pairs at 75 % of the limit, and a gather", 0.6),
    "attention.flex_ms": _time("plain Triton, nine products, masks by tile", 0.5),
    "attention.times_copied_rows": _most("", "2.1 times the pairs, at 60 % of the limit", 1.3),
    "attention.times_copied_rows: training, copied rows, 8 x 300 behind 1000": _most(
        "", "2.1 times the pairs at 80 % of the limit, ours at 50 %", 1.3, 2.0
    ),
    "attention.times_copied_rows: training, copied rows, 8 x 1000 behind 1000": _most(
        "", "1.3 times the pairs at 88 % of the limit, ours at 55 %", 0.8, 1.3
    ),
    "attention.times_varlen": _most("", "equal pairs at 75 % of the limit, and a gather", 1.0),
    "attention.times_flex": _most("", "plain Triton as well, the same nine products", 1.0),
    # kernels
    "kernels.tests_passed": _most("", "tests/ops -k triton", 500),
    "kernels.tests_failed": _least("", "tests that hardware must fail are mended", 0, 0),
    "kernels.error_in_tolerances": _least("", "rounding in the dtype, summed", 0.5),
    "kernels.cache_elements": _most("", "just beyond 2^31", 2.15e9),
    # engine
    "engine.equal_attempts": _most("", "near ties are rare in fp32", 0.98, 0.9),
    "engine.max_nats": _least("nats", "fp32 sums in another order", 1e-4, 1e-3),
    "engine.preemptions": _most("", "sixteen sequences, pages for two", 30),
    "engine.syncs_of_1_token": _least("", "by reading the source", 9),
    "engine.syncs_of_8_tokens": _least("", "three uploads and one read", 4),
    # rates
    "rates.decode_gb_s": _rate("one buffer a tile: loads wait for products", 0.65, 0.7),
    "rates.decode_shared_gb_s": _rate("unique bytes; half of them are shared", 0.5),
    "rates.empty_graph_us": _least("us", "a launch on the device", 5.0),
    "rates.decode_few_gb_s": _rate("too few blocks to fill the card", 0.3),
    "rates.decode_variant_gb_s": _rate("two buffers and five blocks an SM", 0.8),
    "rates.sample_gb_s": _rate("one block an SM, whose noise overlaps nothing", 0.6, 0.6),
    "rates.elementwise_gb_s": _rate("one pass, nothing reused", 0.8),
    "rates.elementwise_gb_s: policy rows": _rate("it reads the logits twice", 0.55),
    "rates.adamw_gb_s": _rate("one pass, eight streams", 0.88, 0.8),
    "rates.adamw_gb_s: torch's fused, float32": _rate("one pass as well, in chunks", 0.85),
    "rates.prefill_tflop_s": _rate("half of a tuned flash kernel", 0.3, unit="TFLOP/s"),
    # decode
    "decode.step_ms": _time("attention at 65 %, the rest near the limit", 0.6, 0.6),
    "decode.few_step_ms": _time("299 launches at 2.5 us beside 0.4 ms of weights", 0.35),
    "decode.graph_ms": _time("as the step, without the host", 0.6),
    "decode.linears_ms": _least("ms", "0.88 GB of weights, read once", 0.4),
    "decode.capture_ms": _least("ms", "an eager round, compiled kernels", 250),
    "decode.graph_mib": _least("MiB", "one pool for all graphs", 16),
    "decode.logits_error": _least("", "28 layers in bf16", 0.03),
    "decode.driver_gib": _least("GiB", "context, cuBLAS, compiled modules", 1.0),
    "decode.eager_step_ms": _least("ms", "299 launches at 15 us of host", 4.5),
    "decode.launches": _least("", "10 a layer and 19 around them", 299),
    "decode.rollout_tok_s": _rate("decode at 60 %, prefill and reads beside it", 0.4, 0.6, "tok/s"),
    "decode.filtered_step_ms": _least("ms", "as a step, and a few passes over the logits", 3.0),
    "decode.prepare_s": _least("s", "18 graphs, an eager round each", 5.0),
    "decode.prepare_mib": _least("MiB", "one pool; logits of a filtered round", 400),
    "decode.beside_a_teacher": _least("", "both read weights: nothing hides but launches", 0.95),
    "decode.generate_step_ms": _least("ms", "28 layers launched from Python", 28.0),
    "decode.times_generate": _most("", "a graph beside Python", 12.0, 3.0),
    # training: bf16 updates are predicted with products at 75 % of the square rate, attention at
    # 150 TFLOP/s and element-wise ops at 3 TB/s; two groups have 13.6k tokens, one has 6.8k
    "training.update_ms": _time("sums of the three, launches hidden behind them", 0.45, 0.5),
    "training.update_ms: Qwen3-0.6B in bfloat16, 2 groups": _time(
        "of 69: products 91, attention 54, element-wise 42, AdamW 7", 0.35
    ),
    "training.update_ms: Qwen3-1.7B in bfloat16, 2 groups": _time(
        "of 183: products 229, attention 54, element-wise 64, AdamW 19", 0.5, 0.5
    ),
    "training.update_ms: Qwen3-4B in bfloat16, 1 group": _time(
        "of 216: products 340 with a second forward, attention 90, AdamW 44", 0.4
    ),
    "training.fp32_update_ms": _time("products at 50 of 800 TFLOP/s", 0.05),
    "training.optimizer_ms": _time("28 bytes a number, a launch a parameter, one norm", 0.7),
    "training.host_waits": _least("", "one read, at the end; uploads are not waited for", 1),
    "training.peak_gib": _least("GiB", "13.6k tokens at 1.7 MB, gradients, logits", 27.0),
    "training.peak_gib: Qwen3-1.7B in bfloat16, 2 groups": _least(
        "GiB", "33 GB of activations, 7 of gradients, 2 of logits", 39.0
    ),
    "training.peak_gib: Qwen3-4B in bfloat16, 1 group": _least(
        "GiB", "16 GB of gradients, 2.5 of layers' inputs, 2 of logits", 20.0
    ),
    "training.peak_gib: Qwen3-0.6B in float32, 1 group": _least(
        "GiB", "6.8k tokens at 3.4 MB, gradients, logits", 26.0
    ),
    "training.reserved_gib": _least("GiB", "the peak, the states, gaps", 45.0),
    "training.reserved_gib: Qwen3-1.7B in bfloat16, 2 groups": _least(
        "GiB", "39 at the peak, 20 of states, gaps", 62.0
    ),
    "training.reserved_gib: Qwen3-4B in bfloat16, 1 group": _least(
        "GiB", "20 at the peak, 45 of states, gaps", 68.0
    ),
    "training.gradient_error": _least("", "fp32 sums in another order", 1e-5, 1e-3),
    "training.gradient_error: bf16 beside fp32": _least("", "bf16 through 28 layers", 0.05),
    "training.launches": _least("", "1,833 in the walk, the step included", 1850),
    "training.repeats": _most("", "no float atomics", 1, 1),
    "training.mismatch_mean_nats": _least("nats", "bf16 sums in another order", 5e-3),
    "training.mismatch_max_nats": _least("nats", "the tail of it", 0.1),
    "training.mismatch_mean_nats: float32": _least("nats", "as on the CPU", 2e-6),
    "training.mismatch_max_nats: float32": _least("nats", "as on the CPU", 3e-5, 1e-3),
    "training.padded_rows_ms": _least(
        "ms", "13k padded tokens at 40 % of the rate, all logits", 300.0
    ),
    "training.times_padded_rows": _most("", "half the tokens, no logits kept", 2.5),
    # head
    "head.bare_gemms_ms": _time("wide products run a little below square ones", 0.85),
    "head.ours_ms": _time("fp32 logits written and read once more", 0.75, 0.8),
    "head.workspace_ms": _time("smaller chunks read W and dW more often", 0.5),
    "head.peer_ms": _time("four or five products", 0.5),
    "head.extra_gib": _least("GiB", "dW in fp32 and bf16, the workspace", 3.2),
    "head.extra_gib: torch naive, D 1024": _least("GiB", "logits four times", 20.0),
    "head.extra_gib: torch naive, D 2048": _least("GiB", "logits four times", 21.0),
    # batch: limits are the plan's least seconds, with the rates of this run, and the plan's GiB
    "batch.rollout_s": Expectation(
        "s", "less", "128 rows: launches beside few bytes, the last answers alone", share=0.3
    ),
    "batch.update_s": Expectation("s", "less", "as `training`", share=0.4),
    "batch.total_s": Expectation("s", "less", "both", share=0.35, goal_share=1 / 1.8),
    "batch.sampled_tok_s": _most("tok/s", "128 rows at 5 ms a token", 25000),
    "batch.peak_gib": Expectation("GiB", "less", "counted on a fake card", share=1.0),
    "batch.reserved_gib": Expectation("GiB", "less", "the plan fills the card", share=1.05),
    # learning
    "learning.rollout_s": _least("s", "130 attempts of 100 tokens, 26 reads", 0.5),
    "learning.update_s": _least("s", "two updates of 32 rollouts, launch-bound", 0.5),
    "learning.unassisted_start": _most("", "as on the CPU", 0.19),
    "learning.unassisted_end": _most("", "three batches teach little", 0.19),
    "learning.equal_rollouts": _most("", "near ties are rare in fp32", 0.97, 0.9),
    "learning.equal_rollouts: bf16 beside fp32": _most(
        "", "a near tie in 300 tokens of bf16, answers of 100", 0.65
    ),
    "learning.repeats": _most("", "same inputs, same bits", 1, 1),
    "learning.guidance_rate": _most("", "every wrong first answer, by the CPU", 0.9),
    "learning.loss_difference": _least("", "other rollouts from the first near tie on", 0.03),
    "learning.loss_difference: first update": _least("", "a third of them differ", 0.01),
    "learning.grad_norm_difference": _least("", "other rollouts, relative", 0.3),
    "learning.grad_norm_difference: first update": _least("", "a third of them differ", 0.1),
    "learning.mismatch_mean_nats": _least("nats", "few layers in bf16", 2e-3),
    "learning.mismatch_max_nats": _least("nats", "the tail of it", 0.05),
    "learning.ratio_error": _least("", "the sampler's differences, averaged", 3e-4),
    "learning.ratio_error: recompute, bfloat16": _least("", "the same forward", 1e-6, 1e-4),
    "learning.clip_fraction": _least("", "no difference comes near 0.2 nats", 0, 0.01),
    # profilers
    "profilers.dram_share": _most("%", "one buffer a tile", 65.0),
    "profilers.occupancy_share": _most("%", "three blocks of four warps an SM", 19.0),
    "profilers.memory_errors": _least("", "compute-sanitizer memcheck", 0, 0),
}


def make_figure(
    key: str, value: float, *, of: str, limit: float | None, is_rehearsed: bool = False
) -> Figure:
    """Returns a figure with its expectation; a key without one is a mistake of ours."""
    assert key in EXPECTATIONS, f"{key} has no expectation; write one before it is measured"
    expectation = EXPECTATIONS.get(f"{key}: {of}", EXPECTATIONS[key])

    # A share is of the limit: a time is the limit over the share, a rate the limit times the share.
    def at(share: float | None, plain: float | None) -> float | None:
        if share is None or limit is None:
            return plain
        return limit / share if expectation.better == "less" else limit * share

    return Figure(
        key=key,
        of=of,
        value=value,
        unit=expectation.unit,
        better=expectation.better,
        limit=limit,
        predicted=at(expectation.share, expectation.value),
        goal=at(expectation.goal_share, expectation.goal),
        is_rehearsed=is_rehearsed,
    )
