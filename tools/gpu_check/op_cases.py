"""Every op that has Triton kernels, as cases for the error rule: inputs on the host, and a run.

Truth is the reference in fp64, plain the reference in the dtype at hand, both on the CPU; the rule
is that of the tests. Values are such that bf16 has them exactly, so all three compute on the same
numbers. Rows and widths stand next to no power of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from socpo_fast.ops import (
    CreditOptions,
    PolicyLossOptions,
    credit_attempts,
    decay_rewards,
    linear_logprob,
    linear_policy_loss,
    linear_sample,
    paged_attention,
    row_keys,
    tree_attention,
)
from socpo_fast.ops.paged_attention import paged_attention_flash
from socpo_fast.ops.rms_norm import rms_norm
from socpo_fast.ops.rotary import rotary_qkv
from socpo_fast.ops.rotary_write import rotary_write
from socpo_fast.ops.swiglu import swiglu
from tests.helpers.error_rule import assert_error_rule
from tools.tree_balance import visible_until_of_groups

Inputs = dict[str, Tensor]
Run = Callable[[Inputs, str], dict[str, Tensor]]  # (inputs, impl) -> what must be right
_FLOAT_32 = ("cos", "sin", "old", "temperature", "rewards")  # in fp32 at least, whatever the dtype
# Of an attention case: whole splits of the decode kernel are shared, on a card and interpreted.
SEQ_LENS = (1, 40, 300, 257, 300, 290, 64, 33)
FEW_SEQ_LENS = (1, 20, 40, 33, 40, 36, 35, 33)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).bfloat16().float()


def attention_inputs(
    seq_lens: list[int], q_lens: list[int], *, heads: tuple[int, int, int], page_size: int
) -> Inputs:
    """Random pages in random order, NaN where nothing may be read, a shared prefix."""
    num_heads, kv_heads, head_dim = heads
    width = -(-max(seq_lens) // page_size)
    num_shared = (256 if max(seq_lens) > 256 else 32) // page_size
    generator = torch.Generator().manual_seed(3)
    table = torch.randperm(len(seq_lens) * width, generator=generator).view(-1, width)
    table[:, :num_shared] = table[0, :num_shared].clone()
    caches = {}
    for name, seed in (("k", 1), ("v", 2)):
        caches[name] = torch.full((table.numel(), page_size, kv_heads, head_dim), torch.nan)
        for pages, length in zip(table, seq_lens, strict=True):
            slots = torch.arange(length)
            values = randn(width * page_size, kv_heads, head_dim, seed=seed)
            caches[name][pages[slots // page_size], slots % page_size] = values[:length]
    cu_seqlens = torch.tensor([0, *q_lens]).cumsum(0).int()
    return {
        "q": randn(sum(q_lens), num_heads, head_dim, seed=4),
        **caches,
        "table": table.int(),
        "seq_lens": torch.tensor(seq_lens).int(),
        "cu_seqlens": cu_seqlens,
    }


def attend(x: Inputs, impl: str) -> dict[str, Tensor]:
    """With the keys of siblings read once for all of them, and without."""
    tensors = [x[name] for name in ("q", "k", "v", "table", "seq_lens", "cu_seqlens")]
    scale = x["q"].shape[-1] ** -0.5
    if impl == "flash":
        max_seqlen_q = int(x["cu_seqlens"].diff().max())
        max_seqlen_k = int(x["seq_lens"].max())
        longest = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
        return {"o": paged_attention_flash(*tensors, scale=scale, **longest)}
    return {
        "o": paged_attention(*tensors, scale=scale, impl=impl),
        "o without cascade": paged_attention(*tensors, scale=scale, cascade=False, impl=impl),
    }


def _norm(x: Inputs, impl: str) -> dict[str, Tensor]:
    residual_TD = x["residual"]
    y, total = rms_norm(x["x"], x["weight"], eps=1e-6, residual_TD=residual_TD, impl=impl)
    return {"y": y, "sum": total}


def _swiglu(x: Inputs, impl: str) -> dict[str, Tensor]:
    gate_up = x["x"].clone().requires_grad_()
    y = swiglu(gate_up, impl=impl)
    y.backward(x["grad"])
    return {"y": y.detach(), "dx": gate_up.grad}


def _norms(x: Inputs) -> dict[str, Any]:
    """Of the heads of q and k, where the model has them."""
    if "q_weight" not in x:
        return {}
    return {"q_weight_E": x["q_weight"], "k_weight_E": x["k_weight"], "eps": 1e-6}


def _write(x: Inputs, impl: str) -> dict[str, Tensor]:
    k, v = (x[name].clone() for name in ("k", "v"))
    q = rotary_write(x["qkv"], x["cos"], x["sin"], k, v, x["slots"], **_norms(x), impl=impl)
    return {"q": q, "k": k, "v": v}


def _attend_tree(x: Inputs, impl: str) -> dict[str, Tensor]:
    """Forward and backward."""
    leaves = [x[name].clone().requires_grad_() for name in ("q", "k", "v")]
    o = tree_attention(*leaves, x["until"], scale=x["q"].shape[-1] ** -0.5, impl=impl)
    o.backward(x["grad"])
    gradients = {f"d{name}": leaf.grad for name, leaf in zip("qkv", leaves, strict=True)}
    return {"o": o.detach()} | gradients


def _rotary_qkv(x: Inputs, impl: str) -> dict[str, Tensor]:
    """Forward and backward, of the norms' weights too; their sums are over tokens and heads."""
    kv_heads = x["k"].shape[2]
    leaves = {
        name: x[name].clone().requires_grad_()
        for name in ("qkv", "q_weight", "k_weight")
        if name in x
    }
    q, k = rotary_qkv(
        leaves["qkv"], x["cos"], x["sin"], num_kv_heads=kv_heads, impl=impl, **_norms(x | leaves)
    )
    torch.cat((q, k), dim=1).backward(x["qkv"][:, :-kv_heads])
    return {"q": q.detach(), "k": k.detach()} | {
        f"d{name}": leaf.grad for name, leaf in leaves.items()
    }


