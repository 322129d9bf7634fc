"""Row passes of `linear_logprob` on a GPU: one program a row, from logits to log-prob, entropy and,
later, gradient.

Read top-down: logprob_rows and logprob_rows_backward launch a kernel each; row_sums reads a row
once, tile after tile; write_row_gradient writes the row of d loss / d logits. GEMMs are not here:
ops/linear_logprob.py calls these on a chunk of logits, between cuBLAS calls.
kernels/linear_policy_loss.py uses the same parts; csrc/ has the same passes on a CPU.

Departures from the textbook. The target entry of the gradient goes through expm1, and logits are
taken relative to the row's largest before anything else, so that neither a probability near 1 nor
large logits cancel. A NaN comes out where one comes in.
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

# 8 logits a thread: no spills even where an odd vocabulary forbids vector loads, and few registers
# (`make aot`). fp64 is there for gradient checks.
TILES: dict[int, dict[torch.dtype, Tile]] = {
    INTERPRETER: {torch.float32: Tile(1024, 1), torch.float64: Tile(1024, 1)},
    80: {torch.float32: Tile(2048, 8), torch.float64: Tile(1024, 8)},
    90: {torch.float32: Tile(2048, 8), torch.float64: Tile(1024, 8)},
    100: {torch.float32: Tile(2048, 8), torch.float64: Tile(1024, 8)},
}

_LOWEST_EXPONENT = tl.constexpr(-1e4)  # exp is 0 there, in fp64 too
_LOWEST_LOGPROB = tl.constexpr(-60.0)  # expm1 is -1 from there on, in fp64 too
_INV_LN2 = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693359375)  # nine bits: its product with a small integer is exact
_LN2_LOW = tl.constexpr(-2.1219444005469058e-4)


def logprob_rows(logits_NV: Tensor, targets_N: Tensor, inv_temperature_N: Tensor) -> Tensor:
    """values [3, N]: log-prob of the target, entropy and logsumexp of z = logits * inv_temperature,
    nats.
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
    """The gradient of `logprob_rows` for any upstream gradient, into grad_logits_NV (logits_NV
    itself, if wanted).
    """
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
    """The launches above for `make aot`: with and without entropy, in place and into bf16, even and
    odd vocabulary.
    """
    for architecture in ARCHITECTURES:
        for dtype, (block, num_warps) in TILES[architecture].items():
            row = {"logits_ptr": dtype, "inv_temperature_ptr": dtype, "targets_ptr": torch.int64}
            saved = dict.fromkeys(("logsumexp_ptr", "entropy_ptr", "grad_logprobs_ptr"), dtype)
            low = torch.bfloat16 if dtype == torch.float32 else dtype
            for label, odd in (("even V", False), ("odd V", True)):
                pointers = row | {"values_ptr": dtype}
                yield AotConfig(
                    _logprob_rows_kernel,
                    architecture,
                    dtype,
                    label,
                    num_warps,
                    pointers,
                    {"BLOCK_V": block},
                    odd,
                )
            for label, grad, grad_entropy, odd in (
                ("in place", dtype, None, False),
                ("entropy", low, dtype, False),
                ("entropy, odd V", dtype, dtype, True),
            ):
                yield AotConfig(
                    _logprob_rows_backward_kernel,
                    architecture,
                    dtype,
                    label,
                    num_warps,
                    row | saved | {"grad_ptr": grad, "grad_entropy_ptr": grad_entropy},
                    {"BLOCK_V": block},
                    odd,
                )


# The number of rows and where their numbers begin differ from chunk to chunk: one compiled kernel
# for all.
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
    # In 64 bits, and every offset with it: a large workspace holds more than 2^31 logits.
    row = tl.program_id(0).to(tl.int64)
    logits_row_ptr = logits_ptr + row * stride_ln
    inv_temperature = tl.load(inv_temperature_ptr + row)
    target_logit = tl.load(logits_row_ptr + tl.load(targets_ptr + row))
    highest, total, weighted = row_sums(logits_row_ptr, num_cols, inv_temperature, True, BLOCK_V)
    log_sum = tl.log(total)
    num_rows = num_rows.to(tl.int64)
    tl.store(values_ptr + row, (target_logit - highest) * inv_temperature - log_sum)
    tl.store(values_ptr + num_rows + row, log_sum - weighted / total)
    tl.store(values_ptr + 2 * num_rows + row, highest * inv_temperature + log_sum)


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
    # In 64 bits, and every offset with it: a large workspace holds more than 2^31 logits.
    row = tl.program_id(0).to(tl.int64)
    logits_row_ptr = logits_ptr + row * stride_ln
    target = tl.load(targets_ptr + row)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    target_logit = tl.load(logits_row_ptr + target)
    # At an offset of 1e4 an fp32 logsumexp is off by 5e-4. As a shift it is as good as the maximum;
    # what is missing is the logarithm of a sum near 1.
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
    """Of one row, read once: the largest logit; sum of exp(d) and of d exp(d), d = (logit -
    largest) / temperature.

    Subtracted before it is scaled, a large common offset costs no digits. A logit of -inf counts as
    nothing.
    """
    dtype = row_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK_V)
    # A maximum and sums for each lane: one for all of them would be a barrier a tile.
    highest = tl.full((BLOCK_V,), float("-inf"), dtype)
    sums = tl.zeros((BLOCK_V,), dtype)
    weighted = tl.zeros((BLOCK_V,), dtype)
    for start in range(0, num_cols, BLOCK_V):
        inside = start + columns < num_cols
        logits = tl.load(row_ptr + start + columns, mask=inside, other=float("-inf"))
        new_highest = tl.maximum(highest, logits)
        step, decay = _rescaling(highest, new_highest, inv_temperature)
        below, terms = _rescaling(logits, new_highest, inv_temperature)
        if WEIGHTED:
            weighted = decay * (weighted + step * sums) + terms * below
        sums = decay * sums + terms
        highest = new_highest
    row_highest = tl.max(highest, 0)
    step, decay = _rescaling(highest, row_highest, inv_temperature)
    return row_highest, tl.sum(decay * sums, 0), tl.sum(decay * (weighted + step * sums), 0)


