"""How a file of this folder declares its kernels for compilation without a GPU."""

from typing import Any, NamedTuple

FP32, BF16, FP16, FP8 = "*fp32:16", "*bf16:16", "*fp16:16", "*fp8e4nv:16"
BOOL, INT64 = "*i1:16", "*i64:16"
"""Pointers to 16-byte aligned memory, as torch allocates it."""


class AotCase(NamedTuple):
    """One specialisation of a kernel, as its launcher would make Triton compile it."""

    kernel: Any
    """The function decorated with triton.jit."""
    arguments: dict[str, str | int | float | bool | None]
    """By parameter name, a run-time argument's type ("*bf16", "i32", "i64", "fp32"; ":16" added where address or value is a
    multiple of 16) or a compile-time constant: constexpr parameters (strings too), strides of 1 and absent tensors (None)."""
    num_warps: int
    num_stages: int = 3
    label: str = ""
    """What tells this case from the kernel's others, e.g. "H=4096"."""
    multiplies_matrices: bool = False
    """True demands wgmma instructions."""
