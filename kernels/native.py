"""The compiled kernels of csrc/, loaded with ctypes: they depend neither on torch's nor on Python's version.

Which implementation runs follows from the device of the tensors and one variable, STROP_KERNELS:
    auto (or unset)  the compiled kernel where its library is installed and takes the dtype, else the torch reference
    reference        the torch reference, everywhere
    native           the compiled kernel; an error where the library is missing or doesn't take the arguments
    triton           the Triton kernel; an error where there is none or it doesn't take the arguments
"""

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from .specs import AdvantageSpec

FOLDER = Path(__file__).parent / "_native"
ABI_VERSION = 3
"""STROP_ABI_VERSION of csrc/include/strop.h."""
CHOICES = ("auto", "reference", "native", "triton")
SCALES = {"group": 0, "batch": 1, "none": 2}
BASELINES = {"mean": 0, "leave-one-out": 1}


def choice() -> str:
    """The value of STROP_KERNELS; ValueError for one without a meaning."""
    value = os.environ.get("STROP_KERNELS") or "auto"
    if value not in CHOICES:
        raise ValueError(f"STROP_KERNELS={value}: choose from {', '.join(CHOICES)}")
    return value


@functools.cache
def library(kind: str) -> ctypes.CDLL | None:
    """strop_<kind>.so (cpu or cuda), None where it isn't installed. RuntimeError for one built from other sources."""
    path = FOLDER / f"strop_{kind}.so"
    if not path.exists():
        return None
    loaded = ctypes.CDLL(str(path))
    version = getattr(loaded, f"strop_{kind}_abi_version")()
    if version != ABI_VERSION:
        raise RuntimeError(f"{path} has interface {version}, this version of strop needs {ABI_VERSION}: install strop again")
    return loaded


def why_missing(kind: str) -> str:
    """What build.txt says of a library that isn't installed, in words for an error message."""
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


def call(function: str, *arguments: ctypes._SimpleCData) -> None:
    """Call strop_cpu_<function>; RuntimeError if it fails."""
    if status := getattr(library("cpu"), f"strop_cpu_{function}")(*arguments):
        raise RuntimeError(f"strop_cpu_{function} failed with status {status} (csrc/include/strop.h)")


def check(kernels: ctypes.CDLL, function: str, status: int) -> None:
    """RuntimeError unless a function of the CUDA library returned STROP_OK."""
    if status:
        detail = f"CUDA error {kernels.strop_cuda_last_error()}"
        raise RuntimeError(f"strop_cuda_{function} failed with status {status}, {detail} (csrc/include/strop.h)")


def is_chosen(rewards: Tensor) -> bool:
    """Whether the compiled group_advantage serves this tensor."""
    chosen = choice()
    if chosen == "triton":
        raise ValueError("STROP_KERNELS=triton: group_advantage has no Triton form; choose native or reference")
    if chosen == "reference":
        return False
    available = library(rewards.device.type) if rewards.device.type in ("cpu", "cuda") else None
    if chosen == "native" and available is None:
        raise RuntimeError(
            f"STROP_KERNELS=native, but strop_{rewards.device.type}.so is not in {FOLDER} (its build.txt says why): "
            "install strop again with a compiler, or unset STROP_KERNELS"
        )
    if chosen == "native" and rewards.dtype != torch.float32:
        raise TypeError(f"STROP_KERNELS=native takes float32 rewards, got {rewards.dtype}: convert them or unset the variable")
    return available is not None and rewards.dtype == torch.float32


def group_advantage(rewards: Tensor, group_index: Tensor, spec: AdvantageSpec) -> tuple[Tensor, Tensor]:
    """`strop.kernels.group_advantage` by the compiled kernel; rewards fp32 [N], group_index int64 [N] in 0..N-1."""
    kind = rewards.device.type
    rewards, group_index = rewards.contiguous(), group_index.contiguous()
    advantages = torch.empty_like(rewards)
    counts = torch.empty(4, dtype=torch.int64, device=rewards.device)
    arguments = [
        ctypes.c_void_p(rewards.data_ptr()),
        ctypes.c_void_p(group_index.data_ptr()),
        ctypes.c_int64(len(rewards)),
        ctypes.c_int(SCALES[spec.scale]),
        ctypes.c_int(BASELINES[spec.baseline]),
        ctypes.c_int(spec.ddof),
        ctypes.c_double(spec.eps),
        ctypes.c_void_p(advantages.data_ptr()),
        ctypes.c_void_p(counts.data_ptr()),
    ]
    kernels = library(kind)
    if kind == "cpu":
        status = kernels.strop_cpu_group_advantage(*arguments)
    else:
        with torch.cuda.device(rewards.device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            status = kernels.strop_cuda_group_advantage(*arguments, stream)
    if status:
        detail = f", CUDA error {kernels.strop_cuda_last_error()}" if kind == "cuda" else ""
        raise RuntimeError(f"strop_{kind}_group_advantage failed with status {status}{detail} (csrc/include/strop.h)")
    return advantages, counts
