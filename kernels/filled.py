"""Python numbers as tensors."""

import torch
from torch import Tensor


def filled(shape: tuple[int, ...], number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[*shape], `number` everywhere.

    torch.compile makes a number that torch.full or an op of ours takes a part of its graph, so that another number compiles
    another graph (after eight of them fullgraph=True is an error); one that multiplies a tensor stays an input.
    """
    if torch.compiler.is_compiling():
        return torch.ones(shape, dtype=dtype, device=device) * number
    return torch.full(shape, number, dtype=dtype, device=device)  # a third of the time
