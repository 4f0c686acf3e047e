"""The precision of the arithmetic."""

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """fp32, or fp64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
