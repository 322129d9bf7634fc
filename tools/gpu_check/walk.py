"""Lists every kernel that the project launches on a card, without one: the fake CUDA walk.

    python -m tools.gpu_check.walk [--markdown FILE] [--json FILE] [--model NAME]   (make gpu-walk)

Needs a CUDA build of PyTorch, no driver and no card. The project's own code (code_paths.py) runs on
tensors that have a shape and a dtype but no memory (fake_cuda.py): decode rounds, a prefill step,
the policy head, the element-wise ops, the update of one group, and draws. Prints the launches,
shapes, bytes and products of each. Exits 1 when a launch has wrong arguments, when the host reads
where it must not, or when a decode round uses a tensor of the host, which no CUDA graph could
replay.

It cannot show time, memory, and whether a result is right. Autograd's engine does not work on the
fake device; graph.py calls the nodes of the graph instead. An op of torch counts as one launch,
although some make several (sort, index_put_) and a copy from the host makes none.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import torch

from socpo_fast.report.environment import installed_version
from tools.gpu_check.code_paths import walk
from tools.gpu_check.launches import PRODUCTS, Launch, Section
from tools.gpu_check.models import MODELS
from tools.gpu_check.revision import revision

# --markdown replaces the text between these lines.
BEGIN = "<!-- begin of the walk -->"
END = "<!-- end of the walk -->"
MAX_SHAPES = 4  # shapes printed for each kernel; --json has all of them
COUNTS = ("launches", "Triton", "torch", "products", "TFLOP", "GB", "host reads", "uploads")
COLUMNS = ("code path", *COUNTS)


def main(arguments: list[str] | None = None) -> int:
    title = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check.walk", description=title)
    parser.add_argument("--markdown", type=Path, help="write the summary there, between its marks")
    parser.add_argument("--json", type=Path, help="write every launch there")
    parser.add_argument("--model", choices=MODELS, default="Qwen3-0.6B")
    options = parser.parse_args(arguments)
    if torch.version.cuda is None:
        needed = f"a CUDA build of torch is needed, got torch {torch.__version__}"
        print(f"walk: {needed}; `make gpu-walk` installs one (no card needed)", file=sys.stderr)
        return 2
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when a kernel is defined
    sections = walk(MODELS[options.model])
    header = header_of(options.model)
    print("\n".join([header, "", *summary(sections), "", *details(sections)]))
    if options.markdown:
        text = "\n".join([header, "", *summary(sections), "", *kernels(sections)])
        write_between_marks(options.markdown, text, (BEGIN, END))
    if options.json:
        report = {"walk": header, "sections": [report_of(section) for section in sections]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    num_faults = 0
    for section in sections:
        # A fault in a layer repeats in every layer, so equal ones are counted.
        for fault, count in Counter(section.faults).items():
            num_faults += count
            print(f"walk: {section.name}: {count} x {fault}", file=sys.stderr)
    return 1 if num_faults else 0


def header_of(model: str) -> str:
    """Returns the model, the versions and the date of a walk."""
    return f"{model}, bf16, sm_90; {revision_and_versions()}."


def revision_and_versions() -> str:
    """Returns the revision, the versions of torch and triton, and the date."""
    versions = f"torch {torch.__version__}, triton {installed_version('triton')}"
    return f"revision {revision()}, {versions}, {date.today().isoformat()}"


def summary(sections: list[Section]) -> list[str]:
    """Returns a Markdown table with a row for each section."""
    rows: list[tuple[str, ...]] = [COLUMNS, ("---",) * len(COLUMNS)]
    for section in sections:
        launches = section.launches
        num_torch = sum(launch.is_torch for launch in launches)
        flops = sum(launch.flops for launch in launches) / 1e12
        moved = sum(launch.num_bytes for launch in launches) / 1e9
        counts = len(launches), len(launches) - num_torch, num_torch, num_products(launches)
        sizes = f"{flops:.3g}", f"{moved:.3g}", len(section.reads), len(section.uploads)
        rows.append(tuple(map(str, (section.name, *counts, *sizes))))
    return ["| " + " | ".join(row) + " |" for row in rows]


def num_products(launches: list[Launch]) -> int:
    """Returns the number of matrix products by cuBLAS."""
    return sum(launch.kernel.removeprefix("aten.") in PRODUCTS for launch in launches)


def kernels(sections: list[Section]) -> list[str]:
    """Returns a paragraph for each longer section: kernels, largest traffic, and host reads."""
    lines: list[str] = []
    printed: list[Counter[str]] = []
    for section in sections:
        counts = Counter(launch.kernel for launch in section.launches)
        # Short sections and repetitions would only lengthen the page.
        if counts.total() <= 10 or counts in printed:
            continue
        printed.append(counts)
        # "~" stands for a space at which a line must not be broken.
        names = [f"{count}~`{kernel}`" for kernel, count in counts.most_common() if count > 1]
        single = [f"`{kernel}`" for kernel, count in counts.items() if count == 1]
        parts = [f"- **{section.name}**: {', '.join(names)}"]
        parts += [f"Once: {', '.join(single)}"] if single else []
        moved = [text.replace(" ", "~") for text in most_moved(section)]
        parts += [f"Most GB: {'; '.join(moved)}"]
        parts += [f"Host reads: {'; '.join(section.reads)}"] if section.reads else []
        text = ". ".join(parts) + "."
        wrapped = textwrap.wrap(text, 100, subsequent_indent="  ", break_on_hyphens=False)
        lines += [line.replace("~", " ") for line in wrapped]
    return lines


def most_moved(section: Section) -> list[str]:
    """Returns the three tensors with the most traffic, and their GB."""
    return [f"{name} {size / 1e9:.3g}" for name, size in traffic(section)[:3]]


def details(sections: list[Section]) -> list[str]:
    """Returns each section's kernels with shapes and grids, its reads, uploads and faults."""
    lines = []
    for section in sections:
        lines += ["", f"## {section.name}", ""]
        by_kernel: dict[str, Counter[Launch]] = {}
        for launch in section.launches:
            by_kernel.setdefault(launch.kernel, Counter())[launch] += 1
        for kernel, variants in sorted(by_kernel.items(), key=lambda item: -item[1].total()):
            lines.append(f"{variants.total():6} {kernel}")
            for launch, count in variants.most_common(MAX_SHAPES):
                grid = f" grid {launch.grid}" if launch.grid else ""
                lines.append(f"{count:12} x {launch.shapes}{grid}")
            if len(variants) > MAX_SHAPES:
                lines.append(f"{len(variants) - MAX_SHAPES:12} more variants")
        lines.append(f"  most GB: {'; '.join(most_moved(section))}")
        for title in ("reads", "uploads", "faults"):
            texts = Counter(getattr(section, title))
            lines += [f"  {title}: {count} x {text}" for text, count in texts.items()]
    return lines


