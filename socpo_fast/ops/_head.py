"""Runs the LM head by chunks of rows, for linear_logprob and linear_policy_loss.

    for each chunk of rows:
        x        = hidden[rows]
        logits   = x @ weight.T          GEMM 1   ChunkedHead.project
        dlogits  = row pass(logits)               the caller's, usually in place
        dx       = dlogits @ weight      GEMM 2   ChunkedHead.backward
        dweight += dlogits.T @ x         GEMM 3   ChunkedHead.backward

Read ChunkedHead; above it stand the workspace size and the functions that select rows.

Departures from the textbook. A chunk's rows are gathered and padded to MIN_ROWS: for fewer rows
GEMM libraries sum in another order, and a row's result would depend on how many others there are.
On a CPU, rows whose gradient is 0 are left out of GEMMs 2 and 3. On a GPU the host would have to
wait for the number of such rows, so they stay, as zeros, and the dx of all chunks is kept and added
up once, after the last chunk. dweight is summed in fp32 in one buffer. All factors of a logit
(temperature, logit scale, softcap) are folded into one number a row, its inverse temperature.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from socpo_fast.ops._checks import has_no_values
from socpo_fast.ops._impl import extension_is_built, kernels_of

# MiB of logits and gathered rows. With dx and GEMM scratch an op stays below dweight + 256 MiB on a
# CPU and below dweight + GPU_WORKSPACE_MIB + 256 MiB on a GPU, not counting the dx of all rows.
# A GPU gets ten times as much because every chunk reads weight and reads and writes dweight once.
# With 208 MiB (237 rows of Qwen3's vocabulary in bf16) that would take longer than the GEMMs.
CPU_WORKSPACE_MIB = 208.0
GPU_WORKSPACE_MIB = 2048.0
MIN_ROWS = 16
NO_TARGET = -100  # the target of a row without loss, as in torch's cross_entropy
# Measured: with fewer rows dweight is read and written too often; with more, the first touch of
# the larger buffers costs as much as that saves.
_CPU_CHUNK_ROWS = 512
Needs = tuple[bool, bool, bool]  # whether hidden, weight and bias need a gradient


def scales_of_logits(
    num_rows: int,
    like: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, float | None]:
    """Returns inv_temperature_N, in the logits' dtype, and tanh_scale, None without a softcap.

    z = inv_temperature (x @ weight.T + bias), and with a softcap
    z = inv_temperature tanh(tanh_scale (x @ weight.T + bias)).
    """
    scale = logit_scale if softcap is None else softcap
    tanh_scale = None if softcap is None else logit_scale / softcap
    dtype = wide_dtype(like)
    if isinstance(temperature, Tensor):
        return (temperature.detach().double().reciprocal() * scale).to(dtype), tanh_scale
    return torch.full((num_rows,), scale / temperature, dtype=dtype, device=like.device), tanh_scale


def wide_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of logits, sums and gradients: fp64 for fp64, otherwise fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def default_workspace_mib(device: torch.device) -> float:
    """Returns what workspace_mib=None means on this device, MiB."""
    return GPU_WORKSPACE_MIB if device.type == "cuda" else CPU_WORKSPACE_MIB


def rows_per_chunk(
    vocab: int,
    width: int,
    wide: torch.dtype,
    factor: torch.dtype,
    device: torch.device,
    workspace_mib: float | None,
    is_capped: bool = False,
) -> int:
    """Returns how many rows of logits [vocab], x and dx [width] fill the workspace, >= MIN_ROWS.

    wide is the dtype of logits and dx, factor the dtype of the matrices that GEMMs multiply. If
    they differ, or with a softcap, the gradient of the logits needs a buffer of its own.
    """
    if workspace_mib is None:
        workspace_mib = default_workspace_mib(device)
    row_bytes = (vocab + 2 * width) * wide.itemsize
    if factor != wide or is_capped:
        row_bytes += vocab * factor.itemsize
    # min: the bytes of a workspace of 1e308 MiB, which means no limit, would overflow to inf.
    max_rows = max(MIN_ROWS, int(min(workspace_mib, 2**30) * 2**20) // row_bytes)
    return min(max_rows, _CPU_CHUNK_ROWS) if device.type == "cpu" else max_rows


def keep_rows(is_kept_N: Tensor, *by_row: Tensor | None) -> list[Any]:
    """Returns each tensor with only the rows where is_kept_N is True; a None stays None.

    On a GPU, and while torch.compile traces, all rows are kept: the host would have to wait for
    their number. Results are contiguous, since row passes read them as plain arrays.
    """
    if is_kept_N.is_cuda or has_no_values(is_kept_N) or is_kept_N.all():
        return [x if x is None else x.contiguous() for x in by_row]
    index = is_kept_N.nonzero()[:, 0]
    return [x if x is None else x[index] for x in by_row]


def row_indices(rows_N: Tensor | None, targets_N: Tensor) -> Tensor:
    """Returns rows_N; None stands for 0, 1, .., N - 1."""
    return torch.arange(targets_N.numel(), device=targets_N.device) if rows_N is None else rows_N


def scatter_rows(values_KN: Tensor, is_kept_N: Tensor) -> Tensor:
    """Undoes keep_rows: returns values for all rows, NaN where is_kept_N is False."""
    # keep_rows may have kept all rows (on a GPU); then only the NaNs are missing.
    if values_KN.shape[1] == is_kept_N.numel():
        return values_KN.where(is_kept_N, torch.nan)
    all_rows = values_KN.new_full((values_KN.shape[0], is_kept_N.numel()), torch.nan)
    return all_rows.index_copy_(1, is_kept_N.nonzero()[:, 0], values_KN)


def shapes_of_gradients(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    needs: Needs,
) -> list[tuple[int, ...]]:
    """Returns the shapes of the gradients of hidden, weight and bias.

    A gradient that is not needed has shape (0,), since a registered op cannot return None.
    """
    shapes = hidden_TD.shape, weight_VD.shape, weight_VD.shape[:1]
    return [tuple(shape) if needed else (0,) for shape, needed in zip(shapes, needs, strict=True)]


class ChunkedHead:
    """Computes hidden_TD[rows] @ weight_VD.T + bias_V by chunks of rows, and all three gradients.

        for span in head.chunks():
            logits = head.project(span)
            ..                            the caller's row pass: logits -> head.grad_logits
            head.backward(span, is_zero_grad)
        head.gradients()

    With tanh_scale the logits are tanh(tanh_scale (..)). With compacts_rows (CPU) the rows of a
    chunk that have a gradient are moved to its front, so that GEMMs 2 and 3 have fewer rows;
    without it (GPU) all rows stay where they are. A row without a gradient may hold NaN.
    """

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        rows_N: Tensor,
        *,
        bias_V: Tensor | None = None,
        tanh_scale: float | None = None,
        workspace_mib: float | None,
        needs_grad: Needs = (False, False, False),
        compacts_rows: bool,
    ):
        self.hidden_TD = hidden_TD
        self.rows_N = rows_N
        self.tanh_scale = tanh_scale
        self.wide = wide_dtype(hidden_TD)
        (vocab, width) = weight_VD.shape
        # A CPU has no fast bf16 arithmetic, so everything is wide there.
        self.factor_dtype = hidden_TD.dtype if hidden_TD.is_cuda else self.wide
        self.weight_VD = weight_VD.to(self.factor_dtype)
        self.bias_V = None if bias_V is None else bias_V.to(self.wide)
        dtypes = (self.wide, self.factor_dtype)
        is_capped = tanh_scale is not None
        self.chunk_rows = rows_per_chunk(
            vocab,
            width,
            *dtypes,
            hidden_TD.device,
            workspace_mib,
            is_capped,
        )
        self.compacts_rows = compacts_rows
        buffer_rows = max(MIN_ROWS, min(self.chunk_rows, rows_N.numel()))
        self.logits = hidden_TD.new_empty((buffer_rows, vocab), dtype=self.wide)
        # Usually the gradient overwrites the logits. It cannot if GEMMs need it in another dtype,
        # nor with a softcap, whose derivative is computed from the logits afterwards.
        is_separate = (self.factor_dtype != self.wide or is_capped) and any(needs_grad)
        self.grad_logits = (
            torch.empty_like(self.logits, dtype=self.factor_dtype) if is_separate else self.logits
        )
        self.needs_hidden, self.needs_weight, self.needs_bias = needs_grad
        self.needs_any = any(needs_grad)
        shapes = shapes_of_gradients(hidden_TD, weight_VD, needs_grad)
        # If rows stay where they are, dx of all rows; MIN_ROWS more for the last chunk's padding.
        num_dx_rows = 0 if compacts_rows else rows_N.numel() + MIN_ROWS
        self.dx_ND = self.logits.new_empty((num_dx_rows, width if self.needs_hidden else 0))
        self.grad_hidden_TD = self.logits.new_zeros(shapes[0] if compacts_rows else 0)
        self.grad_weight_VD = self.logits.new_empty(shapes[1])  # the first product fills it
        self.grad_bias_V = self.logits.new_zeros(shapes[2])
        self.weight_grad_is_filled = False

    def chunks(self) -> Iterator[slice]:
        """Yields slices of rows of about equal size, as few as chunk_rows allows."""
        num_rows = self.rows_N.numel()
        num_chunks = -(-num_rows // self.chunk_rows)
        for idx in range(num_chunks):
            yield slice(num_rows * idx // num_chunks, num_rows * (idx + 1) // num_chunks)

    def project(self, span: slice) -> Tensor:
        """Returns the logits of a chunk's rows, a view of self.logits that the next call reuses."""
        self.x = self.hidden_TD.index_select(0, self.rows_N[span]).to(self.factor_dtype)
        num_rows = self.x.shape[0]
        if num_rows < MIN_ROWS:
            self.x = torch.nn.functional.pad(self.x, (0, 0, 0, MIN_ROWS - num_rows))
        logits = self.logits[: self.x.shape[0]]
        matmul_(logits, self.x, self.weight_VD.T)
        if self.bias_V is not None:
            logits += self.bias_V
        if self.tanh_scale is not None:
            logits.mul_(self.tanh_scale).tanh_()
        return logits[:num_rows]

    def backward(self, span: slice, is_zero_grad: Tensor) -> None:
        """Adds a chunk's contribution, which is in self.grad_logits, to the gradients.

        is_zero_grad [n] is True for rows whose gradient is 0.
        """
        num_rows = is_zero_grad.numel()
        has_grad = ~is_zero_grad if self.compacts_rows else None
        if self.tanh_scale is not None:
            # d tanh(s u) / du = s - s tanh^2. In place: nobody reads the logits after this.
            slope = self.logits[:num_rows].square_().mul_(-self.tanh_scale).add_(self.tanh_scale)
            # A row without a gradient may hold NaN, and 0 * NaN would be NaN.
            self.grad_logits[:num_rows] *= slope.masked_fill_(is_zero_grad[:, None], 0)
        if has_grad is None:
            self.x[:num_rows].masked_fill_(is_zero_grad[:, None], 0)
        else:
            order = torch.arange(num_rows, device=is_zero_grad.device)
            num_rows = self._move_up(has_grad, order)
        if num_rows == 0:
            return
        # Zero rows up to MIN_ROWS add nothing, but keep the order in which GEMMs sum.
        size = max(num_rows, MIN_ROWS)
        self.grad_logits[num_rows:size] = 0
        self.x[num_rows:size] = 0
        grad = self.grad_logits[:size]
        x = self.x[:size]
        if self.needs_weight:
            matmul_(self.grad_weight_VD, grad.T, x, accumulate=self.weight_grad_is_filled)
            self.weight_grad_is_filled = True
        if self.needs_bias:
            self.grad_bias_V += grad.sum(0, dtype=self.wide)
        if not self.needs_hidden:
            return
        if has_grad is None:
            # A chunk's padding rows land on the next chunk's first rows, which overwrites them.
            matmul_(self.dx_ND[span.start : span.start + size], grad, self.weight_VD)
            return
        dx = torch.empty_like(x, dtype=self.wide)
        matmul_(dx, grad, self.weight_VD)
        # Back to index order before adding: the order of a sum decides how it is rounded.
        dx = dx.index_select(0, order[:num_rows].argsort())
        add_rows_(self.grad_hidden_TD, self.rows_N[span][has_grad], dx)

    def gradients(self) -> list[Tensor]:
        """Returns the gradients of hidden, weight and bias, in the wide dtype.

        A gradient is empty if it is not needed, and zero where no row contributed.
        """
        if not self.weight_grad_is_filled:
            self.grad_weight_VD.zero_()
        if self.needs_hidden and not self.compacts_rows:
            sum_rows = kernels_of("sum_rows", "triton").sum_rows
            num_rows = self.rows_N.numel()
            self.grad_hidden_TD = sum_rows(
                self.dx_ND[:num_rows], self.rows_N, self.hidden_TD.shape[0]
            )
        return [self.grad_hidden_TD, self.grad_weight_VD, self.grad_bias_V]

    def _move_up(self, has_grad: Tensor, order: Tensor) -> int:
        """Moves the rows with a gradient to the front and returns their number.

        has_grad    1 0 1 0 1     count = 3: row 4, behind the third row, moves into hole 1
        rows after  0 4 2 . .     `order` records where each row came from
        """
        count = int(has_grad.sum())
        holes = (~has_grad[:count]).nonzero()[:, 0]
        movers = has_grad[count:].nonzero()[:, 0] + count
        # Row by row: indexing with all of them at once would copy up to a whole chunk of logits.
        for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
            self.grad_logits[hole] = self.grad_logits[mover]
        self.x[holes] = self.x[movers]
        order[holes] = movers
        return count


def add_rows_(out_TD: Tensor, rows_N: Tensor, x_ND: Tensor) -> None:
    """Adds x[n] to out[rows[n]]; repeated rows are added in index order."""
    # On a GPU index_add_ would use atomics, in any order; index_put_ sorts the indices instead.
    if x_ND.is_cuda:
        out_TD.index_put_((rows_N,), x_ND, accumulate=True)
    else:
        out_TD.index_add_(0, rows_N, x_ND)


def matmul_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """Computes out = a @ b, or out += a @ b, summed in the dtype of out."""
    # A CPU's matrix products take factors of one dtype only.
    if out.device.type == "cpu":
        a = a.to(out.dtype)
        b = b.to(out.dtype)
    if out.device.type == "cpu" and extension_is_built():
        torch.ops.socpo.matmul_(out, a, b, accumulate)
    elif a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=float(accumulate), out=out)
    else:
        # bf16 or fp16 factors with fp32 sums on a GPU. This use of out_dtype needs torch 2.10, the
        # first release with pytorch PR 167931: hence the minimum version in pyproject.toml.
        torch.addmm(out, a, b, beta=float(accumulate), out_dtype=out.dtype, out=out)