def _sample(x: Inputs, impl: str) -> dict[str, Tensor]:
    """Tokens of clear draws only: temperature 0, whose leads are far above rounding."""
    temperature = x["temperature"].float()  # in the truth too: only logits have a wider dtype
    settings = {"temperature_B": temperature, "top_k_B": x["top_k"]}
    settings |= {
        "top_p_B": torch.ones_like(temperature),
        "min_p_B": torch.zeros_like(temperature),
    }
    drawn = linear_sample(x["hidden"], x["head"], x["keys"], **settings, impl=impl)
    ids, logprobs, entropy, _ = drawn
    greedy = x["temperature"] == 0
    return {"ids": ids[greedy].double(), "logprobs": logprobs[greedy], "entropy": entropy}


def _head(op: Callable[..., Any]) -> Run:
    def run(x: Inputs, impl: str) -> dict[str, Tensor]:
        hidden, head = (x[name].clone().requires_grad_() for name in ("hidden", "head"))
        if op is linear_logprob:
            logprobs, entropy = op(hidden, head, x["targets"], temperature=0.8, impl=impl)
            values = {"logprobs": logprobs, "entropy": entropy}
            loss = logprobs.cos().sum()
        else:
            given = hidden, head, x["targets"], x["old"], x["rewards"]
            options = {"temperature": 0.8, "num_loss_tokens": len(x["old"])}
            options["options"] = PolicyLossOptions(entropy_coef=0.1)
            result = op(*given, **options, impl=impl)
            values = {"logprobs": result.logprobs, "loss": result.loss}
            loss = result.loss
        loss.backward()
        gradients = {"dX": hidden.grad, "dW": head.grad}
        return {name: value.detach() for name, value in values.items()} | gradients

    return run


def _credit(x: Inputs, impl: str) -> dict[str, Tensor]:
    """Both kinds of credit, and decay alone."""
    decayed = decay_rewards(x["rewards"], x["attempts"], impl=impl)
    table = x["rewards"], x["lengths"], x["questions"], x["attempts"], x["rollouts"]
    by_attempt = credit_attempts(*table, options=CreditOptions(), impl=impl)
    grpo = CreditOptions(estimator="grpo", credit="trajectory", schedule="constant", factor=0.5)
    by_trajectory = credit_attempts(*table, options=grpo, impl=impl)
    return {
        "decayed": decayed,
        "advantages": by_attempt.advantages_A,
        "factors": by_attempt.factors_K,
        "trajectory rewards": by_trajectory.rewards_A,
        "trajectory advantages": by_trajectory.advantages_A,
    }


