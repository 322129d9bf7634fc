"""What we believe beforehand, and what we want: written down so that a run says what surprised.

A prediction is a share of the limit (the roofline with ceilings measured in the same run) or, where
nothing limits, a plain number. They are guesses made without a card, from the sources named beside
them; a figure far from its guess is worth more than one that met it. Goals are those of the design;
None: there is none yet.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

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


def _time(
    reason: str, share: float | None = None, goal_share: float | None = None, unit: str = "ms"
) -> Expectation:
    return Expectation(unit, "less", reason, share=share, goal_share=goal_share)


def _number(
    unit: str,
    better: Literal["less", "more"],
    reason: str,
    value: float | None,
    goal: float | None = None,
) -> Expectation:
    return Expectation(unit, better, reason, value=value, goal=goal)


EXPECTATIONS: dict[str, Expectation] = {
    # machine
    "machine.cpu_cores": _number("", "more", "enough for pytest -n", 16),
    "machine.memory_gib": _number("GiB", "more", "an H100 80 GB", 79),
    "machine.memory_free_gib": _rate("nobody else is on it", 0.99, unit="GiB"),
    # ceilings
    "ceilings.copy_gb_s": _number("GB/s", "more", "seen on such a card before", 3000, 2800),
    "ceilings.bf16_tflop_s": _number("TFLOP/s", "more", "seen on such a card before", 798, 700),
    "ceilings.fp32_tflop_s": _number("TFLOP/s", "more", "FFMA, three quarters of 67", 50),
    "ceilings.tf32_tflop_s": _number("TFLOP/s", "more", "half of bf16", 400),
    "ceilings.accumulate_tflop_s": _rate(
        "an fp32 tile more to read and write", 0.85, unit="TFLOP/s"
    ),
    "ceilings.sdpa_ms": _number("ms", "less", "the math backend in fp32", 1.0),
    "ceilings.varlen_ms": _number("ms", "less", "80 GFLOP forward and back at 300 TFLOP/s", 0.6),
    "ceilings.varlen_peak_gib": _number("GiB", "less", "o, lse and three gradients", 0.5),
    "ceilings.varlen_repeats": _number("", "more", "with the deterministic flag", 1),
    # kernels
    "kernels.tests_passed": _number("", "more", "tests/ops -k triton", 342),
    "kernels.tests_failed": _number("", "less", "tests that hardware must fail are mended", 0, 0),
    "kernels.error_in_tolerances": _number("", "less", "rounding in the dtype, summed", 0.5),
    "kernels.cache_elements": _number("", "more", "just beyond 2^31", 2.15e9),
    # engine
    "engine.equal_attempts": _number("", "more", "near ties are rare in fp32", 0.98, 0.9),
    "engine.max_nats": _number("nats", "less", "fp32 sums in another order", 1e-4, 1e-3),
    "engine.preemptions": _number("", "more", "sixteen sequences, pages for two", 30),
    "engine.capture_ms": _number("ms", "less", "an eager round, gc, empty_cache", 250),
    "engine.graph_mib": _number("MiB", "less", "one pool for all graphs", 16),
    "engine.syncs_of_1_token": _number("", "less", "by reading the source", 9),
    "engine.syncs_of_8_tokens": _number("", "less", "three uploads and one read", 4),
    # rates
    "rates.decode_gb_s": _rate("one buffer a tile: loads wait for products", 0.65, 0.7),
    "rates.decode_few_gb_s": _rate("too few blocks to fill the card", 0.3),
    "rates.decode_variant_gb_s": _rate("two buffers and five blocks an SM", 0.8),
    "rates.sample_gb_s": _rate("one block an SM, whose noise overlaps nothing", 0.6, 0.6),
    "rates.elementwise_gb_s": _rate("one pass, nothing reused", 0.8),
    "rates.prefill_tflop_s": _rate("half of a tuned flash kernel", 0.3, unit="TFLOP/s"),
    # decode
    "decode.step_ms": _time("attention at 65 %, the rest near the limit", 0.6, 0.6),
    "decode.few_step_ms": _time("468 launches at 2.5 us beside 0.4 ms of weights", 0.35),
    "decode.eager_step_ms": _number("ms", "less", "468 launches at 15 us of host", 7.0),
    "decode.launches": _number("", "less", "15 a layer and 48 around them", 468),
    "decode.rollout_tok_s": _number("tok/s", "more", "64 rows at 2.5 ms, two rounds", 20000),
    "decode.filtered_step_ms": _number("ms", "less", "64 x 151936 sorted in fp64", 20.0),
    "decode.generate_step_ms": _number("ms", "less", "28 layers launched from Python", 28.0),
    "decode.times_generate": _number("", "more", "a graph beside Python", 12.0, 3.0),
    # training
    "training.update_ms": _time("math attention in fp32, segment by segment", 0.15, 0.5),
    "training.fp32_update_ms": _time("products at 50 of 800 TFLOP/s", 0.05),
    "training.peak_gib": _number("GiB", "less", "7k tokens at 1.7 MB, softmax kept", 25.0),
    "training.launches": _number("", "less", "20 a segment and layer, forward alone", 25000),
    "training.mismatch_mean_nats": _number("nats", "less", "bf16 sums in another order", 5e-3),
    "training.mismatch_max_nats": _number("nats", "less", "the tail of it", 0.1),
    "training.optimizer_ms": _time("several foreach passes instead of one", 0.4),
    "training.padded_rows_ms": _number("ms", "less", "twice the tokens, logits of all", 900.0),
    # head
    "head.bare_gemms_ms": _time("wide products run a little below square ones", 0.85),
    "head.ours_ms": _time("fp32 logits written and read once more", 0.75, 0.8),
    "head.peer_ms": _time("four or five products", 0.5),
    "head.extra_gib": _number("GiB", "less", "dW in fp32 and bf16, the workspace", 3.2),
    "training.times_padded_rows": _number("", "more", "half the tokens, slower attention", 1.3),
}


def make_figure(
    key: str, value: float, *, of: str, limit: float | None, is_rehearsed: bool = False
) -> Figure:
    """The figure with what is expected of it; a key without an expectation is our own mistake."""
    assert key in EXPECTATIONS, f"{key} has no expectation; write one before it is measured"
    e = EXPECTATIONS[key]

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
