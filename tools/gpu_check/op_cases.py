"""Lists every op that has Triton kernels as a case for the error rule: inputs and a run.

The error rule is that of the tests. It compares three results: actual (the kernel), plain (the
reference in the same dtype) and truth (the reference in fp64), the last two on the CPU. Inputs are
exact in bf16, so all three compute on the same numbers. Sizes are not near a power of two. Read
compare, then op_cases.
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
Run = Callable[[Inputs, str], dict[str, Tensor]]  # (inputs, impl) -> results to compare
_FLOAT_32 = ("cos", "sin", "old", "temperature", "rewards")  # at least fp32 in every dtype
# Lengths of an attention case. The shared prefix is at least one whole split of the decode kernel,
# on a card (256 tokens) and with smaller tiles in the interpreter (32).
SEQ_LENS = (1, 40, 300, 257, 300, 290, 64, 33)
FEW_SEQ_LENS = (1, 20, 40, 33, 40, 36, 35, 33)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Returns normal numbers in fp32 that are exact in bf16."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).bfloat16().float()


def attention_inputs(
    seq_lens: list[int], q_lens: list[int], *, heads: tuple[int, int, int], page_size: int
) -> Inputs:
    """Makes pages in random order with a shared prefix, and NaN in slots that must not be read."""
    num_heads, kv_heads, head_dim = heads
    width = -(-max(seq_lens) // page_size)
    num_shared = (256 if max(seq_lens) > 256 else 32) // page_size
    generator = torch.Generator().manual_seed(3)
    table = torch.randperm(len(seq_lens) * width, generator=generator).view(-1, width)
    # Later sequences write the same values into the shared pages: `values` depends on the seed
    # only.
    table[:, :num_shared] = table[0, :num_shared].clone()
    caches = {}
    for name, seed in (("k", 1), ("v", 2)):
        # NaN in every slot that no sequence owns: reading one spoils the result visibly.
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
    """Runs paged attention, with the keys of siblings read once for all of them and without."""
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
    """Runs rms_norm with a residual."""
    residual_TD = x["residual"]
    y, total = rms_norm(x["x"], x["weight"], eps=1e-6, residual_TD=residual_TD, impl=impl)
    return {"y": y, "sum": total}


def _swiglu(x: Inputs, impl: str) -> dict[str, Tensor]:
    """Runs swiglu forward and backward."""
    gate_up = x["x"].clone().requires_grad_()
    y = swiglu(gate_up, impl=impl)
    y.backward(x["grad"])
    return {"y": y.detach(), "dx": gate_up.grad}


def _norms(x: Inputs) -> dict[str, Any]:
    """Returns the weights of the norms of q and k, if the model has them."""
    if "q_weight" not in x:
        return {}
    return {"q_weight_E": x["q_weight"], "k_weight_E": x["k_weight"], "eps": 1e-6}


def _write(x: Inputs, impl: str) -> dict[str, Tensor]:
    """Runs rotary_write into copies of the page pools."""
    k, v = (x[name].clone() for name in ("k", "v"))
    q = rotary_write(x["qkv"], x["cos"], x["sin"], k, v, x["slots"], **_norms(x), impl=impl)
    return {"q": q, "k": k, "v": v}


def _attend_tree(x: Inputs, impl: str) -> dict[str, Tensor]:
    """Runs tree attention forward and backward."""
    leaves = [x[name].clone().requires_grad_() for name in ("q", "k", "v")]
    o = tree_attention(*leaves, x["until"], scale=x["q"].shape[-1] ** -0.5, impl=impl)
    o.backward(x["grad"])
    gradients = {f"d{name}": leaf.grad for name, leaf in zip("qkv", leaves, strict=True)}
    return {"o": o.detach()} | gradients


def _rotary_qkv(x: Inputs, impl: str) -> dict[str, Tensor]:
    """Runs rotary_qkv forward and backward, also for the norms' weights."""
    kv_heads = x["k"].shape[2]
    leaves = {
        name: x[name].clone().requires_grad_()
        for name in ("qkv", "q_weight", "k_weight")
        if name in x
    }
    q, k = rotary_qkv(
        leaves["qkv"], x["cos"], x["sin"], num_kv_heads=kv_heads, impl=impl, **_norms(x | leaves)
    )
    # Any gradient will do, so the first heads of qkv serve as one.
    torch.cat((q, k), dim=1).backward(x["qkv"][:, :-kv_heads])
    return {"q": q.detach(), "k": k.detach()} | {
        f"d{name}": leaf.grad for name, leaf in leaves.items()
    }


def _sample(x: Inputs, impl: str) -> dict[str, Tensor]:
    """Runs linear_sample; compares tokens only at temperature 0, where rounding decides none."""
    temperature = x["temperature"].float()  # fp32 in the truth, too: only logits are wider there
    settings = {"temperature_B": temperature, "top_k_B": x["top_k"]}
    settings |= {
        "top_p_B": torch.ones_like(temperature),
        "min_p_B": torch.zeros_like(temperature),
    }
    results = linear_sample(x["hidden"], x["head"], x["keys"], **settings, impl=impl)
    ids, logprobs, entropy, _ = results
    # At other temperatures a draw can change by rounding, so tokens cannot be compared.
    greedy = x["temperature"] == 0
    return {"ids": ids[greedy].double(), "logprobs": logprobs[greedy], "entropy": entropy}


