"""Statistics and gradient of rows of logits by csrc/cuda/logit_rows.cu; kernels/reference/logit_rows.py says what they are.

`shape`: the options of `native_structs.logit_rows`.
"""

import ctypes

import torch
from torch import Tensor

from .. import native
from ..native_structs import TYPE_CODES, address, logit_rows


def logit_statistics(
    logits_NV: Tensor, targets_N: Tensor, *, partial: bool, **shape: float | Tensor | None
) -> Tensor:
    """fp32 [5, N] of one vocabulary shard, or [3, N]: logprob, entropy, logsumexp."""
    rows = logit_rows(logits_NV, targets_N, **shape)
    out = torch.empty(5 if partial else 3, len(logits_NV), dtype=torch.float32, device=logits_NV.device)
    native.launch("logit_statistics", logits_NV.device, ctypes.byref(rows), ctypes.c_int(partial), address(out))
    return out


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
    """out_NV, columns next to each other, becomes the logits' gradient; it may be logits_NV."""
    rows = logit_rows(logits_NV, targets_N, **shape)
    statistics = [values_N.contiguous() for values_N in statistics_3N.unbind(0)]
    upstream = [None if gradient_N is None else gradient_N.float().contiguous() for gradient_N in (g_N, h_N, k_N)]
    native.launch(
        "logit_gradient",
        logits_NV.device,
        ctypes.byref(rows),
        *map(address, (*statistics, *upstream, out_NV)),
        ctypes.c_int(TYPE_CODES[out_NV.dtype]),
        ctypes.c_int64(out_NV.stride(0)),
    )