def traffic(section: Section) -> list[tuple[str, int]]:
    """Returns tensors by the bytes read and written, the largest first."""
    sizes: Counter[str] = Counter()
    for launch in section.launches:
        for name, size in launch.traffic:
            sizes[name] += size
    return sizes.most_common()


def report_of(section: Section) -> dict[str, Any]:
    """Returns a section as JSON: every different launch once, with its count."""
    launches = [
        {
            "kernel": launch.kernel,
            "count": count,
            "shapes": launch.shapes,
            "grid": launch.grid,
            "bytes": launch.num_bytes,
            "flops": launch.flops,
        }
        for launch, count in Counter(section.launches).most_common()
    ]
    texts = {name: getattr(section, name) for name in ("reads", "uploads", "faults")}
    return {"section": section.name, "launches": launches, "traffic": traffic(section), **texts}


def write_between_marks(path: Path, text: str, marks: tuple[str, str]) -> None:
    """Replaces the text between two marks of a file, or writes a new file with the marks."""
    begin, end = marks
    old = path.read_text(encoding="utf-8") if path.is_file() else f"{begin}\n{end}\n"
    if begin not in old or end not in old:
        raise ValueError(f"{path} must have the lines {begin} and {end}, got a file without")
    text_above, _, remainder = old.partition(begin)
    text_below = remainder.partition(end)[2]
    path.write_text(f"{text_above}{begin}\n{text}\n{end}{text_below}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
