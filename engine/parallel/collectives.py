"""The collectives the engine uses, over one `Axis` each. All are no-ops on an axis of size 1.

CPU tensors go over gloo, CUDA tensors over NCCL, fp32 and bf16 alike. Reductions give the same bits on every rank and in
every run of the same layout.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Axis

REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def all_reduce(tensor: Tensor, axis: Axis, op: Literal["sum", "max", "min"] = "sum") -> Tensor:
    """Reduce elementwise over the axis, in place; returns `tensor`. Any shape, the same on every rank."""
    if axis.group is not None:
        dist.all_reduce(tensor, REDUCE_OPS[op], group=axis.group)
    return tensor


def reduce_scatter_rows(rows: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis, keeping one block of rows a rank. rows [size * n, ...] contiguous -> block [n, ...], a view of `rows`.

    In place: rank r's block is rows[r * n : (r + 1) * n] and holds the sum; the other blocks may hold anything afterwards.
    """
    if axis.group is None:
        return rows
    block = rows.chunk(axis.size)[axis.rank]
    if rows.device.type != "cpu":
        dist.reduce_scatter_tensor(block, rows, group=axis.group)
        return block
    # gloo's own reduce-scatter is a copy and a full all-reduce, twice the traffic. Here every rank receives only its block
    # from each peer, and sums in rank order.
    received = torch.empty_like(rows)
    dist.all_to_all_single(received, rows, group=axis.group)
    parts = received.chunk(axis.size)
    torch.add(parts[0], parts[1], out=block)
    for part in parts[2:]:
        block.add_(part)
    return block


def all_gather_rows(rows: Tensor, axis: Axis) -> Tensor:
    """Fill in the other ranks' blocks of rows, in place; returns `rows`.

    rows [size * n, ...] contiguous; on entry rank r holds its block rows[r * n : (r + 1) * n], on return all of them.
    """
    if axis.group is not None:
        dist.all_gather_into_tensor(rows, rows.chunk(axis.size)[axis.rank], group=axis.group)
    return rows


def broadcast(tensor: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """Overwrite `tensor` with that of the axis's rank `source`, in place; returns it."""
    if axis.group is not None:
        dist.broadcast(tensor, group=axis.group, group_src=source)
    return tensor


def all_gather_objects(obj: Any, axis: Axis) -> list[Any]:
    """Every rank's `obj` (picklable, small: it travels through pickle), in rank order."""
    if axis.group is None:
        return [obj]
    gathered: list[Any] = [None] * axis.size
    dist.all_gather_object(gathered, obj, group=axis.group)
    return gathered


def barrier(axis: Axis) -> None:
    """Return once every rank of the axis has called it. A CPU message: it doesn't wait for CUDA streams."""
    all_reduce(torch.zeros(1), axis)
