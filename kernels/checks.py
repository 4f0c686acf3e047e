"""What every public op checks before it computes; each message names the argument, its value and what to pass instead."""

import os

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATISTICS = (torch.float32, torch.float64)
INDEX = (torch.int64,)
DEBUG_VARIABLE = "STROP_KERNELS_DEBUG"


def check_tensor(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """TypeError for a non-tensor or another dtype, ValueError for another shape or device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: pass a torch.Tensor")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {wanted}: convert it with {name}.to({dtypes[0]})")
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other arguments on {device}: move it with {name}.to('{device}')")


def values_may_be_read(device: torch.device) -> bool:
    """Whether a check may look at values: free on a CPU, a wait for the device elsewhere (only with STROP_KERNELS_DEBUG=1)."""
    return device.type == "cpu" or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
