"""The compiled kernels of csrc/, loaded with ctypes: they depend neither on torch's nor on Python's version."""

import ctypes
import functools
import os
import warnings
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "_native"
ABI_VERSION = 3
"""STROP_ABI_VERSION of csrc/include/strop.h."""
LAUNCH_FAILED = 3
"""STROP_LAUNCH_FAILED there: the CUDA runtime has an error number."""
CHOICES = ("auto", "reference", "native", "triton")


def choice() -> str:
    """The value of STROP_KERNELS; ValueError for one without a meaning."""
    value = os.environ.get("STROP_KERNELS") or "auto"
    if value not in CHOICES:
        raise ValueError(f"STROP_KERNELS={value}: choose from {', '.join(CHOICES)}")
    return value


def library(kind: str) -> ctypes.CDLL | None:
    """strop_<kind>.so (cpu or cuda); None where it isn't installed, and where it can't be used, of which one warning tells."""
    loaded = _open(kind)
    return None if isinstance(loaded, str) else loaded


@functools.cache
def _open(kind: str) -> ctypes.CDLL | str | None:
    """The library, why it can't be used, or None where it isn't installed.

    A file of another machine or C library and one of other sources (after an update whose build failed) are the same to a
    caller: every op still has another form, so a job that may take any form goes on, and STROP_KERNELS=native is an error.
    """
    path = FOLDER / f"strop_{kind}.so"
    if not path.exists():
        return None
    try:
        loaded = ctypes.CDLL(str(path))
        version = getattr(loaded, f"strop_{kind}_abi_version")()
        reason = f"{path} has interface {version}, this version of strop needs {ABI_VERSION}: install strop again"
    except (OSError, AttributeError) as error:  # AttributeError: a library, but none of ours
        version, reason = None, f"{path} can't be loaded ({error}): install strop again on this machine"
    if version == ABI_VERSION:
        return loaded
    if choice() == "auto":
        warnings.warn(f"{reason}. Until then ops take another form, which may be slower", RuntimeWarning, stacklevel=2)
    return reason


def why_missing(kind: str) -> str:
    """Why `library` is None: what is wrong with the file, or what build.txt says of one that isn't there."""
    if isinstance(reason := _open(kind), str):
        return reason
    report = FOLDER / "build.txt"
    lines = report.read_text().splitlines() if report.exists() else []
    noted = [line for line in lines if line.startswith(f"strop_{kind}:")]
    return noted[0] if noted else f"strop_{kind} was not built: install strop from source to build it"


def launch(function: str, device: torch.device, *arguments: ctypes._SimpleCData) -> None:
    """Call strop_cuda_<function> with torch's current stream of `device` as last argument; RuntimeError if it fails."""
    kernels = library("cuda")
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        check(kernels, function, getattr(kernels, f"strop_cuda_{function}")(*arguments, stream))


def call(function: str, *arguments: object) -> None:
    """Call strop_cpu_<function> with ctypes' own types; RuntimeError if it fails."""
    if status := getattr(library("cpu"), f"strop_cpu_{function}")(*arguments):
        raise RuntimeError(f"strop_cpu_{function} failed with status {status} (csrc/include/strop.h)")


def check(kernels: ctypes.CDLL, function: str, status: int) -> None:
    """RuntimeError unless a function of the CUDA library returned STROP_OK."""
    if status:
        detail = f", CUDA error {kernels.strop_cuda_last_error()}" if status == LAUNCH_FAILED else ""
        raise RuntimeError(f"strop_cuda_{function} failed with status {status}{detail} (csrc/include/strop.h)")
