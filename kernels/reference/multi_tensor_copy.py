"""Many copies, one at a time."""

from torch import Tensor


def multi_tensor_copy(sources: list[Tensor], destinations: list[Tensor]) -> None:
    for source, destination in zip(sources, destinations, strict=True):
        destination.copy_(source)
