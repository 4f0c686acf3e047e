"""Tensors divided by rows over an axis: rank r owns block r of ceil(rows / size) rows, as DTensor's Shard(0) cuts.

The last ranks' blocks may be shorter or empty. Each block is a rectangle of the tensor, contiguous in memory. Lists of
tensors (one dtype, one device) travel in one message; a single tensor whose rows divide evenly travels without a copy.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from .collectives import all_gather_rows, reduce_scatter_rows
from .mesh import Axis


def own_rows(num_rows: int, axis: Axis) -> slice:
    """The rows of a tensor of `num_rows` rows that this rank owns."""
    block = -(-num_rows // axis.size)
    return slice(min(axis.rank * block, num_rows), min((axis.rank + 1) * block, num_rows))


def sum_own_rows(tensors: Sequence[Tensor], axis: Axis) -> None:
    """Add up the tensors over the axis, in place, in the rows that this rank owns; other rows may hold anything afterwards."""
    if axis.size == 1:
        return
    if _travels_as_it_is(tensors, axis):
        reduce_scatter_rows(tensors[0], axis)
        return
    staging, columns = _stage(tensors, axis)
    for tensor, column in zip(tensors, columns, strict=True):
        for rows, place in _blocks(tensor, column):
            place.copy_(rows)
    reduce_scatter_rows(staging, axis)
    for tensor, column in zip(tensors, columns, strict=True):
        rows = tensor[own_rows(len(tensor), axis)].view(-1)
        rows.copy_(column[axis.rank, : len(rows)])


def gather_rows(tensors: Sequence[Tensor], axis: Axis) -> None:
    """Fill in the rows that other ranks own, in place: afterwards all ranks hold equal tensors."""
    if axis.size == 1:
        return
    if _travels_as_it_is(tensors, axis):
        all_gather_rows(tensors[0], axis)
        return
    staging, columns = _stage(tensors, axis)
    for tensor, column in zip(tensors, columns, strict=True):
        rows = tensor[own_rows(len(tensor), axis)].view(-1)
        column[axis.rank, : len(rows)].copy_(rows)
    all_gather_rows(staging, axis)
    for tensor, column in zip(tensors, columns, strict=True):
        for rows, place in _blocks(tensor, column):
            rows.copy_(place)


def _travels_as_it_is(tensors: Sequence[Tensor], axis: Axis) -> bool:
    return len(tensors) == 1 and len(tensors[0]) % axis.size == 0


def _stage(tensors: Sequence[Tensor], axis: Axis) -> tuple[Tensor, Sequence[Tensor]]:
    """An uninitialised message [size, n], row r for rank r, and each tensor's columns of it."""
    block_sizes = [-(-len(tensor) // axis.size) * tensor[0].numel() for tensor in tensors]
    staging = tensors[0].new_empty(axis.size, sum(block_sizes))
    return staging, staging.split(block_sizes, dim=1)


def _blocks(tensor: Tensor, column: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of equal shape, (part of `tensor`, its place in its columns [size, block] of a message); two pairs at most."""
    flat, block = tensor.view(-1), column.shape[1]
    full = len(flat) // block
    yield flat[: full * block].view(full, block), column[:full]
    if rest := len(flat) % block:
        yield flat[-rest:], column[full, :rest]
