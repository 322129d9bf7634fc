"""What is distributed: an sdist is the repository, and wheels work in an empty folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
# The extension of another torch, as far as it is looked at before it would be loaded.
OTHER_TORCH = b"\x7fELF socpo_fast._C is built for torch 1.13.1\0"
TINY_RUN = {
    "run.num_batches": 1,
    "rollout.questions_per_batch": 2,
    "rollout.group_size": 2,
    "rollout.max_new_tokens": 64,
    "train.questions_per_update": 2,
    "data.builtin_eval_questions": 2,
    "eval.samples": 1,
}
TINY = [word for key, value in TINY_RUN.items() for word in (f"--{key}", str(value))]


def run(command: list[str], cwd: Path, **environ: str) -> str:
    """Returns what a command prints, stderr included; it must succeed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def build(kind: str, tree: Path, to: Path, **environ: str) -> tuple[Path, str]:
    """Builds an sdist or a wheel of a tree; returns its path and what the build printed."""
    code = f"import sys; from setuptools.build_meta import *; build_{kind}(sys.argv[1])"
    printed = run([sys.executable, "-c", code, str(to)], tree, **environ)
    [path] = [path for path in to.iterdir() if path.name.endswith((".whl", ".tar.gz"))]
    return path, printed


def modules_of_extras() -> list[str]:
    """The installed modules that no core dependency, nor what it needs itself, brings."""
    core = {"socpo-fast"}
    needed = [*map(Requirement, PROJECT["dependencies"])]
    while needed:
        requirement = needed.pop()
        name = canonicalize_name(requirement.name)
        is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if is_needed and name not in core:
            core.add(name)
            needed += map(Requirement, metadata.requires(name) or [])
    owners = metadata.packages_distributions()
    return sorted(
        module for module, names in owners.items() if core.isdisjoint(map(canonicalize_name, names))
    )


def hide(modules: list[str]) -> str:
    """Returns a line of Python after which these modules cannot be imported."""
    return f"import sys; sys.modules.update(dict.fromkeys({modules!r}))"


