"""Stage `decode`: times decode steps of real shapes, beside the bytes that a step has to read.

Weights are random, which changes neither bytes nor launches. Steps are timed through the engine, as
in a rollout: the host reads once every eight tokens, and rounds are replayed from a CUDA graph.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from socpo_fast.model import Decoder, load_student, save_student
from socpo_fast.report.sizes import num_parameters
from tests.helpers.tiny import generate_same
from tools.gpu_check.check import Check, Part, Skipped, check_close, relative_error
from tools.gpu_check.decoding import (
    CONTEXT,
    PAGE_SIZE,
    TINY_CONTEXT,
    Decoding,
    make_engine,
    params_of,
)
from tools.gpu_check.engines import drain, launch_rounds, logits_of, prompts_of
from tools.gpu_check.models import MODELS, make_model
from tools.gpu_check.rooflines import decode_bytes, rollout_bytes
from tools.gpu_check.timing import median_ms, profile_table


def steps(model: str, batches: tuple[int, ...]) -> Part:
    """Returns a part that times batches of different prompts; the limit is weights plus live KV."""

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
                limit = check.ceilings.read_ms(num_bytes)
                # Few rows are bound by launches and latency, many by bytes: different predictions.
                key = "decode.step_ms" if batch >= 64 else "decode.few_step_ms"
                check.figure(key, step_ms, of=of, limit=limit)
                if (graph_ms := decoding.graph_ms(check)) is not None:
                    check.figure("decode.graph_ms", graph_ms, of=of, limit=limit)
                # Frees its pages before the next batch allocates its own.
                del decoding

    return part


def eager_step(check: Check) -> None:
    """Times the same rounds with kernels launched one by one."""
    decoding = small_batch(check)
    launch_rounds(decoding.engine)
    of = f"{decoding.rows} x {decoding.context}"
    check.figure("decode.eager_step_ms", decoding.step_ms(check.device), of=of)


def captures(check: Check) -> None:
    """Measures a capture's time and memory, and the time of a step's linear layers."""
    decoding = small_batch(check)
    loop = decoding.engine.steps.loop
    assert loop is not None
    for rows in (2,) if check.tiny else (1, 64, 256):
        of = f"{rows} rows"
        check.figure("decode.linears_ms", linears_ms(check, decoding.engine.student, rows), of=of)
    if not loop.captures:
        raise Skipped("graphs are a card's")
    for rows in (32, 64, 128):
        check.free_memory()
        old_reserved = torch.cuda.memory_reserved(check.device)
        started = time.perf_counter()
        with torch.no_grad():
            # No graph of this size exists yet, so this captures one.
            loop.graph_for(rows, 32, False)
        torch.cuda.synchronize(check.device)
        of = f"{rows} rows"
        check.figure("decode.capture_ms", 1e3 * (time.perf_counter() - started), of=of)
        num_bytes = torch.cuda.memory_reserved(check.device) - old_reserved
        check.figure("decode.graph_mib", max(0, num_bytes) / 2**20, of=of)


def all_captures(check: Check) -> None:
    """Measures all captures of a run's start: each batch size, with filters and without."""
    engine = small_batch(check).engine
    engine.reset()
    check.free_memory()
    num_bytes = torch.cuda.memory_reserved(check.device) if check.is_cuda else 0
    started = time.perf_counter()
    engine.prepare(TINY_CONTEXT if check.tiny else CONTEXT)
    if check.is_cuda:
        torch.cuda.synchronize(check.device)
        num_bytes = torch.cuda.memory_reserved(check.device) - num_bytes
    of = "max_running 256"
    check.figure("decode.prepare_s", time.perf_counter() - started, of=of)
    check.figure("decode.prepare_mib", max(0, num_bytes) / 2**20, of=of)


