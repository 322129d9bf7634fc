"""Computes log-probs, entropies and gradients of `linear_logprob` from logits on a GPU, row by row.

Read top-down: logprob_rows and logprob_rows_backward launch a kernel each, one program a row;
row_sums reads a row once, tile after tile; write_row_gradient writes a row of d loss / d logits.
The GEMMs are elsewhere: ops/linear_logprob.py calls this on a chunk of logits between cuBLAS calls.

    one program:   logits of a row   [ tile 0 | tile 1 | tile 2 | .. ]   BLOCK_V logits each
    each lane of the tile keeps m_i (maximum), l_i (sum of exp) and the sum for the entropy;
    the lanes are merged once, at the end of the row

kernels/linear_policy_loss.py uses the same functions; csrc/ has the same passes on a CPU.

Departures from the textbook. The target's entry of the gradient is computed by expm1, so p - 1 does
not cancel where p is near 1. The row's largest logit is subtracted before anything else, so large
logits do not cancel either. A NaN in the input gives a NaN in the output.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels._launch import (
    ARCHITECTURES,
    INTERPRETER,
    AotConfig,
    AotConfigs,
    Tile,
    architecture_of,
)

# 8 logits a thread, 4 in fp64: no spills even where an odd vocabulary forbids vector loads, and few
# registers (`make aot`). fp64 is there for gradient checks.
TILES: dict[int, dict[torch.dtype, Tile]] = {
    INTERPRETER: {torch.float32: Tile(1024, 1), torch.float64: Tile(1024, 1)},
    80: {torch.float32: Tile(2048, 8), torch.float64: Tile(1024, 8)},
    90: {torch.float32: Tile(2048, 8), torch.float64: Tile(1024, 8)},
    100: {torch.float32: Tile(2048, 8), torch.float64: Tile(1024, 8)},
}

_LOWEST_EXPONENT = tl.constexpr(-1e4)  # exp is 0 there, in fp64 too
_LOWEST_LOGPROB = tl.constexpr(-60.0)  # expm1 is -1 from there on down, in fp64 too
_INV_LN2 = tl.constexpr(1.4426950408889634)
# ln 2 in two numbers. The first has nine bits, so that its product with a small integer is exact.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.1219444005469058e-4)


def logprob_rows(logits_NV: Tensor, targets_N: Tensor, inv_temperature_N: Tensor) -> Tensor:
    """Returns [3, N]: log-prob of the target, entropy and logsumexp of each row, in nats.

    They are those of z = logits * inv_temperature.
    """
    num_rows, num_cols = logits_NV.shape
    values_3N = logits_NV.new_empty((3, num_rows))
    if num_rows == 0:
        return values_3N
    tile = TILES[architecture_of(logits_NV)][logits_NV.dtype]
    with torch.cuda.device_of(logits_NV):
        _logprob_rows_kernel[(num_rows,)](
            logits_NV,
            values_3N,
            targets_N.contiguous(),
            inv_temperature_N.contiguous(),
            num_rows,
            num_cols,
            logits_NV.stride(0),
            BLOCK_V=tile.block,
            num_warps=tile.num_warps,
        )
    return values_3N


def logprob_rows_backward(
    logits_NV: Tensor,
    grad_logits_NV: Tensor,
    targets_N: Tensor,
    inv_temperature_N: Tensor,
    logsumexp_N: Tensor,
    entropy_N: Tensor,
    grad_logprobs_N: Tensor,
    grad_entropy_N: Tensor | None,
) -> None:
    """Writes the gradient of `logprob_rows` to grad_logits_NV, which may be logits_NV itself."""
    num_rows, num_cols = logits_NV.shape
    if num_rows == 0:
        return
    tile = TILES[architecture_of(logits_NV)][logits_NV.dtype]
    with torch.cuda.device_of(logits_NV):
        _logprob_rows_backward_kernel[(num_rows,)](
            logits_NV,
            grad_logits_NV,
            targets_N.contiguous(),
            inv_temperature_N.contiguous(),
            logsumexp_N.contiguous(),
            entropy_N.contiguous(),
            grad_logprobs_N.contiguous(),
            None if grad_entropy_N is None else grad_entropy_N.contiguous(),
            num_cols,
            logits_NV.stride(0),
            grad_logits_NV.stride(0),
            BLOCK_V=tile.block,
            num_warps=tile.num_warps,
        )


def aot_configs() -> AotConfigs:
    """Yields the launches above: with and without entropy, in place or to bf16, even and odd V."""
    for architecture in ARCHITECTURES:
        for dtype, (block, num_warps) in TILES[architecture].items():
            row_pointers = {
                "logits_ptr": dtype,
                "inv_temperature_ptr": dtype,
                "targets_ptr": torch.int64,
            }
            saved_pointers = dict.fromkeys(
                ("logsumexp_ptr", "entropy_ptr", "grad_logprobs_ptr"), dtype
            )
            low_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
            for label, odd_sizes in (("even V", False), ("odd V", True)):
                pointers = row_pointers | {"values_ptr": dtype}
                yield AotConfig(
                    _logprob_rows_kernel,
                    architecture,
                    dtype,
                    label,
                    num_warps,
                    pointers,
                    {"BLOCK_V": block},
                    odd_sizes,
                )
            for label, grad, grad_entropy, odd_sizes in (
                ("in place", dtype, None, False),
                ("entropy", low_dtype, dtype, False),
                ("entropy, odd V", dtype, dtype, True),
            ):
                yield AotConfig(
                    _logprob_rows_backward_kernel,
                    architecture,
                    dtype,
                    label,
                    num_warps,
                    row_pointers
                    | saved_pointers
                    | {"grad_ptr": grad, "grad_entropy_ptr": grad_entropy},
                    {"BLOCK_V": block},
                    odd_sizes,
                )


# The number of rows and the alignment of their pointers differ from chunk to chunk. Triton does not
# specialise on them, so one compiled kernel serves all chunks.
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["targets_ptr", "inv_temperature_ptr"],
)
def _logprob_rows_kernel(
    logits_ptr,
    values_ptr,
    targets_ptr,
    inv_temperature_ptr,
    num_rows,
    num_cols,
    stride_ln,
    BLOCK_V: tl.constexpr,
):
    """Computes log-prob, entropy and logsumexp of one row."""
    # Offsets are in 64 bits, since a large workspace holds more than 2^31 logits.
    row = tl.program_id(0).to(tl.int64)
    logits_row_ptr = logits_ptr + row * stride_ln
    inv_temperature = tl.load(inv_temperature_ptr + row)
    target_logit = tl.load(logits_row_ptr + tl.load(targets_ptr + row))
    m_i, l_i, weighted = row_sums(logits_row_ptr, num_cols, inv_temperature, True, BLOCK_V)
    log_sum = tl.log(l_i)
    num_rows = num_rows.to(tl.int64)
    tl.store(values_ptr + row, (target_logit - m_i) * inv_temperature - log_sum)
    tl.store(values_ptr + num_rows + row, log_sum - weighted / l_i)
    tl.store(values_ptr + 2 * num_rows + row, m_i * inv_temperature + log_sum)


@triton.jit(
    do_not_specialize_on_alignment=[
        "targets_ptr", "inv_temperature_ptr", "logsumexp_ptr", "entropy_ptr", "grad_logprobs_ptr",
        "grad_entropy_ptr"
    ]
)  # fmt: skip
def _logprob_rows_backward_kernel(
    logits_ptr,
    grad_ptr,
    targets_ptr,
    inv_temperature_ptr,
    logsumexp_ptr,
    entropy_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    num_cols,
    stride_ln,
    stride_gn,
    BLOCK_V: tl.constexpr,
):
    """Writes the gradient of one row, from the logits and the saved logsumexp."""
    # Offsets are in 64 bits, since a large workspace holds more than 2^31 logits.
    row = tl.program_id(0).to(tl.int64)
    logits_row_ptr = logits_ptr + row * stride_ln
    target = tl.load(targets_ptr + row)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    target_logit = tl.load(logits_row_ptr + target)
    # An fp32 logsumexp of 1e4 is off by 5e-4, too much for a log-prob. As a shift it is still as
    # good as the maximum. What it is off by is the logarithm of the shifted sum, which is near 1.
    shift = tl.load(logsumexp_ptr + row) / inv_temperature
    log_sum = tl.log(_shifted_sum(logits_row_ptr, num_cols, inv_temperature, shift, BLOCK_V))
    has_entropy: tl.constexpr = grad_entropy_ptr is not None
    grad_entropy = tl.load(grad_entropy_ptr + row) if has_entropy else tl.zeros_like(shift)
    logprob = (target_logit - shift) * inv_temperature - log_sum
    write_row_gradient(
        logits_row_ptr, grad_ptr + row * stride_gn, num_cols, inv_temperature, target, shift,
        log_sum, logprob,
        tl.load(entropy_ptr + row), tl.load(grad_logprobs_ptr + row), grad_entropy, has_entropy,
        BLOCK_V,
    )  # fmt: skip


@triton.jit
def row_sums(row_ptr, num_cols, inv_temperature, WEIGHTED: tl.constexpr, BLOCK_V: tl.constexpr):
    """Returns a row's largest logit, sum of exp(d) and sum of d exp(d), reading the row once.

        d = (logit - largest) / temperature

    The largest logit is subtracted before the scaling, so a large common offset costs no digits. A
    logit of -inf adds nothing.
    """
    dtype = row_ptr.dtype.element_ty
    offs_v = tl.arange(0, BLOCK_V)
    # Each lane has its own maximum and sums. A maximum of the whole tile would need a barrier in
    # every tile.
    m_i = tl.full((BLOCK_V,), float("-inf"), dtype)
    l_i = tl.zeros((BLOCK_V,), dtype)
    weighted = tl.zeros((BLOCK_V,), dtype)
    for start in range(0, num_cols, BLOCK_V):
        mask = start + offs_v < num_cols
        logits = tl.load(row_ptr + start + offs_v, mask=mask, other=float("-inf"))
        m_new = tl.maximum(m_i, logits)
        m_shift, alpha = _rescaling(m_i, m_new, inv_temperature)
        d, exp_d = _rescaling(logits, m_new, inv_temperature)
        # Where the maximum rises, each older d falls by the same amount: m_shift, at most 0.
        if WEIGHTED:
            weighted = alpha * (weighted + m_shift * l_i) + exp_d * d
        l_i = alpha * l_i + exp_d
        m_i = m_new
    row_max = tl.max(m_i, 0)
    m_shift, alpha = _rescaling(m_i, row_max, inv_temperature)
    return row_max, tl.sum(alpha * l_i, 0), tl.sum(alpha * (weighted + m_shift * l_i), 0)


@triton.jit
def _rescaling(x, m_i, inv_temperature):
    """Returns d = (x - m_i) / temperature and exp(d), for x <= m_i; d is finite where x is -inf."""
    d = (x - _or_zero(m_i)) * inv_temperature
    # With d = -inf, d exp(d) would be NaN. With this number it is 0. NaN stays NaN.
    d = tl.where(d < _LOWEST_EXPONENT, _LOWEST_EXPONENT, d)
    return d, tl.exp(d)


@triton.jit
def _shifted_sum(row_ptr, num_cols, inv_temperature, shift, BLOCK_V: tl.constexpr):
    """Returns the sum of exp((logit - shift) / temperature) over one row."""
    offs_v = tl.arange(0, BLOCK_V)
    sums = tl.zeros((BLOCK_V,), row_ptr.dtype.element_ty)
    for start in range(0, num_cols, BLOCK_V):
        mask = start + offs_v < num_cols
        logits = tl.load(row_ptr + start + offs_v, mask=mask, other=float("-inf"))
        sums += tl.exp((logits - shift) * inv_temperature)
    return tl.sum(sums, 0)


@triton.jit
def write_row_gradient(
    logits_row_ptr,
    grad_row_ptr,
    num_cols,
    inv_temperature,
    target,
    shift,
    log_sum,
    logprob,
    entropy,
    grad_logprob,
    grad_entropy,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Writes grad_logprob d logprob / d logits + grad_entropy d entropy / d logits of one row.

        z = logits / temperature      log p = (logits - shift) / temperature - log_sum
        d logprob / d z[i] = (i == target) - p[i]
        d entropy / d z[i] = -p[i] (log p[i] + entropy)

    The row is exactly 0 where both factors are.
    """
    offs_v = tl.arange(0, BLOCK_V)
    zero = tl.zeros((BLOCK_V,), logits_row_ptr.dtype.element_ty)
    # A row without loss gets zeros, even if its logits hold NaN.
    if (grad_logprob == 0) & (grad_entropy == 0):
        for start in range(0, num_cols, BLOCK_V):
            tl.store(
                grad_row_ptr + start + offs_v,
                zero.to(grad_row_ptr.dtype.element_ty),
                start + offs_v < num_cols,
            )
    else:
        p_minus_1, _ = expm1_and_exp(tl.where(logprob < _LOWEST_LOGPROB, _LOWEST_LOGPROB, logprob))
        target_grad = -grad_logprob * p_minus_1
        if HAS_ENTROPY:
            target_grad -= grad_entropy * _entropy_slope(logprob, entropy)
        for start in range(0, num_cols, BLOCK_V):
            mask = start + offs_v < num_cols
            logits = tl.load(logits_row_ptr + start + offs_v, mask=mask, other=float("-inf"))
            logprobs = (logits - shift) * inv_temperature - log_sum
            grad = -grad_logprob * tl.exp(logprobs)
            if HAS_ENTROPY:
                grad -= grad_entropy * _entropy_slope(logprobs, entropy)
            grad = tl.where(start + offs_v == target, target_grad, grad) * inv_temperature
            tl.store(grad_row_ptr + start + offs_v, grad.to(grad_row_ptr.dtype.element_ty), mask)


@triton.jit
def _entropy_slope(logprob, entropy):
    """Returns -d entropy / d z of an outcome with this log-prob: p (log p + entropy)."""
    return tl.exp(logprob) * (_or_zero(logprob) + entropy)


@triton.jit
def _or_zero(x):
    """Returns x with 0 for -inf. It is multiplied by a probability of 0, and 0 * -inf is NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def expm1_and_exp(x):
    """Returns exp(x) - 1 and exp(x) for -60 <= x <= 20, within a few units in the last place.

        x = n ln 2 + r      exp(x) - 1 = 2^n (exp(r) - 1) + (2^n - 1), the first by a series in r

    Triton has no expm1, and the GPU's exp has an error of 1e-6 at x = 20.
    """
    n = tl.floor(x * _INV_LN2 + 0.5)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    series = tl.full((), 1.0, x.dtype)
    # |r| <= ln 2 / 2, so the first term that is left out is below 1e-22.
    for divisor in tl.static_range(16, 1, -1):
        series = 1.0 + series * r * (1.0 / divisor)
    series *= r
    # 2^n, by writing n into the exponent's bits.
    if x.dtype == tl.float64:
        power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return power * series + (power - 1.0), power * series + power
