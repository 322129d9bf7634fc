"""The bundle for a GPU machine without a network: its contents, refusals and script.

pip and Python are replaced by stand-ins, so nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tools.gpu_check import bundle

MIB = 2**20
PINS = {**bundle.WHEELS, **bundle.PEERS}


def write_wheel(
    folder: Path,
    package: str,
    version: str,
    *,
    requires: tuple[str, ...] = (),
    num_bytes: int = 10,
    modules: Mapping[str, str] | None = None,
) -> Path:
    """Writes a wheel that pip accepts: metadata, modules, and a file of zeros."""
    name = package.replace("-", "_")
    info = f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {text}" for text in requires]
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for module, source in (modules or {}).items():
            archive.writestr(module, source)
        archive.writestr(f"{name}_data.bin", b"\0" * num_bytes)
        archive.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", "")
    return path


Pip = Callable[..., list[list[str]]]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pip:
    """Replaces pip; returns the commands it was called with. Builds nothing in this checkout."""
    monkeypatch.setattr(bundle, "ROOT", tmp_path / "checkout")

    def install(
        num_bytes: int = 10,
        failing: str = "",
        requires: Mapping[str, tuple[str, ...]] | None = None,
    ) -> list[list[str]]:
        commands: list[list[str]] = []

        def run(command: list[str], **_options: Any) -> SimpleNamespace:
            if command[0] == "git":
                return SimpleNamespace(returncode=0, stdout="abc123\n", stderr="")
            commands.append(command)
            package, _, version = command[-1].partition("==")
            if package == failing:
                stderr = "WARNING: slow\nERROR: No matching distribution found\n"
                return SimpleNamespace(returncode=1, stdout="", stderr=stderr)
            requirements = (requires or {}).get(package, ())
            folder = Path(command[command.index("--dest") + 1])
            write_wheel(folder, package, version, num_bytes=num_bytes, requires=requirements)
            return SimpleNamespace(returncode=0, stdout="", stderr="")

        monkeypatch.setattr(bundle, "subprocess", SimpleNamespace(run=run))
        return commands

    return install


def names_in(folder: Path) -> list[str]:
    """Returns the paths of all files in a folder, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_wheels_peers_and_script_are_there(tmp_path: Path, pip: Pip, capsys: Capture) -> None:
    commands = pip()
    folder = tmp_path / "gpu_bundle"
    assert bundle.main(["--python", "3.13", "--peers", "--folder", str(folder)]) == 0
    assert [command[-1] for command in commands] == [f"{name}=={v}" for name, v in PINS.items()]
    for command in commands:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:", "manylinux_2_28_x86_64"} <= set(command)
        assert command[command.index("--python-version") + 1] == "3.13"
    assert len(os.listdir(folder / "wheels")) == len(bundle.WHEELS)
    assert len(os.listdir(folder / "peers")) == len(bundle.PEERS)
    assert (folder / "peers" / "verl-0.9.1-py3-none-any.whl").is_file()
    subprocess.run(["sh", "-n", folder / "run.sh"], check=True)
    printed = capsys.readouterr().out
    for text in (
        f"MiB  {folder}/wheels",
        f"MiB  {folder}/peers",
        "in all",
        f"sh {folder}/run.sh --out DIR",
    ):
        assert text in printed
    command = "python3 -m tools.gpu_check --minutes 5 --peers /tmp/socpo_packages/peers --out DIR"
    assert command in printed
    assert os.listdir(tmp_path) == ["gpu_bundle"]


def test_peers_are_left_out_unless_asked_for(tmp_path: Path, pip: Pip) -> None:
    commands = pip()
    assert bundle.main(["--folder", str(tmp_path / "b")]) == 0
    assert len(commands) == len(bundle.WHEELS) and not (tmp_path / "b" / "peers").exists()


def test_a_bundle_that_is_too_large_is_refused(tmp_path: Path, pip: Pip, capsys: Capture) -> None:
    folder = tmp_path / "gpu_bundle"
    pip()
    assert bundle.main(["--folder", str(folder)]) == 0
    old_names = names_in(tmp_path)
    pip(num_bytes=11 * MIB)
    assert bundle.main(["--folder", str(folder)]) == 1
    error = capsys.readouterr().err
    assert (
        error
        == "bundle: must be at most 40 MiB, got revision.txt 0.0, run.sh 0.0, wheels 44.0 MiB\n"
    )
    # The older bundle stays, and nothing half-made lies beside it.
    assert names_in(tmp_path) == old_names
    assert (folder / "wheels" / "pydantic-2.14.4-py3-none-any.whl").stat().st_size < MIB


