"""What the two LM-head ops share: rows in chunks, three GEMMs a chunk, and the row passes that run
in between.

    logits = x @ weight.T;   row pass: logits -> dlogits, in place;   dx = dlogits @ weight;
    dweight += dlogits.T @ x

Departures from the textbook. A chunk's rows are picked and padded to MIN_ROWS: below a few rows
GEMM libraries sum in another order, and a row's bits would depend on its company. On a CPU, rows
whose gradient turned out 0 are left out of the two gradient GEMMs; on a GPU the host would have to
wait for their number, so they stay as zeros, and the dx of all chunks is kept and added up once,
behind the last one. dweight is summed in fp32 in one buffer. Whatever scales a logit is one number
a row, its inverse temperature.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from socpo_fast.ops._checks import has_no_values
from socpo_fast.ops._impl import extension_is_built, kernels_of

# MiB of logits and picked rows. With the rest (dx, GEMM scratch) an op stays below dweight + 256
# MiB on a CPU and below dweight + GPU_WORKSPACE_MIB + 256 MiB on a card, dx of all rows apart. A
# card gets ten times as much: weight and dweight cross its memory once a chunk, and with 208 MiB,
# which is 237 rows of Qwen3's vocabulary in bf16, that would take longer than the GEMMs.
CPU_WORKSPACE_MIB = 208.0
GPU_WORKSPACE_MIB = 2048.0
MIN_ROWS = 16
NO_TARGET = -100  # stands among the targets for a row without loss, as in torch's cross_entropy
_CPU_CHUNK_ROWS = (
    512  # measured: with fewer, dweight goes by too often; with more, fresh memory costs as much
)
Needs = tuple[bool, bool, bool]  # whether hidden, weight and bias need a gradient


def scales_of_logits(
    num_rows: int,
    like: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, float | None]:
    """inv_temperature_N, in the dtype of the logits, and tanh_scale, None without a softcap.

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
    """fp64 for fp64, otherwise fp32: what logits, sums and gradients are held in."""
    return torch.promote_types(x.dtype, torch.float32)


