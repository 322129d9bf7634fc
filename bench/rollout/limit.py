"""Runs the linears of a case and nothing else, on the student's weights: the limit of any engine.

Shapes and order are those of the case, and each pass goes through every layer and the LM head; the
inputs are random. For each number of rows the fastest of several GEMMs is used. On a card each kind
of pass is a CUDA graph, since small products launched one by one from Python would wait for the
host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.machine import product_dtype
from bench.measure import time_rounds
from bench.rollout.cases import Step
from socpo_fast.model.decoder import Decoder
from socpo_fast.ops._impl import extension_is_built

Linear = Callable[[Tensor, Tensor, Tensor], object]  # input rows, weight, buffer of output rows


def linears(device: torch.device, dtype: torch.dtype) -> dict[str, Linear]:
    """Returns the available GEMMs for weights of this dtype; ours allocates its own output."""
    choices: dict[str, Linear] = {}
    if dtype == product_dtype(device, dtype):
        choices["torch"] = lambda x, weight, out: torch.mm(x, weight.t(), out=out)
    if device.type == "cpu" and extension_is_built():
        ops = torch.ops.socpo
        if dtype == torch.float32:
            choices["matmul_"] = lambda x, weight, out: ops.matmul_(out, x, weight.t(), False)
        choices["linear"] = lambda x, weight, out: ops.linear(x, weight, None)
    if not choices:
        choices["torch"] = lambda x, weight, out: torch.mm(x, weight.float().t(), out=out)
    return choices


class Limit:
    """Replays passes over one student's weights; `chosen` names the GEMM of each kind of pass."""

    def __init__(self, student: Decoder, steps: Sequence[Step]):
        self.head = student.lm_head.weight.detach()
        self.device = self.head.device
        blocks = [(layer.attention, layer.mlp) for layer in student.layers]
        modules = [(attn.qkv, attn.o, mlp.gate_up, mlp.down) for attn, mlp in blocks]
        self.layers = [linear.weight.detach() for layer in modules for linear in layer]
        self.linears = linears(self.device, self.head.dtype)
        self.steps = list(steps)
        # One pair of buffers, large enough for every linear, so that a replay allocates nothing.
        sizes = {(w.shape[i], step.rows) for w in self.layers for step in steps for i in (0, 1)}
        sizes |= {(self.head.shape[i], step.head_rows) for step in steps for i in (0, 1)}
        max_values = max(width * rows for width, rows in sizes)
        dtype = product_dtype(self.device, self.head.dtype)
        self.rows_in = torch.randn(max_values, device=self.device).to(dtype)
        self.rows_out = torch.empty_like(self.rows_in)
        self.chosen = {step: self._fastest(step) for step in dict.fromkeys(steps)}
        self._replays = {step: self._replay_of(step) for step in self.chosen}

    def replay(self) -> None:
        """Runs all passes of the case."""
        for step in self.steps:
            self._replays[step]()

    def prefill(self) -> None:
        """Runs the passes of the prompts: all up to the first one that decodes."""
        for step in self.steps:
            if not step.is_prefill:
                return
            self._replays[step]()

    def _replay_of(self, step: Step) -> Callable[[], object]:
        run = partial(self._pass, step, self.chosen[step])
        if self.device.type != "cuda":
            return run
        graph = torch.cuda.CUDAGraph()
        # Kernels must be loaded before they are captured; _fastest has run this pass before.
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _pass(self, step: Step, name: str) -> None:
        linear = self.linears[name]
        for weight in self.layers:
            self._run(linear, weight, step.rows)
        if step.head_rows:
            self._run(linear, self.head, step.head_rows)

    def _run(self, linear: Linear, weight: Tensor, rows: int) -> None:
        outs, ins = weight.shape
        rows_in = self.rows_in[: rows * ins].view(rows, ins)
        linear(rows_in, weight, self.rows_out[: rows * outs].view(rows, outs))

    def _fastest(self, step: Step, num_runs: int = 3) -> str:
        runs = [partial(self._pass, step, name) for name in self.linears]
        seconds = [min(times) for times in time_rounds(runs, num_runs, self.device)]
        return list(self.linears)[seconds.index(min(seconds))]
