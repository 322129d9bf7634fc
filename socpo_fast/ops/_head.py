"""What the two LM-head ops share: rows in chunks, three GEMMs a chunk, and the row passes that run in between.

    logits = x @ weight.T;   row pass: logits -> dlogits, in place;   dx = dlogits @ weight;   dweight += dlogits.T @ x

Departures from the textbook. A chunk's rows are picked and padded to MIN_ROWS: below a few rows GEMM libraries sum in
another order, and a row's bits would depend on its company. On a CPU, rows whose gradient turned out 0 are left out of
the two gradient GEMMs; on a GPU the host would have to wait for their number, so they stay as zeros. dweight is summed
in fp32 in one buffer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from socpo_fast.ops._checks import check_rule
from socpo_fast.ops._impl import extension_is_built

# MiB of logits and picked rows. With the rest (dx, GEMM scratch) an op stays below dweight + 256
# MiB on a CPU and below dweight + GPU_WORKSPACE_MIB + 256 MiB on a card. A card gets ten times as
# much: weight and dweight cross its memory once a chunk, and with 208 MiB, which is 237 rows of
# Qwen3's vocabulary in bf16, that would take longer than the GEMMs.
CPU_WORKSPACE_MIB = 208.0
GPU_WORKSPACE_MIB = 2048.0
MIN_ROWS = 16
_CPU_CHUNK_ROWS = 512  # measured: with fewer, dweight goes by too often; with more, fresh memory costs as much
SKIP_TILE = 256  # words; skip_below decides for each row and tile of the vocabulary


def inverse_temperatures(temperature: float | Tensor, num_rows: int, like: Tensor) -> Tensor:
    """[N] in the dtype of the logits."""
    dtype = wide_dtype(like)
    if isinstance(temperature, Tensor):
        return temperature.detach().double().reciprocal().to(dtype)
    return torch.full((num_rows,), 1 / temperature, dtype=dtype, device=like.device)


def wide_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64, otherwise fp32: what logits, sums and gradients are held in."""
    return torch.promote_types(x.dtype, torch.float32)


def default_workspace_mib(device: torch.device) -> float:
    """What workspace_mib None means on this device, MiB."""
    return GPU_WORKSPACE_MIB if device.type == "cuda" else CPU_WORKSPACE_MIB


def check_head_options(where: str, workspace_mib: float | None, skip_below: float = 0.0) -> None:
    fits = workspace_mib is None or 0 < workspace_mib < float("inf")
    check_rule(where, "workspace_mib", workspace_mib, fits, "finite and > 0")
    check_rule(where, "skip_below", skip_below, 0 <= skip_below < float("inf"), "finite and >= 0")


