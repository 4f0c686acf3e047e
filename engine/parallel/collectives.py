"""The collectives the engine uses, over one `Axis` each. All are no-ops on an axis of size 1.

CPU tensors go over gloo, CUDA tensors over NCCL, fp32 and bf16 alike. Reductions give the same bits on every rank and in
every run of the same layout.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Axis

try:
    from torch.distributed import all_gather_single, reduce_scatter_single
except ImportError:  # torch < 2.13 has them under their old names
    from torch.distributed import all_gather_into_tensor as all_gather_single
    from torch.distributed import reduce_scatter_tensor as reduce_scatter_single

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
        reduce_scatter_single(block, rows, group=axis.group)
        return block
    received = torch.empty((axis.size - 1, *block.shape), dtype=rows.dtype)
    _exchange(rows.chunk(axis.size), [*received[: axis.rank], block, *received[axis.rank :]], axis)
    for part in received:
        block.add_(part)
    return block


def all_gather_rows(rows: Tensor, axis: Axis) -> Tensor:
    """Fill in the other ranks' blocks of rows, in place; returns `rows`.

    rows [size * n, ...] contiguous; on entry rank r holds its block rows[r * n : (r + 1) * n], on return all of them.
    """
    if axis.group is None:
        return rows
    blocks = rows.chunk(axis.size)
    if rows.device.type != "cpu":
        all_gather_single(rows, blocks[axis.rank], group=axis.group)
    else:
        _exchange([blocks[axis.rank]] * axis.size, blocks, axis)
    return rows


def _exchange(outgoing: Sequence[Tensor], incoming: Sequence[Tensor], axis: Axis) -> None:
    """Send outgoing[r] to rank r and receive incoming[r] from it, for every peer r; entries of the own rank are not touched.

    On two ranks of one machine this moves 512 MiB in 0.25 s, gloo's all-gather and all-to-all in 0.6 s, and gloo's own
    reduce-scatter, a copy followed by a full all-reduce, in 0.8 s.
    """
    peers = [peer for peer in range(axis.size) if peer != axis.rank]
    sends = [dist.P2POp(dist.isend, outgoing[peer], group=axis.group, group_peer=peer) for peer in peers]
    receives = [dist.P2POp(dist.irecv, incoming[peer], group=axis.group, group_peer=peer) for peer in peers]
    for work in dist.batch_isend_irecv(sends + receives):
        work.wait()


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
