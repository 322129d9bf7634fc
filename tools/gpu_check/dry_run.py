"""Runs every stage of gpu_check at its real sizes, on a card that is not there.

    python -m tools.gpu_check.dry_run [STAGE[:PART] ..] [--markdown FILE]   (make gpu-dry-run)

Needs a CUDA build of PyTorch, no driver and no card. The parts of the stages run one by one on the
fake device (fake_cuda.py, stand_ins.py) and take their CUDA branches. For each part it prints the
launches, the figures and the peak memory of tensors. Exits 1 when a part raises, when a launch has
wrong arguments, when a capture reads a value or uses a tensor of the host, or when the memory
exceeds that of a card.

It cannot show time, values, whether Triton compiles a kernel, and memory outside of tensors.
REPLACED and SKIPPED below list what has a stand-in and what is skipped, with the reasons. Read
main, then run_all and run_part.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import io
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from tools.gpu_check import engines, learning, op_cases, profilers, timing
from tools.gpu_check.check import Check, Part
from tools.gpu_check.fake_cuda import fake_cuda
from tools.gpu_check.memory import CARD_GIB
from tools.gpu_check.outcome import Outcome, lines_of, table
from tools.gpu_check.recorder import Recorder
from tools.gpu_check.results import read_results
from tools.gpu_check.stages import BY_NAME, NAMES
from tools.gpu_check.stand_ins import stage_stand_ins
from tools.gpu_check.walk import revision_and_versions, write_between_marks

BEGIN = "<!-- begin of the dry run -->"
END = "<!-- end of the dry run -->"
COMPARING = "ceilings rates decode training head learning"  # modules that import check_close
# The value of every number that the host reads and that is unknown. It must make sense as a token
# (not one that ends a sequence) and as a count.
UNKNOWN = 7
RUN = learning.run  # kept, since learning.run is replaced below
MAX_LEFT_BYTES = 2**20  # of tensors that may outlive a part, such as caches


def run_only(_name: str, run: op_cases.Run, inputs: op_cases.Inputs, *target: Any) -> float:
    """Stands in for op_cases.compare: runs the op and compares nothing."""
    dtype, device, impl = target
    run(op_cases.move(inputs, dtype, device), impl)
    return 0.0


def student_on_card(check: Check, model: str, _device: object) -> Any:
    """Stands in for make_student: always on the card, also where a stage asks for a CPU."""
    return engines.make_student(check, model, check.device)


def workload_here(tool: str, _options: list[str], name: str, check: Check, _limit_s: float) -> str:
    """Stands in for profilers.under: runs the workload and returns a tool's typical output."""
    profilers.workload(name, check)
    # Enough of an output for the code that parses it.
    rows = f'"Kernel Name","{profilers.DRAM}","{profilers.OCCUPANCY}"\n"_decode_kernel","50","50"\n'
    return rows if tool == "ncu" else "ERROR SUMMARY: 0 errors"


def check_shapes(what: str, actual: Tensor, truth: Tensor, bound: float = 0.0) -> None:
    """Stands in for check.check_close: compares shapes only."""
    assert actual.shape == truth.shape, f"{what}: {list(actual.shape)} and {list(truth.shape)}"


def error_of_shapes(actual: Tensor, truth: Tensor) -> float:
    """Stands in for attention.row_error: compares shapes only."""
    check_shapes("rows", actual, truth)
    return 0.0


def run_on_card(check: Check, folder: Path, name: str, _device: str, **changes: Any) -> Path:
    """Stands in for learning.run: always on the card, also where a stage asks for a CPU."""
    return RUN(check, folder, name, str(check.device), **changes)


def nothing(*_arguments: object) -> None:
    return None


class Replaced(NamedTuple):
    """A function of some modules of gpu_check, its stand-in, and the reason."""

    modules: str
    name: str
    stand_in: Any
    reason: str


REPLACED = (
    Replaced(COMPARING, "check_close", check_shapes, "there are no values"),
    Replaced("attention", "row_error", error_of_shapes, "there are no values"),
    Replaced("engine", "assert_changed", nothing, "tokens are the same before and after"),
    Replaced("updates", "assert_moved", nothing, "weights are the same before and after"),
    Replaced("kernels", "compare", run_only, "the truth is the CPU's; the card's side runs"),
    Replaced("engine", "make_student", student_on_card, "the CPU's engine draws real tokens"),
    Replaced("learning", "run", run_on_card, "on a CPU it takes minutes, and draws real tokens"),
    Replaced("profilers", "under", workload_here, "a card's tools; their workload runs"),
)
SKIPPED = {
    "attention: flex": "it compiles, which asks the driver",
    "kernels: op tests": "pytest in processes of its own",
    "profilers: warm up": "processes of its own",
}
# (Module, constant, value in a dry run): fewer repeats, as repeats launch the same kernels again.
FEWER = (
    (timing, "MIN_RUNS", 1),
    (timing, "MAX_RUNS", 1),
    (engines, "NEW_TOKENS", 16),
    (learning, "NUM_BATCHES", 1),
)


