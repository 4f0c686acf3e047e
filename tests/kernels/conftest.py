"""Kernels without a GPU: Triton in an interpreting process, CUDA sources compiled for the CPU."""

import contextlib
import ctypes
import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch
from strop.kernels import native

HERE = Path(__file__).parent
CUDA_SOURCES = HERE.parents[1] / "csrc/cuda"
# A misaligned vector access aborts the test, as it would fail on a GPU.
EMULATE = ("g++ -x c++ -std=c++17 -O1 -Wall -Wno-unknown-pragmas -fPIC -shared -DSTROP_EMULATION "
           "-fsanitize=alignment,bounds,shift,signed-integer-overflow,null -fno-sanitize-recover=all")  # fmt: skip


def neighbour(name: str):
    """The module in this folder, which is not on sys.path."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_emulation(source: Path, folder: Path) -> ctypes.CDLL:
    """A .cu file as a library that runs on the CPU."""
    library = folder / f"{source.stem}.so"
    includes = [f"-I{HERE / 'emulation'}", f"-I{CUDA_SOURCES}"]
    subprocess.run([*EMULATE.split(), *includes, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def interpreted():
    """An `Interpreter`: `interpreted.check(op, *arguments, upstream=...)` compares Triton with the reference."""
    pytest.importorskip("triton")
    interpreter = neighbour("interpreter").Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    """emulated_library(path of a .cu file) -> ctypes library, compiled once a session."""
    folder, libraries = tmp_path_factory.mktemp("emulated"), {}

    def load(source: Path) -> ctypes.CDLL:
        if source not in libraries:
            libraries[source] = compile_emulation(source, folder)
        return libraries[source]

    return load


@pytest.fixture(params=["forward", "backward"])
def emulated_cuda(request, emulated_library, monkeypatch):
    """Within the test strop.kernels.cuda runs csrc/cuda on CPU tensors; once with threads and blocks in the opposite order."""

    def launch(function: str, device: torch.device, *arguments) -> None:
        for source in sorted(CUDA_SOURCES.glob("*.cu")):
            library = emulated_library(source)
            with contextlib.suppress(AttributeError):
                launcher = getattr(library, function)
                library.strop_emulation_order(int(request.param == "backward"))
                code = launcher(*arguments, ctypes.c_void_p(None))
                if code:
                    raise RuntimeError(f"{function}: CUDA error {code}")
                return
        raise AssertionError(f"no file of {CUDA_SOURCES} defines {function}")

    monkeypatch.setattr(native, "launch", launch)