def test_a_failing_pip_is_told(tmp_path: Path, pip: Pip, capsys: Capture) -> None:
    pip(failing="pydantic-core")
    assert bundle.main(["--folder", str(tmp_path / "gpu_bundle")]) == 1
    package = "pydantic-core==2.50.5 for Python 3.12"
    reason = "ERROR: No matching distribution found"
    assert capsys.readouterr().err == f"bundle: {package}: pip failed: {reason}\n"
    assert os.listdir(tmp_path) == []


def test_pins_that_do_not_fit_are_refused(tmp_path: Path, pip: Pip, capsys: Capture) -> None:
    requirements = (
        "pydantic-core==2.50.4",
        "typing-extensions>=4",
        "annotated-types>9; extra == 'more'",
    )
    pip(requires={"pydantic": requirements})
    assert bundle.main(["--folder", str(tmp_path / "gpu_bundle")]) == 1
    error = capsys.readouterr().err
    assert "needs pydantic-core==2.50.4, got pydantic_core-2.50.5" in error
    assert error.count("needs") == 1


def test_a_folder_that_is_no_bundle_stays(tmp_path: Path, pip: Pip, capsys: Capture) -> None:
    commands = pip()
    (tmp_path / "thesis.tex").write_text("mine")
    assert bundle.main(["--folder", str(tmp_path)]) == 1
    assert "must be new or an older bundle" in capsys.readouterr().err
    assert bundle.main(["--folder", str(tmp_path / "b"), "--python", "3"]) == 1
    assert "--python must be two numbers" in capsys.readouterr().err
    assert commands == [] and names_in(tmp_path) == ["thesis.tex"]


