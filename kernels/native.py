"""Loads the libraries that setup.py compiled from csrc/ (plain C interface, ctypes)."""

import ctypes
import functools
from pathlib import Path
from typing import Literal

import torch

LibraryName = Literal["strop_cpu", "strop_cuda"]
FOLDER = Path(__file__).parent / "_native"


@functools.cache
def library(name: LibraryName) -> ctypes.CDLL | None:
    """The library, None where it was not built. One that is there but doesn't load raises OSError: it is broken."""
    path = FOLDER / f"{name}.so"
    return ctypes.CDLL(str(path)) if path.exists() else None


def why_missing(name: LibraryName) -> str:
    """The reason that the build noted, in words for an error message."""
    report = FOLDER / "build.txt"
    lines = report.read_text().splitlines() if report.exists() else []
    noted = [line for line in lines if line.startswith(f"{name}:")]
    return noted[0] if noted else f"{name} was not built (install strop from source to build it)"


def launch(function: str, device: torch.device, *arguments: ctypes._SimpleCData) -> None:
    """Call a launcher of strop_cuda on torch's current stream of `device`, which is its last argument.

    Raises RuntimeError with the CUDA error code where the launcher returns one.
    """
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        code = getattr(library("strop_cuda"), function)(*arguments, stream)
    if code:
        raise RuntimeError(f"{function}: CUDA error {code} (cudaError_t in driver_types.h)")
