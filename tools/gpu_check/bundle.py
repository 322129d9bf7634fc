"""Collects in one folder what has to travel to a machine with a card and without a network.

    python -m tools.gpu_check.bundle [--python 3.12] [--peers] [--folder gpu_bundle]

    gpu_bundle/wheels/      what the checks import and a CUDA image lacks, for that machine's Python
    gpu_bundle/peers/       with --peers: what the policy head is compared with
    gpu_bundle/extension/   socpo_fast/_C*.so, where it was built for that Python
    gpu_bundle/run.sh       installs all of it beside the checkout and runs the check

Peers have a folder of their own, which one stage puts at the end of sys.path: their wheels bring
top-level packages such as `tests` and `scripts`, and those would hide ours. The folder appears
whole or not at all, and is refused above LIMIT_MIB.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from tools.gpu_check.revision import ROOT, revision

LIMIT_MIB = 40
# What `python -m tools.gpu_check` imports besides the packages of a CUDA image.
WHEELS = {
    "pydantic": "2.14.4",
    "pydantic-core": "2.50.5",
    "annotated-types": "0.8.0",
    "typing-inspection": "0.4.5",
}
# What stage `head` compares with.
PEERS = {
    "liger-kernel": "0.8.5",
    "trl": "1.16.0",
    "accelerate": "1.15.0",  # TRL's head cannot be imported without it
    "cut-cross-entropy": "25.1.1",
    "verl": "0.9.1",
}
# From new to old. pip accepts a wheel for any of them. CUDA images have glibc 2.28 or newer.
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux2010_x86_64",
    "manylinux1_x86_64",
)
RUN_SH = """\
#!/bin/sh
# Checks the project on this machine's card, without a network. In the repository's root:
#     sh {name}/run.sh --out DIR
# Arguments go to `python3 -m tools.gpu_check`. In the checkout it leaves copies of the extension.
set -eu
bundle=$(cd "$(dirname "$0")" && pwd)
python=${{PYTHON:-python3}}
if [ ! -d tools/gpu_check ]; then
    echo "run.sh: must be started in the repository's root, got $(pwd)" >&2
    exit 2
