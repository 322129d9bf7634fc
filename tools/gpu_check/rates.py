"""Stage `rates`: measures each kernel by itself against the card's ceiling, at shapes of Qwen3.

Every figure is bytes (each tensor once) or FLOPs over time. L2 is cold and launches run inside a
CUDA graph, so neither the host nor a warm cache is measured. The decode and sampling kernels are
also tried with other tiles and pipeline depths, for later work to choose from.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from socpo_fast.kernels import (
    linear_policy_loss,
    linear_sample,
    paged_attention,
)
from socpo_fast.kernels import rms_norm as norms
from socpo_fast.kernels import swiglu as gates
from socpo_fast.kernels.filtered_draw import Filters
from socpo_fast.kernels.rotary import rotary_qkv, rotary_write
from socpo_fast.kernels.rotary_backward import rotary_qkv_backward
from socpo_fast.model import ModelConfig
from socpo_fast.ops import row_keys
from socpo_fast.ops.rotary import split_qkv
from tools.gpu_check.adamw import adamw
from tools.gpu_check.check import Check, Part, check_close
from tools.gpu_check.decode_kernel import (
    DECODE,
    PAGE_SIZE,
    TINY_DECODE,
    VARIANTS,
    VARIED,
    DecodeCall,
    DecodeShape,
    WithOptions,
    decode_inputs,
    variant,
)
from tools.gpu_check.models import MODELS
from tools.gpu_check.rooflines import sample_bytes
from tools.gpu_check.timing import Run, median_ms


def decode_attention(check: Check) -> None:
    """Measures one layer's decode attention at several batches and contexts."""
    for shape in TINY_DECODE if check.tiny else DECODE:
        of = f"{shape.model}, {shape.batch} x {shape.context}{shape.sharing}"
        key = "rates.decode_gb_s" if shape.batch >= 64 else "rates.decode_few_gb_s"
        key = "rates.decode_shared_gb_s" if shape.group > 1 else key
        with check.case(f"decode {of}"):
            rate = DecodeCall(check, shape).gb_s()
            check.figure(key, rate, of=of, limit=check.ceilings.read_gb_s)


def decode_variants(check: Check) -> None:
    """Measures it with other tiles, splits and pipeline depths; all results must agree."""
    for shape in TINY_DECODE[:1] if check.tiny else VARIED:
        call = DecodeCall(check, shape)
        # The kernel as shipped; stage `kernels` compares it with fp64.
        truth = call.run().double()
        for name, changes in VARIANTS.items():
            of = f"{name}, {shape.batch} x {shape.context}"
            call.cascade = bool(changes.get("cascade", 1))
            tiles = {name: value for name, value in changes.items() if name != "cascade"}
            with check.case(f"decode variant {of}"), variant(**tiles):
                check_close(of, call.run(), truth, bound=1e-2)
                limit = check.ceilings.read_gb_s
                check.figure("rates.decode_variant_gb_s", call.gb_s(), of=of, limit=limit)


def prefill_attention(check: Check) -> None:
    """Measures prefill of whole prompts, and of guidance after long contexts."""
    config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
    cases = {
        "8 prompts of 1000": (8, 1000, 1000),
        "64 suffixes of 131 behind 1300": (64, 131, 1431),
    }
    if check.tiny:
        cases = {"2 prompts of 20": (2, 20, 20)}
    for of, (batch, new_tokens, context) in cases.items():
        shape = DecodeShape("", batch, context)
        # Pages as for decode; the queries are many tokens a sequence here.
        _, k, v, table, seq_lens, _ = decode_inputs(check, config, shape, 0)
        q = check.randn(batch * new_tokens, config.num_heads, config.head_dim, seed=3)
        cu_seqlens = torch.arange(0, (batch + 1) * new_tokens, new_tokens, device=check.device)

        def run(
            tensors: tuple[Tensor, ...] = (q, k, v, table, seq_lens, cu_seqlens.int()),
            new_tokens: int = new_tokens,
            context: int = context,
        ) -> Tensor:
            max_lens = {"max_seqlen_q": new_tokens, "max_seqlen_k": context}
            return paged_attention.paged_attention_triton(*tensors, scale=0.1, **max_lens)

        # Query i of the new tokens sees all keys but the new ones after it.
        pairs = batch * new_tokens * (context - (new_tokens - 1) / 2)
        flops = 4 * pairs * config.num_heads * config.head_dim
        rate = 1e-9 * flops / median_ms(run, check.device, in_graph=True)
        check.figure("rates.prefill_tflop_s", rate, of=of, limit=check.ceilings.bf16_tflop_s)


def head_and_draw(check: Check) -> None:
    """Measures the LM head with its draw in one pass, by registers and with a filter."""
    config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
    vocab = config.vocab_size
    width = config.hidden_size
    weight = check.randn(vocab, width, seed=1) * width**-0.5
    kernel = linear_sample._sample_tile_kernel
    for batch in (2,) if check.tiny else (1, 64, 256):
        hidden = check.randn(batch, width, seed=2)
        keys = row_keys(torch.arange(batch).repeat(6, 1).t()).to(check.device)
        temperature = torch.ones(batch, device=check.device)
        top_p = torch.full((batch,), 0.95, device=check.device)
        filters = Filters(torch.zeros_like(keys), top_p, torch.zeros_like(top_p))

        gemm_ms = check.ceilings.bf16_ms(2 * batch * vocab * width)
        # The kernel ships with a limit of registers, so that two blocks fit on a multiprocessor;
        # "any registers" lifts it.
        for name, options, draw_filters in (
            ("", {}, None),
            (", any registers", {"maxnreg": None}, None),
            (", top-p", {}, filters),
        ):
            if options and not check.is_cuda:
                continue
            num_bytes = sample_bytes(batch, vocab, width, weight.itemsize)
            if draw_filters is not None:  # logits in fp32, written and read at least once
                num_bytes += 8 * batch * vocab
            # With many rows the product takes longer than reading the weights, and is the limit.
            limit = 1e-6 * num_bytes / max(check.ceilings.read_ms(num_bytes), gemm_ms)
            run = partial(
                linear_sample.linear_sample_triton,
                hidden,
                weight,
                keys,
                temperature,
                None,
                draw_filters,
            )
            # The launcher looks its kernel up in the module, so it can be replaced there.
            linear_sample._sample_tile_kernel = (
                WithOptions(kernel, **options) if options else kernel
            )
            try:
                rate = 1e-6 * num_bytes / median_ms(run, check.device, in_graph=True)
            finally:
                linear_sample._sample_tile_kernel = kernel
            check.figure("rates.sample_gb_s", rate, of=f"{batch} rows{name}", limit=limit)


