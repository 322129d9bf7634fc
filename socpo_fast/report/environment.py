"""The machine in words, for `socpo env` and the card of a bench."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers", "flash-attn", "safetensors", "tokenizers")


def environment() -> dict[str, str]:
    """Device, cores, threads and versions, as text to print. Nothing in it identifies a person or
    holds a key.
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
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The CPU's model name where Linux tells it, else the instruction set's."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = (
        cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        if cpuinfo.is_file()
        else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def git_revision() -> str | None:
    """The commit this package's checkout stands on, read from the files of .git; None outside a
    checkout.
    """
    git = Path(__file__).resolve().parents[2] / ".git"
    head = git / "HEAD"
    if not head.is_file():
        return None
    revision = head.read_text(encoding="utf-8").strip()
    if not revision.startswith("ref: "):
        return revision
    ref = revision.removeprefix("ref: ")
    if (git / ref).is_file():
        return (git / ref).read_text(encoding="utf-8").strip()
    packed = git / "packed-refs"
    lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {ref}")), None)
