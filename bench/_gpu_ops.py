"""Each op's Triton kernels on a card beside the reference on the CPU: the part of gpu_check that needs no engine.

Truth is the reference in fp64, plain the reference in the dtype at hand, and the error rule of the tests holds. Values
are such that bf16 has them exactly, so that all three compute on the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from socpo_fast.ops import (
    compute_advantages,
    decay_rewards,
    linear_logprob,
    linear_policy_loss,
    linear_sample,
    paged_attention,
    row_keys,
)
from socpo_fast.ops._flash import paged_attention_flash
from socpo_fast.ops.rms_norm import rms_norm
from socpo_fast.ops.rotary import rotary, rotary_write
from socpo_fast.ops.swiglu import swiglu
from tests.error_rule import assert_bitwise_equal, assert_error_rule

Inputs = dict[str, Tensor]
Run = Callable[[Inputs, str], dict[str, Tensor]]  # (inputs, impl) -> what must be right
_FLOAT_32 = ("cos", "sin", "old", "temperature", "rewards")  # held in fp32 at least, whatever the dtype


def randn(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return values.bfloat16().float()


def attention_inputs(seq_lens: list[int], q_lens: list[int], *, heads: tuple[int, int, int], page_size: int) -> Inputs:
    """Random pages in random order, NaN where nothing may be read; all share the pages of their first 256 tokens."""
    num_heads, kv_heads, head_dim = heads
    width = -(-max(seq_lens) // page_size)
    table = torch.randperm(len(seq_lens) * width, generator=torch.Generator().manual_seed(3)).view(-1, width)
    table[:, : 256 // page_size] = table[0, : 256 // page_size].clone()
    caches = {}
    for name, seed in (("k", 1), ("v", 2)):
        caches[name] = torch.full((table.numel(), page_size, kv_heads, head_dim), torch.nan)
        for pages, length in zip(table, seq_lens, strict=True):
            slots, values = torch.arange(length), randn(width * page_size, kv_heads, head_dim, seed=seed)
            caches[name][pages[slots // page_size], slots % page_size] = values[:length]
    q = randn(sum(q_lens), num_heads, head_dim, seed=4)
    lengths = {"seq_lens": torch.tensor(seq_lens).int(), "cu_seqlens": torch.tensor([0, *q_lens]).cumsum(0).int()}
    return {"q": q, **caches, "table": table.int(), **lengths}


def attend(x: Inputs, impl: str) -> dict[str, Tensor]:
    """By an implementation; Triton's with the keys of siblings read once and, to the bit, without."""
    tensors, scale = [x[name] for name in ("q", "k", "v", "table", "seq_lens", "cu_seqlens")], x["q"].shape[-1] ** -0.5
    if impl == "flash":
        longest = {"max_seqlen_q": int(x["cu_seqlens"].diff().max()), "max_seqlen_k": int(x["seq_lens"].max())}
        return {"o": paged_attention_flash(*tensors, scale=scale, **longest)}
    o = paged_attention(*tensors, scale=scale, impl=impl)
    if impl == "triton":
        apart = paged_attention(*tensors, scale=scale, cascade=False, impl=impl)
        assert_bitwise_equal(o, apart, name="paged_attention with cascade")
    return {"o": o}


def _norm(x: Inputs, impl: str) -> dict[str, Tensor]:
    y, total = rms_norm(x["x"], x["weight"], eps=1e-6, residual_TD=x["residual"], impl=impl)
    return {"y": y, "sum": total}


def _write(x: Inputs, impl: str) -> dict[str, Tensor]:
    k, v = (x[name].clone() for name in ("k", "v"))
    q = rotary_write(x["qkv"], x["cos"], x["sin"], k, v, x["slots"], impl=impl)
    return {"q": q, "k": k, "v": v}


def _sample(x: Inputs, impl: str) -> dict[str, Tensor]:
    """Tokens of clear draws only: temperature 0 with leads far above rounding."""
    temperature = x["temperature"].float()  # in the truth too: only logits have a wider dtype
    settings = {"temperature_B": temperature, "top_k_B": x["top_k"]}
    settings |= {"top_p_B": torch.ones_like(temperature), "min_p_B": torch.zeros_like(temperature)}
    ids, logprobs, entropy, _ = linear_sample(x["hidden"], x["head"], x["keys"], **settings, impl=impl)
    greedy = x["temperature"] == 0
    return {"ids": ids[greedy].double(), "logprobs": logprobs[greedy], "entropy": entropy}


def _head(op: Callable[..., Any]) -> Run:
    def run(x: Inputs, impl: str) -> dict[str, Tensor]:
        hidden, head = (x[name].clone().requires_grad_() for name in ("hidden", "head"))
        if op is linear_logprob:
            logprobs, entropy = op(hidden, head, x["targets"], temperature=0.8, impl=impl)
            values, loss = {"logprobs": logprobs, "entropy": entropy}, logprobs.cos().sum()
        else:
            given = hidden, head, x["targets"], x["old"], x["rewards"]
            result = op(*given, temperature=0.8, num_loss_tokens=len(x["old"]), entropy_coef=0.1, impl=impl)
            values, loss = {"logprobs": result.logprobs, "loss": result.loss}, result.loss
        loss.backward()
        return {name: value.detach() for name, value in values.items()} | {"dX": hidden.grad, "dW": head.grad}

    return run


