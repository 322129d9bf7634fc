"""Stage `ceilings`: measures what the card can do. Every limit but attention's rests on it.

Measured are large copies, square products, a layer's products at their real widths, and products of
bf16 factors that are added into an fp32 tensor, as for the gradient of a weight.
"""

from __future__ import annotations

import shutil

import torch
from torch import Tensor

from socpo_fast.ops._head import matmul_
from tools.gpu_check.check import Check, Part, Skipped, check_close, query_driver
from tools.gpu_check.models import MODELS
from tools.gpu_check.timing import fp32_products, median_ms

GEMM = 8192
TINY_GEMM = 64
COPY_BYTES = 4 << 30
TINY_COPY_BYTES = 1 << 20


def copy_rate(check: Check) -> None:
    """Measures copies on the device (bytes read and written both count), and reads."""
    num_bytes = TINY_COPY_BYTES if check.tiny else COPY_BYTES
    source = torch.ones(num_bytes, dtype=torch.int8, device=check.device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), check.device)
    # The factor: bytes are read and written, and bytes / ms = 1e-6 GB/s.
    check.figure("ceilings.copy_gb_s", 2e-6 * num_bytes / ms)
    # A sum reads everything and writes almost nothing.
    numbers = source.view(torch.float32)
    ms = median_ms(numbers.sum, check.device)
    check.figure("ceilings.read_gb_s", 1e-6 * num_bytes / ms)


def host_link(check: Check) -> None:
    """Measures pinned host memory to the device and back: the cost of moving optimizer states."""
    if not check.is_cuda:
        raise Skipped("a card has a link, a CPU has not")
    # Only pinned memory reaches the link's full rate, and can be copied asynchronously.
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
    """Measures square products in bf16, fp32, and fp32 computed in tf32."""
    size = TINY_GEMM if check.tiny else GEMM
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "ieee"),
        ("fp32", torch.float32, "ieee"),
        ("tf32", torch.float32, "tf32"),
    ):
        a, b = (check.randn(size, size, seed=seed, dtype=dtype) for seed in (0, 1))
        with fp32_products(precision):
            ms = median_ms(lambda a=a, b=b: a @ b, check.device)
        check.figure(f"ceilings.{name}_tflop_s", 2e-9 * size**3 / ms)


def accumulate_fp32(check: Check) -> None:
    """Checks and measures bf16 products stored over NaN in, and added to, an fp32 tensor."""
    size = TINY_GEMM if check.tiny else GEMM // 2
    a, b = (check.randn(size, size, seed=seed) for seed in (0, 1))
    # NaN in the target: a product that wrongly adds (beta = 0 times NaN) would show.
    out = torch.full((size, size), torch.nan, dtype=torch.float32, device=check.device)
    # The first rows are enough to notice an error; the whole product in fp64 takes long.
    truth = a[:64].double() @ b.double()
    matmul_(out, a, b)
    check_close("over NaN", out[:64], truth)
    matmul_(out, a, b, accumulate=True)
    check_close("added to itself", out[:64], 2 * truth)
    ms = median_ms(lambda: matmul_(out, a, b, accumulate=True), check.device)
    limit = check.ceilings.bf16_tflop_s if check.is_cuda else None
    check.figure("ceilings.accumulate_tflop_s", 2e-9 * size**3 / ms, limit=limit)


def linears(check: Check) -> None:
    """Measures a layer's products at their real widths, with dX and dW: the true ceiling of MFU."""
    num_tokens = 16 if check.tiny else 8192
    for model in ("tiny",) if check.tiny else ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B"):
        config = MODELS[model]
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        width = config.hidden_size
        inner = config.intermediate_size
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
            # Three products of 2 T M N each: forward, dX and dW.
            total_flops += 6.0 * num_tokens * rows * columns
        limit = check.ceilings.bf16_tflop_s
        rate = 1e-9 * total_flops / total_ms
        check.figure("ceilings.linears_tflop_s", rate, of=model, limit=limit)


def clocks(check: Check) -> None:
    """Records the driver's clocks and power right after the work."""
    if not (check.is_cuda and shutil.which("nvidia-smi")):
        raise Skipped("nvidia-smi is a card's")
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
    check.note(query_driver(fields))


PARTS: dict[str, Part] = {
    "copy": copy_rate,
    "gemm": gemm_rates,
    "clocks": clocks,
    "accumulate": accumulate_fp32,
    "linears": linears,
    "host link": host_link,
}
