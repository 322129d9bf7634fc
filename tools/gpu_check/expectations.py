"""What we believe beforehand, and what we want: written down so that a run says what surprised.

A prediction is a share of the limit (the roofline with ceilings measured in the same run) or, where
nothing limits, a plain number. They are guesses made without a card, from the sources named beside
them; a figure far from its guess is worth more than one that met it. Goals are those of the design;
None: there is none yet.
"""

from __future__ import annotations

from typing import NamedTuple

from tools.gpu_check.results import Better, Figure


class Expectation(NamedTuple):
    """Of one kind of figure: shares are of the limit, `value` and `goal` are in `unit`."""

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
    return Expectation(unit, "more", reason, share=share, goal_share=goal_share)


def _time(reason: str, share: float | None = None, goal_share: float | None = None) -> Expectation:
    return Expectation("ms", "less", reason, share=share, goal_share=goal_share)


def _least(unit: str, reason: str, value: float, goal: float | None = None) -> Expectation:
    """A plain number, the less the better."""
    return Expectation(unit, "less", reason, value=value, goal=goal)


def _most(unit: str, reason: str, value: float, goal: float | None = None) -> Expectation:
    """A plain number, the more the better."""
    return Expectation(unit, "more", reason, value=value, goal=goal)


# By key; "key: case" where one case of a key is expected to differ.
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
    "ceilings.attention_tflop_s": _rate("flash, forward and back", 0.45, unit="TFLOP/s"),
    "ceilings.sdpa_ms": _least("ms", "the math backend: 15 launches, 2.5 GFLOP in fp32", 0.15),
    "ceilings.sdpa_first_ms": _least("ms", "no plan is built by the math backend", 20.0),
    "ceilings.sdpa_step_ms": _least("ms", "60 launches from Python", 0.8),
    "ceilings.varlen_ms": _least("ms", "39 to 160 GFLOP at 300 TFLOP/s, Python", 0.6),
    "ceilings.varlen_fixed_order_ms": _least("ms", "a third slower", 0.8),
    "ceilings.varlen_peak_gib": _least("GiB", "o, lse and three gradients", 0.5),
    "ceilings.varlen_repeats": _most("", "with the deterministic flag", 1),
    # kernels
    "kernels.tests_passed": _most("", "tests/ops -k triton", 342),
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
    "rates.prefill_tflop_s": _rate("half of a tuned flash kernel", 0.3, unit="TFLOP/s"),
    # decode
    "decode.step_ms": _time("attention at 65 %, the rest near the limit", 0.6, 0.6),
    "decode.few_step_ms": _time("468 launches at 2.5 us beside 0.4 ms of weights", 0.35),
    "decode.graph_ms": _time("as the step, without the host", 0.6),
    "decode.linears_ms": _least("ms", "0.88 GB of weights, read once", 0.4),
    "decode.capture_ms": _least("ms", "an eager round, compiled kernels", 250),
    "decode.graph_mib": _least("MiB", "one pool for all graphs", 16),
    "decode.logits_error": _least("", "28 layers in bf16", 0.03),
    "decode.kv_cache_gib": _most("GiB", "what the reserve of a quarter leaves", 40),
    "decode.kv_cache_gib: Qwen3-4B": _most("GiB", "gradients and moments take 45 GiB", 2.5),
    "decode.driver_gib": _least("GiB", "context, cuBLAS, compiled modules", 1.0),
    "decode.eager_step_ms": _least("ms", "468 launches at 15 us of host", 7.0),
    "decode.launches": _least("", "15 a layer and 48 around them", 468),
    "decode.rollout_tok_s": _most("tok/s", "64 rows at 2.5 ms, two rounds", 20000),
    "decode.filtered_step_ms": _least("ms", "64 x 151936 sorted in fp64", 20.0),
    "decode.generate_step_ms": _least("ms", "28 layers launched from Python", 28.0),
    "decode.times_generate": _most("", "a graph beside Python", 12.0, 3.0),
    # training
    "training.update_ms": _time("math attention in fp32; 11k launches are 60 ms", 0.15, 0.5),
    "training.fp32_update_ms": _time("products at 50 of 800 TFLOP/s", 0.05),
    "training.peak_gib": _least("GiB", "7k tokens at 1.7 MB, softmax kept: 11 + 11 GB", 25.0),
    "training.peak_gib: Qwen3-1.7B in bfloat16": _least("GiB", "17 + 11 + gradients", 34.0),
    "training.peak_gib: Qwen3-4B in bfloat16, layers recomputed": _least(
        "GiB", "gradients of 8 GB, a layer at a time", 15.0
    ),
    "training.peak_gib: Qwen3-0.6B in float32": _least("GiB", "twice bf16's activations", 38.0),
    "training.peak_gib: Qwen3-0.6B in float32 by tf32": _least("GiB", "as without", 38.0),
    "training.reserved_gib": _least("GiB", "the peak and the allocator's gaps", 45.0),
    "training.gradient_error": _least("", "fp32 sums in another order", 1e-5, 1e-3),
    "training.gradient_error: bf16 beside fp32": _least("", "bf16 through 28 layers", 0.05),
    "training.launches": _least("", "11,312 in the walk, one group as here", 11400),
    "training.repeats": _most("", "no float atomics in math attention", 1),
    "training.mismatch_mean_nats": _least("nats", "bf16 sums in another order", 5e-3),
    "training.mismatch_max_nats": _least("nats", "the tail of it", 0.1),
    "training.mismatch_mean_nats: float32": _least("nats", "as on the CPU", 2e-6),
    "training.mismatch_max_nats: float32": _least("nats", "as on the CPU", 3e-5, 1e-3),
    "training.optimizer_ms": _time("several foreach passes instead of one", 0.4),
    "training.padded_rows_ms": _least(
        "ms", "13k padded tokens at 40 % of the rate, all logits", 300.0
    ),
    "training.times_padded_rows": _most("", "half the tokens, slower attention", 1.5),
    # head
    "head.bare_gemms_ms": _time("wide products run a little below square ones", 0.85),
    "head.ours_ms": _time("fp32 logits written and read once more", 0.75, 0.8),
    "head.workspace_ms": _time("smaller chunks read W and dW more often", 0.5),
    "head.peer_ms": _time("four or five products", 0.5),
    "head.extra_gib": _least("GiB", "dW in fp32 and bf16, the workspace", 3.2),
    "head.extra_gib: torch naive, D 1024": _least("GiB", "logits four times", 20.0),
    "head.extra_gib: torch naive, D 2048": _least("GiB", "logits four times", 21.0),
    # learning
    "learning.rollout_s": _least("s", "130 attempts of 100 tokens, 26 reads", 0.5),
    "learning.update_s": _least("s", "two updates of 32 rollouts, launch-bound", 2.0),
    "learning.unassisted_start": _most("", "as on the CPU", 0.19),
    "learning.unassisted_end": _most("", "three batches teach little", 0.19),
    "learning.equal_rollouts": _most("", "near ties are rare in fp32", 0.97, 0.9),
    "learning.repeats": _most("", "same inputs, same bits", 1, 1),
    "learning.guidance_rate": _most("", "every wrong first answer, by the CPU", 0.9),
    # profilers
    "profilers.dram_share": _most("%", "one buffer a tile", 65.0),
    "profilers.occupancy_share": _most("%", "three blocks of four warps an SM", 19.0),
    "profilers.memory_errors": _least("", "compute-sanitizer memcheck", 0, 0),
}


def make_figure(
    key: str, value: float, *, of: str, limit: float | None, is_rehearsed: bool = False
) -> Figure:
    """The figure with what is expected of it; a key without an expectation is our own mistake."""
    assert key in EXPECTATIONS, f"{key} has no expectation; write one before it is measured"
    e = EXPECTATIONS.get(f"{key}: {of}", EXPECTATIONS[key])

    def at(share: float | None, plain: float | None) -> float | None:
        if share is None or limit is None:
            return plain
        return limit / share if e.better == "less" else limit * share

    return Figure(
        key=key,
        of=of,
        value=value,
        unit=e.unit,
        better=e.better,
        limit=limit,
        predicted=at(e.share, e.value),
        goal=at(e.goal_share, e.goal),
        is_rehearsed=is_rehearsed,
    )