def op_cases(num_rows: int, vocab: int, width: int) -> dict[str, tuple[Run, Inputs]]:
    """Every op with heads of SmolLM2, and the ops that depend on heads with Qwen3's too."""
    index = torch.arange(num_rows)
    shrunk = 2.0 ** (1 - round(math.log2(width) / 2))  # logits of a few units
    head = {"hidden": randn(num_rows, width), "head": randn(vocab, width, seed=1) * shrunk}
    old = -4 - randn(num_rows).abs()
    rows = {"targets": index * 7 % vocab, "old": old, "rewards": randn(num_rows, seed=8)}
    draws = {
        "keys": row_keys(index.repeat(6, 1).t()),
        "temperature": (index % 3) / 2.0,
        "top_k": torch.zeros_like(index),
    }
    wide = randn(num_rows, width, seed=1)
    norm = {"x": randn(num_rows, width), "residual": wide, "weight": randn(width)}
    gate_up = {"x": randn(num_rows, 2 * width), "grad": wide}
    credit = {
        "attempts": index % 3,
        "questions": index // 6,
        "rollouts": index // 3 % 2,
        "lengths": 1 + index % 5,
        "rewards": (index % 2).float(),
    }
    cases: dict[str, tuple[Run, Inputs]] = {
        "rms_norm": (_norm, norm),
        "swiglu": (_swiglu, gate_up),
        "linear_sample": (_sample, head | draws),
        "linear_logprob": (_head(linear_logprob), head | rows),
        "linear_policy_loss": (_head(linear_policy_loss), head | rows),
        "decay and advantages": (_credit, credit),
    }
    for model, heads, page_size in (("SmolLM2", (6, 2, 64), 16), ("Qwen3", (16, 8, 128), 32)):
        for name, case in _head_cases(num_rows, heads, page_size, model == "Qwen3").items():
            cases[f"{name} of {model}"] = case
    return cases


def _head_cases(
    num_rows: int, heads: tuple[int, int, int], page_size: int, has_norms: bool
) -> dict[str, tuple[Run, Inputs]]:
    """What depends on a model's heads: attention, rotary, their norms."""
    num_heads, kv_heads, head_dim = heads
    frequencies = torch.linspace(1.0, 0.01, head_dim // 2)
    angles = torch.outer(torch.arange(num_rows), frequencies).repeat(1, 2)
    turns = {"cos": angles.cos(), "sin": angles.sin()}
    qkv = randn(num_rows, num_heads + 2 * kv_heads, head_dim)
    slots = torch.arange(num_rows).flip(0)
    caches = (num_rows // page_size + 1, page_size, kv_heads, head_dim)
    pages = {"qkv": qkv, "slots": slots, **turns, "k": torch.zeros(caches)}
    if has_norms:
        weights = (1 + 0.5 * randn(head_dim, seed=seed) for seed in (1, 2))
        pages |= dict(zip(("q_weight", "k_weight"), weights, strict=True))
    seq_lens = list(SEQ_LENS if num_rows >= 64 else FEW_SEQ_LENS)
    decode, prefill = (
        attention_inputs(seq_lens, q_lens, heads=heads, page_size=page_size)
        for q_lens in ([1] * len(seq_lens), [1, 20, 9, 1, 30, 0, 33, 5])
    )
    # A prompt that more rows see than a program of the backward takes.
    groups = [(700, [100, 300, 257]), (40, [1, 33])] if num_rows >= 256 else [(40, [20, 9])]
    until = visible_until_of_groups(groups)
    tree = {
        "q": randn(len(until), num_heads, head_dim),
        "k": randn(len(until), kv_heads, head_dim, seed=1),
        "v": randn(len(until), kv_heads, head_dim, seed=2),
        "until": until,
        "grad": randn(len(until), num_heads, head_dim, seed=3),
    }
    return {
        "decode": (attend, decode),
        "prefill": (attend, prefill),
        "tree": (_attend_tree, tree),
        "rotary_qkv": (_rotary_qkv, pages),
        "rotary_write": (_write, pages | {"v": torch.zeros(caches)}),
    }


def move(inputs: Inputs, dtype: torch.dtype, device: torch.device | str) -> Inputs:
    """To the device, and what is not of the model in fp32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    moved = {}
    for key, x in inputs.items():
        number = wide if key in _FLOAT_32 else dtype
        moved[key] = x.to(device, number if x.is_floating_point() else x.dtype)
    return moved


def compare(
    name: str, run: Run, inputs: Inputs, dtype: torch.dtype, device: torch.device, impl: str
) -> float:
    """Holds an implementation to the error rule; returns its largest error over the largest value.

    Raises:
        AssertionError: names the output, the first wrong element and the three values there.
    """

    actual = run(move(inputs, dtype, device), impl)
    plain = run(move(inputs, dtype, "cpu"), "ref")
    truth = run(move(inputs, torch.float64, "cpu"), "ref")
    worst = 0.0
    for key in actual:
        value = truth[key]
        scale = value.double().abs().nan_to_num().max().clamp(min=1e-30)
        three = [x[key].cpu().double() / scale for x in (actual, plain, truth)]
        assert_error_rule(*three, name=f"{name}: {key}", dtype=dtype)
        worst = max(worst, float((three[0] - three[2]).abs().nan_to_num().max()))
    return worst