@triton.jit
def _rescaling(x, highest, inv_temperature):
    """d = (x - highest) / temperature and exp(d), for x at most highest; d is finite where x is
    -inf.
    """
    d = (x - _or_zero(highest)) * inv_temperature
    d = tl.where(
        d < _LOWEST_EXPONENT, _LOWEST_EXPONENT, d
    )  # a factor of 0, and 0 times it is 0; NaN stays
    return d, tl.exp(d)


@triton.jit
def _shifted_sum(row_ptr, num_cols, inv_temperature, shift, BLOCK_V: tl.constexpr):
    """Sum of exp((logit - shift) / temperature) over one row."""
    columns = tl.arange(0, BLOCK_V)
    sums = tl.zeros((BLOCK_V,), row_ptr.dtype.element_ty)
    for start in range(0, num_cols, BLOCK_V):
        inside = start + columns < num_cols
        logits = tl.load(row_ptr + start + columns, mask=inside, other=float("-inf"))
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
    """grad_logprob d logprob / d logits + grad_entropy d entropy / d logits, exactly 0 where both
    factors are.

    log p = (logits - shift) / temperature - log_sum.
    """
    columns = tl.arange(0, BLOCK_V)
    zero = tl.zeros((BLOCK_V,), logits_row_ptr.dtype.element_ty)
    if (grad_logprob == 0) & (grad_entropy == 0):  # whatever the logits hold
        for start in range(0, num_cols, BLOCK_V):
            tl.store(
                grad_row_ptr + start + columns,
                zero.to(grad_row_ptr.dtype.element_ty),
                start + columns < num_cols,
            )
    else:
        p_less_1, _ = expm1_and_exp(tl.where(logprob < _LOWEST_LOGPROB, _LOWEST_LOGPROB, logprob))
        target_grad = -grad_logprob * p_less_1
        if HAS_ENTROPY:
            target_grad -= grad_entropy * _entropy_slope(logprob, entropy)
        for start in range(0, num_cols, BLOCK_V):
            inside = start + columns < num_cols
            logits = tl.load(logits_row_ptr + start + columns, mask=inside, other=float("-inf"))
            logp = (logits - shift) * inv_temperature - log_sum
            grad = -grad_logprob * tl.exp(logp)
            if HAS_ENTROPY:
                grad -= grad_entropy * _entropy_slope(logp, entropy)
            grad = tl.where(start + columns == target, target_grad, grad) * inv_temperature
            tl.store(grad_row_ptr + start + columns, grad.to(grad_row_ptr.dtype.element_ty), inside)


@triton.jit
def _entropy_slope(logp, entropy):
    """-d entropy / d z of an outcome of log-probability logp: p (log p + entropy)."""
    return tl.exp(logp) * (_or_zero(logp) + entropy)


@triton.jit
def _or_zero(x):
    """x, with 0 for -inf: what a factor of 0 is to be multiplied by."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def expm1_and_exp(x):
    """exp(x) - 1 and exp(x) for -60 <= x <= 20, within a few units in the last place, also near 0.

    x = n ln 2 + r and a series in r, since the GPU's own exp loses 1e-6 at 20 and there is no expm1
    in Triton.
    """
    n = tl.floor(x * _INV_LN2 + 0.5)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    series = tl.full((), 1.0, x.dtype)
    for divisor in tl.static_range(16, 1, -1):  # |r| <= ln 2 / 2: the next term is below 1e-22
        series = 1.0 + series * r * (1.0 / divisor)
    series *= r
    if x.dtype == tl.float64:
        power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return power * series + (power - 1.0), power * series + power
