"""Runs the policy head's three GEMMs and nothing else, in their best chunking: the head's limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.machine import matmuls, product_dtype
from bench.measure import first_seconds

Gemms = tuple[str, int, int]  # library, rows and columns of a tile of logits


def gemm_choices(num_rows: int, vocab_size: int, device: torch.device) -> list[Gemms]:
    """Returns the libraries and chunkings among which to look for the fastest.

    On a card logits are chunked by rows only. Chunks of columns would add up dX in several steps
    and round it to bf16 after each.
    """
    is_card = device.type == "cuda"
    row_counts = (128, 256, 512)
    column_counts = (2048, 8192)
    if is_card:
        row_counts = (1024, 2048, 4096)
        column_counts = ()
    by_rows = [(rows, vocab_size) for rows in row_counts if rows < num_rows]
    by_columns = [(num_rows, columns) for columns in column_counts if columns < vocab_size]
    tiles = (*by_rows, *by_columns, (num_rows, vocab_size))
    return [(library, *tile) for library in matmuls(device) for tile in tiles]


def fastest_gemms(hidden_ND: Tensor, weight_VD: Tensor) -> list[Gemms]:
    """Returns each library's fastest chunking."""
    device = hidden_ND.device
    choices = gemm_choices(hidden_ND.shape[0], weight_VD.shape[0], device)
    runs = bare_gemms(hidden_ND, weight_VD, choices)
    seconds = {choice: first_seconds(run, device) for choice, run in runs.items()}
    return [
        min((choice for choice in choices if choice[0] == library), key=seconds.__getitem__)
        for library in matmuls(device)
    ]


def bare_gemms(
    hidden_ND: Tensor, weight_VD: Tensor, choices: Sequence[Gemms]
) -> dict[Gemms, Callable[[], tuple[Tensor, Tensor]]]:
    """Returns a run for each choice: logits, dX and dW into buffers made here; dW in fp32."""
    factor_dtype = product_dtype(hidden_ND.device, hidden_ND.dtype)
    hidden_ND = hidden_ND.to(factor_dtype)
    weight_VD = weight_VD.to(factor_dtype)
    grad_hidden = torch.zeros_like(hidden_ND)
    grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
    max_logits = max(min(rows, hidden_ND.shape[0]) * columns for _, rows, columns in choices)
    buffer = hidden_ND.new_zeros(max_logits)

    @torch.no_grad()
    def run(library: str, num_rows: int, num_columns: int) -> tuple[Tensor, Tensor]:
        matmul = matmuls(hidden_ND.device)[library]
        for row in range(0, hidden_ND.shape[0], num_rows):
            hidden, grad_h = (x[row : row + num_rows] for x in (hidden_ND, grad_hidden))
            for column in range(0, weight_VD.shape[0], num_columns):
                columns = slice(column, column + num_columns)
                weight = weight_VD[columns]
                grad_w = grad_weight[columns]
                logits = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
                matmul(logits, hidden, weight.T, False)
                matmul(grad_h, logits, weight, column > 0)
                matmul(grad_w, logits.T, hidden, row > 0)
        return grad_hidden, grad_weight

    return {choice: partial(run, *choice) for choice in choices}
