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


def number_on(device: torch.device, number: Tensor, dtype: torch.dtype) -> Tensor:
    """A 0-dim tensor there, detached.

    The number of a CPU tensor goes to a GPU as the argument of a launch: copying the pageable memory that holds it waits for
    the stream and is an error while a CUDA graph is captured. (torch.compile can't know the number; its graphs copy.)
    """
    if number.device.type == "cpu" and device.type != "cpu" and not torch.compiler.is_compiling():
        return filled((), number.item(), dtype, device)
    return number.detach().to(device, dtype)
