"""Describes the machine and the installed versions, for `socpo env` and the header of a bench."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers", "flash-attn", "safetensors", "tokenizers")


def environment() -> dict[str, str]:
    """Returns device, cores, threads and versions, as text to print.

    None of it identifies a person or holds a key, so it can be pasted into a bug report.
    """
    facts = {
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU {cpu_name()}",
        "cores": str(num_cores()),
        "threads": str(torch.get_num_threads()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    facts |= {package: installed_version(package) for package in PACKAGES}
    if torch.version.cuda is not None:
        facts["cuda"] = torch.version.cuda
    return facts | {
        "socpo_fast": installed_version("socpo_fast"),
        "git_revision": git_revision() or "unknown",
    }


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    # taskset and containers' cpusets restrict the affinity, which os.cpu_count() does not see.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Returns the CPU's model name where Linux tells it, else the name of the instruction set."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = (
        cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        if cpuinfo.is_file()
        else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def installed_version(package: str) -> str:
    """Returns a package's version, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def git_revision() -> str | None:
    """Returns the commit that this package's checkout is at; None outside a checkout."""
    # Reads the files of .git itself, so that it works where git is not installed.
    git = Path(__file__).resolve().parents[2] / ".git"
    head_file = git / "HEAD"
    if not head_file.is_file():
        return None
    revision = head_file.read_text(encoding="utf-8").strip()
    if not revision.startswith("ref: "):
        return revision
    ref = revision.removeprefix("ref: ")
    if (git / ref).is_file():
        return (git / ref).read_text(encoding="utf-8").strip()
    # After `git gc` a branch has no file of its own: packed-refs lists "<commit> <ref>".
    packed = git / "packed-refs"
    lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {ref}")), None)
