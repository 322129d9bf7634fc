"""The contenders of bench_rollout from other projects; run by it in a peer's own Python: REQUEST.json ANSWER.json.

Imports nothing of ours. Every peer gets the same prompts (token ids), one round to warm up, and writes the seconds of
the others. A second attempt is submitted as a whole context: no peer can go on from a finished answer; vLLM finds the
common prefix in its cache.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Generate = Callable[[list[list[int]], int], list[list[int]]]  # (prompts, answers to each) -> new ids of every answer


def run_rounds(job: Job, generate: Generate) -> list[float]:
    """Seconds of each round but the first."""
    case, seconds = job["case"], []
    for given in job["rounds"]:
        started = time.perf_counter()
        answers = generate(given["prompts"], case["num_rollouts"])
        assert len(answers) == len(given["prompts"]) * case["num_rollouts"], len(answers)
        assert all(len(ids) == case["new_tokens"] for ids in answers), [len(ids) for ids in answers]
        if case["resumed"]:
            groups = [answers[i : i + case["num_rollouts"]] for i in range(0, len(answers), case["num_rollouts"])]
            contexts = [
                prompt + ids + given["suffix"]
                for prompt, group in zip(given["prompts"], groups, strict=True)
                for ids in group[: case["resumed"]]
            ]
            generate(contexts, 1)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def transformers_generate(job: Job) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["student"], dtype=torch.float32)
    model.generation_config.eos_token_id = None
    new_tokens = job["case"]["new_tokens"]
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    options |= {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

    @torch.inference_mode()
    def generate(prompts: list[list[int]], num_rollouts: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        copied = ids.repeat_interleave(num_rollouts, dim=0)
        extra = {}
        if job["peer"] == "generate-shared" and num_rollouts > 1:
            cache = DynamicCache(config=model.config)
            model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(num_rollouts)
            extra = {"past_key_values": cache}
        out = model.generate(copied, attention_mask=torch.ones_like(copied), **options, **extra)
        return out[:, ids.shape[1] :].tolist()

    return generate


def transformers_generate_batch(job: Job) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["student"], dtype=torch.float32, attn_implementation="sdpa")
    new_tokens = job["case"]["new_tokens"]
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0
    )
    longest = job["case"]["prompt_tokens"] + 2 * new_tokens + job["case"]["guidance"]
    sequences = job["case"]["num_prompts"] * job["case"]["num_rollouts"]
    pages = ContinuousBatchingConfig(page_size=32, num_blocks=sequences * (longest // 32 + 2), max_batch_tokens=2048)

    def generate(prompts: list[list[int]], num_rollouts: int) -> list[list[int]]:
        inputs = [prompt for prompt in prompts for _ in range(num_rollouts)]
        options = {"generation_config": config, "continuous_batching_config": pages, "progress_bar": False}
        outputs = model.generate_batch(inputs=inputs, **options)
        return [output.generated_tokens for output in outputs.values()]

    return generate


def ctranslate2_generate(job: Job) -> Generate:
    import ctranslate2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["student"])
    options = {"compute_type": "float32", "inter_threads": 1, "intra_threads": job["threads"]}
    generator = ctranslate2.Generator(job["ct2_dir"], device="cpu", **options)
    new_tokens = job["case"]["new_tokens"]

    def generate(prompts: list[list[int]], num_rollouts: int) -> list[list[int]]:
        tokens = [tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts]
        results = generator.generate_batch(
            tokens,
            num_hypotheses=num_rollouts,
            sampling_topk=0,
            sampling_temperature=1.0,
            max_length=new_tokens,
            min_length=new_tokens,
            include_prompt_in_result=False,
            max_batch_size=0,
        )
        return [list(ids) for result in results for ids in result.sequences_ids]

    return generate


def vllm_generate(job: Job) -> Generate:
    from vllm import LLM, SamplingParams

    longest = job["case"]["prompt_tokens"] + 2 * job["case"]["new_tokens"] + job["case"]["guidance"] + 8
    llm = LLM(job["student"], dtype="float32", max_model_len=longest, enable_prefix_caching=True, max_num_seqs=64)
    new_tokens = job["case"]["new_tokens"]

    def generate(prompts: list[list[int]], num_rollouts: int) -> list[list[int]]:
        params = SamplingParams(n=num_rollouts, temperature=1.0, max_tokens=new_tokens, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(completion.token_ids) for output in outputs for completion in output.outputs]

    return generate


def llama_seconds(job: Job) -> list[float]:
    """llama-batched-bench: no sampling, and one prompt shared by all where questions have several answers."""
    case, folder = job["case"], Path(os.environ["SOCPO_PEER_LLAMA"])
    if case["resumed"]:
        raise SystemExit("llama-batched-bench knows no second attempt")
    parallel = case["num_prompts"] * case["num_rollouts"]
    context = parallel * (case["prompt_tokens"] + case["new_tokens"]) + 512
    command = [
        str(folder / "llama-batched-bench"),
        "-m",
        str(folder / "student.gguf"),
        "-c",
        str(context),
        "-b",
        "2048",
    ]
    command += [
        "-ub",
        "512",
        "-npp",
        str(case["prompt_tokens"]),
        "-ntg",
        str(case["new_tokens"]),
        "-npl",
        str(parallel),
    ]
    command += ["-t", str(job["threads"]), "-tb", str(job["threads"]), "--output-format", "jsonl"]
    command += ["-pps"] if case["num_rollouts"] > 1 else []
    seconds = []
    for _ in job["rounds"][1:]:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        row = next(json.loads(line) for line in out.splitlines() if line.startswith("{"))
        seconds.append(row["t"] if "t" in row else row["t_pp"] + row["t_tg"])
    return seconds


GENERATORS: dict[str, Callable[[Job], Generate]] = {
    "generate-copied": transformers_generate,
    "generate-shared": transformers_generate,
    "generate-batch": transformers_generate_batch,
    "ctranslate2": ctranslate2_generate,
    "vllm": vllm_generate,
}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    random.seed(0)
    seconds = llama_seconds(job) if job["peer"] == "llama.cpp" else run_rounds(job, GENERATORS[job["peer"]](job))
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    Path(sys.argv[2]).write_text(json.dumps({"seconds": seconds, "peak_mib": peak}), encoding="utf-8")


if __name__ == "__main__":
    main()