def default_workspace_mib(device: torch.device) -> float:
    """What workspace_mib None means on this device, MiB."""
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
    """Rows whose logits [vocab], x and dx [width] fill the workspace; at least MIN_ROWS.

    wide is the dtype of logits and dx, factor that of what GEMMs multiply; where they differ, and
    behind a softcap, the gradient of the logits has a buffer of its own.
    """
    if workspace_mib is None:
        workspace_mib = default_workspace_mib(device)
    row_bytes = (vocab + 2 * width) * wide.itemsize
    if factor != wide or is_capped:
        row_bytes += vocab * factor.itemsize
    most = max(MIN_ROWS, int(min(workspace_mib, 2**30) * 2**20) // row_bytes)
    return min(most, _CPU_CHUNK_ROWS) if device.type == "cpu" else most


def keep_wanted(wanted_N: Tensor, *by_row: Tensor | None) -> list[Any]:
    """Of each tensor that is given the wanted rows, contiguous, as row passes read plain arrays.

    All rows on a GPU, where the host would wait for the number of the wanted ones, and while
    torch.compile traces.
    """
    if wanted_N.is_cuda or has_no_values(wanted_N) or wanted_N.all():
        return [x if x is None else x.contiguous() for x in by_row]
    index = wanted_N.nonzero()[:, 0]
    return [x if x is None else x[index] for x in by_row]


def row_indices(rows_N: Tensor | None, targets_N: Tensor) -> Tensor:
    """rows_N, of which None is row n."""
    return torch.arange(targets_N.numel(), device=targets_N.device) if rows_N is None else rows_N


def spread(values_KN: Tensor, wanted_N: Tensor) -> Tensor:
    """Values of the rows that keep_wanted kept, at their places among all rows; NaN elsewhere."""
    if values_KN.shape[1] == wanted_N.numel():
        return values_KN.where(wanted_N, torch.nan)
    everywhere = values_KN.new_full((values_KN.shape[0], wanted_N.numel()), torch.nan)
    return everywhere.index_copy_(1, wanted_N.nonzero()[:, 0], values_KN)


def shapes_of_gradients(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    needs: Needs,
) -> list[tuple[int, ...]]:
    """Of hidden, weight and bias; (0,) for one not needed, as an op cannot return None."""
    shapes = hidden_TD.shape, weight_VD.shape, weight_VD.shape[:1]
    return [tuple(shape) if needed else (0,) for shape, needed in zip(shapes, needs, strict=True)]


class ChunkedHead:
    """hidden_TD[rows] @ weight_VD.T + bias_V by chunks of rows, with the gradients of all three.

    for part in head.chunks():
        logits = head.project(part);  row pass from logits into head.grad_logits;
        head.backward(part, ..)

    With tanh_scale the logits are tanh(tanh_scale (..)). Without moves_rows_up rows keep their
    places, as they must on a card. A row without a gradient may hold anything.
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
        moves_rows_up: bool,
    ):
        self.hidden_TD = hidden_TD
        self.rows_N = rows_N
        self.tanh_scale = tanh_scale
        self.wide = wide_dtype(hidden_TD)
        (vocab, width) = weight_VD.shape
        # a CPU has no fast bf16 arithmetic, so there everything is wide
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
        self.moves_rows_up = moves_rows_up
        buffer_rows = max(MIN_ROWS, min(self.chunk_rows, rows_N.numel()))
        self.logits = hidden_TD.new_empty((buffer_rows, vocab), dtype=self.wide)
        is_apart = (self.factor_dtype != self.wide or is_capped) and any(needs_grad)
        self.grad_logits = (
            torch.empty_like(self.logits, dtype=self.factor_dtype) if is_apart else self.logits
        )
        self.needs_hidden, self.needs_weight, self.needs_bias = needs_grad
        self.needs_any = any(needs_grad)
        shapes = shapes_of_gradients(hidden_TD, weight_VD, needs_grad)
        # Where rows keep their places, dx of all of them; behind, room for what pads the last
        # chunk.
        num_dx_rows = 0 if moves_rows_up else rows_N.numel() + MIN_ROWS
        self.dx_ND = self.logits.new_empty((num_dx_rows, width if self.needs_hidden else 0))
        self.grad_hidden_TD = self.logits.new_zeros(shapes[0] if moves_rows_up else 0)
        self.grad_weight_VD = self.logits.new_empty(shapes[1])  # the first product fills it
        self.grad_bias_V = self.logits.new_zeros(shapes[2])
        self.has_products = False

    def chunks(self) -> Iterator[slice]:
        """Slices of about equal size, as few as chunk_rows allows."""
        num_rows = self.rows_N.numel()
        num_chunks = -(-num_rows // self.chunk_rows)
        for idx in range(num_chunks):
            yield slice(num_rows * idx // num_chunks, num_rows * (idx + 1) // num_chunks)

    def project(self, part: slice) -> Tensor:
        """Logits of the chunk's rows; they stand in self.logits until the next one."""
        self.x = self.hidden_TD.index_select(0, self.rows_N[part]).to(self.factor_dtype)
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

    def backward(self, part: slice, no_grad: Tensor) -> None:
        """Adds the chunk's part to the gradients, from self.grad_logits; no_grad [n] is True where
        those are 0.
        """
        num_rows = no_grad.numel()
        has_grad = ~no_grad if self.moves_rows_up else None
        if self.tanh_scale is not None:  # d tanh(s u) / du = s - s tanh^2; the logits are done with
            slope = self.logits[:num_rows].square_().mul_(-self.tanh_scale).add_(self.tanh_scale)
            self.grad_logits[:num_rows] *= slope.masked_fill_(
                no_grad[:, None], 0
            )  # 0 * nan is not 0
        if has_grad is None:
            self.x[:num_rows].masked_fill_(no_grad[:, None], 0)
        else:
            order = torch.arange(num_rows, device=no_grad.device)
            num_rows = self._move_up(has_grad, order)
        if num_rows == 0:
            return
        size = max(num_rows, MIN_ROWS)
        self.grad_logits[num_rows:size] = 0
        self.x[num_rows:size] = 0
        grad = self.grad_logits[:size]
        x = self.x[:size]
        if self.needs_weight:
            matmul_(self.grad_weight_VD, grad.T, x, accumulate=self.has_products)
            self.has_products = True
        if self.needs_bias:
            self.grad_bias_V += grad.sum(0, dtype=self.wide)
        if not self.needs_hidden:
            return
        if has_grad is None:  # what pads a chunk is overwritten by the next one
            matmul_(self.dx_ND[part.start : part.start + size], grad, self.weight_VD)
            return
        dx = torch.empty_like(x, dtype=self.wide)
        matmul_(dx, grad, self.weight_VD)
        # Rows that were moved up are added in the order in which they came.
        dx = dx.index_select(0, order[:num_rows].argsort())
        add_rows_(self.grad_hidden_TD, self.rows_N[part][has_grad], dx)

    def gradients(self) -> list[Tensor]:
        """Of hidden, weight and bias, wide; zeros where no row had one, empty where not needed."""
        if not self.has_products:
            self.grad_weight_VD.zero_()
        if self.needs_hidden and not self.moves_rows_up:
            sum_rows = kernels_of("sum_rows", "triton").sum_rows
            num_rows = self.rows_N.numel()
            self.grad_hidden_TD = sum_rows(
                self.dx_ND[:num_rows], self.rows_N, self.hidden_TD.shape[0]
            )
        return [self.grad_hidden_TD, self.grad_weight_VD, self.grad_bias_V]

    def _move_up(self, has_grad: Tensor, order: Tensor) -> int:
        """Moves rows with a gradient into the places of rows without; returns how many; `order`
        follows.
        """
        count = int(has_grad.sum())
        holes = (~has_grad[:count]).nonzero()[:, 0]
        movers = has_grad[count:].nonzero()[:, 0] + count
        for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
            self.grad_logits[hole] = self.grad_logits[
                mover
            ]  # one by one: together they would need a second chunk
        self.x[holes] = self.x[movers]
        order[holes] = movers
        return count


def add_rows_(out_TD: Tensor, rows_N: Tensor, x_ND: Tensor) -> None:
    """out[rows[n]] += x[n], rows that repeat in index order."""
    if x_ND.is_cuda:  # there index_add_ would use atomics; index_put_ sorts instead
        out_TD.index_put_((rows_N,), x_ND, accumulate=True)
    else:
        out_TD.index_add_(0, rows_N, x_ND)


def matmul_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b, summed in the dtype of out."""
    if out.device.type == "cpu":  # whose products are in one dtype
        a = a.to(out.dtype)
        b = b.to(out.dtype)
    if out.device.type == "cpu" and extension_is_built():
        torch.ops.socpo.matmul_(out, a, b, accumulate)
    elif a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=float(accumulate), out=out)
    else:
        # bf16 or fp16 factors on a GPU. That `out` may be fp32 while the factors are not needs
        # torch 2.10, the first release with pytorch PR 167931: hence the floor in pyproject.toml.
        torch.addmm(out, a, b, beta=float(accumulate), out_dtype=out.dtype, out=out)
