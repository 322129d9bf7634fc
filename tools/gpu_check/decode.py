"""Stage `decode`: milliseconds a decode step of real shapes, beside the bytes it has to read.

Weights are random, which changes no byte and no launch. Steps are timed through the engine as a
rollout runs it: eight tokens a host read, rounds replayed from a CUDA graph.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from socpo_fast import Engine, SamplingParams
from socpo_fast.engine.sequence import Sequence
from socpo_fast.model import Decoder, save_student
from socpo_fast.model.decoder import turned_heads
from socpo_fast.ops import Segment, packed_attention
from tools.gpu_check.check import Check, Part, Skipped, check_close
from tools.gpu_check.engines import drain, launch_rounds, prompts_of
from tools.gpu_check.models import MODELS, make_model
from tools.gpu_check.rooflines import decode_bytes, kv_bytes
from tools.gpu_check.timing import profile_table

PAGE_SIZE = 32
CONTEXT, TINY_CONTEXT = 800, 24
TOKENS_A_READ = 8
TIMED_READS = 4  # of so many tokens each
# Early sequences decode while late ones are prefilled: they must not end before all are timed.
NEW_TOKENS = TOKENS_A_READ * (TIMED_READS + 8)


def params_of(num_new: int = NEW_TOKENS, **changes: Any) -> SamplingParams:
    usual = {"temperature": 1.0, "max_new_tokens": num_new, "n": 1, "eos_ids": ()}
    return SamplingParams(**usual | {"ignore_eos": True} | changes)


def make_engine(student: Decoder, num_tokens: int) -> Engine:
    """With pages for so many tokens."""
    itemsize = student.lm_head.weight.element_size()
    gib = (num_tokens + PAGE_SIZE) * kv_bytes(student.config, itemsize) / 2**30
    return Engine(
        student,
        kv_cache_gib=gib,
        page_size=PAGE_SIZE,
        tokens_per_sync=TOKENS_A_READ,
        token_budget=8192,
    )


class Decoding:
    """A batch that has been prefilled and decodes: `groups` prompts, `group_size` rollouts each."""

    def __init__(
        self, student: Decoder, groups: int, group_size: int, context: int, **changes: Any
    ):
        rows = groups * group_size
        pages = groups * (-(-context // PAGE_SIZE)) + rows * (-(-NEW_TOKENS // PAGE_SIZE) + 2)
        self.engine = make_engine(student, pages * PAGE_SIZE)
        self.rows, self.context = rows, context
        params = params_of(n=group_size, **changes)
        for idx, prompt in enumerate(prompts_of(student, groups, context)):
            self.engine.submit(prompt, params, key=(0, idx))
        while len(self._running()) < rows:
            self.engine.step()  # prefills
        for _ in range(2):
            self.engine.step()  # compiles and captures

    def _running(self) -> list[Sequence]:
        """Sequences that decode."""
        return [s for s in self.engine._scheduler.running if s.num_sampled > 0]

    def step_ms(self, device: torch.device) -> float:
        """Of one token of every sequence; what eight of them are read together is a part of it."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        live_before = sum(s.num_cached for s in self._running())
        before, started = self.engine.stats.decode_tokens, time.perf_counter()
        for _ in range(TIMED_READS):
            self.engine.step()
        seconds = time.perf_counter() - started
        num_sampled = self.engine.stats.decode_tokens - before
        # Keys that the middle one of the timed steps reads, shared ones each time.
        self.live_tokens = live_before + num_sampled // 2
        return 1e3 * seconds * self.rows / num_sampled


def steps(model: str, batches: tuple[int, ...]) -> Part:
    """Steps of batches whose prompts are all different; the limit is weights plus live KV."""

    def part(check: Check) -> None:
        config = MODELS["tiny" if check.tiny else model]
        student = make_model(config, device=check.device, dtype=check.dtype)
        context = TINY_CONTEXT if check.tiny else CONTEXT
        for batch in (1, 3) if check.tiny else batches:
            of = f"{model}, {batch} x {context}"
            with check.case(f"steps of {of}"):
                decoding = Decoding(student, batch, 1, context)
                step_ms = decoding.step_ms(check.device)
                itemsize = student.lm_head.weight.element_size()
                num_bytes = decode_bytes(config, decoding.live_tokens, itemsize)
                limit = check.ceilings.memory_ms(num_bytes)
                key = "decode.step_ms" if batch >= 64 else "decode.few_step_ms"
                check.figure(key, step_ms, of=of, limit=limit)
                del decoding

    return part