def main(arguments: list[str] | None = None) -> int:
    title = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check.dry_run", description=title)
    parser.add_argument("parts", nargs="*", metavar="STAGE[:PART]", help="default: all of them")
    parser.add_argument("--markdown", type=Path, help="write the table there, between its marks")
    parser.add_argument("--verbose", action="store_true", help="show what the stages print")
    options = parser.parse_args(arguments)
    if torch.version.cuda is None:
        needed = f"a CUDA build of torch is needed, got torch {torch.__version__}"
        advice = "`make gpu-dry-run` installs one (no card needed)"
        print(f"dry run: {needed}; {advice}", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET") == "1":  # too late to unset it: kernels are defined
        print("dry run: TRITON_INTERPRET must be unset, got 1", file=sys.stderr)
        return 2
    try:
        chosen = select(options.parts)
    except ValueError as error:
        parser.error(str(error))
    outcomes = []
    for outcome in run_all(chosen, is_verbose=options.verbose):
        outcomes.append(outcome)
        print("\n".join(lines_of(outcome)), flush=True)
        for fault in outcome.faults:
            print(f"dry run: {outcome.name}: {fault}", file=sys.stderr, flush=True)
    if options.markdown:
        about = f"{revision_and_versions()}. {about_stand_ins()}"
        lines = textwrap.wrap(about, 100, break_on_hyphens=False)
        text = "\n".join([*lines, "", *table(outcomes)])
        write_between_marks(options.markdown, text, (BEGIN, END))
    return 1 if any(outcome.faults for outcome in outcomes) else 0


def select(names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns (stage, part) of all parts, or of those that are named.

    Raises:
        ValueError: a name matches no part.
    """
    parts = [(stage, part) for stage in NAMES for part in module_of(stage).PARTS]
    if not names:
        return parts
    chosen = []
    for name in names:
        stage, _, part_name = name.partition(":")
        matches = [(s, p) for s, p in parts if s == stage and part_name in p]
        if not matches:
            raise ValueError(f"dry run: {name} must be a stage, or STAGE:PART, got neither")
        chosen += matches
    return chosen


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"tools.gpu_check.{name}")


def run_all(chosen: Sequence[tuple[str, str]], *, is_verbose: bool) -> Iterator[Outcome]:
    """Runs parts on the fake card; yields the outcome of each."""
    gc.freeze()  # imported modules are never garbage; each collection would search them again
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stand_ins = [
            (module_of(module), replaced.name, replaced.stand_in)
            for replaced in REPLACED
            for module in replaced.modules.split()
        ]
        # Modules import these functions by name, so each module's own name must be replaced.
        for module, name, stand_in in (*stand_ins, *FEWER):
            stack.enter_context(mock.patch.object(module, name, stand_in))
        recorder = stack.enter_context(fake_cuda(has_details=False, unknown=UNKNOWN))
        stack.enter_context(stage_stand_ins(recorder))
        sums: dict[str, float] = {}
        for stage, part in chosen:
            outcome = run_part(recorder, stage, part, folder, is_verbose=is_verbose)
            # Parts that run at once share one card, so their peaks must fit together.
            sums[stage] = sums.get(stage, 0) + outcome.peak_gib
            if BY_NAME[stage].parts_at_once and sums[stage] > CARD_GIB:
                outcome.faults.append(f"parts run at once take {sums[stage]:.1f} GiB together")
            yield outcome


def run_part(
    recorder: Recorder, stage: str, part: str, folder: Path, *, is_verbose: bool
) -> Outcome:
    """Runs one part on the fake device, which starts with empty memory."""
    outcome = Outcome(stage, part)
    if reason := SKIPPED.get(outcome.name):
        outcome.skips.append(f"{part}: {reason}")
        return outcome
    recorder.sections.clear()
    recorder.full_at = ""
    # The peak must be that of this part.
    recorder.memory.start()
    results = folder / f"{stage}-{part}.jsonl"
    check = Check(stage, device=torch.device("cuda"), tiny=False, results=results, peers=None)
    function: Part = module_of(stage).PARTS[part]
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if not is_verbose:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(recorder.section(part, may_read=True))
        stack.enter_context(check.case(part))
        function(check)
    outcome.seconds = time.perf_counter() - started
    add_up(outcome, recorder, results)
    # Caches that a stage keeps for its next part: emptied, so that only leaks remain.
    for value in vars(module_of(stage)).values():
        if isinstance(value, functools._lru_cache_wrapper):
            value.cache_clear()
    gc.collect()
    if recorder.memory.held_bytes > MAX_LEFT_BYTES:
        left = f"{recorder.memory.held_bytes / 2**20:.1f} MiB"
        outcome.faults.append(f"{left} are still held when the part has ended")
    return outcome


def add_up(outcome: Outcome, recorder: Recorder, results: Path) -> None:
    """Fills an outcome from the recorder's sections and the part's results."""
    launches = [launch for section in recorder.sections for launch in section.launches]
    outcome.num_torch = sum(launch.is_torch for launch in launches)
    outcome.num_triton = len(launches) - outcome.num_torch
    outcome.num_reads = sum(len(section.reads) for section in recorder.sections)
    outcome.num_uploads = sum(len(section.uploads) for section in recorder.sections)
    outcome.peak_gib = recorder.memory.most_bytes / 2**30
    stage_result = read_results(results, NAMES).stages[outcome.stage]
    outcome.num_figures = len(stage_result.figures)
    outcome.skips = [f"{case['case']}: {case['message']}" for case in stage_result.skips]
    outcome.faults = [fault for section in recorder.sections for fault in section.faults]
    outcome.faults += [f"{case['case']}: {case['message']}" for case in stage_result.failures]
    if recorder.full_at:
        need = f"{outcome.peak_gib:.1f} GiB, more than the {CARD_GIB:g} of a card"
        outcome.faults.append(f"out of memory at {recorder.full_at}: at most {need}")


def about_stand_ins() -> str:
    """Returns sentences on what differs from a run on a card."""
    texts = [
        f"`{name}` of {modules.replace(' ', ', ')} ({reason})"
        for modules, name, _, reason in REPLACED
    ]
    fewer = [f"`{name}` = {count}" for _, name, count in FEWER]
    return f"Stood in for: {'; '.join(texts)}. Fewer repeats: {', '.join(fewer)}."


if __name__ == "__main__":
    sys.exit(main())
