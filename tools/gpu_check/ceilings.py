"""Stage `ceilings`: what the card can do, and what PyTorch does with it. Every limit rests on it.

The rates are those of large copies and square products. Then two questions on which later work
depends: does a product of bf16 factors add into an fp32 tensor, and which attention does PyTorch
pick for a tree of segments (a mask and grouped heads rule several out)?
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from socpo_fast.ops._head import matmul_
from tools.gpu_check.check import Check, Part, Skipped, check_close
from tools.gpu_check.models import MODELS
from tools.gpu_check.timing import median_ms, peak_gib, profile_table, wall_ms

GEMM, TINY_GEMM = 8192, 64
COPY_BYTES, TINY_COPY_BYTES = 4 << 30, 1 << 20
# A group of eight rollouts: segment rows and keys seen, Qwen3-0.6B's heads.
TREE = {"prompt": 1000, "answer": 300, "rollouts": 8, "heads": 16, "kv_heads": 8, "head_dim": 128}
TINY_TREE = {"prompt": 30, "answer": 7, "rollouts": 2, "heads": 4, "kv_heads": 2, "head_dim": 16}


def copy_rate(check: Check) -> None:
    """Device to device, where bytes read and written both count; and reading alone."""
    num_bytes = TINY_COPY_BYTES if check.tiny else COPY_BYTES
    source = torch.ones(num_bytes, dtype=torch.int8, device=check.device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), check.device)
    check.figure("ceilings.copy_gb_s", 2e-6 * num_bytes / ms)
    numbers = source.view(torch.float32)
    ms = median_ms(numbers.sum, check.device)
    check.figure("ceilings.read_gb_s", 1e-6 * num_bytes / ms)


def host_link(check: Check) -> None:
    """Pinned host memory to the device and back: what moving optimizer states would cost."""
    if not check.is_cuda:
        raise Skipped("a card has a link, a CPU has not")
    host = torch.empty(1 << 30, dtype=torch.int8, pin_memory=True)
    device = torch.empty_like(host, device=check.device)
    for way, run in (
        ("to the card", lambda: device.copy_(host, non_blocking=True)),
        ("to the host", lambda: host.copy_(device, non_blocking=True)),
    ):
        check.figure(
            "ceilings.link_gb_s", 1e-6 * host.nbytes / median_ms(run, check.device), of=way
        )


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


def linears(check: Check) -> None:
    """A layer's products at their real widths, forward, dX and dW in fp32: MFU's true ceiling."""
    num_tokens = 16 if check.tiny else 8192
    for model in ("tiny",) if check.tiny else ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B"):
        config = MODELS[model]
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        width, inner = config.hidden_size, config.intermediate_size
        total_ms = total_flops = 0.0
        for columns, rows in (
            (width, heads),
            (config.num_heads * config.head_dim, width),
            (width, 2 * inner),
            (inner, width),
        ):
            x, dy = (
                check.randn(num_tokens, n, seed=seed) for seed, n in enumerate((columns, rows))
            )
            weight = check.randn(rows, columns, seed=2)
            dw = torch.zeros(rows, columns, device=check.device)

            def run(
                x: Tensor = x, dy: Tensor = dy, weight: Tensor = weight, dw: Tensor = dw
            ) -> None:
                torch.mm(x, weight.T)
                torch.mm(dy, weight)
                matmul_(dw, dy.T, x, accumulate=True)

            total_ms += median_ms(run, check.device)
            total_flops += 6.0 * num_tokens * rows * columns
        limit = check.ceilings.bf16_tflop_s
        rate = 1e-9 * total_flops / total_ms
        check.figure("ceilings.linears_tflop_s", rate, of=model, limit=limit)


def long_row(check: Check) -> None:
    """PyTorch's attention over one long causal row, forward and back: the rate to come near."""
    tree = TINY_TREE if check.tiny else TREE
    heads, head_dim = tree["heads"], tree["head_dim"]
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        for length in (64,) if check.tiny else (8192, 16384):
            of = f"{backend.name.lower()}, {length} tokens"
            with check.case(f"attention {of}"):
                if not check.is_cuda and backend is SDPBackend.CUDNN_ATTENTION:
                    raise Skipped("cuDNN is a card's")
                q, k, v = (
                    check.randn(1, heads, length, head_dim, seed=seed).requires_grad_()
                    for seed in range(3)
                )
                do = check.randn(1, heads, length, head_dim, seed=3)

                def step(q: Tensor = q, k: Tensor = k, v: Tensor = v, do: Tensor = do) -> object:
                    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                    return torch.autograd.grad(o, (q, k, v), do)

                with of_torch(), sdpa_kernel(backend):
                    ms = median_ms(step, check.device)
                flops = 14.0 * heads * head_dim * length * (length + 1) / 2
                limit = check.ceilings.bf16_tflop_s
                check.figure("ceilings.attention_tflop_s", 1e-9 * flops / ms, of=of, limit=limit)


@contextlib.contextmanager
def of_torch() -> Iterator[None]:
    """What PyTorch cannot do here is worth knowing, and no fault of ours."""
    try:
        yield
    except RuntimeError as error:
        raise Skipped(f"torch {torch.__version__}: {error}") from error


