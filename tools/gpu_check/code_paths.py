"""Runs the code paths of the fake CUDA walk, one section each; `walk` lists them in order.

They are the project's own code, called in the same way as the engine and the trainer call it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from socpo_fast.engine import Engine
from socpo_fast.engine.decode import DecodeLoop
from socpo_fast.engine.runner import Runner
from socpo_fast.engine.sampler import draw
from socpo_fast.model import Decoder, ModelConfig
from socpo_fast.model.decoder import Layer, rotary_tables
from socpo_fast.ops import linear_policy_loss, rms_norm, rotary_qkv, rotary_write, swiglu
from socpo_fast.training.optimizer import Optimizer
from socpo_fast.training.step import policy_gradients
from socpo_fast.types import Attempt, Rollout, RolloutKey, SamplingParams
from tools.gpu_check.fake_cuda import fake_cuda
from tools.gpu_check.graph import backward
from tools.gpu_check.groups import add_turns
from tools.gpu_check.launches import Section
from tools.gpu_check.recorder import Recorder

DEVICE = "cuda:0"
DTYPE = torch.bfloat16
PAGE_SIZE = 32
NUM_PAGES = 64  # of one sequence, so its context has 2048 tokens
NUM_TOKENS = 8192  # of the policy head and of the element-wise ops
# The group of the update, in tokens. Every second rollout has two attempts with a bridge (guidance)
# between them.
PROMPT = 300
GROUP_SIZE = 8
ATTEMPT = 1000
BRIDGE = 130


def walk(config: ModelConfig) -> list[Section]:
    """Runs every code path below for a model of this shape; returns their sections."""
    with fake_cuda() as recorder:
        student = fake_model(config)
        decode_rounds(recorder, student)
        prefill_step(recorder, student)
        policy_head(recorder, student)
        element_wise(recorder, student)
        update(recorder, student)
        draws(recorder, student)
    return recorder.sections


def fake_model(config: ModelConfig) -> Decoder:
    """Returns a decoder on the fake device."""
    # On meta first: a real Decoder would allocate and initialise gigabytes on the host.
    with torch.device("meta"):
        student = Decoder(config)
    for name, parameter in list(student.named_parameters()):
        module, _, leaf = name.rpartition(".")
        empty = torch.empty(parameter.shape, dtype=DTYPE, device=DEVICE)
        setattr(student.get_submodule(module), leaf, nn.Parameter(empty))
    # The loop above has given the two tied weights a tensor each.
    if config.tie_word_embeddings:
        student.lm_head.weight = student.embed.weight
    student.inv_freq = config.inverse_frequencies().to(DEVICE)
    return student


def decode_rounds(recorder: Recorder, student: Decoder) -> None:
    """Runs what a CUDA graph captures: it must not read a value nor use a tensor of the host."""
    for rows, is_filtered in ((256, False), (256, True), (16, False), (1, False)):
        num_pages = rows * NUM_PAGES
        options = {"num_pages": num_pages, "page_size": PAGE_SIZE}
        runner = Runner(student, **options, cascade=True, attention="auto")
        loop = DecodeLoop(runner, max_running=rows, max_rounds=8)
        loop._table(NUM_PAGES)  # made before a capture, so not part of the section
        name = f"decode round, batch {rows}{', top-p' if is_filtered else ''}"
        with recorder.section(name, may_read=False, may_upload=False), torch.no_grad():
            loop.run_round(rows, NUM_PAGES, is_filtered)


def prefill_step(recorder: Recorder, student: Decoder) -> None:
    """Runs an engine's first step: prefills prompts, forks their groups, draws the first tokens."""
    engine = Engine(student, kv_cache_gib=8, page_size=PAGE_SIZE)
    params = SamplingParams(
        temperature=1.0,
        max_new_tokens=8,
        eos_ids=(),
        ignore_eos=True,
        n=GROUP_SIZE,
    )
    for question_idx in range(6):
        engine.submit(range(PROMPT), params, key=(0, question_idx))
    with recorder.section(f"prefill step, 6 x {PROMPT} tokens", may_read=True):
        engine.step()


def policy_head(recorder: Recorder, student: Decoder) -> None:
    """Runs the policy head: three products and a row pass a chunk; its backward only scales."""
    weight_VD = student.lm_head.weight.detach().requires_grad_()
    hidden_TD = _empty(NUM_TOKENS, student.config.hidden_size).requires_grad_()
    values_T = torch.empty(NUM_TOKENS, device=DEVICE)
    targets_T = values_T.to(torch.int64)
    with recorder.section(f"policy head, {NUM_TOKENS} rows", may_read=False):
        policy = linear_policy_loss(
            hidden_TD,
            weight_VD,
            targets_T,
            values_T,
            values_T,
            temperature=1.0,
            num_loss_tokens=float(NUM_TOKENS),
        )
        policy.loss.backward()


