"""Many copies in few launches of csrc/cuda/multi_tensor_copy.cu."""

import ctypes

import torch
from torch import Tensor

from .. import native
from ..native_structs import TYPE_CODES
from ..rectangles import rectangle_pairs


def multi_tensor_copy(sources: list[Tensor], destinations: list[Tensor]) -> None:
    table = [
        (*pair, TYPE_CODES.get(source.dtype, 0), TYPE_CODES.get(destination.dtype, 0), source.element_size())
        for source, destination in zip(sources, destinations, strict=True)
        for pair in rectangle_pairs(source, destination)
    ]
    if table:
        rows = torch.tensor(table, dtype=torch.int64, device="cpu")
        arguments = ctypes.c_void_p(rows.data_ptr()), ctypes.c_int64(len(table))
        native.launch("multi_tensor_copy", sources[0].device, *arguments)