def masked_attention(
    check: Check, dtype: torch.dtype, num_keys: int
) -> tuple[Callable[[], Tensor], Callable[[], object]]:
    """A segment of a tree as training attends today: (forward, forward and backward)."""
    tree = TINY_TREE if check.tiny else TREE
    heads, kv_heads, head_dim, rows = (
        tree[name] for name in ("heads", "kv_heads", "head_dim", "answer")
    )
    q = check.randn(1, heads, rows, head_dim, seed=1, dtype=dtype).requires_grad_()
    k = check.randn(1, kv_heads, num_keys, head_dim, seed=2, dtype=dtype).requires_grad_()
    mask = torch.ones(rows, num_keys, dtype=torch.bool, device=check.device).tril(num_keys - rows)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, mask, enable_gqa=True)

    def both() -> object:
        o = forward()
        return torch.autograd.grad(o, (q, k), torch.ones_like(o))

    return forward, both


def sdpa_probe(check: Check) -> None:
    """Times of a masked, grouped call; the first one of each new length, which may build a plan."""
    prompt = (TINY_TREE if check.tiny else TREE)["prompt"]
    for dtype in (torch.bfloat16, torch.float32) if check.is_cuda else (torch.float32,):
        word = str(dtype).removeprefix("torch.")
        with check.case(f"sdpa {word}"):
            for key, num_keys in (("first", prompt), ("other length", prompt + 17)):
                forward, both = masked_attention(check, dtype, num_keys)
                first_ms = wall_ms(both, check.device)
                check.figure("ceilings.sdpa_first_ms", first_ms, of=f"{word}, {key}")
            ms = median_ms(torch.no_grad()(forward), check.device, in_graph=True)
            check.figure("ceilings.sdpa_ms", ms, of=word)
            check.figure("ceilings.sdpa_step_ms", median_ms(both, check.device), of=word)


def sdpa_kernels(check: Check) -> None:
    """Which kernels these calls were. Last: a profiler stays in the way of what follows."""
    prompt = (TINY_TREE if check.tiny else TREE)["prompt"]
    for dtype in (torch.bfloat16, torch.float32) if check.is_cuda else (torch.float32,):
        _, both = masked_attention(check, dtype, prompt)
        both()
        table, num_launches = profile_table(both, check.device, num_rows=12)
        word = str(dtype).removeprefix("torch.")
        check.note(f"masked grouped attention in {word}: {num_launches} launches\n{table}")
        print(table, flush=True)


def varlen_probe(check: Check) -> None:
    """PyTorch's own variable-length attention over a group's tree, forward and backward, twice."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Skipped(f"torch {torch.__version__} has no varlen_attn") from None
    if not check.is_cuda:
        raise Skipped("varlen_attn runs on a card only")
    count, heads, head_dim = TREE["rollouts"], TREE["heads"], TREE["head_dim"]
    for kv_heads, rows in ((TREE["kv_heads"], 300), (heads, 300), (heads, 1000)):
        of = f"{heads} heads on {kv_heads}, answers of {rows}"
        with check.case(f"varlen {of}"):
            keys = TREE["prompt"] + rows
            q = check.randn(count * rows, heads, head_dim, seed=1).requires_grad_()
            k = check.randn(count * keys, kv_heads, head_dim, seed=2).requires_grad_()
            do = check.randn(count * rows, heads, head_dim, seed=3)
            ends_q, ends_k = (
                torch.arange(count + 1, dtype=torch.int32, device=check.device) * length
                for length in (rows, keys)
            )

            def step(
                q: Tensor = q,
                k: Tensor = k,
                do: Tensor = do,
                ends: tuple[Tensor, Tensor] = (ends_q, ends_k),
                longest: tuple[int, int] = (rows, keys),
            ) -> tuple[Tensor, ...]:
                o = varlen_attn(q, k, k, *ends, *longest, window_size=(-1, 0))
                return (o, *torch.autograd.grad(o, (q, k), do))

            with of_torch():
                ms = median_ms(step, check.device)
            check.figure("ceilings.varlen_ms", ms, of=of)
            check.figure("ceilings.varlen_peak_gib", peak_gib(step, check.device), of=of)
            torch.use_deterministic_algorithms(True)
            try:
                ms, first, second = median_ms(step, check.device), step(), step()
            finally:
                torch.use_deterministic_algorithms(False)
            check.figure("ceilings.varlen_fixed_order_ms", ms, of=of)
            equal = all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
            check.figure("ceilings.varlen_repeats", float(equal), of=of)


def clocks(check: Check) -> None:
    """Clocks and power right after the work, by the driver."""
    if not (check.is_cuda and shutil.which("nvidia-smi")):
        raise Skipped("nvidia-smi is a card's")
    query = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
    check.note(done.stdout.strip() or done.stderr.strip())


PARTS: dict[str, Part] = {
    "copy": copy_rate,
    "gemm": gemm_rates,
    "clocks": clocks,
    "accumulate": accumulate_fp32,
    "sdpa": sdpa_probe,
    "linears": linears,
    "long row": long_row,
    "varlen": varlen_probe,
    "host link": host_link,
    "sdpa kernels": sdpa_kernels,
}
