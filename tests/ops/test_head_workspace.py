"""Tests how many rows the policy head projects at once, and how it adds up their dX."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import (
    PolicyLossOptions,
    _fused_logprob,
    _fused_policy_loss,
    _head,
    available_impls,
    linear_logprob,
    linear_policy_loss,
)
from socpo_fast.ops._head import ChunkedHead, default_workspace_mib, rows_per_chunk
from tests.helpers.error_rule import assert_error_rule

CPU = torch.device("cpu")
CARD = torch.device("cuda", 1)
QWEN3_VOCAB = 151_936


@pytest.mark.parametrize(
    ("device", "width", "dtype", "rows"),
    [
        # 208 MiB / (151936 logits + x and dx of 1024, fp32) = 218103808 // 615936
        (CPU, 1024, torch.float32, 354),
        # 2048 MiB: 2147483648 // 615936, and with a bf16 gradient of 151936 // 919808, // 932096
        (CARD, 1024, torch.float32, 3486),
        (CARD, 1024, torch.bfloat16, 2334),
        (CARD, 2560, torch.bfloat16, 2303),
    ],
)
def test_rows_of_a_chunk(device: torch.device, width: int, dtype: torch.dtype, rows: int) -> None:
    """The default number of rows follows from the workspace and the bytes of a row."""
    assert rows_per_chunk(QWEN3_VOCAB, width, torch.float32, dtype, device, None) == rows
    # Row passes index the logits of a chunk in 64 bits, though by default 32 would suffice.
    assert rows * QWEN3_VOCAB < 2**31


def test_default_workspace_depends_on_the_device() -> None:
    assert (default_workspace_mib(CPU), default_workspace_mib(CARD)) == (208, 2048)
    sizes = 1000, 100, torch.float32, torch.float32
    assert rows_per_chunk(*sizes, CPU, None) == 512  # the most on a CPU
    assert rows_per_chunk(*sizes, CARD, None) == 2**31 // 4800
    for device in (CPU, CARD):
        assert rows_per_chunk(*sizes, device, 1e-6) == _head.MIN_ROWS
        assert rows_per_chunk(*sizes, device, 0.5) == 2**19 // 4800
    assert rows_per_chunk(*sizes, CARD, 1e308) == 2**50 // 4800
    assert rows_per_chunk(*sizes, CARD, 0.5, True) == 2**19 // 8800  # a softcap keeps capped logits


@pytest.mark.skipif("cpp" not in available_impls().values(), reason="extension not built")
def test_both_ops_use_the_default_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default of 0.25 MiB gives as many rows at once as a workspace_mib of 0.25."""
    chunk_rows: list[int] = []
    init = ChunkedHead.__init__

    def note_rows(self: ChunkedHead, *head_inputs: Tensor, **options: Any) -> None:
        init(self, *head_inputs, **options)
        chunk_rows.append(self.chunk_rows)

    monkeypatch.setattr(ChunkedHead, "__init__", note_rows)
    monkeypatch.setattr(_head, "CPU_WORKSPACE_MIB", 0.25)
    torch.manual_seed(0)
    head_inputs = torch.randn(40, 16), torch.randn(2000, 16), torch.arange(40)
    ones = torch.ones(40)
    for workspace_mib in (None, 0.25, 208.0):
        options: dict[str, Any] = {"workspace_mib": workspace_mib, "impl": "cpp", "temperature": 1}
        linear_logprob(*head_inputs, **options)
        linear_policy_loss(*head_inputs, -ones, ones, num_loss_tokens=40, **options)
    assert chunk_rows == [2**18 // (4 * 2032)] * 4 + [512] * 2


def run_backward(
    *,
    as_on_a_card: bool,
    needs_grad: tuple[bool, bool, bool] = (True, True, True),
) -> list[Tensor]:
    """Returns the gradients of 40 rows in chunks of 16.

    Every third row has no gradient, and rows of hidden repeat.
    """
    torch.manual_seed(1)
    hidden = torch.randn(9, 8)
    weight = torch.randn(50, 8)
    rows = torch.arange(40) * 5 % 9
    has_grad = torch.arange(40) % 3 != 1
    options: dict[str, Any] = {"workspace_mib": 1e-6, "needs_grad": needs_grad}
    chunked_head = ChunkedHead(hidden, weight, rows, compacts_rows=not as_on_a_card, **options)
    for chunk in chunked_head.chunks():
        chunked_head.project(chunk)
        num_rows = chunk.stop - chunk.start
        chunked_head.grad_logits[:num_rows] = torch.randn(num_rows, 50) * has_grad[chunk, None]
        chunked_head.backward(chunk, ~has_grad[chunk])
    return chunked_head.gradients()


def test_a_card_moves_and_sorts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card rows with a gradient stay where they are, and no sort runs.

    A CPU moves them up to make the products smaller; a card would have to wait for their number.
    """
    expected = run_backward(as_on_a_card=False)

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("rows that were never moved need no order")

    monkeypatch.setattr(Tensor, "argsort", refuse)
    monkeypatch.setattr(ChunkedHead, "_move_up", refuse)
    actual = run_backward(as_on_a_card=True)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_error_rule(ours, theirs, theirs.double(), name="gradient", dtype=torch.float32)
    assert run_backward(as_on_a_card=True, needs_grad=(False, True, True))[0].shape == (0,)
    with pytest.raises(AssertionError, match="never moved"):
        run_backward(as_on_a_card=False)


def keep_all(_: Tensor, *by_row: Tensor | None) -> list[Tensor | None]:
    """Keeps all rows, as keep_rows does on a card; the host cannot know how many are wanted."""
    return [x if x is None else x.contiguous() for x in by_row]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("op", ["policy", "policy with entropy", "policy, all values", "logprob"])
def test_rows_that_stay_may_hold_anything(
    op: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card rows without a gradient stay in the products, and may still hold NaN or inf.

    0 * nan is not 0, so the op has to clear them.
    """
    torch.manual_seed(2)
    hidden = torch.randn(40, 8)
    weight = torch.randn(50, 8)
    targets = torch.arange(40)
    targets[::4] = _head.NO_TARGET
    weights = torch.ones(40)
    weights[1::4] = 0
    if op == "logprob":
        targets[1::4] = _head.NO_TARGET
    grads = []
    for is_on_a_card in (False, True):
        if is_on_a_card:
            for module in (_fused_logprob, _fused_policy_loss):
                monkeypatch.setattr(module, "keep_rows", keep_all)
            hidden[::4] = torch.nan
            hidden[1::4] = torch.inf
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, torch.zeros(50))]
        options: dict[str, Any] = {"workspace_mib": 1e-6, "impl": "triton", "temperature": 1.0}
        options |= {"softcap": softcap, "bias_V": leaves[2]}
        if op == "logprob":
            linear_logprob(*leaves[:2], targets, **options)[0].nansum().backward()
        else:
            entropy_coef = 0.1 if op == "policy with entropy" else 0.0
            options |= {"metrics": "all" if op == "policy, all values" else "loss_rows"}
            options |= {
                "weights_N": weights,
                "options": PolicyLossOptions(entropy_coef=entropy_coef),
            }
            old = torch.full((40,), -4.0)
            linear_policy_loss(*leaves[:2], targets, old, torch.ones(40), **options).loss.backward()
        grads.append([leaf.grad for leaf in leaves])
    for clean, dirty in zip(*grads, strict=True):
        assert_error_rule(dirty, clean, clean.double(), name="gradient", dtype=torch.float32)
    assert not grads[1][0][::4].any()
    assert not grads[1][0][1::4].any()
