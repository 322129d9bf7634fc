"""Checks that ops, compiled once, serve every number of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast import ops
from tests.helpers.elementwise import needs_cpp
from tests.ops.test_registered_ops import DRAWS, f


@needs_cpp
@pytest.mark.parametrize(
    "name", ["linear_policy_loss", "linear_sample", "tree_attention", "compute_advantages"]
)
def test_new_lengths_need_no_new_graph(name: str) -> None:
    """At most two graphs are compiled for twelve numbers of tokens.

    Every microbatch has another number of tokens, so a graph per number would compile for ever.
    """
    graphs = []
    weight = f(20, 8)

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def loss(h: Tensor, rows: Tensor) -> Tensor:
        tokens = {
            "targets_N": rows,
            "rows_N": rows,
            "old_logprobs_N": h[rows, 0],
            "advantages": h[rows, 1],
        }
        return ops.linear_policy_loss(h, weight, **tokens, temperature=1.0, num_loss_tokens=3).loss

    def sample(h: Tensor, rows: Tensor) -> Tensor:
        draws = {key: x[:1].expand(len(rows)).contiguous() for key, x in DRAWS.items()}
        return ops.linear_sample(h, weight, rows, rows_B=rows, **draws)[1]

    def attend(h: Tensor, rows: Tensor) -> Tensor:
        heads = h[:, None]
        return ops.tree_attention(
            heads, heads, heads, torch.full_like(h[:, 0], len(h)).int(), scale=1.0
        )

    def advantages(h: Tensor, rows: Tensor) -> Tensor:
        return ops.compute_advantages(h[:, 0].contiguous(), rows, rows, rows * 0)

    torch._dynamo.reset()
    functions = {
        "linear_policy_loss": loss,
        "linear_sample": sample,
        "tree_attention": attend,
        "compute_advantages": advantages,
    }
    compiled = torch.compile(functions[name], fullgraph=True, dynamic=True, backend=count)
    for length in range(5, 17):
        rows = torch.arange(length)
        torch.testing.assert_close(
            compiled(f(length, 8), rows), functions[name](f(length, 8), rows)
        )
    assert len(graphs) <= 2
