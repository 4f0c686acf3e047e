"""The row kernels of csrc/cpu/logit_rows.cpp; kernels/reference/logit_rows.py says what they are.

`shape`: the options of `native_structs.logit_rows`.
"""

import ctypes

import torch
from torch import Tensor

from ..native_structs import TYPE_CODES, address, logit_rows
from . import call_parallel


def logit_statistics(
    logits_NV: Tensor, targets_N: Tensor, *, partial: bool, **shape: float | Tensor | None
) -> Tensor:
    rows = logit_rows(logits_NV, targets_N, **shape)
    statistics = torch.empty(5 if partial else 3, len(logits_NV), dtype=torch.float32)
    call_parallel("logit_statistics", ctypes.byref(rows), ctypes.c_int(partial), address(statistics))
    return statistics


def logit_gradient(
    logits_NV: Tensor,
    targets_N: Tensor,
    statistics_3N: Tensor,
    g_N: Tensor | None,
    h_N: Tensor | None,
    k_N: Tensor | None,
    *,
    out_NV: Tensor,
    **shape: float | Tensor | None,
) -> None:
    rows = logit_rows(logits_NV, targets_N, **shape)
    statistics_3N = statistics_3N.contiguous()
    first, field_bytes = statistics_3N.data_ptr(), statistics_3N.element_size() * len(targets_N)
    upstream = [None if gradient is None else gradient.contiguous() for gradient in (g_N, h_N, k_N)]
    call_parallel(
        "logit_gradient",
        ctypes.byref(rows),
        *(ctypes.c_void_p(first + field * field_bytes) for field in range(3)),
        *(address(gradient) for gradient in upstream),
        address(out_NV),
        ctypes.c_int(TYPE_CODES[out_NV.dtype]),
        ctypes.c_int64(out_NV.stride(0)),
    )