def elementwise(check: Check) -> None:
    """Measures norms, gate, rotary, page writes and the policy head's row pass, both ways."""
    config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
    num_tokens = 7 if check.tiny else 65536  # many, so that a graph's launch is a small share
    for of, (run, num_bytes) in elementwise_runs(check, config, num_tokens).items():
        with check.case(f"elementwise {of}"):
            rate = 1e-6 * num_bytes / median_ms(run, check.device, in_graph=True)
            limit = check.ceilings.copy_gb_s
            check.figure("rates.elementwise_gb_s", rate, of=of, limit=limit)


def elementwise_runs(
    check: Check, config: ModelConfig, num_tokens: int
) -> dict[str, tuple[Run, int]]:
    """Returns {name: (the call, bytes of its tensors, each once)}."""
    width = config.hidden_size
    inner = config.intermediate_size
    head_dim = config.head_dim
    x, residual, grad = (check.randn(num_tokens, width, seed=seed) for seed in (1, 2, 3))
    weight = check.randn(width, seed=4)
    head_weight = check.randn(head_dim, seed=4)
    gate_up = check.randn(num_tokens, 2 * inner, seed=5)
    grad_gate = check.randn(num_tokens, inner, seed=6)
    num_heads = config.num_heads + 2 * config.num_kv_heads
    qkv = check.randn(num_tokens, num_heads, head_dim, seed=7)
    grads = [x.contiguous() for x in split_qkv(qkv, config.num_kv_heads)]
    angles = check.randn(num_tokens, head_dim, seed=8, dtype=torch.float32)
    num_pages = -(-num_tokens // PAGE_SIZE)
    cache = torch.zeros(
        num_pages, PAGE_SIZE, config.num_kv_heads, head_dim, dtype=x.dtype, device=check.device
    )
    slots = torch.arange(num_tokens, device=check.device)
    rope = angles, angles, head_weight, head_weight, 1e-6
    qk_bytes = grads[0].nbytes + grads[1].nbytes
    token = x.itemsize * width
    tables = 2 * angles.nbytes
    num_rows = 3 if check.tiny else 1024
    return {
        "norm with residual": (lambda: norms.rms_norm(x, weight, 1e-6, residual), 4 * x.nbytes),
        "norm, backward": (
            lambda: norms.rms_norm_backward(x, weight, 1e-6, grad, residual),
            4 * num_tokens * token,
        ),
        "swiglu": (lambda: gates.swiglu(gate_up), 3 * grad_gate.nbytes),
        "swiglu, backward": (
            lambda: gates.swiglu_backward(gate_up, grad_gate),
            5 * grad_gate.nbytes,
        ),
        "norms of q and k, rotary": (
            lambda: rotary_qkv(qkv, *rope, config.num_kv_heads),
            2 * qk_bytes + tables,
        ),
        "norms of q and k, rotary, backward": (
            lambda: rotary_qkv_backward(*grads, qkv, *rope),
            qk_bytes + 2 * qkv.nbytes + tables,
        ),
        "norms of q and k, rotary, page write": (
            lambda: rotary_write(qkv, *rope, cache, cache, slots),
            2 * qkv.nbytes + tables,
        ),
        "policy rows": row_pass(check, num_rows, config.vocab_size),
    }


def row_pass(check: Check, num_rows: int, vocab: int) -> tuple[Run, int]:
    """Returns the policy head's row pass: reads fp32 logits, writes their gradient, each once."""
    logits = check.randn(num_rows, vocab, seed=1, dtype=torch.float32)
    grad = torch.empty_like(logits, dtype=check.dtype)
    targets = torch.arange(num_rows, device=check.device) % vocab
    row = torch.ones(num_rows, device=check.device)
    row_inputs = targets, row - 10, row, None, row, row
    settings = (0.2, 0.2, 3.0, 0.0, None, 0.0, 3, True)
    return (
        lambda: linear_policy_loss.policy_rows(logits, grad, *row_inputs, *settings),
        logits.nbytes + grad.nbytes,
    )


def launch_latency(check: Check) -> None:
    """Measures a graph of one kernel that does nothing: the time that no figure can go below."""
    x = torch.zeros(1, device=check.device)
    us = 1e3 * median_ms(lambda: x.add_(0), check.device, in_graph=True)
    check.figure("rates.empty_graph_us", us)


PARTS: dict[str, Part] = {
    "launch latency": launch_latency,
    "decode attention": decode_attention,
    "head and draw": head_and_draw,
    "elementwise": elementwise,
    "adamw": adamw,
    "prefill attention": prefill_attention,
    "decode variants": decode_variants,
}
