"""Log-prob, entropy and logsumexp of logits that exist already; backward may write into them."""

import torch
import torch.distributed as dist
from torch import Tensor

from .softmax import (
    LogitShape,
    OnlineSoftmax,
    RowStatistics,
    Upstream,
    logit_gradient,
    refuse_double_backward,
    statistics_dtype,
)

TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}


def row_blocks(logits: Tensor) -> list[slice]:
    height = max(TILE_ELEMENTS.get(logits.device.type, 2**20) // logits.shape[1], 1)
    return [slice(start, min(start + height, len(logits))) for start in range(0, len(logits), height)]


class Logprob(torch.autograd.Function):
    """(logits [N, V], targets int64 [N]) -> (logprob, entropy, logsumexp), each [N]."""

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        targets: Tensor,
        shape: LogitShape,
        ignore_index: int,
        first_token: int,
        group: dist.ProcessGroup | None,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        kept = targets != ignore_index
        targets = targets - first_token
        dtype = statistics_dtype(logits)
        softmax = OnlineSoftmax.empty(len(logits), dtype, logits.device)
        for rows in row_blocks(logits):
            z = shape.apply_(logits[rows].to(dtype, copy=True), rows, slice(None))
            softmax.add_(z, torch.empty_like(z), rows, targets[rows], may_be_infinite=True)
        if group is not None:
            softmax.all_reduce_(group)
        statistics = softmax.finish().ignore(~kept, logsumexp=0)
        ctx.save_for_backward(logits, targets, kept, *statistics)
        ctx.shape, ctx.inplace_backward = shape, inplace_backward
        return tuple(statistics)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        refuse_double_backward("logprob")
        logits, targets, kept, *statistics = ctx.saved_tensors
        upstream = Upstream.inside(kept, gradients)
        statistics = RowStatistics(*statistics).ignore(~kept, logsumexp=1e30)  # e^(z - 1e30) = 0, whatever z
        d_logits = logits.detach() if ctx.inplace_backward else torch.empty_like(logits)
        for rows in row_blocks(logits):
            z = ctx.shape.apply_(logits[rows].to(statistics.logprob.dtype, copy=True), rows, slice(None))
            own, own_upstream = statistics.select(rows), upstream.select(rows)
            dz = logit_gradient(z, torch.empty_like(z), targets[rows], own, own_upstream, may_be_infinite=True)
            d_logits[rows] = ctx.shape.backward_(dz, z, rows, slice(None))
        return d_logits, *(None,) * 6