def _head(op: Callable[..., Any]) -> Run:
    """Returns a run of linear_logprob or linear_policy_loss, forward and backward."""

    def run(x: Inputs, impl: str) -> dict[str, Tensor]:
        hidden, lm_head = (x[name].clone().requires_grad_() for name in ("hidden", "head"))
        if op is linear_logprob:
            logprobs, entropy = op(hidden, lm_head, x["targets"], temperature=0.8, impl=impl)
            values = {"logprobs": logprobs, "entropy": entropy}
            # A function whose derivative differs from token to token.
            loss = logprobs.cos().sum()
        else:
            tensors = hidden, lm_head, x["targets"], x["old"], x["rewards"]
            options = {"temperature": 0.8, "num_loss_tokens": len(x["old"])}
            options["options"] = PolicyLossOptions(entropy_coef=0.1)
            result = op(*tensors, **options, impl=impl)
            values = {"logprobs": result.logprobs, "loss": result.loss}
            loss = result.loss
        loss.backward()
        gradients = {"dX": hidden.grad, "dW": lm_head.grad}
        return {name: value.detach() for name, value in values.items()} | gradients

    return run


def _credit(x: Inputs, impl: str) -> dict[str, Tensor]:
    """Runs both kinds of credit, and decay by itself."""
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
    """Returns a case for every op; ops that depend on heads have one for SmolLM2 and Qwen3 each."""
    index = torch.arange(num_rows)
    # Gives logits of a few units. A power of two, so that the weights stay exact in bf16.
    shrunk = 2.0 ** (1 - round(math.log2(width) / 2))
    lm_head = {"hidden": randn(num_rows, width), "head": randn(vocab, width, seed=1) * shrunk}
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
        "linear_sample": (_sample, lm_head | draws),
        "linear_logprob": (_head(linear_logprob), lm_head | rows),
        "linear_policy_loss": (_head(linear_policy_loss), lm_head | rows),
        "decay and advantages": (_credit, credit),
    }
    for model, heads, page_size in (("SmolLM2", (6, 2, 64), 16), ("Qwen3", (16, 8, 128), 32)):
        for name, case in _head_cases(num_rows, heads, page_size, model == "Qwen3").items():
            cases[f"{name} of {model}"] = case
    return cases


def _head_cases(
    num_rows: int, heads: tuple[int, int, int], page_size: int, has_norms: bool
) -> dict[str, tuple[Run, Inputs]]:
    """Returns the cases that depend on a model's heads: attention, rotary and their norms."""
    num_heads, kv_heads, head_dim = heads
    frequencies = torch.linspace(1.0, 0.01, head_dim // 2)
    angles = torch.outer(torch.arange(num_rows), frequencies).repeat(1, 2)
    tables = {"cos": angles.cos(), "sin": angles.sin()}
    qkv = randn(num_rows, num_heads + 2 * kv_heads, head_dim)
    slots = torch.arange(num_rows).flip(0)
    caches = (num_rows // page_size + 1, page_size, kv_heads, head_dim)
    pages = {"qkv": qkv, "slots": slots, **tables, "k": torch.zeros(caches)}
    if has_norms:
        weights = (1 + 0.5 * randn(head_dim, seed=seed) for seed in (1, 2))
        pages |= dict(zip(("q_weight", "k_weight"), weights, strict=True))
    seq_lens = list(SEQ_LENS if num_rows >= 64 else FEW_SEQ_LENS)
    decode, prefill = (
        attention_inputs(seq_lens, q_lens, heads=heads, page_size=page_size)
        for q_lens in ([1] * len(seq_lens), [1, 20, 9, 1, 30, 0, 33, 5])
    )
    # The prompt is seen by more rows than one program of the backward handles, so it is cut.
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
    """Moves inputs to a device and dtype; those that are not of the model are at least fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    moved = {}
    for key, x in inputs.items():
        float_dtype = wide if key in _FLOAT_32 else dtype
        moved[key] = x.to(device, float_dtype if x.is_floating_point() else x.dtype)
    return moved


def compare(
    name: str, run: Run, inputs: Inputs, dtype: torch.dtype, device: torch.device, impl: str
) -> float:
    """Checks an implementation by the error rule; returns its largest error over the largest value.

    Raises:
        AssertionError: names the output, the first wrong element and its three values.
    """

    actual = run(move(inputs, dtype, device), impl)
    plain = run(move(inputs, dtype, "cpu"), "ref")
    truth = run(move(inputs, torch.float64, "cpu"), "ref")
    worst = 0.0
    for key in actual:
        value = truth[key]
        scale = value.double().abs().nan_to_num().max().clamp(min=1e-30)
        # Scaled to the largest value, so that one tolerance fits all outputs.
        scaled = [x[key].cpu().double() / scale for x in (actual, plain, truth)]
        assert_error_rule(*scaled, name=f"{name}: {key}", dtype=dtype)
        worst = max(worst, float((scaled[0] - scaled[2]).abs().nan_to_num().max()))
    return worst
