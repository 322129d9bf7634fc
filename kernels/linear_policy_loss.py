"""Computes log-prob, loss and gradient of `linear_policy_loss` from logits on a GPU, row by row.

Read top-down: policy_rows launches _policy_rows_kernel, one program a row; _policy_term and
_kl_term are the loss of one token; the sums over a row and its gradient are those of
kernels/linear_logprob.py. The GEMMs are elsewhere: ops/linear_policy_loss.py calls this on a chunk
of logits between cuBLAS calls. csrc/ has the same pass on a CPU.

    hidden --cuBLAS--> logits --this pass--> loss, d loss / d logits --cuBLAS--> dX, dW
                       a row is read twice: for its sums, and for its gradient

Departures from the textbook. The gradient is computed in the forward, since the coefficient of a
policy loss depends on the log-prob of its own row only. It may overwrite the logits. A NaN in the
input gives a NaN in the output: comparisons are written so that none is clamped away.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels._launch import ARCHITECTURES, AotConfig, AotConfigs, architecture_of
from socpo_fast.kernels.linear_logprob import (
    TILES,
    expm1_and_exp,
    logprob_rows,
    logprob_rows_backward,
    row_sums,
    write_row_gradient,
)

__all__ = ["logprob_rows", "logprob_rows_backward", "policy_rows"]

# Log ratios are clamped to +-20 before exp, and have no gradient beyond.
_MAX_LOG_RATIO = tl.constexpr(20.0)


def policy_rows(
    logits_NV: Tensor,
    grad_logits_NV: Tensor | None,
    targets_N: Tensor,
    old_logprobs_N: Tensor,
    advantages: Tensor,
    attempt_of_token_N: Tensor | None,
    weights_N: Tensor,
    inv_temperature_N: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    entropy_coef: float,
    ref_logprobs_N: Tensor | None,
    kl_coef: float,
    kl_estimator: int,
    need_entropy: bool,
) -> Tensor:
    """Returns loss, its terms and statistics of a chunk of rows, and writes the gradient.

        z = logits * inv_temperature

    Args: per-row tensors in the logits' dtype (fp32 or fp64). grad_logits_NV receives d loss / d
    logits; it may be logits_NV itself, of another dtype, or None. dual_clip: inf is off.
    kl_estimator: 1, 2 or 3.

    Returns: [6, N], by row: loss times weight; logprob; entropy; ratio; clipped (0 or 1);
    d loss / d logprob without the term of the entropy. The entropy is NaN unless need_entropy is
    set or entropy_coef is not 0. A row of weight 0 has loss, clipped, d loss / d logprob and
    gradient exactly 0, even if its logits hold NaN.
    """
    num_rows, num_cols = logits_NV.shape
    values_6N = logits_NV.new_empty((6, num_rows))
    if num_rows == 0:
        return values_6N
    tile = TILES[architecture_of(logits_NV)][logits_NV.dtype]
    with torch.cuda.device_of(logits_NV):
        _policy_rows_kernel[(num_rows,)](
            logits_NV,
            grad_logits_NV,
            values_6N,
            targets_N.contiguous(),
            old_logprobs_N.contiguous(),
            advantages.contiguous(),
            None if attempt_of_token_N is None else attempt_of_token_N.contiguous(),
            weights_N.contiguous(),
            inv_temperature_N.contiguous(),
            None if ref_logprobs_N is None or kl_coef == 0 else ref_logprobs_N.contiguous(),
            num_rows,
            num_cols,
            logits_NV.stride(0),
            0 if grad_logits_NV is None else grad_logits_NV.stride(0),
            1.0 - clip_low,
            1.0 + clip_high,
            float(dual_clip),
            float(entropy_coef),
            float(kl_coef),
            KL_ESTIMATOR=kl_estimator,
            NEED_ENTROPY=need_entropy or entropy_coef != 0,
            ENTROPY_GRAD=entropy_coef != 0,
            BLOCK_V=tile.block,
            num_warps=tile.num_warps,
        )
    return values_6N


def aot_configs() -> AotConfigs:
    """Yields the launch above: plain and with every term, in place or into bf16, even and odd V."""
    for architecture in ARCHITECTURES:
        for dtype, (block, num_warps) in TILES[architecture].items():
            names = (
                "logits_ptr",
                "values_ptr",
                "old_ptr",
                "advantages_ptr",
                "weights_ptr",
                "inv_temperature_ptr",
            )
            low_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
            for label, grad, need_entropy, all_terms, odd_sizes in (
                ("bare, no gradient", None, False, False, False),
                ("plain, in place", dtype, True, False, False),
                ("plain, odd V", low_dtype, True, False, True),
                ("all terms", low_dtype, True, True, False),
                ("all terms, odd V", dtype, True, True, True),
            ):
                attempt_dtype = torch.int64 if need_entropy else None
                ref_dtype = dtype if all_terms else None
                pointers = dict.fromkeys(names, dtype) | {"grad_ptr": grad, "ref_ptr": ref_dtype}
                yield AotConfig(
                    _policy_rows_kernel,
                    architecture,
                    dtype,
                    label,
                    num_warps,
                    pointers | {"targets_ptr": torch.int64, "attempt_ptr": attempt_dtype},
                    {
                        "KL_ESTIMATOR": 3,
                        "NEED_ENTROPY": need_entropy,
                        "ENTROPY_GRAD": all_terms,
                        "BLOCK_V": block,
                    },
                    odd_sizes,
                )


# The number of rows and the alignment of their pointers differ from chunk to chunk. Triton does not
# specialise on them, so one compiled kernel serves all chunks.
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=[
        "targets_ptr", "old_ptr", "advantages_ptr", "attempt_ptr", "weights_ptr",
        "inv_temperature_ptr", "ref_ptr"
    ],
)  # fmt: skip
def _policy_rows_kernel(
    logits_ptr,
    grad_ptr,
    values_ptr,
    targets_ptr,
    old_ptr,
    advantages_ptr,
    attempt_ptr,
    weights_ptr,
    inv_temperature_ptr,
    ref_ptr,
    num_rows,
    num_cols,
    stride_ln,
    stride_gn,
    ratio_min: tl.float64,
    ratio_max: tl.float64,
    dual_clip: tl.float64,
    entropy_coef: tl.float64,
    kl_coef: tl.float64,
    KL_ESTIMATOR: tl.constexpr,
    NEED_ENTROPY: tl.constexpr,
    ENTROPY_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Computes loss, statistics and gradient of one row."""
    dtype = logits_ptr.dtype.element_ty
    # Offsets are in 64 bits, since a large workspace holds more than 2^31 logits.
    row = tl.program_id(0).to(tl.int64)
    logits_row_ptr = logits_ptr + row * stride_ln
    target = tl.load(targets_ptr + row)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    # Read before the gradient is written, which may overwrite the logits.
    target_logit = tl.load(logits_row_ptr + target)
    m_i, l_i, weighted = row_sums(logits_row_ptr, num_cols, inv_temperature, NEED_ENTROPY, BLOCK_V)
    log_sum = tl.log(l_i)
    logprob = (target_logit - m_i) * inv_temperature - log_sum
    entropy = log_sum - weighted / l_i if NEED_ENTROPY else tl.full((), float("nan"), dtype)

    weight = tl.load(weights_ptr + row)
    advantage = tl.load(
        advantages_ptr + (row if attempt_ptr is None else tl.load(attempt_ptr + row))
    )
    # The numbers of the loss are passed as fp64 and converted to the dtype of the logits: in fp64,
    # gradient checks need all of their digits.
    loss, ratio, is_clipped, derivative = _policy_term(
        logprob,
        tl.load(old_ptr + row),
        advantage,
        tl.full((), ratio_min, dtype),
        tl.full((), ratio_max, dtype),
        tl.full((), dual_clip, dtype),
    )
    if ref_ptr is not None:
        kl, kl_derivative = _kl_term(logprob, tl.load(ref_ptr + row), KL_ESTIMATOR)
        loss += tl.full((), kl_coef, dtype) * kl
        derivative += tl.full((), kl_coef, dtype) * kl_derivative
    if ENTROPY_GRAD:
        loss -= tl.full((), entropy_coef, dtype) * entropy
    # tl.where instead of a product: a weight of 0 times NaN would be NaN.
    has_loss = weight != 0
    coefficient = tl.where(has_loss, weight * derivative, 0.0)
    values_row_ptr = values_ptr + row
    num_rows = num_rows.to(tl.int64)
    tl.store(values_row_ptr, tl.where(has_loss, weight * loss, 0.0))
    tl.store(values_row_ptr + num_rows, logprob)
    tl.store(values_row_ptr + 2 * num_rows, entropy)
    tl.store(values_row_ptr + 3 * num_rows, ratio)
    tl.store(values_row_ptr + 4 * num_rows, (has_loss & is_clipped).to(dtype))
    tl.store(values_row_ptr + 5 * num_rows, coefficient)
    if grad_ptr is not None:
        entropy_grad = (
            -weight * tl.full((), entropy_coef, dtype) if ENTROPY_GRAD else tl.zeros((), dtype)
        )
        write_row_gradient(
            logits_row_ptr, grad_ptr + row * stride_gn, num_cols, inv_temperature, target, m_i,
            log_sum, logprob,
            entropy, coefficient, entropy_grad, ENTROPY_GRAD, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _policy_term(logprob, old_logprob, advantage, ratio_min, ratio_max, dual_clip):
    """Returns a token's clipped loss, ratio, whether a clip is active, and d loss / d logprob.

        loss = max(-A ratio, -A clamp(ratio, ratio_min, ratio_max))       ratio = exp(log ratio)

    If A < 0, the loss is at most -A dual_clip. Where a clip is active, the derivative is 0.
    """
    log_ratio = logprob - old_logprob
    _, ratio = expm1_and_exp(_clamp(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    unclipped = -advantage * ratio
    clamped = -advantage * _clamp(ratio, ratio_min, ratio_max)
    is_clipped = clamped > unclipped
    loss = tl.where(is_clipped, clamped, unclipped)
    is_dual_clipped = (advantage < 0) & (loss > -advantage * dual_clip)
    loss = tl.where(is_dual_clipped, -advantage * dual_clip, loss)
    # d ratio / d logprob is the ratio itself, so `unclipped` is also the derivative.
    is_out_of_range = tl.abs(log_ratio) > _MAX_LOG_RATIO
    return (
        loss,
        ratio,
        is_clipped | is_dual_clipped,
        tl.where(is_clipped | is_dual_clipped | is_out_of_range, 0.0, unclipped),
    )


@triton.jit
def _kl_term(logprob, ref_logprob, KL_ESTIMATOR: tl.constexpr):
    """Returns a token's estimate of KL(policy || reference) and its derivative by logprob.

    d = ref_logprob - logprob       k1 = -d       k2 = d^2 / 2       k3 = exp(d) - 1 - d
    """
    difference = ref_logprob - logprob
    d = _clamp(difference, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    if KL_ESTIMATOR == 1:
        value = -d
        derivative = tl.full((), 1.0, d.dtype)
    elif KL_ESTIMATOR == 2:
        value = 0.5 * d * d
        derivative = -d
    else:
        expm1, _ = expm1_and_exp(d)
        value = expm1 - d
        derivative = -expm1
    return value, tl.where(tl.abs(difference) > _MAX_LOG_RATIO, 0.0, derivative)


@triton.jit
def _clamp(x, low, high):
    """Returns x limited to [low, high]; NaN stays NaN, unlike in tl.minimum and tl.maximum."""
    return tl.where(x < low, low, tl.where(x > high, high, x))
