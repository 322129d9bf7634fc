"""The engine on a card: the part of gpu_check that generates. Each check takes (device, Sizes) and returns its figures.

They run on a CPU too, with tiny sizes: that is how tests/test_gpu_check.py tests them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from socpo_fast import Engine, SamplingParams
from socpo_fast.engine.runner import Runner
from socpo_fast.model import Decoder, ModelConfig
from socpo_fast.model.decoder import turned_heads
from socpo_fast.ops import Segment, packed_attention, row_key
from socpo_fast.ops.sample import noise_bits
from socpo_fast.train.optimizer import Optimizer
from socpo_fast.types import Attempt

Figures = dict[str, Any]
MAX_NATS = 1e-3  # between a card's log-probs and a CPU's, both fp32
NEAR_TIE = 1e-2  # a lead below it may change hands by rounding


@dataclass(frozen=True)
class Sizes:
    layers: int
    width: int
    heads: tuple[int, int, int]  # query, key-value, head dim
    vocab: int
    new_tokens: int
    batches: tuple[int, ...]  # of the decode timing
    loss: tuple[int, int, int]  # rows, vocabulary, width of the policy loss timing
    rounds: int  # of every timing


CHECKED = Sizes(6, 576, (9, 3, 64), 4999, 48, (), (0, 0, 0), 0)  # where a CPU has to keep up
FULL = Sizes(30, 576, (9, 3, 64), 49152, 64, (1, 16, 64, 256), (8192, 49152, 1024), 5)  # SmolLM2-135M's shape
TINY = Sizes(2, 32, (4, 2, 8), 61, 12, (1, 2), (20, 61, 16), 2)
PAGE_SIZE = 16


def make_student(sizes: Sizes, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Decoder:
    """Random weights, of a size at which some tokens are likely and no two equally so."""
    heads, kv_heads, head_dim = sizes.heads
    off = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "qk_norm"), False)
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        intermediate_size=sizes.width * 8 // 3,
        num_layers=sizes.layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        **off,
    )
    torch.manual_seed(0)
    student = Decoder(config)
    for parameter in student.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
    return student.to(device, dtype)


def make_engine(student: Decoder, *, num_pages: int = 400, **options: int) -> Engine:
    gib = (num_pages + 0.5) * Runner.page_bytes(student, PAGE_SIZE) / 2**30
    return Engine(student, kv_cache_gib=gib, page_size=PAGE_SIZE, **options)


def prompts_of(sizes: Sizes, count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(sizes.vocab, (count, length), generator=generator).tolist()


def params_of(sizes: Sizes, **changes: Any) -> SamplingParams:
    usual = {"temperature": 1.0, "max_new_tokens": sizes.new_tokens, "n": 4, "eos_ids": (), "ignore_eos": True}
    return SamplingParams(**usual | {"seed": 3} | changes)


def lead(student: Decoder, context: list[int], params: SamplingParams, attempt: Attempt, position: int) -> float:
    """By how much the drawn token's score (logit + noise) beats the next one's, by a plain forward."""
    whole, scale = [Segment(0, len(context), ())], student.config.head_dim**-0.5

    def attend(_layer: int, qkv: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return packed_attention(*turned_heads(qkv, rotary, student.config.num_kv_heads), whole, scale=scale)

    with torch.no_grad():
        hidden = student(torch.tensor(context), torch.arange(len(context)), attend)[-1]
        scores = (student.lm_head.weight @ hidden).double()
    if params.temperature > 0:
        key = row_key(params.seed, *attempt.key, attempt.rollout_idx, attempt.attempt_idx, position)
        v = (noise_bits(torch.tensor([key]), len(scores))[0].double() + 0.5) * 2.0**-32
        scores = scores / params.temperature - torch.log(-torch.log1p(-v.clamp(max=1 - 2.0**-24)))
    first, second = scores.topk(2).values.tolist()
    return first - second


def same_attempt(
    student: Decoder, context: list[int], params: SamplingParams, ours: Attempt, theirs: Attempt
) -> tuple[bool, float]:
    """(every token equal, largest difference of log-probs before the first that is not, which must be a near tie)."""
    pairs = list(zip(ours.token_ids, theirs.token_ids, strict=False))
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    difference = float((ours.logprobs[:equal] - theirs.logprobs[:equal]).abs().max()) if equal else 0.0
    where = f"question {ours.key.question}, rollout {ours.rollout_idx}, attempt {ours.attempt_idx}"
    assert difference <= MAX_NATS, f"{where}: log-probs differ by {difference:.3g} nats"
    if equal < len(pairs):
        tie = lead(student, context + theirs.token_ids[:equal], params, theirs, equal)
        assert tie < NEAR_TIE, f"{where}: token {equal} differs, though it leads by {tie:.3g}"
        return False, difference
    assert ours.num_tokens == theirs.num_tokens, f"{where}: {ours.num_tokens} tokens and {theirs.num_tokens}"
    return True, difference


def compare_engines(ours: Engine, theirs: Engine, sizes: Sizes) -> Figures:
    """Groups and second attempts of two engines; `theirs` on the CPU, whose student judges near ties."""
    prompts = [*prompts_of(sizes, 3, 37), *prompts_of(sizes, 1, 70)]
    num_equal = num_all = 0
    worst = 0.0
    for params in (params_of(sizes), params_of(sizes, temperature=0.0, n=1), params_of(sizes, temperature=0.7)):
        groups = [engine.generate(prompts, params, keep=True) for engine in (ours, theirs)]
        contexts = {(a.key, a.rollout_idx): p for p, group in zip(prompts, groups[1], strict=True) for a in group}
        attempts = [[attempt for group in found for attempt in group] for found in groups]
        for attempt_idx in range(2):
            again = []
            for a, b in zip(*attempts, strict=True):
                equal, difference = same_attempt(theirs.student, contexts[b.key, b.rollout_idx], params, a, b)
                num_equal, num_all, worst = num_equal + equal, num_all + 1, max(worst, difference)
                if equal and attempt_idx == 0:
                    again.append((a, b))
            for a, b in again:
                for engine, attempt in ((ours, a), (theirs, b)):
                    engine.resume(attempt, prompts[0][:9], params, cut=sizes.new_tokens // 2)
                contexts[b.key, b.rollout_idx] = (
                    contexts[b.key, b.rollout_idx] + b.token_ids[: sizes.new_tokens // 2] + prompts[0][:9]
                )
            attempts = [drain(engine) for engine in (ours, theirs)]
        for engine in (ours, theirs):
            engine.release(list(engine._pinned))
            assert engine.stats.pages_free == engine.stats.pages_total, "pages leaked"
    assert num_equal >= 0.9 * num_all, f"only {num_equal} of {num_all} attempts are equal"
    return {"attempts": num_all, "equal": num_equal, "max_nats": worst, "preemptions": ours.stats.preemptions}


def drain(engine: Engine) -> list[Attempt]:
    finished: list[Attempt] = []
    while engine.has_work:
        finished += engine.step()
    return sorted(finished, key=lambda a: (a.key, a.rollout_idx))


def exact(groups: list[list[Attempt]]) -> list[tuple[list[int], list[float]]]:
    return [(attempt.token_ids, attempt.logprobs.tolist()) for group in groups for attempt in group]


def engine_against_cpu(device: torch.device, sizes: Sizes) -> Figures:
    ours, theirs = (make_engine(make_student(sizes, where)) for where in (device, "cpu"))
    return compare_engines(ours, theirs, sizes)


def forced_preemption(device: torch.device, sizes: Sizes) -> Figures:
    """Pages for two and a half of sixteen sequences: the tokens of an engine that has plenty."""
    longest = -(-(70 + 9 + 2 * sizes.new_tokens) // PAGE_SIZE)
    ours = make_engine(make_student(sizes, device), num_pages=longest * 5 // 2)
    figures = compare_engines(ours, make_engine(make_student(sizes, "cpu")), sizes)
    assert figures["preemptions"] > 0, "nobody was preempted"
    return figures


def graph_replay(device: torch.device, sizes: Sizes) -> Figures:
    """Equal bits: rounds replayed and rounds run; and four sequences, no padding, one and eight tokens a read."""
    student, prompts = make_student(sizes, device), prompts_of(sizes, 3, 21)
    replayed, run = (make_engine(student, tokens_per_sync=8) for _ in range(2))
    as_they_come(run)
    for params in (params_of(sizes, n=3, eos_ids=(0, 1, 2), ignore_eos=False), params_of(sizes, top_k=7)):
        assert exact(replayed.generate(prompts, params)) == exact(run.generate(prompts, params)), "graph and eager"
    one, eight = (
        exact(make_engine(student, tokens_per_sync=count).generate(prompts[:1], params_of(sizes))) for count in (1, 8)
    )
    assert one == eight, "tokens_per_sync 1 and 8"
    return {"graphs": len(replayed._loop._graphs)}


def as_they_come(engine: Engine) -> None:
    """No graphs: the same rounds, padded alike, launched op by op."""
    loop = engine._loop
    loop._graph = lambda rows, pages: SimpleNamespace(replay=lambda: loop._round(rows, pages))


def weights_stay(device: torch.device, sizes: Sizes) -> Figures:
    """Three updates: no pointer changes, and graphs captured before draw from the new weights."""
    student, prompts, params = make_student(sizes, device), prompts_of(sizes, 2, 21), params_of(sizes)
    engine, optimizer = make_engine(student, tokens_per_sync=8), Optimizer(student, lr=1e-3, warmup_updates=0)
    seen = [exact(engine.generate(prompts, params))]
    tensors = [*student.parameters(), *student.buffers()]
    pointers = [x.data_ptr() for x in tensors]
    for _ in range(3):
        for idx, parameter in enumerate(student.parameters()):
            generator = torch.Generator().manual_seed(idx + len(seen))
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        assert not optimizer.step().skipped
        engine.bump_policy_version()
        seen.append(exact(engine.generate(prompts, params)))
        assert [x.data_ptr() for x in [*student.parameters(), *student.buffers()]] == pointers, "storage moved"
        fresh = make_engine(copy.deepcopy(student), tokens_per_sync=8)
        assert seen[-1] == exact(fresh.generate(prompts, params)), "old weights in the engine"
        assert seen[-1] != seen[-2]
    return {"tensors": len(tensors)}
