"""The row kernels under logprob, linear_logprob and linear_policy_loss: logits in, statistics or the gradient out.

u the logits, z = softcap * tanh((u + bias) / softcap) * inverse_temperature, p = softmax(z) over the kept tokens. Rows whose
target is IGNORED give 0 (as a partial result: what adds nothing) and a gradient of 0, whatever their logits hold.
"""

import torch
from torch import Tensor

from . import softmax as formulas
from .softmax import IGNORED, LogitShape, OnlineSoftmax, RowStatistics, Upstream, statistics_dtype

TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
"""Logits upcast at a time: 4 MB fp32 stay in a CPU's cache."""


def logit_statistics(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    inverse_temperature: float | Tensor,
    softcap: float | None,
    bias_V: Tensor | None,
    keep_mask_NV: Tensor | None,
    partial: bool,
) -> Tensor:
    """fp32 (fp64 for fp64 logits) [5, N] of one vocabulary shard (`OnlineSoftmax`), or [3, N]: logprob, entropy, logsumexp.

    targets_N: int64, a column; outside 0..V-1 the token lies in another shard: found is 0, and the whole log-prob NaN.
    """
    shape = LogitShape(inverse_temperature, softcap, keep_mask_NV)
    ignored_N = targets_N == IGNORED
    softmax = OnlineSoftmax.empty(len(logits_NV), statistics_dtype(logits_NV), logits_NV.device)
    for rows in row_blocks(logits_NV):
        z = shaped_logits(logits_NV, bias_V, shape, rows)
        softmax.add_(z, torch.empty_like(z), rows, targets_N[rows], may_be_infinite=True)
    if not partial:
        return torch.stack(softmax.finish().ignore(ignored_N, logsumexp=0))
    softmax.maximum.masked_fill_(ignored_N, -torch.inf)
    softmax.partial_5N[1:].masked_fill_(ignored_N, 0)
    return softmax.partial_5N


def logit_gradient(
    logits_NV: Tensor,
    targets_N: Tensor,
    statistics_3N: Tensor,
    g_N: Tensor | None,
    h_N: Tensor | None,
    k_N: Tensor | None,
    *,
    inverse_temperature: float | Tensor,
    softcap: float | None,
    bias_V: Tensor | None,
    keep_mask_NV: Tensor | None,
    out_NV: Tensor,
) -> None:
    """out_NV, which may be logits_NV, becomes the logits' gradient; statistics_3N are those of the whole vocabulary."""
    shape = LogitShape(inverse_temperature, softcap, keep_mask_NV)
    statistics, upstream = RowStatistics(*statistics_3N.unbind(0)), Upstream(g_N, h_N, k_N)
    ignored_N = targets_N == IGNORED
    for rows in row_blocks(logits_NV):
        z = shaped_logits(logits_NV, bias_V, shape, rows)
        own, own_upstream = statistics.select(rows), upstream.select(rows)
        dz = formulas.logit_gradient(z, torch.empty_like(z), targets_N[rows], own, own_upstream, may_be_infinite=True)
        shape.backward_(dz, z, rows, slice(None))
        out_NV[rows] = dz.masked_fill_(ignored_N[rows, None], 0)


def row_blocks(logits_NV: Tensor) -> list[slice]:
    height = max(TILE_ELEMENTS.get(logits_NV.device.type, 2**20) // logits_NV.shape[1], 1)
    return [slice(start, min(start + height, len(logits_NV))) for start in range(0, len(logits_NV), height)]


def shaped_logits(logits_NV: Tensor, bias_V: Tensor | None, shape: LogitShape, rows: slice) -> Tensor:
    """z of some rows, a copy in fp32 or fp64."""
    z = logits_NV[rows].to(statistics_dtype(logits_NV), copy=True)
    if bias_V is not None:
        z += bias_V
    return shape.apply_(z, rows, slice(None))
