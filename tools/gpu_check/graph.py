"""The backward of autograd without its engine, which asks a device for its streams.

`backward` calls the nodes of the graph, each after all that it waits for. Departures from the
engine: hooks of tensors and nodes do not run, and independent nodes may come in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction


def backward(roots: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Adds to .grad of every leaf what torch.autograd.backward would, one node after the other.

    Hooks do not run. Gradients that nobody else holds become .grad without a copy, as there.
    """
    arrived: dict[Any, dict[int, Tensor]] = {}
    with torch.no_grad():
        for root, gradient in zip(roots, gradients, strict=True):
            _arrive(arrived, root.grad_fn, root.output_nr, gradient)
        for node in _in_order([root.grad_fn for root in roots]):
            if node not in arrived:
                continue
            inputs = arrived.pop(node)
            if hasattr(node, "variable"):
                _accumulate(node.variable, inputs[0])
                continue
            results = _call(node, inputs)
            for (following, index), result in zip(node.next_functions, results, strict=True):
                if following is not None and result is not None:
                    _arrive(arrived, following, index, result)


def _arrive(arrived: dict[Any, dict[int, Tensor]], node: Any, index: int, gradient: Tensor) -> None:
    """Adds a gradient to an input of a node, which says what shape and dtype it takes."""
    expected = node._input_metadata[index]
    shape = torch.Size(expected.shape)
    if gradient.shape != shape:  # it was broadcast
        gradient = gradient.sum_to_size(shape)
    leaf = getattr(node, "variable", None)
    gradient = gradient.to(expected.dtype if leaf is None else leaf.grad_dtype)
    inputs = arrived.setdefault(node, {})
    inputs[index] = inputs[index] + gradient if index in inputs else gradient


def _in_order(roots: Sequence[Any]) -> Iterator[Any]:
    """Every node of the graph, before those that need its result."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following]
    return reversed(order)


def _call(node: Any, inputs: Mapping[int, Tensor]) -> Sequence[Tensor | None]:
    """One gradient for each of node.next_functions."""
    metadata = node._input_metadata
    gradients = [inputs.get(index) for index in range(len(metadata))]
    if not isinstance(node, BackwardCFunction):
        results = node(*gradients)
        return results if isinstance(results, tuple) else (results,)
    # A Function written in Python gets zeros for what has no gradient, and its answer has an entry
    # for each argument, tensor or not.
    for index, meta in enumerate(metadata):
        if gradients[index] is None:
            gradients[index] = torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device)
    results = node.apply(*gradients)
    results = results if isinstance(results, tuple) else (results,)
    answers = zip(results, node.needs_input_grad, strict=True)
    needed = iter([gradient for gradient, is_needed in answers if is_needed])
    return [None if following is None else next(needed) for following, _ in node.next_functions]


def _accumulate(variable: Tensor, gradient: Tensor) -> None:
    if variable.grad is not None:
        variable.grad += gradient
    elif gradient.stride() == variable.stride():
        variable.grad = gradient
    else:
        variable.grad = torch.empty_like(variable).copy_(gradient)