def element_wise(recorder: Recorder, student: Decoder) -> None:
    """Runs each op forward and backward, and the engine's write of keys and values."""
    config = student.config
    layer = student.layers[0]
    assert isinstance(layer, Layer)
    heads = config.num_heads
    kv_heads = config.num_kv_heads
    head_dim = config.head_dim
    weight_D = layer.attention_norm.weight
    eps = config.rms_norm_eps
    x_TD = _empty(NUM_TOKENS, config.hidden_size).requires_grad_()
    residual_TD = _empty(NUM_TOKENS, config.hidden_size).requires_grad_()
    gate_up_TJ = _empty(NUM_TOKENS, 2 * config.intermediate_size).requires_grad_()
    norms: dict[str, Any] = {}
    q_norm = layer.attention.q_norm
    k_norm = layer.attention.k_norm
    if q_norm is not None and k_norm is not None:
        norms = {"q_weight_E": q_norm.weight, "k_weight_E": k_norm.weight, "eps": eps}
    qkv_TXE = _empty(NUM_TOKENS, heads + 2 * kv_heads, head_dim).requires_grad_()
    positions_T = torch.empty(NUM_TOKENS, dtype=torch.int64, device=DEVICE)
    tables = rotary_tables(positions_T, student.inv_freq)
    k_cache_PSKE = _empty(NUM_TOKENS // PAGE_SIZE, PAGE_SIZE, kv_heads, head_dim)
    v_cache_PSKE = torch.empty_like(k_cache_PSKE)
    norm = partial(rms_norm, x_TD, weight_D, eps=eps)
    ops: dict[str, Callable[[], Any]] = {
        "rms_norm": norm,
        "rms_norm with residual": partial(norm, residual_TD=residual_TD),
        "swiglu": lambda: swiglu(gate_up_TJ),
        "rotary_qkv": lambda: rotary_qkv(qkv_TXE, *tables, num_kv_heads=kv_heads, **norms),
    }
    for name, op in ops.items():
        outputs: Any = ()
        with recorder.section(name, may_read=False):
            outputs = op()
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        gradients = [torch.empty_like(x) for x in outputs]
        with recorder.section(f"{name}, backward", may_read=False):
            backward(outputs, gradients)
        student.zero_grad()
        # Else the next op would add to these gradients, which is a launch more.
        for leaf in (x_TD, residual_TD, gate_up_TJ, qkv_TXE):
            leaf.grad = None
    with recorder.section("rotary_write", may_read=False), torch.no_grad():
        rotary_write(qkv_TXE, *tables, k_cache_PSKE, v_cache_PSKE, positions_T, **norms)


def update(recorder: Recorder, student: Decoder) -> None:
    """Runs one group's forward, backward and AdamW step; the host reads once, at the end."""
    rollouts = [_rollout(idx, num_attempts=1 + idx % 2) for idx in range(GROUP_SIZE)]
    # Made before the section: its moments are allocated once a run, not once an update.
    optimizer = Optimizer(student, lr=1e-6)
    with recorder.section("update of one group", may_read=False):
        stats = policy_gradients(student, rollouts, token_budget=16384, temperature=1.0)
    with recorder.section("its step of AdamW", may_read=True):
        optimizer.step(stats.loss_stats_7[0], also_read=stats.loss_stats_7)


def _rollout(rollout_idx: int, num_attempts: int) -> Rollout:
    """Returns a rollout with attempts of equal length and a bridge between them."""
    key = RolloutKey(0, 0)
    values = torch.zeros(ATTEMPT)
    attempts = [
        Attempt(list(range(ATTEMPT)), values, values, "length", key, rollout_idx, attempt_idx, 0)
        for attempt_idx in range(num_attempts)
    ]
    rollout = Rollout(question_idx=0, rollout_idx=rollout_idx, prompt_ids=list(range(PROMPT)))
    add_turns(rollout, attempts, list(range(BRIDGE)))
    return rollout


def draws(recorder: Recorder, student: Decoder) -> None:
    """Runs the LM head and the draw, without a filter and with top-p."""
    rows = 256
    hidden_BD = _empty(rows, student.config.hidden_size)
    row_keys_B = torch.empty(rows, dtype=torch.int64, device=DEVICE)
    settings_4B = torch.tensor([1.0, 0.95, 0.0, 0.0], device=DEVICE)[:, None].repeat(1, rows)
    for name, is_filtered in (("draw", False), ("draw with top-p", True)):
        with recorder.section(f"{name}, batch {rows}", may_read=False), torch.no_grad():
            draw(student, hidden_BD, row_keys_B, settings_4B, is_filtered)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device=DEVICE)
