"""Runs autograd's backward without its engine, which would ask the device for its streams.

`backward` and `grad` call the nodes of the graph, each one after all nodes that pass it gradients.
Read _run, _in_order, _visit; then _Saved and _Reads, which free memory as the engine does.
Departures from the engine: hooks of tensors and nodes do not run, and a graph can be walked only
once, since `saved_until_read` frees what its nodes had saved.

    loss -> MulBackward -> MmBackward -> AccumulateGrad (a leaf: has .variable)
            ^ arrived: {node: {index of its output: gradient}}
"""

from __future__ import annotations

import heapq
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.function import BackwardCFunction


def backward(roots: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Adds to .grad of every leaf what torch.autograd.backward would add.

    As in the engine, a first gradient becomes .grad without a copy where its strides fit.
    """
    _run(roots, gradients, _accumulate)


def grad(
    roots: Sequence[Tensor], leaves: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Returns what torch.autograd.grad returns for leaves of the graph; no .grad changes."""
    if not all(leaf.is_leaf for leaf in leaves):
        raise NotImplementedError("graph.grad: inputs must be leaves, got the result of an op")
    by_leaf: dict[int, Tensor] = {}

    def keep(variable: Tensor, gradient: Tensor) -> None:
        by_leaf[id(variable)] = gradient

    _run(roots, gradients, keep)
    return tuple(by_leaf.get(id(leaf)) for leaf in leaves)


def saved_until_read() -> torch.autograd.graph.saved_tensors_hooks:
    """Returns hooks that free saved tensors as soon as their node has run, as the engine does.

    Otherwise they would live as long as the graph, and a backward would seem to need more memory.
    """
    return torch.autograd.graph.saved_tensors_hooks(_Saved, _Saved.read)


class _Saved:
    """A tensor saved for a node; None once the node has run."""

    def __init__(self, tensor: Tensor):
        # Detached, as its grad_fn may be the node that saves it: a cycle that would never be freed.
        is_leaf = tensor.grad_fn is None
        self.tensor: Tensor | None = tensor if is_leaf else tensor.detach()

    def read(self) -> Tensor:
        assert self.tensor is not None, "a graph whose tensors have been freed is walked again"
        # A read by torch.utils.checkpoint is of a layer's input, which is needed for the whole
        # layer.
        is_checkpoint = sys._getframe(1).f_code.co_filename == torch.utils.checkpoint.__file__
        _reads.add(self, is_checkpoint=is_checkpoint)
        return self.tensor


class _Reads:
    """Saved tensors that have been read, and when each of them may be freed.

    Those of a node are freed when it has run. The inputs of a checkpointed layer stay until the
    next layer is recomputed: only then the layer's last node has run.
    """

    def __init__(self) -> None:
        self.by_node: list[_Saved] = []
        self.by_checkpoint: list[_Saved] = []
        self.by_last_checkpoint: list[_Saved] = []

    def add(self, saved: _Saved, *, is_checkpoint: bool) -> None:
        if is_checkpoint:
            _free(self.by_last_checkpoint)
            self.by_checkpoint.append(saved)
        else:
            self.by_node.append(saved)

    def end_node(self) -> None:
        _free(self.by_node)
        if self.by_checkpoint:
            self.by_last_checkpoint, self.by_checkpoint = self.by_checkpoint, []

    def end_graph(self) -> None:
        for reads in (self.by_node, self.by_checkpoint, self.by_last_checkpoint):
            _free(reads)


def _free(reads: list[_Saved]) -> None:
    for saved in reads:
        saved.tensor = None
    reads.clear()


_reads = _Reads()
_tasks = itertools.count()


def _run(
    roots: Sequence[Tensor],
    gradients: Sequence[Tensor],
    at_leaf: Callable[[Tensor, Tensor], None],
) -> None:
    """Calls each node after those it depends on, and at_leaf with each leaf's final gradient."""
    arrived: dict[Any, dict[int, Tensor]] = {}
    task = next(_tasks)  # torch.utils.checkpoint recomputes once a task
    with torch.no_grad(), mock.patch.object(torch._C, "_current_graph_task_id", return_value=task):
        for root, gradient in zip(roots, gradients, strict=True):
            _arrive(arrived, root.grad_fn, root.output_nr, gradient)
        try:
            for node in _in_order([root.grad_fn for root in roots]):
                if node in arrived:
                    _visit(node, arrived, at_leaf)
        finally:
            _reads.end_graph()


def _visit(
    node: Any,
    arrived: dict[Any, dict[int, Tensor]],
    at_leaf: Callable[[Tensor, Tensor], None],
) -> None:
    """Calls one node, frees what it had saved, and passes on its gradients."""
    if hasattr(node, "variable"):
        at_leaf(node.variable, arrived.pop(node)[0])
        return
    results = _call(node, arrived.pop(node))  # popped, so that its gradients are freed after it
    _reads.end_node()
    for (following, index), result in zip(node.next_functions, results, strict=True):
        if following is not None and result is not None:
            _arrive(arrived, following, index, result)


def _arrive(arrived: dict[Any, dict[int, Tensor]], node: Any, index: int, gradient: Tensor) -> None:
    """Adds a gradient to a node's input, in the shape and dtype that the node expects."""
    expected = node._input_metadata[index]
    shape = torch.Size(expected.shape)
    if gradient.shape != shape:  # the input was broadcast in the forward
        gradient = gradient.sum_to_size(shape)
    leaf = getattr(node, "variable", None)
    gradient = gradient.to(expected.dtype if leaf is None else leaf.grad_dtype)
    inputs = arrived.setdefault(node, {})
    inputs[index] = inputs[index] + gradient if index in inputs else gradient


def _in_order(roots: Sequence[Any]) -> Iterator[Any]:
    """Yields every node after all nodes that pass it gradients; the youngest ready node first.

    This is the engine's order: nodes made later in the forward come first, and leaves at once.
    """
    num_awaited: Counter[Any] = Counter()
    stack = list(dict.fromkeys(roots))
    visited = set(stack)
    while stack:
        followers = [node for node, _ in stack.pop().next_functions if node is not None]
        # Counts how many edges lead to each node: it is ready when all of them have brought a
        # gradient.
        num_awaited.update(followers)
        stack += [node for node in dict.fromkeys(followers) if node not in visited]
        visited.update(followers)
    ready = [(-node._sequence_nr(), idx, node) for idx, node in enumerate(dict.fromkeys(roots))]
    ready = [entry for entry in ready if num_awaited[entry[2]] == 0]
    heapq.heapify(ready)
    tie = itertools.count(len(roots))  # entries of one age stay in order; nodes cannot be compared
    while ready:
        _, _, node = heapq.heappop(ready)
        yield node
        for following, _ in node.next_functions:
            if following is None:
                continue
            num_awaited[following] -= 1
            if num_awaited[following] == 0:
                heapq.heappush(ready, (-following._sequence_nr(), next(tie), following))


def _call(node: Any, inputs: Mapping[int, Tensor]) -> Sequence[Tensor | None]:
    """Calls a node; returns one gradient for each of node.next_functions."""
    metadata = node._input_metadata
    gradients = [inputs.get(index) for index in range(len(metadata))]
    if not isinstance(node, BackwardCFunction):
        results = node(*gradients)
        return results if isinstance(results, tuple) else (results,)
    # A Function written in Python gets zeros where there is no gradient. It returns an entry for
    # each argument of its forward, also for those that are no tensors.
    for index, meta in enumerate(metadata):
        if gradients[index] is None:
            gradients[index] = torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device)
    results = node.apply(*gradients)
    results = results if isinstance(results, tuple) else (results,)
    flagged = zip(results, node.needs_input_grad, strict=True)
    needed = iter([gradient for gradient, is_needed in flagged if is_needed])
    return [None if following is None else next(needed) for following, _ in node.next_functions]


def _accumulate(variable: Tensor, gradient: Tensor) -> None:
    """Adds a gradient to a leaf, as AccumulateGrad does."""
    if variable.grad is not None:
        # In place, as autograd does without create_graph: .grad keeps its storage.
        variable.grad += gradient
    elif gradient.stride() == variable.stride():
        variable.grad = gradient
    else:
        variable.grad = torch.empty_like(variable).copy_(gradient)
