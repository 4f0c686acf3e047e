"""What every public op checks before it computes; each message names the argument, its value and what to pass instead."""

import math
import numbers
import os

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATISTICS = (torch.float32, torch.float64)
INDEX = (torch.int64,)
INTEGERS = (torch.int64, torch.int32)
NUMBERS = (numbers.Real, torch.SymFloat, torch.SymInt)
DEBUG_VARIABLE = "STROP_KERNELS_DEBUG"


def check_tensor(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None = None,
    device: torch.device | None = None,
    instead: str = "reshape or expand it",
) -> None:
    """TypeError for a non-tensor or another dtype, ValueError for another shape or device.

    instead: how one gets the expected shape.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: pass a torch.Tensor")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {wanted}: convert it with .to({dtypes[0]})")
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}: {instead}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other arguments on {device}: move it with .to('{device}')")


def check_positive(name: str, value: float, instead: str) -> None:
    """TypeError unless value is a number, ValueError unless it is finite and above 0.

    instead: what to pass, e.g. "pass the step's count of tokens".
    """
    if isinstance(value, Tensor) or not isinstance(value, NUMBERS):
        raise TypeError(f"{name} is a {type(value).__name__}: {instead}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} {value}: must be above 0 and finite; {instead}")


def check_positive_values(name: str, tensor: Tensor, instead: str) -> None:
    """ValueError where an entry isn't finite and above 0, on devices whose values may be read."""
    if not values_may_be_read(tensor.device):
        return
    wrong = tensor[~((tensor > 0) & (tensor < math.inf))]
    if wrong.numel():
        raise ValueError(f"{name} holds {wrong.flatten()[0].item()}: must be above 0 and finite; {instead}")


def check_instance(name: str, value: object, wanted: type) -> None:
    """TypeError unless value is an instance of `wanted`, one of the settings of specs.py."""
    if not isinstance(value, wanted):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}: pass a strop.kernels.{wanted.__name__}")


def require_floating(op: str, **tensors: Tensor) -> None:
    """TypeError unless every tensor is float32, bfloat16, float16 or float64."""
    for name, tensor in tensors.items():
        check_tensor(f"{op}: {name}", tensor, FLOATING)


def require_integers(op: str, **tensors: Tensor) -> None:
    """TypeError unless every tensor is int32 or int64."""
    for name, tensor in tensors.items():
        check_tensor(f"{op}: {name}", tensor, INTEGERS)


def require_dims(op: str, name: str, tensor: Tensor, shape: str, *, least: int | None = None, exact: int | None = None) -> None:
    """ValueError unless tensor has at least `least`, or exactly `exact`, dimensions. shape: how the docstring writes it."""
    if (exact is not None and tensor.dim() != exact) or (least is not None and tensor.dim() < least):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}: pass {shape}")


def require_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    """ValueError unless tensor has that shape. why: what the shape follows from, e.g. "the last axis of x"."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}: {tuple(expected)} is needed, {why}")


def require_same_device(op: str, **tensors: Tensor) -> None:
    """ValueError unless all tensors are on the device of the first."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != reference.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but {first} on {reference.device}: move one with .to(device)")


def values_may_be_read(device: torch.device) -> bool:
    """Whether a check may look at values: free on a CPU, a wait for the device elsewhere (only with STROP_KERNELS_DEBUG=1).

    Never while torch.compile traces: a graph can't depend on values.
    """
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