def beside_a_teacher(check: Check) -> None:
    """Runs two engines on a stream each: the time of both over the sum of their single times."""
    batches = (2, 2) if check.tiny else (64, 16)

    def seconds(indices: tuple[int, ...]) -> float:
        # The student's stream has priority -1, above the teacher's 0, as in a run.
        engines = [small_batch(check, batches[i], stream_priority=i - 1).engine for i in indices]
        started = time.perf_counter()
        while any(engine.has_work for engine in engines):
            for engine in engines:
                # launch does not wait, so the other engine's kernels can overlap with these.
                engine.launch()
                if engine.is_ready:
                    engine.release(engine.collect())
        return time.perf_counter() - started

    separate_s = seconds((0,)) + seconds((1,))
    of = f"{batches[0]} and {batches[1]} sequences"
    check.figure("decode.beside_a_teacher", seconds((0, 1)) / separate_s, of=of)


def linears_ms(check: Check, student: Decoder, rows: int) -> float:
    """Times all products of a decode step but the LM head's, one after the other in a graph."""
    weights = [p for layer in student.layers for p in layer.parameters() if p.ndim > 1]
    inputs = {n: check.randn(rows, n, seed=0) for n in {weight.shape[1] for weight in weights}}

    def run() -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[1]], weight.T)

    with torch.no_grad():
        return median_ms(run, check.device, in_graph=True)


def small_batch(
    check: Check, batch: int = 16, *, stream_priority: int | None = None, **changes: float
) -> Decoding:
    """Returns a decoding batch of Qwen3-0.6B; `changes` are sampling parameters."""
    config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
    student = make_model(config, device=check.device, dtype=check.dtype)
    context = TINY_CONTEXT if check.tiny else CONTEXT
    rows = 2 if check.tiny else batch
    return Decoding(student, rows, 1, context, stream_priority=stream_priority, **changes)


def kernels_of_a_round(check: Check) -> None:
    """Lists a round's kernels by time. Must come last: the profiler slows down what follows."""
    for batch in (16, 256):
        decoding = small_batch(check, batch)
        loop = decoding.engine.steps.loop
        assert loop is not None
        of = f"{decoding.rows} x {decoding.context}"
        pages = 1 + max(len(s.pages) for s in decoding.engine.scheduler.running)
        with torch.no_grad():
            table, num_launches = profile_table(
                lambda loop=loop, size=(decoding.rows, pages, False): loop.run_round(*size),
                check.device,
            )
        check.figure("decode.launches", num_launches, of=of)
        check.note(f"one decode round of {of}, kernels by time\n{table}")
        if check.tiny:
            break


def groups_and_second_attempts(check: Check) -> None:
    """Times 8 x 8 rollouts, half of them resumed, and checks that no token is prefilled twice."""
    config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
    student = make_model(config, device=check.device, dtype=check.dtype)
    groups, size, prompt, new, suffix = (2, 2, 20, 9, 5) if check.tiny else (8, 8, 300, 100, 60)
    engine = make_engine(student, groups * size * (prompt + 2 * new + suffix + 3 * PAGE_SIZE))
    prompts = prompts_of(student, groups, prompt)
    params = params_of(new, n=size)
    for _ in range(2):  # the first run compiles and captures, the second one is timed
        started = time.perf_counter()
        stats = engine.stats
        attempts = [a for group in generate_same(engine, prompts, params, keep=True) for a in group]
        resumed = attempts[::2]
        engine.release(attempts[1::2])
        for attempt in resumed:
            engine.resume(attempt, prompts[0][:suffix], params, kept_tokens=prompt + new)
        engine.release(drain(engine))
        seconds = time.perf_counter() - started
    prefilled = engine.stats.prefill_tokens - stats.prefill_tokens
    # A resumed sequence prefills its guidance and the last sampled token, which has no KV yet.
    num_unique = groups * prompt + len(resumed) * (1 + suffix)
    assert prefilled == num_unique, f"prefilled {prefilled} tokens, {num_unique} are unique"
    num_sampled = (len(attempts) + len(resumed)) * new
    itemsize = student.lm_head.weight.element_size()
    rollout = partial(rollout_bytes, config, num_new=new, itemsize=itemsize)
    num_bytes = rollout(rows=len(attempts), unique=groups * prompt)
    resumed_own = len(resumed) * (new + suffix)
    num_bytes += rollout(rows=len(resumed), unique=groups * prompt + resumed_own)
    of = f"{groups} x {size}, {new} new, half resumed"
    limit = 1e3 * num_sampled / check.ceilings.read_ms(num_bytes)
    check.figure("decode.rollout_tok_s", num_sampled / seconds, of=of, limit=limit)


