"""Matrix products that accumulate in fp32 (fp64 for fp64 factors), whatever their factors."""

import torch
from torch import Tensor


def multiplies_narrow(hidden_NH: Tensor, weight_VH: Tensor) -> bool:
    """Whether products read bf16 or fp16 and write fp32, which only cuBLAS does (since torch 2.10 adding to fp32 as well)."""
    return hidden_NH.is_cuda and hidden_NH.dtype == weight_VH.dtype and hidden_NH.dtype.itemsize == 2


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, accumulated in the dtype of total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
