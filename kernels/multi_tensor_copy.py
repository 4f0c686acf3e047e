"""Many tensors into many places at once: how new weights reach a rollout engine that keeps its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import FLOATING, require_same_device, require_shape
from .dispatch import choose, define_op, form

AVAILABLE = ("reference", "triton", "cuda")


def multi_tensor_copy(sources: Sequence[Tensor], destinations: Sequence[Tensor]) -> None:
    """destinations[i].copy_(sources[i]) for every i, converting dtypes, in a few launches instead of one each.

    Shapes agree pair by pair; both sides may have any strides, so a destination can be a part of a fused or sharded weight.
    A pair has equal dtypes (any: the bits are copied) or two of float32, bfloat16 and float16 (rounded to nearest even);
    float64 can be converted by the reference only. All tensors are on one device. In place, without gradient. A destination
    overlaps neither another destination nor any source.

    CUDA takes 400 rectangles a launch, their table among the kernel's arguments: nothing is uploaded, and a CUDA graph may
    capture it. Triton makes a launch for each pair of dtypes, its table in device memory.

    Raises ValueError for lists of unequal length, unequal shapes, more than one device or a destination that holds an
    element twice, TypeError for other dtypes.
    """
    sources, destinations = list(sources), list(destinations)
    if len(sources) != len(destinations):
        raise ValueError(f"multi_tensor_copy: {len(sources)} sources but {len(destinations)} destinations: pass one for each")
    for i, (source, destination) in enumerate(zip(sources, destinations, strict=True)):
        require_shape("multi_tensor_copy", f"destinations[{i}]", destination, source.shape, f"the shape of sources[{i}]")
        require_same_device(
            "multi_tensor_copy", **{"sources[0]": sources[0], f"sources[{i}]": source, f"destinations[{i}]": destination}
        )
        if source.dtype != destination.dtype and not {source.dtype, destination.dtype} <= set(FLOATING):
            raise TypeError(f"multi_tensor_copy: sources[{i}] is {source.dtype}, destinations[{i}] {destination.dtype}: only "
                            "float32, bfloat16 and float16 are converted; use destination.copy_(source)")  # fmt: skip
        if any(size > 1 and stride == 0 for size, stride in zip(destination.shape, destination.stride(), strict=True)):
            raise ValueError(f"multi_tensor_copy: destinations[{i}] has strides {destination.stride()} and so holds an element "
                             "twice: pass a tensor that was not expanded")  # fmt: skip
    if sources:
        _multi_tensor_copy([s.detach() for s in sources], [d.detach() for d in destinations])


def _run(sources: list[Tensor], destinations: list[Tensor]) -> None:
    """float64 as first tensor must not decide for all of them, so dispatch looks at a byte."""
    anywhere = torch.empty(0, dtype=torch.uint8, device=sources[0].device)
    converted = [(s.dtype, d.dtype) for s, d in zip(sources, destinations, strict=True) if s.dtype != d.dtype]
    if choose("multi_tensor_copy", anywhere, AVAILABLE) != "reference" and any(torch.float64 in pair for pair in converted):
        raise TypeError("multi_tensor_copy: kernels don't convert float64: use destination.copy_(source), or "
                        "STROP_KERNELS=reference")  # fmt: skip
    form("multi_tensor_copy", anywhere, AVAILABLE).multi_tensor_copy(sources, destinations)


def _fake(sources: list[Tensor], destinations: list[Tensor]) -> None:
    return None


_multi_tensor_copy = define_op("multi_tensor_copy(Tensor[] sources, Tensor(a!)[] destinations) -> ()", _run, _fake)