def test_only_the_extension_of_that_python_travels(
    tmp_path: Path, pip: Pip, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip()
    (tmp_path / "socpo_fast").mkdir()
    for tag in ("312", "311", "312d"):
        (tmp_path / "socpo_fast" / f"_C.cpython-{tag}-x86_64-linux-gnu.so").write_bytes(b"code")
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    folder = tmp_path / "gpu_bundle"
    assert bundle.main(["--folder", str(folder)]) == 0
    assert os.listdir(folder / "extension") == ["_C.cpython-312-x86_64-linux-gnu.so"]
    assert f"cp {folder}/extension/*.so socpo_fast/" in capsys.readouterr().out
    assert bundle.main(["--folder", str(folder), "--python", "3.13"]) == 0
    assert not (folder / "extension").exists()
    line = "no extension for Python 3.13: the check runs without (SOCPO_BUILD=none)\n"
    assert line in capsys.readouterr().out


CHECK = """
import json, os, sys
import tiny_needed
assert tiny_needed.ANSWER == 42 and "tiny_peer" not in sys.modules
peers = sys.argv[sys.argv.index("--peers") + 1]
sys.path.append(peers)
import tiny_peer
out = sys.argv[sys.argv.index("--out") + 1]
os.makedirs(out)
with open(os.path.join(out, "seen.json"), "w") as file:
    json.dump({"argv": sys.argv[1:], "peers": peers, "pythonpath": os.environ["PYTHONPATH"]}, file)
sys.exit(3)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Returns a checkout with a bundle in it, and a check that imports packages of the bundle."""
    root = tmp_path / "checkout"
    folder = root / "gpu_bundle"
    for name in (
        "tools/gpu_check",
        "socpo_fast",
        "gpu_bundle/wheels",
        "gpu_bundle/peers",
        "gpu_bundle/extension",
    ):
        (root / name).mkdir(parents=True)
    (root / "tools" / "__init__.py").touch()
    (root / "tools" / "gpu_check" / "__init__.py").touch()
    (root / "tools" / "gpu_check" / "__main__.py").write_text(CHECK)
    modules = {"tiny_needed.py": "ANSWER = 42\n"}
    write_wheel(folder / "wheels", "tiny-needed", "1.0", modules=modules)
    # This peer brings a package of our name, as verl does; at the end of sys.path it hides nothing.
    modules = {"tiny_peer.py": "", "tools/__init__.py": "raise RuntimeError('hidden')\n"}
    write_wheel(folder / "peers", "tiny-peer", "1.0", modules=modules)
    (folder / "extension" / "_C.cpython-312-x86_64-linux-gnu.so").write_bytes(b"code")
    script = bundle.RUN_SH.format(name="gpu_bundle", minutes=bundle.MINUTES)
    (folder / "run.sh").write_text(script)
    return root


def run_script(
    root: Path,
    *arguments: str,
    loads: bool = True,
    **environ: str,
) -> subprocess.CompletedProcess[str]:
    """Runs run.sh with a stand-in for Python.

    The stand-in answers whether the extension loads; it passes all other calls to Python.
    """
    stand_in = root.parent / "python"
    if not stand_in.exists():
        answer = f'case "$*" in *socpo_fast._C*) exit {int(not loads)} ;; esac'
        stand_in.write_text(f'#!/bin/sh\n{answer}\nexec {sys.executable} "$@"\n')
        stand_in.chmod(0o755)
    return subprocess.run(
        ["sh", "gpu_bundle/run.sh", *arguments],
        cwd=root,
        env={**os.environ, "PYTHON": str(stand_in), "TMPDIR": str(root.parent), **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_script_installs_checks_and_cleans_up(tmp_path: Path, checkout: Path) -> None:
    """A stand-in for `timeout` records the limit that the script sets."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "timeout").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/limit\nshift 3\nexec "$@"\n')
    (tools / "timeout").chmod(0o755)
    old_names = set(names_in(checkout))
    out = tmp_path / "out"
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    arguments = ["--out", str(out), "--minutes", "8"]
    result = run_script(checkout, *arguments, PATH=path, PYTHONPATH="/elsewhere")
    assert result.returncode == 3, result.stderr  # the check's own status
    recorded = read_record(out)
    assert recorded["argv"] == [
        "--minutes",
        "5",
        "--peers",
        recorded["peers"],
        "--out",
        str(out),
        "--minutes",
        "8",
    ]
    assert recorded["pythonpath"] == recorded["peers"].replace("/peers", "/wheels") + ":/elsewhere"
    assert (tmp_path / "limit").read_text().startswith("-k 20 540 ")
    new_names = set(names_in(checkout)) - old_names
    assert new_names == {"socpo_fast/_C.cpython-312-x86_64-linux-gnu.so"}
    remaining = sorted(os.listdir(tmp_path))
    assert remaining == ["bin", "checkout", "limit", "out", "python"]  # no packages


def read_record(out: Path) -> dict[str, Any]:
    return json.loads((out / "seen.json").read_text())


def test_an_extension_that_does_not_load_is_left_out(tmp_path: Path, checkout: Path) -> None:
    result = run_script(checkout, "--out", str(tmp_path / "out"), loads=False)
    assert result.returncode == 3, result.stderr
    assert result.stderr == "run.sh: the extension does not load here; the check runs without\n"
    assert os.listdir(checkout / "socpo_fast") == []
    built_here = checkout / "socpo_fast" / "_C.cpython-312-x86_64-linux-gnu.so"
    built_here.write_bytes(b"their own")
    assert run_script(checkout, "--out", str(tmp_path / "out2"), loads=False).returncode == 3
    assert built_here.read_bytes() == b"their own"


def test_the_script_says_where_it_must_be_started(tmp_path: Path, checkout: Path) -> None:
    shutil.rmtree(checkout / "tools")
    result = run_script(checkout, "--out", str(tmp_path / "out"))
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == f"run.sh: must be started in the repository's root, got {checkout}\n"


def test_the_script_ends_when_a_wheel_is_broken(tmp_path: Path, checkout: Path) -> None:
    [wheel] = (checkout / "gpu_bundle" / "wheels").iterdir()
    wheel.write_bytes(b"no archive")
    result = run_script(checkout, "--out", str(tmp_path / "out"))
    assert result.returncode not in (0, 3) and "tiny_needed" in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["checkout", "python"]