fi
minutes={minutes}
previous=
for argument in "$@"; do
    case $previous in --minutes) minutes=$argument ;; esac
    case $argument in --minutes=*) minutes=${{argument#--minutes=}} ;; esac
    previous=$argument
done
# The driver keeps to its minutes by itself; a minute later it is stopped from outside.
limit_s=$("$python" -c 'import sys; print(int(60 * float(sys.argv[1])) + 60)' "$minutes")
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
install_into() {{ "$python" -m pip install -q --no-index --no-deps --target "$@"; }}
install_into "$packages/wheels" "$bundle"/wheels/*.whl
if [ -d "$bundle/peers" ]; then
    install_into "$packages/peers" "$bundle"/peers/*.whl
    set -- --peers "$packages/peers" "$@"
fi
# Python must not write compiled files into the checkout. A cache elsewhere (PYTHONPYCACHEPREFIX) is
# no way out: with it, Python would not see the compiled files of torch and compile them again.
export PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH="$packages/wheels${{PYTHONPATH:+:$PYTHONPATH}}"
for extension in "$bundle"/extension/*.so; do
    copy=socpo_fast/$(basename "$extension")
    if [ ! -f "$extension" ] || [ -e "$copy" ]; then continue; fi
    cp "$extension" "$copy"
    # Built against another torch, it would stop every stage where they all work without it.
    if ! "$python" -c 'import torch, socpo_fast._C'; then
        rm "$copy"
        echo "run.sh: the extension does not load here; the check runs without" >&2
    fi
done
status=0
timeout -k 20 "$limit_s" "$python" -m tools.gpu_check --minutes {minutes} "$@" || status=$?
exit "$status"
"""
MINUTES = 5  # of a run of run.sh, unless its arguments say otherwise


class BundleError(Exception):
    """Raised where no bundle can be made; the message says why, in one line."""


def main(arguments: list[str] | None = None) -> int:
    title = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check.bundle", description=title)
    parser.add_argument("--python", default="3.12", help="that machine's Python; default 3.12")
    parser.add_argument("--peers", action="store_true", help="with what `head` is compared with")
    parser.add_argument("--folder", type=Path, default=Path("gpu_bundle"))
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        check_options(options.python, folder)
        collect(partial, folder.name, options.python, options.peers)
        sizes = part_sizes(partial)
        check_size(sizes)
        replace(folder, partial)
    except BundleError as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # already renamed where all went well
    print("\n".join(report(options.folder, sizes, options.python)))
    return 0


def collect(partial: Path, name: str, python: str, with_peers: bool) -> None:
    """Fills the folder `partial`; `name` is the folder's final name."""
    download(WHEELS, partial / "wheels", python)
    if conflicts := find_conflicts(partial / "wheels", python):
        raise BundleError("; ".join(conflicts))
    if with_peers:
        download(PEERS, partial / "peers", python)
    for path in extensions(python):
        (partial / "extension").mkdir(exist_ok=True)
        shutil.copy2(path, partial / "extension")
    (partial / "revision.txt").write_text(revision() + "\n", encoding="utf-8")
    script = RUN_SH.format(name=name, minutes=MINUTES)
    (partial / "run.sh").write_text(script, encoding="utf-8")


def download(pins: Mapping[str, str], folder: Path, python: str) -> None:
    """Downloads one wheel for each package by pip, for that Python on Linux x86-64."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    for package, version in pins.items():
        wheel = f"{package}=={version}"
        result = subprocess.run(
            [*command, "--dest", str(folder), wheel],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            lines = (result.stdout + result.stderr).strip().splitlines() or ["it said nothing"]
            raise BundleError(f"{wheel} for Python {python}: pip failed: {lines[-1]}")


def find_conflicts(folder: Path, python: str) -> list[str]:
    """Returns the requirements among a folder's wheels that the folder does not meet."""
    wheels = {parse_wheel_filename(path.name)[0]: path for path in sorted(folder.glob("*.whl"))}
    target = {"python_version": python, "extra": ""}
    conflicts = []
    for path in wheels.values():
        with zipfile.ZipFile(path) as archive:
            [metadata] = [x for x in archive.namelist() if x.endswith(".dist-info/METADATA")]
            headers = HeaderParser().parsestr(archive.read(metadata).decode())
        for text in headers.get_all("Requires-Dist", []):
            requirement = Requirement(text)
            needed = wheels.get(canonicalize_name(requirement.name))
            if needed is None:
                continue  # a dependency of torch or transformers, installed there already
            version = parse_wheel_filename(needed.name)[1]
            is_meant = requirement.marker is None or requirement.marker.evaluate(target)
            if is_meant and version not in requirement.specifier:
                conflicts.append(f"{path.name} needs {requirement}, got {needed.name}")
    return conflicts


def extensions(python: str) -> list[Path]:
    """Returns the built extension, if it was built for that Python."""
    tag = "cpython-" + python.replace(".", "")
    return sorted((ROOT / "socpo_fast").glob(f"_C.{tag}-*.so"))


def part_sizes(folder: Path) -> dict[str, int]:
    """Returns the bytes of each part of a bundle."""
    sizes = {}
    for entry in sorted(folder.iterdir()):
        files = (
            [entry] if entry.is_file() else [path for path in entry.rglob("*") if path.is_file()]
        )
        sizes[entry.name] = sum(path.stat().st_size for path in files)
    return sizes


def check_size(sizes: Mapping[str, int]) -> None:
    """Raises BundleError where a bundle is too large to be carried along."""
    if sum(sizes.values()) > LIMIT_MIB * 2**20:
        parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes.items())
        raise BundleError(f"must be at most {LIMIT_MIB} MiB, got {parts} MiB")


def check_options(python: str, folder: Path) -> None:
    """Checks the options. Only an older bundle may be replaced, never another folder."""
    if not re.fullmatch(r"3\.\d+", python):
        raise BundleError(f"--python must be two numbers such as 3.12, got {python!r}")
    if folder.exists() and not (folder / "run.sh").is_file():
        raise BundleError(f"--folder must be new or an older bundle, got {folder}")


def replace(folder: Path, partial: Path) -> None:
    """Puts the new bundle in place of the old one, by renaming: a reader never sees half of it."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def report(folder: Path, sizes: Mapping[str, int], python: str) -> list[str]:
    """Returns lines on the bundle's content, and the commands for the machine with the card."""
    lines = [f"{size / 2**20:8.2f} MiB  {folder / name}" for name, size in sizes.items()]
    lines.append(f"{sum(sizes.values()) / 2**20:8.2f} MiB  in all")
    if "extension" not in sizes:
        lines.append(f"no extension for Python {python}: the check runs without (SOCPO_BUILD=none)")
    target = "/tmp/socpo_packages"
    install = "python3 -m pip install -q --no-index --no-deps --target"
    check = f"PYTHONPATH={target}/wheels python3 -m tools.gpu_check --minutes {MINUTES}"
    lines += ["", "There, in the repository's root:", f"    sh {folder}/run.sh --out DIR", ""]
    lines += ["which is", f"    {install} {target}/wheels {folder}/wheels/*.whl"]
    if "peers" in sizes:
        lines.append(f"    {install} {target}/peers {folder}/peers/*.whl")
        check += f" --peers {target}/peers"
    if "extension" in sizes:
        lines.append(f"    cp {folder}/extension/*.so socpo_fast/")
    return [*lines, f"    {check} --out DIR"]


if __name__ == "__main__":
    sys.exit(main())
