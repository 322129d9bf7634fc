"""The limit of a case: its own linears, replayed alone on the student's weights.

Shapes and order are those of the case, each pass through every layer and the LM head; the numbers that go in are
random. For each number of rows the fastest of several GEMMs runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import _card as card_of
from bench._rollout_cases import Step
from socpo_fast.model.decoder import Decoder
from socpo_fast.ops._impl import extension_is_built

Linear = Callable[[Tensor, Tensor, Tensor], object]  # rows in, weight, room for rows out


def linears(dtype: torch.dtype) -> dict[str, Linear]:
    """The GEMMs there are for weights of this dtype; our own makes its room itself."""
    found: dict[str, Linear] = {}
    if dtype == torch.float32:
        found["torch"] = lambda x, weight, out: torch.mm(x, weight.t(), out=out)
    if extension_is_built():
        if dtype == torch.float32:
            found["matmul_"] = lambda x, weight, out: torch.ops.socpo.matmul_(out, x, weight.t(), False)
        found["linear"] = lambda x, weight, out: torch.ops.socpo.linear(x, weight, None)
    if not found:
        found["torch"] = lambda x, weight, out: torch.mm(x, weight.float().t(), out=out)
    return found


class Limit:
    """Replays passes over the weights of one student; `chosen` names the linear for each kind of pass."""

    def __init__(self, student: Decoder, steps: Sequence[Step]):
        self.head = student.lm_head.weight.detach()
        modules = [(a.qkv, a.o, m.gate_up, m.down) for a, m in ((x.attention, x.mlp) for x in student.layers)]
        self.layers = [linear.weight.detach() for layer in modules for linear in layer]
        self.linears, self.steps = linears(self.head.dtype), list(steps)
        sizes = {(weight.shape[i], rows) for weight in self.layers for rows, _, _ in steps for i in (0, 1)}
        sizes |= {(self.head.shape[i], step.head_rows) for step in steps for i in (0, 1)}
        most = max(width * rows for width, rows in sizes)
        self.rows_in, self.rows_out = torch.randn(most), torch.empty(most)
        self.chosen = {step: self._fastest(step) for step in dict.fromkeys(steps)}

    def replay(self) -> None:
        for step in self.steps:
            self._pass(step, self.chosen[step])

    def prefill(self) -> None:
        """The passes in front of the first one that decodes."""
        for step in self.steps:
            if not step.is_prefill:
                return
            self._pass(step, self.chosen[step])

    def _pass(self, step: Step, name: str) -> None:
        linear = self.linears[name]
        for weight in self.layers:
            self._run(linear, weight, step.rows)
        if step.head_rows:
            self._run(linear, self.head, step.head_rows)

    def _run(self, linear: Linear, weight: Tensor, rows: int) -> None:
        outs, ins = weight.shape
        linear(self.rows_in[: rows * ins].view(rows, ins), weight, self.rows_out[: rows * outs].view(rows, outs))

    def _fastest(self, step: Step, num_runs: int = 3) -> str:
        samples = card_of.time_rounds([lambda name=name: self._pass(step, name) for name in self.linears], num_runs)
        seconds = [min(times) for times in samples]
        return list(self.linears)[seconds.index(min(seconds))]