def _credit(x: Inputs, impl: str) -> dict[str, Tensor]:
    decayed = decay_rewards(x["rewards"], x["attempts"], schedule="batch_mean", impl=impl)
    given = x["rewards"], x["lengths"], x["questions"], x["attempts"]
    return {"decayed": decayed, "advantages": compute_advantages(*given, schedule="batch_mean", impl=impl)}


def op_cases(num_rows: int, vocab: int, width: int) -> dict[str, tuple[Run, Inputs]]:
    """Every op that has Triton kernels; rows and widths next to no power of two."""
    heads, angles = (6, 2, 64), torch.outer(torch.arange(num_rows), torch.linspace(1.0, 0.01, 32)).repeat(1, 2)
    turns = {"cos": angles.cos(), "sin": angles.sin()}
    index = torch.arange(num_rows)
    shrunk = 2.0 ** (1 - round(math.log2(width) / 2))  # logits of a few units
    head = {"hidden": randn(num_rows, width), "head": randn(vocab, width, seed=1) * shrunk}
    rows = {"targets": index * 7 % vocab, "old": -4 - randn(num_rows).abs(), "rewards": randn(num_rows, seed=8)}
    keys = row_keys(index.repeat(6, 1).t())
    draws = {"keys": keys, "temperature": (index % 3) / 2.0, "top_k": torch.zeros_like(index)}
    lengths, page = [1, 40, 300, 257, 300, 290, 64, 33], 16
    pages = {"qkv": randn(num_rows, 10, 64), "slots": index.flip(0), **turns}
    pages |= {name: torch.zeros(num_rows // page + 1, page, 2, 64) for name in ("k", "v")}
    norm = {"x": randn(num_rows, width), "residual": randn(num_rows, width, seed=1), "weight": randn(width)}
    decode, prefill = (
        attention_inputs(lengths, q_lens, heads=heads, page_size=page)
        for q_lens in ([1] * len(lengths), [1, 40, 9, 1, 60, 0, 64, 5])
    )
    credit = {"attempts": index % 3, "questions": index // 6, "lengths": 1 + index % 5, "rewards": (index % 2).float()}
    return {
        "paged_attention decode": (attend, decode),
        "paged_attention prefill": (attend, prefill),
        "rotary": (lambda x, impl: {"x": rotary(x["qkv"], x["cos"], x["sin"], impl=impl)}, pages),
        "rotary_write": (_write, pages),
        "rms_norm": (_norm, norm),
        "swiglu": (lambda x, impl: {"x": swiglu(x["x"], impl=impl)}, {"x": randn(num_rows, 2 * width)}),
        "linear_sample": (_sample, head | draws),
        "linear_logprob": (_head(linear_logprob), head | rows),
        "linear_policy_loss": (_head(linear_policy_loss), head | rows),
        "decay and advantages": (_credit, credit),
    }


def compare(name: str, run: Run, inputs: Inputs, dtype: torch.dtype, device: torch.device, impl: str) -> float:
    """Holds an implementation on a device to the error rule; returns its largest error over the largest value."""

    def of(dtype: torch.dtype, device: torch.device | str, impl: str) -> dict[str, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = {key: wide if key in _FLOAT_32 else dtype for key, x in inputs.items() if x.is_floating_point()}
        return run({key: x.to(device, dtypes.get(key, x.dtype)) for key, x in inputs.items()}, impl)

    actual, plain, truth = of(dtype, device, impl), of(dtype, "cpu", "ref"), of(torch.float64, "cpu", "ref")
    worst = 0.0
    for key, value in truth.items():
        scale = value.double().abs().nan_to_num().max().clamp(min=1e-30)
        three = [x[key].cpu().double() / scale for x in (actual, plain, truth)]
        assert_error_rule(*three, name=f"{name}: {key}", dtype=dtype)
        worst = max(worst, float((three[0] - three[2]).abs().nan_to_num().max()))
    return worst


def check_ops(device: torch.device, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, int, int]) -> dict[str, float]:
    """The largest relative error of each op in each dtype."""
    cases = op_cases(*sizes).items()
    return {
        f"{name} {str(dtype).removeprefix('torch.')}": compare(name, *case, dtype, device, "triton")
        for dtype in dtypes
        for name, case in cases
    }


def check_flash(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> dict[str, float]:
    """Pages of 256, decode and prefill."""
    lengths, figures = [1, 256, 257, 700], {}
    for name, q_lens in (("decode", [1] * 4), ("prefill", [1, 256, 30, 500])):
        inputs = attention_inputs(lengths, q_lens, heads=(6, 2, 64), page_size=256)
        inputs |= {key: inputs[key].nan_to_num() for key in ("k", "v")}
        for dtype in dtypes:
            figures[f"{name} {dtype}"] = compare(f"flash {name}", attend, inputs, dtype, device, "flash")
    return figures
