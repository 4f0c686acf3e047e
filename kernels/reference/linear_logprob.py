"""Log-prob, entropy and logsumexp of hidden x LM head, with only tiles of the logits in memory.

Forward visits the vocabulary in blocks and keeps a few numbers a row; backward makes each tile again (8 N H V in all), turns
it into dz and multiplies that into dX and dW at once. A tile fits into a CPU's cache, where the elementwise work is cheap.

Rows whose target is IGNORED give 0 and no gradient. On a CPU they are left out of every product, as are the rows without
upstream gradient in backward; elsewhere shapes stay fixed, so that nothing waits for the host.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from .softmax import (
    IGNORED,
    LogitShape,
    OnlineSoftmax,
    RowStatistics,
    Upstream,
    logit_gradient,
    statistics_dtype,
)

TILE_ROWS = {"cpu": 512, "cuda": 8192}
TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
"""Logits a tile: 4 MB fp32 on a CPU (seen fastest among 1 to 32 MB); 128 MB on a GPU, few launches of large products."""


def tiles(num_rows: int, vocab: int, device: torch.device) -> Iterator[tuple[slice, list[slice]]]:
    """(columns, [rows, ...]): for each vocabulary block, the row blocks that share its weights."""
    height = max(min(num_rows, TILE_ROWS.get(device.type, 512)), 1)
    width = max(TILE_ELEMENTS.get(device.type, 2**20) // height, 128)
    rows = [slice(start, min(start + height, num_rows)) for start in range(0, num_rows, height)]
    for start in range(0, vocab, width):
        yield slice(start, min(start + width, vocab)), rows


class TiledLogits:
    """The logits of some rows, one tile at a time, in two buffers that every tile uses again."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: LogitShape,
        live: Tensor,
    ):
        """live: bool [N], the rows that count. Everything is upcast to fp32 (fp64 for fp64 inputs)."""
        self.dtype = statistics_dtype(hidden)
        self.weight, self.bias = weight, bias
        self.rows = live.nonzero().squeeze(1) if hidden.device.type == "cpu" and not live.all() else None
        """int64 indices into hidden of the rows multiplied, None for all."""
        self.x = self.choose(hidden).to(self.dtype)
        self.shape = shape if self.rows is None else shape.select(self.rows)
        self.may_be_infinite = bias is not None or shape.keep_mask is not None
        self.scale: float | Tensor = 1.0
        if shape.softcap is None and bias is None:  # (x / T) W = (x W) / T: cheaper on H columns than on V
            scale = self.shape.inverse_temperature
            self.scale = scale[:, None] if isinstance(scale, Tensor) else scale
            self.x = self.x * self.scale
            self.shape = self.shape._replace(inverse_temperature=1.0)
        self._buffers: list[Tensor] = []

    def choose(self, values: Tensor) -> Tensor:
        """[N, ...] -> those of the rows multiplied."""
        return values if self.rows is None else values[self.rows]

    def tiles(self) -> Iterator[tuple[slice, Tensor, list[slice]]]:
        """(columns, their weights, row blocks)."""
        for columns, row_blocks in tiles(len(self.x), len(self.weight), self.x.device):
            yield columns, self.weight[columns].to(self.dtype), row_blocks

    def tile(self, block: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """(z, scratch), both [n, v]; valid until the next call."""
        x = self.x[rows]
        size = len(x) * len(block)
        if not self._buffers or self._buffers[0].numel() < size:
            self._buffers = [x.new_empty(size) for _ in range(2)]
        z, scratch = (buffer[:size].view(len(x), len(block)) for buffer in self._buffers)
        torch.mm(x, block.t(), out=z)
        if self.bias is not None:
            z += self.bias[columns]
        return self.shape.apply_(z, rows, columns), scratch


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    shape: LogitShape,
    group: dist.ProcessGroup | None,
) -> RowStatistics:
    """targets: int64 [N], rows of this rank's weight; outside 0..V-1 in another shard of `group`."""
    kept = targets != IGNORED
    logits = TiledLogits(hidden, weight, bias, shape, kept)
    row_targets = logits.choose(targets)
    softmax = OnlineSoftmax.empty(len(logits.x), logits.dtype, hidden.device)
    for columns, block, row_blocks in logits.tiles():
        for tile in row_blocks:
            z, scratch = logits.tile(block, tile, columns)
            softmax.add_(z, scratch, tile, row_targets[tile] - columns.start, logits.may_be_infinite)
    if group is not None:
        softmax.all_reduce_(group)
    statistics = softmax.finish()
    if logits.rows is not None:
        statistics = statistics.scatter(logits.rows, len(targets))
    return statistics.ignore(~kept, logsumexp=0)


def linear_logprob_backward(
    upstream: Upstream,
    statistics: RowStatistics,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    shape: LogitShape,
    group: dist.ProcessGroup | None,
    needs: tuple[bool, bool, bool],
    main_grad: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden (summed over `group`), weight and bias, None where `needs` says so. With main_grad, weight's is
    added to it and None is returned."""
    needs_hidden, needs_weight, needs_bias = needs
    kept = targets != IGNORED
    upstream = Upstream.inside(kept, upstream)
    statistics = statistics.ignore(~kept, logsumexp=1e30)  # e^(z - 1e30) = 0, whatever z
    logits = TiledLogits(hidden, weight, bias, shape, upstream.live_rows(kept))
    if logits.rows is not None:
        targets, statistics, upstream = targets[logits.rows], statistics.select(logits.rows), upstream.select(logits.rows)
    d_x = torch.zeros_like(logits.x) if needs_hidden else None
    d_weight = torch.empty_like(weight) if needs_weight and main_grad is None else None
    d_bias = torch.zeros_like(bias, dtype=logits.dtype) if needs_bias else None
    for columns, block, row_blocks in logits.tiles():
        if needs_weight:
            d_rows = (d_weight if main_grad is None else main_grad)[columns]
            d_block = d_rows if d_rows.dtype == logits.dtype else torch.empty_like(block)
            keeps = main_grad is not None  # whether d_block holds something to add to
            if not row_blocks and not keeps:
                d_block.zero_()
        for tile in row_blocks:
            z, scratch = logits.tile(block, tile, columns)
            own, own_upstream = statistics.select(tile), upstream.select(tile)
            dz = logit_gradient(z, scratch, targets[tile] - columns.start, own, own_upstream, logits.may_be_infinite)
            logits.shape.backward_(dz, z, tile, columns)
            if needs_hidden:
                d_x[tile].addmm_(dz, block)
            if needs_weight:
                d_block.addmm_(dz.t(), logits.x[tile], beta=1 if keeps else 0)
                keeps = True
            if needs_bias:
                d_bias[columns] += dz.sum(0)
        if needs_weight and d_block is not d_rows:
            d_rows.copy_(d_block)
    d_hidden = None
    if needs_hidden:
        d_hidden = d_x * logits.scale
        if logits.rows is not None:
            d_hidden = torch.zeros_like(hidden, dtype=logits.dtype).index_copy_(0, logits.rows, d_hidden)
        if group is not None:
            dist.all_reduce(d_hidden, group=group)  # each rank has multiplied its own vocabulary rows
        d_hidden = d_hidden.to(hidden.dtype)
    return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias.dtype)
