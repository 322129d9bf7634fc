"""Starts the contenders from other projects and talks to them; each runs in its own process.

Each peer has several settings to choose from. Python peers run peer_worker.py with the peer's own
Python and stay alive from case to case. llama.cpp runs as its llama-batched-bench, one process a
call, and a case is put together from several calls, since that tool knows a single prompt only. It
samples nothing, and its tokens are random.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench.rollout.cases import Case, Work

Result = dict[str, Any]  # has keys seconds, prefill_s, prefilled, peak_mib; or error
WORKER = Path(__file__).with_name("peer_worker.py")
CPU_ONLY = ("ctranslate2", "vllm", "llama.cpp", "llama.cpp-bf16")  # as peers.txt installs them
NAMES = ("generate-copied", "generate-shared", "generate-batch", *CPU_ONLY)


class Contender(Protocol):
    """Anything that can be timed on a piece of work."""

    name: str
    setting: str
    version: str

    def run(self, work: Work) -> Result: ...

    def close(self) -> None: ...


@dataclass
class Worker:
    """A process of peer_worker.py with one setting, started at its first piece of work."""

    name: str
    setting: str
    python: str
    options: dict[str, Any]
    env: dict[str, str]
    timeout_s: float
    version: str = ""
    _process: subprocess.Popen | None = None
    _log: Any = field(default_factory=tempfile.TemporaryFile)

    def run(self, work: Work) -> Result:
        try:
            if self._process is None:
                self._start()
            assert self._process is not None and self._process.stdin is not None
            self._process.stdin.write(json.dumps(work.to_json()).encode() + b"\n")
            self._process.stdin.flush()
            return self._read()
        except (OSError, RuntimeError) as error:
            self.close()
            return {"error": str(error)}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        # Without our PYTHONPATH, which would mix our packages into the peer's environment.
        command = [self.python, str(WORKER), self.name, json.dumps(self.options)]
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, env=inherited | self.env, bufsize=0, **pipes)
        self.version = self._read()["version"]

    def _read(self) -> Result:
        assert self._process is not None and self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            # select, as readline has no timeout and a peer may hang.
            if not selector.select(self.timeout_s):
                raise RuntimeError(f"no answer in {self.timeout_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            logged = self._log.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"ended: {(logged or ['?'])[-1]}")
        return json.loads(line)


@dataclass
class LlamaCpp:
    """llama.cpp's llama-batched-bench: one call for the prompts, one for decoding all rollouts.

    A second attempt is charged for its guidance only, as if the context before it were still in the
    KV cache. A llama.cpp server can keep it in a slot, but batched-bench cannot show that.
    """

    name: str
    setting: str
    folder: Path
    model: str
    threads: int
    flags: Sequence[str]
    timeout_s: float
    version: str = ""
    _peak_mib: float = 0.0

    def run(self, work: Work) -> Result:
        case = work.case
        self._peak_mib = 0.0
        try:
            if case.rollouts == 1:
                prefill_s, decode_s = self._call(case.prompt, case.new, case.questions)
            else:
                # Two calls: prompts once a question, then decoding of all rollouts behind a single
                # shared prompt (-pps).
                prefill_s, _ = self._call(case.prompt, 2, case.questions)
                decode_s = self._call(case.prompt, case.new, case.num_first, "-pps")[1]
            seconds = prefill_s + decode_s
            if case.guidance:
                seconds += self._call(1 + case.guidance, 2, case.num_second)[0]
                context = case.prompt + case.new + case.guidance
                seconds += self._call(context, case.new, case.num_second, "-pps")[1]
        except (OSError, RuntimeError) as error:
            return {"error": str(error)}
        known = {"seconds": seconds, "prefill_s": prefill_s}
        return known | {"prefilled": None, "peak_mib": self._peak_mib}

    def close(self) -> None:
        pass

    def _call(self, prompt: int, new: int, parallel: int, *more: str) -> tuple[float, float]:
        """Returns seconds of prompts and of decoding; the first new token comes from the prompt."""
        # Each sequence has its own part of the KV cache, a multiple of 256 tokens.
        context_size = -(-(prompt + new + 1) // 256) * 256 * parallel
        command = [str(self.folder / "llama-batched-bench"), "-m", str(self.folder / self.model)]
        command += ["-c", str(context_size), "-npp", str(prompt), "-ntg", str(max(1, new - 1))]
        command += ["-npl", str(parallel), "-b", "2048"]
        command += ["-t", str(self.threads), "-tb", str(self.threads)]
        command += ["--output-format", "jsonl", *self.flags, *more]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
            process = subprocess.Popen(command, stdout=out, stderr=log)
            deadline = time.monotonic() + self.timeout_s
            while process.poll() is None:
                if time.monotonic() > deadline:
                    process.kill()
                self._peak_mib = max(self._peak_mib, _peak_mib_of(process.pid))
                time.sleep(0.1)
            out.seek(0)
            log.seek(0)
            stdout_text = out.read().decode()
            logged = log.read().decode(errors="replace")
        lines = (stdout_text + "\n" + logged).splitlines()
        rows = [json.loads(line) for line in lines if line.startswith('{"n_kv_max"')]
        if process.returncode != 0 or len(rows) != 1:
            last = (logged.strip().splitlines() or ["no result"])[-1]
            raise RuntimeError(f"llama-batched-bench: {last}")
        return rows[0]["t_pp"], rows[0]["t_tg"]


def _peak_mib_of(pid: int) -> float:
    """Returns the most memory that a process held so far; 0 if it has just ended."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def start_peers(args: argparse.Namespace, cases: Sequence[Case]) -> list[list[Contender]]:
    """Returns the settings of each peer of --peers; processes start at their first work."""
    return [
        _llama(name, args) if name.startswith("llama") else _workers(name, args, cases)
        for name in args.peers
    ]


