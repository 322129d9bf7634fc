"""Stage `ceilings`: what the card can do, and what PyTorch does with it. Every limit rests on it.

The rates are those of large copies and square products. Then two questions on which later work
depends: does a product of bf16 factors add into an fp32 tensor, and which attention does PyTorch
pick for a tree of segments (a mask and grouped heads rule several out)?
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from socpo_fast.ops._head import matmul_
from tools.gpu_check.check import Check, Part, Skipped, check_close
from tools.gpu_check.timing import median_ms, peak_gib, profile_table

GEMM, TINY_GEMM = 8192, 64
COPY_BYTES, TINY_COPY_BYTES = 4 << 30, 1 << 20
# A group of eight rollouts: segment rows and keys seen, Qwen3-0.6B's heads.
TREE = {"prompt": 1000, "answer": 300, "rollouts": 8, "heads": 16, "kv_heads": 8, "head_dim": 128}
TINY_TREE = {"prompt": 30, "answer": 7, "rollouts": 2, "heads": 4, "kv_heads": 2, "head_dim": 16}


def copy_rate(check: Check) -> None:
    """Device to device; bytes read and bytes written both count."""
    num_bytes = TINY_COPY_BYTES if check.tiny else COPY_BYTES
    source = torch.ones(num_bytes, dtype=torch.int8, device=check.device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), check.device)
    check.figure("ceilings.copy_gb_s", 2e-6 * num_bytes / ms)


def gemm_rates(check: Check) -> None:
    """Square products in bf16, fp32 and fp32 by tf32."""
    size = TINY_GEMM if check.tiny else GEMM
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "ieee"),
        ("fp32", torch.float32, "ieee"),
        ("tf32", torch.float32, "tf32"),
    ):
        a, b = (check.randn(size, size, seed=seed, dtype=dtype) for seed in (0, 1))
        backend.fp32_precision = precision
        try:
            ms = median_ms(lambda a=a, b=b: a @ b, check.device)
        finally:
            backend.fp32_precision = before
        check.figure(f"ceilings.{name}_tflop_s", 2e-9 * size**3 / ms)


def accumulate_fp32(check: Check) -> None:
    """bf16 factors into an fp32 tensor, over NaN and added: how weights get their gradient."""
    size = TINY_GEMM if check.tiny else GEMM // 2
    a, b = (check.randn(size, size, seed=seed) for seed in (0, 1))
    out = torch.full((size, size), torch.nan, dtype=torch.float32, device=check.device)
    truth = a[:64].double() @ b.double()
    matmul_(out, a, b)
    check_close("over NaN", out[:64], truth)
    matmul_(out, a, b, accumulate=True)
    check_close("added to itself", out[:64], 2 * truth)
    ms = median_ms(lambda: matmul_(out, a, b, accumulate=True), check.device)
    limit = check.ceilings.bf16_tflop_s if check.is_cuda else None
    check.figure("ceilings.accumulate_tflop_s", 2e-9 * size**3 / ms, limit=limit)


def sdpa_probe(check: Check) -> None:
    """Which kernel a masked, grouped call takes, its time, and that of a second length after it."""
    tree = TINY_TREE if check.tiny else TREE
    heads, kv_heads, head_dim = tree["heads"], tree["kv_heads"], tree["head_dim"]
    for dtype in (check.dtype, torch.float32):
        of = str(dtype).removeprefix("torch.")
        with check.case(f"sdpa {of}"):
            for key, num_keys in (("first", tree["prompt"]), ("other length", tree["prompt"] + 17)):
                rows = tree["answer"]
                q = check.randn(1, heads, rows, head_dim, seed=1, dtype=dtype)
                k = check.randn(1, kv_heads, num_keys, head_dim, seed=2, dtype=dtype)
                mask = torch.ones(rows, num_keys, dtype=torch.bool, device=check.device)
                mask = mask.tril(num_keys - rows)

                def attend(q: Tensor = q, k: Tensor = k, mask: Tensor = mask) -> Tensor:
                    return F.scaled_dot_product_attention(q, k, k, mask, enable_gqa=True)

                check.figure("ceilings.sdpa_ms", median_ms(attend, check.device), of=f"{of}, {key}")
            table, num_launches = profile_table(attend, check.device, num_rows=6)
            check.note(f"masked grouped attention in {of}: {num_launches} launches\n{table}")
            print(table, flush=True)


def varlen_probe(check: Check) -> None:
    """PyTorch's own variable-length attention over a group's tree, forward and backward, twice."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Skipped(f"torch {torch.__version__} has no varlen_attn") from None
    if not check.is_cuda:
        raise Skipped("varlen_attn runs on a card only")
    tree, device = (TINY_TREE if check.tiny else TREE), check.device
    heads, head_dim, count = tree["heads"], tree["head_dim"], tree["rollouts"]
    rows, keys = tree["answer"], tree["prompt"] + tree["answer"]
    q = check.randn(count * rows, heads, head_dim, seed=1).requires_grad_()
    # Heads are repeated, since not every version takes grouped ones.
    k = check.randn(count * keys, heads, head_dim, seed=2).requires_grad_()
    ends_q = torch.arange(0, (count + 1) * rows, rows, dtype=torch.int32, device=device)
    ends_k = torch.arange(0, (count + 1) * keys, keys, dtype=torch.int32, device=device)

    def step() -> tuple[Tensor, ...]:
        o = varlen_attn(q, k, k, ends_q, ends_k, rows, keys, window_size=(-1, 0))
        return (o, *torch.autograd.grad(o.float().square().sum(), (q, k)))

    check.figure("ceilings.varlen_ms", median_ms(step, device))
    check.figure("ceilings.varlen_peak_gib", peak_gib(step, device))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = step(), step()
    finally:
        torch.use_deterministic_algorithms(False)
    equal = all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    check.figure("ceilings.varlen_repeats", float(equal))


PARTS: dict[str, Part] = {
    "copy": copy_rate,
    "gemm": gemm_rates,
    "accumulate": accumulate_fp32,
    "sdpa": sdpa_probe,
    "varlen": varlen_probe,
}