def install(dist: Path, folder: Path, **environ: str) -> Path:
    """Installs into a new environment with our core dependencies; returns its bin folder."""
    venv.create(folder, with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    borrowed = sysconfig.get_paths()["purelib"]
    pth = Path(paths["purelib"], "borrowed.pth")
    pth.write_text(borrowed, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", f"{paths['scripts']}/python", "install"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    run([*pip, *options, str(dist)], folder, **environ)
    pth.write_text(f"{borrowed}\n{hide(modules_of_extras())}\n", encoding="utf-8")
    return Path(paths["scripts"])


@pytest.fixture(scope="module")
def repository() -> list[str]:
    """The files that git knows or would take; a symbolic link is one of them."""
    if not (ROOT / ".git").exists():
        pytest.skip("this tree is a copy, which git does not know")
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    return [name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def sdist(repository: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, made without a look at csrc/."""
    tree = tmp_path_factory.mktemp("tree")
    for name in repository:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"), SOCPO_BUILD="none")[0]


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    [tree] = folder.iterdir()
    return tree


@pytest.mark.slow
def test_sdist_is_the_repository(unpacked: Path, repository: list[str]) -> None:
    """Kernels and configs are there twice: an sdist holds files in place of symbolic links."""
    links = {"socpo_fast/kernels", "socpo_fast/configs"}
    targets = ("kernels/", "configs/")
    linked = {f"socpo_fast/{name}" for name in repository if name.startswith(targets)}
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    made = {name for name in files if re.match(r"PKG-INFO|setup\.cfg|socpo_fast\.egg-info", name)}
    assert files - made == {*repository, *linked} - links
    assert not [path for path in unpacked.rglob("*") if path.is_symlink()]


@pytest.mark.slow
def test_wheel_without_csrc(unpacked: Path, tmp_path: Path) -> None:
    """It is the package alone, with its data, and the build has nothing to warn of."""
    wheel, printed = build("wheel", unpacked, tmp_path, SOCPO_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "absent from the `packages`" not in printed
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = unpacked / "socpo_fast"
    sources = {str(path.relative_to(unpacked)) for path in package.rglob("*") if path.is_file()}
    assert names == sources


@pytest.mark.slow
@pytest.mark.parametrize("built", ["auto", "none"])
def test_commands_run_in_an_empty_folder(
    built: str, sdist: Path, unpacked: Path, tmp_path: Path
) -> None:
    """A compiled wheel, made of the sdist, and an sdist that is installed without a compiler."""
    dist = build("wheel", unpacked, tmp_path, SOCPO_BUILD="auto")[0] if built == "auto" else sdist
    scripts = install(dist, tmp_path / "venv", SOCPO_BUILD="none", CXX="no-compiler")
    empty = tmp_path / "empty"
    empty.mkdir()

    def socpo(*words: str) -> str:
        return run([str(scripts / "socpo"), *words], empty)

    where = run([str(scripts / "python"), "-c", "import socpo_fast as s; print(s.__file__)"], empty)
    assert where.startswith(str(tmp_path / "venv"))
    assert re.search(r"op swiglu +(\w+)", socpo("env"))[1] == {"auto": "cpp", "none": "ref"}[built]
    for command in ("demo", "train", "eval", "rollout", "plan"):
        socpo(command, *["--dry-run"] * (command != "plan"))
        assert not [*empty.iterdir()]
    socpo("demo", *TINY)
    socpo("train", *TINY)
    for name in ("molar_mass", "run"):
        assert (empty / "runs" / name / "metrics.jsonl").stat().st_size > 0
        assert not (empty / "runs" / name / "tb").exists(), "tensorboard is an extra"
    socpo("eval", *TINY)
    socpo("rollout", *TINY, "--run.name", "rollouts")
    assert str(empty / "runs" / "run") in socpo("report", str(empty / "runs" / "run"))
    assert "<svg" in (empty / "runs" / "run" / "report.html").read_text(encoding="utf-8")
    socpo("init", "mine")
    run([str(scripts / "socpo"), "train", "--config", "config.toml", *TINY], empty / "mine")


def test_core_dependencies_are_enough(tmp_path: Path) -> None:
    """Training, report and all, where nothing else is installed; what needs more says what."""
    hidden = modules_of_extras()
    assert {"datasets", "pandas", "pyarrow", "tensorboard", "matplotlib", "pytest"} <= {*hidden}
    export = ["export", "runs/molar_mass", "rollouts.parquet"]
    code = [
        hide(hidden),
        "from socpo_fast.cli import main",
        f"assert main(['demo', *{TINY}]) == 0",
        f"assert main({export}) == 2",
    ]
    printed = run([sys.executable, "-c", "\n".join(code)], tmp_path, PYTHONPATH=str(ROOT))
    assert "pip install 'socpo_fast[parquet]'" in printed.splitlines()[-1]


def test_extension_of_another_torch_is_refused(tmp_path: Path) -> None:
    """In words that name both releases, and before the library is loaded."""
    library = tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.write_bytes(OTHER_TORCH)
    code = f"import socpo_fast; socpo_fast.__path__.insert(0, {str(tmp_path)!r}); socpo_fast.Engine"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith("RuntimeError: ops: the extension socpo_fast._C must be built for")
    assert "got one for torch 1.13;" in last_line and "--no-build-isolation" in last_line


def test_floors_are_those_that_are_tested() -> None:
    pins = {}
    for line in (ROOT / "constraints-floor.txt").read_text(encoding="utf-8").splitlines():
        name, is_pin, version = line.partition("==")
        if is_pin:
            pins[name] = Version(version)
    optional = ("gpu", "math", "trl", "parquet", "datasets", "tensorboard")
    extras = [PROJECT["optional-dependencies"][name] for name in optional]
    for text in [*PROJECT["dependencies"], *chain(*extras)]:
        requirement = Requirement(text)
        pin = pins[requirement.name]
        [floor] = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        assert pin in requirement.specifier and pin.release[: len(floor.release)] == floor.release


def test_wheels_are_for_the_declared_pythons() -> None:
    declared = re.findall(r":: Python :: 3\.(\d+)", "\n".join(PROJECT["classifiers"]))
    builds = PYPROJECT["tool"]["cibuildwheel"]["build"]
    assert builds == [f"cp3{minor}-manylinux_x86_64" for minor in declared]
