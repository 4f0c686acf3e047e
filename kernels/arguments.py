"""What the public ops ask of their arguments. Every error names op, argument, value and what would be accepted."""

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_floating(op: str, **tensors: Tensor) -> None:
    """TypeError unless every tensor is float32, bfloat16, float16 or float64."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is a {type(tensor).__name__}: pass a torch.Tensor")
        if tensor.dtype not in FLOATING:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
            raise TypeError(f"{op}: {name} is {tensor.dtype}: pass one of {accepted} (tensor.float() converts)")


def require_integers(op: str, **tensors: Tensor) -> None:
    """TypeError unless every tensor is int32 or int64."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is a {type(tensor).__name__}: pass a torch.Tensor")
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: {name} is {tensor.dtype}: pass int32 or int64 (tensor.long() converts)")


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
