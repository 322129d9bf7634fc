"""Links a decoder to the live transformers module whose parameters are views of its own.

Only storage is shared: autograd sees two sets of parameters. So gradients are handed over before
and after our backward:

    module    q_proj.weight | k_proj.weight | v_proj.weight      views of rows of
    decoder   attention.qkv.weight                               one tensor; and so are their .grad
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from socpo_fast.model.accumulate import MARK

# Each parameter of ours with its parts: the table of a module (`_parameters`), its name there, its
# rows in ours. Looked up anew every time, since somebody may put another parameter into the table.
Parts = list[tuple[Any, list[tuple[dict[str, Any], str, slice]]]]


class SharedWeights:
    """The parameters of a live module that are views of a decoder's parameters.

    Attributes:
        module: the live module.
        parts:  the decoder's parameters with the module's; under tied embeddings the module's head
                is an entry of its own.
    """

    def __init__(self, module: nn.Module, parts: Parts):
        self.module = module
        self.parts = parts
        # The views that link_grads handed out last, by the place of their parameter.
        self._handed_out: dict[tuple[int, str], Tensor] = {}

    def __deepcopy__(self, _memo: object) -> None:
        """Returns None: a copy of the decoder has storage of its own."""

    def entries(self) -> list[tuple[dict[str, Any], str]]:
        """Returns where the module's parameters are to be found: table and name of each."""
        return [(table, leaf) for _, entries in self.parts for table, leaf, _ in entries]

    def addresses(self) -> list[int]:
        """Returns where those parameters are as long as the link holds, in the same order."""
        return [param[rows].data_ptr() for param, entries in self.parts for _, _, rows in entries]

    @contextmanager
    def link_grads(self) -> Iterator[None]:
        """Makes each .grad of the module a view of ours, around a backward of the decoder.

        Gradients that the module has before are kept: they are copied into ours, unless they are
        views of it already. If it has none (`zero_grad`), ours begins anew, and so does the
        module's if somebody has cleared ours. A parameter that is frozen in the module gets none.

        Parameters that our own optimizer owns are left alone: it reads and drops ours.
        """
        linked = [(param, entries) for param, entries in self.parts if not hasattr(param, MARK)]
        for param, entries in linked:
            param.requires_grad_(any(table[leaf].requires_grad for table, leaf, _ in entries))
            if param.grad is None:
                for table, leaf, _ in entries:
                    if table[leaf].grad is self._handed_out.get((id(table), leaf)):
                        table[leaf].grad = None
            grads = [table[leaf].grad for table, leaf, _ in entries]
            if all(grad is None for grad in grads):
                param.grad = None
                continue
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            for grad, (_, _, rows) in zip(grads, entries, strict=True):
                view = param.grad[rows]
                if grad is None:
                    view.zero_()
                elif grad.data_ptr() != view.data_ptr():
                    view.copy_(grad)
        yield
        for param, entries in linked:
            for table, leaf, rows in entries if param.grad is not None else ():
                if table[leaf].requires_grad:
                    self._handed_out[id(table), leaf] = table[leaf].grad = param.grad[rows]