def rows_per_chunk(
    vocab: int,
    width: int,
    wide: torch.dtype,
    factor: torch.dtype,
    device: torch.device,
    workspace_mib: float | None,
) -> int:
    """Rows whose logits [vocab], x and dx [width] fill the workspace; at least MIN_ROWS.

    wide is the dtype of logits and dx, factor that of what GEMMs multiply; where they differ, the
    gradient of the logits has a buffer of its own.
    """
    if workspace_mib is None:
        workspace_mib = default_workspace_mib(device)
    row_bytes = (vocab + 2 * width) * wide.itemsize
    if factor != wide:
        row_bytes += vocab * factor.itemsize
    most = max(MIN_ROWS, int(min(workspace_mib, 2**30) * 2**20) // row_bytes)
    return min(most, _CPU_CHUNK_ROWS) if device.type == "cpu" else most


class ChunkedHead:
    """hidden_TD[rows] @ weight_VD.T a chunk of rows at a time, with the gradients of hidden and weight.

    for part in head.chunks():
        logits = head.project(part);  row pass from logits into head.grad_logits;  head.backward(part, ..)
    """

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        rows_N: Tensor,
        *,
        workspace_mib: float | None,
        needs_grad: tuple[bool, bool] = (False, False),
        skip_below: float = 0.0,
        wanted_N: Tensor | None = None,
    ):
        self.hidden_TD, self.rows_N, self.wanted_N, self.skip_below = hidden_TD, rows_N, wanted_N, skip_below
        self.wide, (vocab, width) = wide_dtype(hidden_TD), weight_VD.shape
        # a CPU has no fast bf16 arithmetic, so there everything is wide
        self.factor_dtype = hidden_TD.dtype if hidden_TD.is_cuda else self.wide
        self.weight_VD = weight_VD.to(self.factor_dtype)
        dtypes = self.wide, self.factor_dtype
        self.chunk_rows = rows_per_chunk(vocab, width, *dtypes, hidden_TD.device, workspace_mib)
        self.moves_rows_up = hidden_TD.device.type == "cpu"  # on a card rows keep their places
        buffer_rows = max(MIN_ROWS, min(self.chunk_rows, rows_N.numel()) + (skip_below > 0))
        self.logits = hidden_TD.new_empty((buffer_rows, vocab), dtype=self.wide)
        self.grad_logits = self.logits
        if self.factor_dtype != self.wide and any(needs_grad):
            self.grad_logits = torch.empty_like(self.logits, dtype=self.factor_dtype)
        self.needs_hidden, self.needs_weight = needs_grad
        self.grad_hidden_TD: Tensor | None = None
        self.grad_weight_VD: Tensor | None = None
        self.x = hidden_TD.new_empty((0, width))

    def chunks(self) -> Iterator[slice]:
        """Slices of about equal size, as few as chunk_rows allows."""
        num_rows = self.rows_N.numel()
        num_chunks = -(-num_rows // self.chunk_rows)
        for idx in range(num_chunks):
            yield slice(num_rows * idx // num_chunks, num_rows * (idx + 1) // num_chunks)

    def project(self, part: slice) -> Tensor:
        """Logits of the chunk's rows; they stand in self.logits until the next one."""
        rows = self.rows_N[part]
        num_rows = rows.numel()
        size = max(num_rows + (self.skip_below > 0), MIN_ROWS)
        self.x = self.hidden_TD.new_zeros((size, self.hidden_TD.shape[1]), dtype=self.factor_dtype)
        self.x[:num_rows] = self.hidden_TD.index_select(0, rows)
        if self.wanted_N is not None:  # a row that is not wanted may hold anything, and 0 * nan is not 0
            self.x[:num_rows].masked_fill_(~self.wanted_N[part, None], 0)
        matmul_(self.logits[:size], self.x, self.weight_VD.T)
        return self.logits[:num_rows]

    def backward(self, part: slice, has_grad: Tensor) -> None:
        """Adds the chunk's part to the gradients, from self.grad_logits; has_grad [n] is False where those are 0."""
        num_rows, rows, by_index = has_grad.numel(), self.rows_N[part], None
        if self.moves_rows_up:
            order = torch.arange(num_rows, device=has_grad.device)
            num_rows = self._move_up(has_grad, order)
            rows, by_index = self.rows_N[part][has_grad], order[:num_rows].argsort()
        if num_rows == 0:
            return
        size = max(num_rows + (self.skip_below > 0), MIN_ROWS)
        self.grad_logits[num_rows:size], self.x[num_rows:size] = 0, 0
        dx = self._skip_tiles(num_rows) if self.skip_below > 0 else self._add_products(size)
        if dx is not None:
            if self.grad_hidden_TD is None:
                self.grad_hidden_TD = torch.zeros_like(self.hidden_TD, dtype=self.wide)
            # Rows that were moved up are added in the order in which they came.
            dx = dx[:num_rows] if by_index is None else dx.index_select(0, by_index)
            _add_rows_(self.grad_hidden_TD, rows, dx)

    def _add_products(self, size: int) -> Tensor | None:
        """dweight += dlogits.T @ x over the chunk's first rows; returns their dx."""
        grad, x, is_first = self.grad_logits[:size], self.x[:size], self.grad_weight_VD is None
        if self.needs_weight:
            if self.grad_weight_VD is None:
                self.grad_weight_VD = torch.empty_like(self.weight_VD, dtype=self.wide)
            matmul_(self.grad_weight_VD, grad.T, x, accumulate=not is_first)
        if not self.needs_hidden:
            return None
        dx = torch.empty_like(x, dtype=self.wide)
        matmul_(dx, grad, self.weight_VD)
        return dx

    def _skip_tiles(self, num_rows: int) -> Tensor | None:
        """_add_products, tile by tile of the vocabulary, over the rows that reach skip_below somewhere in the tile."""
        grad, dx = self.grad_logits[: num_rows + 1], None
        if self.needs_weight and self.grad_weight_VD is None:
            self.grad_weight_VD = torch.zeros_like(self.weight_VD, dtype=self.wide)
        if self.needs_hidden:
            dx = self.x.new_zeros((num_rows + 1, self.x.shape[1]), dtype=self.wide)
        vocab = grad.shape[1]
        whole = vocab // SKIP_TILE * SKIP_TILE
        tiles = [grad[:, :whole].unflatten(1, (-1, SKIP_TILE)), grad[:, None, whole:]]
        largest = torch.cat([torch.maximum(x.amax(-1), -x.amin(-1)) for x in tiles if x.numel()], 1)
        tile_idx, rows = (~(largest < self.skip_below)).T.nonzero().unbind(1)  # nan is kept
        for tile, kept in enumerate(rows.split(tile_idx.bincount(minlength=largest.shape[1]).tolist())):
            if kept.numel() == 0:
                continue
            words = slice(tile * SKIP_TILE, min((tile + 1) * SKIP_TILE, vocab))
            # few different sizes, which GEMM libraries prepare for; the row behind the last holds zeros
            kept = F.pad(kept, (0, -kept.numel() % MIN_ROWS), value=num_rows)
            dz = grad[:, words].index_select(0, kept)
            if self.grad_weight_VD is not None:
                matmul_(self.grad_weight_VD[words], dz.T, self.x.index_select(0, kept), accumulate=True)
            if dx is not None:
                sums = dx.index_select(0, kept)
                matmul_(sums, dz, self.weight_VD[words], accumulate=True)
                dx.index_copy_(0, kept, sums)
        return dx

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of hidden and weight, wide; zeros where no row had one."""
        dx, dw = self.grad_hidden_TD, self.grad_weight_VD
        if self.needs_hidden and dx is None:
            dx = torch.zeros_like(self.hidden_TD, dtype=self.wide)
        if self.needs_weight and dw is None:
            dw = torch.zeros_like(self.weight_VD, dtype=self.wide)
        return dx, dw

    def _move_up(self, has_grad: Tensor, order: Tensor) -> int:
        """Moves rows with a gradient into the places of rows without; returns how many; `order` follows."""
        count = int(has_grad.sum())
        holes, movers = (~has_grad[:count]).nonzero()[:, 0], has_grad[count:].nonzero()[:, 0] + count
        for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
            self.grad_logits[hole] = self.grad_logits[mover]  # one by one: together they would need a second chunk
        self.x[holes], order[holes] = self.x[movers], movers
        return count


def matmul_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b, summed in the dtype of out."""
    if out.device.type == "cpu" and extension_is_built():
        torch.ops.socpo.matmul_(out, a, b, accumulate)
    elif a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=float(accumulate), out=out)
    else:
        # bf16 or fp16 factors on a GPU. That `out` may be fp32 while the factors are not needs
        # torch 2.10, the first release with pytorch PR 167931: hence the floor in pyproject.toml.
        torch.addmm(out, a, b, beta=float(accumulate), out_dtype=out.dtype, out=out)


def _add_rows_(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """total[rows[i]] += values[i], i in order: on a GPU index_add_ would use atomics, index_put_ sorts."""
    if total.is_cuda:
        total.index_put_((rows,), values, accumulate=True)
    else:
        total.index_add_(0, rows, values)
