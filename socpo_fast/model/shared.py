"""Links a decoder to the live transformers module whose parameters are views of its own.

Read SharedWeights.link_grads, then count_optimizer_steps. Only storage is shared: autograd sees two
sets of parameters. So gradients are handed over before and after our backward:

    module    q_proj.weight | k_proj.weight | v_proj.weight      views of rows of
    decoder   attention.qkv.weight                               one tensor; and so are their .grad
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from socpo_fast.model.accumulate import MARK

# Each parameter of ours with its parts: the table of a module (`_parameters`), its name there, its
# rows in ours. Looked up anew every time, since somebody may put another parameter into the table.
Parts = list[tuple[Any, list[tuple[dict[str, Any], str, slice]]]]


class SharedWeights:
    """The parameters of a live module that are views of a decoder's parameters.

    Attributes:
        num_optimizer_steps: steps, since the link was made, of torch optimizers that hold one of
            the module's parameters. It tells of writes that torch does not count.
    """

    def __init__(self, parts: Parts):
        self.parts = parts
        self.num_optimizer_steps = 0
        _linked.add(self)

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
        views of it already. If it has none (`zero_grad`), ours begins anew.

        Parameters that our own optimizer owns are left alone: it reads and drops ours.
        """
        linked = [(param, entries) for param, entries in self.parts if not hasattr(param, MARK)]
        for param, entries in linked:
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
            if param.grad is not None:
                for table, leaf, rows in entries:
                    table[leaf].grad = param.grad[rows]


_linked: WeakSet[SharedWeights] = WeakSet()


def count_optimizer_steps() -> None:
    """Counts, from now on, the steps of all optimizers in the links that they concern."""
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_count_step))


_hooks: list[Any] = []


def _count_step(optimizer: Optimizer, *_args: object) -> None:
    """Is called by torch after every optimizer step of the process."""
    stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for shared in _linked:
        if any(id(table[leaf]) in stepped for table, leaf in shared.entries()):
            shared.num_optimizer_steps += 1