def _llama(name: str, args: argparse.Namespace) -> list[Contender]:
    model = "student.gguf" if name == "llama.cpp" else "student-bf16.gguf"
    settings = {"flash on": ["-fa", "on"], "flash off": ["-fa", "off"]}
    settings["one KV"] = ["-fa", "on", "-kvu"]
    settings["f32 KV"] = ["-fa", "on", "-ctk", "f32", "-ctv", "f32"]
    folder = Path(args.llama_dir)
    version = args.llama_version
    return [
        LlamaCpp(name, text, folder, model, args.threads, flags, args.timeout_s, version)
        for text, flags in settings.items()
    ]


def _workers(name: str, args: argparse.Namespace, cases: Sequence[Case]) -> list[Contender]:
    longest = max(case.longest for case in cases) + 8
    sequences = max(case.num_first for case in cases)
    options = {"student": args.student, "threads": args.threads, "ct2_dir": args.ct2_dir}
    options |= {"dtype": str(args.dtype).removeprefix("torch."), "device": str(args.device)}
    options |= {"longest": longest, "sequences": sequences}
    options["cache_tokens"] = sequences * (longest + 256)
    env = {"OMP_NUM_THREADS": str(args.threads)}
    python = args.peers_python
    settings: dict[str, tuple[dict[str, Any], dict[str, str]]] = {"": ({}, {})}
    if name == "generate-batch":
        settings = {f"page {size}": ({"page_size": size}, {}) for size in (32, 256)}
    elif name == "ctranslate2":  # GEMMs by oneDNN, which it chooses on AMD, or by MKL
        settings = {
            text: ({}, {"CT2_USE_MKL": use}) for text, use in (("oneDNN", "0"), ("MKL", "1"))
        }
        if sequences > 8:  # long prompts run three times as fast one question at a time
            settings |= {
                f"{text}, 8 at once": ({"at_once": 8}, library)
                for text, (_, library) in settings.items()
            }
    elif name == "vllm":
        python = args.vllm_python
        environment = Path(python).parent.parent
        libraries = [str(path) for path in sorted(environment.glob("lib/libiomp5.so"))]
        env |= {"LD_PRELOAD": ":".join([*libraries, *args.vllm_preload])}
        env |= {"VLLM_CPU_KVCACHE_SPACE": "2"}
        env |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}" if args.threads > 1 else "0"}
        env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        settings = {f"page {size}": ({"block_size": size}, {}) for size in (128, 32)}
    return [
        Worker(name, text, python, options | more, env | more_env, args.timeout_s)
        for text, (more, more_env) in settings.items()
    ]