def evaluation_step(check: Check) -> None:
    """Times a step with top-p, as in an evaluation."""
    decoding = small_batch(check, 64, top_p=0.95, temperature=0.6)
    of = f"top-p, {decoding.rows} x {decoding.context}"
    check.figure("decode.filtered_step_ms", decoding.step_ms(check.device), of=of)


def beside_transformers(check: Check) -> None:
    """Compares with transformers at equal weights: milliseconds a token, and logits."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise Skipped("transformers is not installed") from None
    config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
    student = make_model(config, device=check.device, dtype=check.dtype)
    memory = Path("/dev/shm")  # in RAM: writing and reading gigabytes on a disk takes long
    needed = 4 * num_parameters(config)
    # In a container /dev/shm may be tiny.
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > needed
    with tempfile.TemporaryDirectory(dir=memory if has_room else None) as name:
        folder = Path(name) / "student"
        save_student(student, folder)
        load = partial(AutoModelForCausalLM.from_pretrained, folder, local_files_only=True)
        theirs = load(dtype=check.dtype).to(check.device)
        theirs_fp32 = load(dtype=torch.float32).to(check.device)
        ours_fp32 = load_student(folder, device=check.device)
    batch, prompt = (2, 10) if check.tiny else (16, 300)
    prompts = torch.tensor(prompts_of(student, batch, prompt), device=check.device)
    time_generate(check, student, theirs, prompts)
    row = prompts[0, :64]
    with torch.no_grad():
        # transformers in fp32 is the truth for our bf16 logits, and must agree with our fp32 ones.
        truth = theirs_fp32(row[None]).logits[0].double()
    error = relative_error(logits_of(student, row), truth)
    check.figure("decode.logits_error", error, of=str(check.dtype).removeprefix("torch."))
    check_close("logits in fp32", logits_of(ours_fp32, row), truth)


def time_generate(
    check: Check, student: Decoder, theirs: torch.nn.Module, prompts: torch.Tensor
) -> None:
    """Times `generate` at its defaults, as a trainer that calls it would; milliseconds a token."""
    batch, prompt = prompts.shape
    seconds = []
    # The first run warms up. The last two differ in new tokens only, so prefill cancels out.
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


def driver_memory(check: Check) -> None:
    """Measures what a process holds of the card besides PyTorch's memory."""
    if not check.is_cuda:
        raise Skipped("a CPU has no context")
    free, total = torch.cuda.mem_get_info(check.device)
    # The context, loaded modules and libraries: everything that PyTorch did not allocate itself.
    beside = (total - free - torch.cuda.memory_reserved(check.device)) / 2**30
    check.figure("decode.driver_gib", beside)


PARTS: dict[str, Part] = {
    "steps of 0.6B": steps("Qwen3-0.6B", (64, 256, 1, 16)),
    "steps of 4B": steps("Qwen3-4B", (64,)),
    "transformers": beside_transformers,
    "groups": groups_and_second_attempts,
    "captures": captures,
    "all captures": all_captures,
    "teacher": beside_a_teacher,
    "eager": eager_step,
    "evaluation": evaluation_step,
    "driver": driver_memory,
    "kernels of a round": kernels_of_a_round,
}