def eager_and_launches(check: Check) -> None:
    """The same rounds launched one by one, and how many kernels a round is."""
    model = "Qwen3-0.6B"
    config = MODELS["tiny" if check.tiny else model]
    student = make_model(config, device=check.device, dtype=check.dtype)
    decoding = Decoding(
        student, 2 if check.tiny else 16, 1, TINY_CONTEXT if check.tiny else CONTEXT
    )
    loop = decoding.engine._loop
    assert loop is not None
    launch_rounds(decoding.engine)
    of = f"{model}, {decoding.rows} x {decoding.context}"
    check.figure("decode.eager_step_ms", decoding.step_ms(check.device), of=of)
    pages = 1 + max(len(sequence.pages) for sequence in decoding.engine._scheduler.running)
    with torch.no_grad():
        table, num_launches = profile_table(lambda: loop._round(decoding.rows, pages), check.device)
    check.figure("decode.launches", num_launches, of=of)
    check.note(f"one decode round of {of}, kernels by time\n{table}")


def groups_and_second_attempts(check: Check) -> None:
    """8 x 8 rollouts, half of them resumed: tok/s, and that nothing is prefilled twice."""
    config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
    student = make_model(config, device=check.device, dtype=check.dtype)
    groups, size, prompt, new, suffix = (2, 2, 20, 9, 5) if check.tiny else (8, 8, 300, 100, 60)
    engine = make_engine(student, groups * size * (prompt + 2 * new + suffix + 3 * PAGE_SIZE))
    prompts, params = prompts_of(student, groups, prompt), params_of(new, n=size)
    for _ in range(2):  # the first compiles and captures
        started, stats = time.perf_counter(), engine.stats
        attempts = [a for group in engine.generate(prompts, params, keep=True) for a in group]
        resumed = attempts[::2]
        engine.release(attempts[1::2])
        for attempt in resumed:
            engine.resume(attempt, prompts[0][:suffix], params, kept_tokens=prompt + new)
        engine.release(drain(engine))
        seconds = time.perf_counter() - started
    prefilled = engine.stats.prefill_tokens - stats.prefill_tokens
    unique = groups * prompt + len(resumed) * (1 + suffix)
    assert prefilled == unique, f"prefilled {prefilled} tokens, {unique} are unique"
    sampled = (len(attempts) + len(resumed)) * new
    of = f"{groups} x {size}, {new} new, half resumed"
    check.figure("decode.rollout_tok_s", sampled / seconds, of=of)


def evaluation_step(check: Check) -> None:
    """A step with top-p, as evaluations take it: outside of the graph, by sorting."""
    config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
    student = make_model(config, device=check.device, dtype=check.dtype)
    context, batch = (TINY_CONTEXT, 2) if check.tiny else (CONTEXT, 64)
    decoding = Decoding(student, batch, 1, context, top_p=0.95, temperature=0.6)
    of = f"top-p, {batch} x {context}"
    check.figure("decode.filtered_step_ms", decoding.step_ms(check.device), of=of)


def beside_transformers(check: Check) -> None:
    """Equal weights in transformers: equal logits, and the time a token of its `generate` takes."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise Skipped("transformers is not installed") from None
    config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
    student = make_model(config, device=check.device, dtype=check.dtype)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        save_student(student, Path(folder) / "student")
        theirs = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "student", dtype=check.dtype, local_files_only=True
        ).to(check.device)
    batch, prompt = (2, 10) if check.tiny else (16, 300)
    prompts = torch.tensor(prompts_of(student, batch, prompt), device=check.device)
    with torch.no_grad():
        expected = theirs(prompts[:1, :64]).logits[0].double()
    # Two ways to round in bf16, through 28 layers.
    bound = 5e-2 if check.is_cuda else 1e-3
    check_close("logits", logits_of(student, prompts[0, :64]), expected, bound=bound)
    seconds = []
    for num_new in (1, 1, 5 if check.tiny else 33):
        started = time.perf_counter()
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": num_new}
        theirs.generate(prompts, min_new_tokens=num_new, pad_token_id=0, **options)
        seconds.append(time.perf_counter() - started)
    their_ms = 1e3 * (seconds[2] - seconds[1]) / (num_new - 1)
    decoding = Decoding(student, batch, 1, prompt)
    of = f"{batch} x {prompt}"
    check.figure("decode.generate_step_ms", their_ms, of=of)
    check.figure("decode.times_generate", their_ms / decoding.step_ms(check.device), of=of)


def logits_of(student: Decoder, token_ids_T: torch.Tensor) -> torch.Tensor:
    """[T, V] of a plain forward, fp64."""
    whole, scale = [Segment(0, len(token_ids_T), ())], student.config.head_dim**-0.5

    def attend(
        _layer: int, qkv: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        heads = turned_heads(qkv, rotary, student.config.num_kv_heads)
        return packed_attention(*heads, whole, scale=scale)

    positions = torch.arange(len(token_ids_T), device=token_ids_T.device)
    with torch.no_grad():
        hidden = student(token_ids_T, positions, attend)
        return (hidden.to(student.lm_head.weight.dtype) @ student.lm_head.weight.T).double()


PARTS: dict[str, Part] = {
    "steps of 0.6B": steps("Qwen3-0.6B", (1, 16, 64, 256)),
    "eager and launches": eager_and_launches,
    "groups": groups_and_second_attempts,
    "steps of 4B": steps("Qwen3-4B", (64,)),
    "evaluation": evaluation_step,
    "transformers": beside_transformers,
}
