"""The LM head in pieces: products by torch, softmax rows by the kernels that `dispatch.form` names.

`head_statistics` is the forward pass of linear_logprob; gradients are in head_gradient.py.
N rows, n rows of a piece, H hidden, V vocabulary, v columns of a piece. Rows are a slice or indices, `per_row[rows]` serves
both; columns are a slice of the vocabulary, None for all of it.

Estimates for an H100 at 745 TF/s and 3.0 TB/s, not measured (bf16, N=8192, H=4096, V=131072; a bare product takes 11.8 ms):
    forward alone                 13.2 ms    89% of the product's speed: 1.4 ms to read the fp32 logits for their statistics
    forward and backward            52 ms    which makes the logits again: the products alone 47
Column tiles that stay in the 50 MB L2 cache, with partial statistics joined afterwards, would save up to 0.6 ms of the former.
For gradients made in the forward, a narrow gradient written over the fp32 row it comes from would double the chunks, so that
weight is read half as often; no more rows would wait for one product (see HELD_CHUNKS), and row kernels would need a barrier.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from . import products
from .dispatch import form
from .reference.softmax import IGNORED, LogitShape, OnlineSoftmax, statistics_dtype

AVAILABLE = ("reference", "triton", "cuda", "cpu")
BUFFER_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""What logits and their gradient may take together."""
CHUNK_ROWS = 1024
"""At most, in whole rows."""
HELD_CHUNKS = 2
"""bf16 or fp16 gradients of so many chunks wait for one product: adding a product of few rows to weight's gradient in fp32
takes as long as reading and writing that gradient (estimates for V=128k, H=4096, 3 TB/s: 1.4 ms, the product of 1024 rows
itself 1.5). With 2, 1024 rows wait at V=128k: hidden's gradient is 128 tiles of 128 x 256, one wave on 132 multiprocessors;
3 of the smaller chunks that would fit are 1152 rows, 144 tiles, two waves. Which is faster hasn't been measured."""
TILE_ROWS = {"cpu": 4096, "cuda": 8192}
CAST_ELEMENTS = 2**21
"""Weights converted at a time where a product can't read their dtype."""

Rows = slice | Tensor


class LmHead:
    """hidden [N, H] times weight [V, H]; logits in fp32 (fp64 for fp64 inputs)."""

    def __init__(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        shape: LogitShape,
        group: dist.ProcessGroup | None,
    ):
        """targets_N: of `local_targets`. group: the ranks whose weights hold the other vocabulary rows."""
        self.hidden_NH, self.weight_VH, self.bias_V, self.targets_N = hidden_NH, weight_VH, bias_V, targets_N
        self.shape, self.group = shape, group
        self.kernels = form("logit_rows", hidden_NH, AVAILABLE)
        self.dtype = statistics_dtype(hidden_NH)
        self.product_dtype = hidden_NH.dtype if products.multiplies_narrow(hidden_NH, weight_VH) else self.dtype
        """What products multiply; they accumulate in `dtype`."""
        self.narrow = self.product_dtype != self.dtype
        self.num_held = 0
        """Rows of gradients that wait in the buffer for their product."""
        self._buffers: dict[torch.dtype, Tensor] = {}

    def buffer_elements(self, held_chunks: int) -> int:
        """Logits a piece, so that they and the gradients of so many pieces fit."""
        itemsize = self.dtype.itemsize + (held_chunks * self.product_dtype.itemsize if self.narrow else 0)
        return BUFFER_BYTES.get(self.hidden_NH.device.type, BUFFER_BYTES["cpu"]) // itemsize

    def rows_within(self, held_chunks: int) -> int:
        """Whole rows a piece, in steps that fill the tiles of a tensor-core product where there is one."""
        rows = self.buffer_elements(held_chunks) // len(self.weight_VH)
        step = 128 if self.narrow and rows >= 128 else 16
        return min(max(rows // step * step, 16), CHUNK_ROWS)

    @property
    def chunk_rows(self) -> int:
        """Rows of logits in a chunk whose gradient is wanted."""
        return self.rows_within(HELD_CHUNKS)

    def chunks(self, live_N: Tensor) -> Iterator[Rows]:
        """Pieces of whole rows, for gradients. live_N: bool, the rows that count: see `row_pieces`."""
        return row_pieces(live_N, self.chunk_rows)

    def tiles(self, live_N: Tensor) -> Iterator[tuple[slice, list[Rows]]]:
        """(columns, row pieces): large squares rather than whole rows, so that sums over pieces are read and written less."""
        device, vocab = self.hidden_NH.device.type, len(self.weight_VH)
        height = TILE_ROWS.get(device, TILE_ROWS["cpu"])
        row_tiles = list(row_pieces(live_N, height))
        width = max(self.buffer_elements(1) // max(min(height, len(live_N)), 1) // 128 * 128, 128)
        for start in range(0, vocab, width):
            yield slice(start, min(start + width, vocab)), row_tiles

    def logits(self, rows: Rows, columns: slice | None = None) -> Tensor:
        """[n, v] in `dtype`, before bias, softcap and temperature; valid until the next call."""
        x_nH = self.hidden_NH[rows].to(self.product_dtype)
        columns = slice(0, len(self.weight_VH)) if columns is None else columns
        logits_nv = self._buffer(self.dtype, len(x_nH), columns.stop - columns.start)
        for part, block in self.weight_blocks(columns):
            products.multiply(x_nH, block.t(), logits_nv[:, part])
        return logits_nv

    def kept_hidden(self, rows: Rows) -> Tensor:
        """[n, H] in `product_dtype`, 0 in ignored rows: a product over rows would make NaN of 0 times the NaN they may hold."""
        x_nH = self.hidden_NH[rows].to(self.product_dtype)
        if isinstance(rows, Tensor):
            return x_nH  # chosen because they count
        return x_nH.masked_fill((self.targets_N[rows] == IGNORED)[:, None], 0)

    def release_buffers(self) -> None:
        self._buffers.clear()

    def weight_blocks(self, columns: slice | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(part of the columns, [part, H] in `product_dtype`): in one piece where the weight has that dtype."""
        weight_vH = self.weight_VH if columns is None else self.weight_VH[columns]
        width, hidden_size = weight_vH.shape
        step = width if weight_vH.dtype == self.product_dtype else CAST_ELEMENTS // max(hidden_size, 1)
        for start in range(0, width, max(step, 1)):
            part = slice(start, min(start + max(step, 1), width))
            yield part, weight_vH[part].to(self.product_dtype)

    def statistics(self, logits_nV: Tensor, rows: Rows) -> Tensor:
        """[3, n]: logprob, entropy, logsumexp over the vocabulary of all ranks; 0 for ignored rows."""
        if self.group is None:
            return self.own_statistics(logits_nV, rows)
        return join_shards(self.own_statistics(logits_nV, rows), self.targets_N[rows], self.group)

    def own_statistics(self, logits_nV: Tensor, rows: Rows) -> Tensor:
        """What this rank knows without the others: [3, n] without a group, [5, n] (`OnlineSoftmax`) with one."""
        targets_n, sharded = self.targets_N[rows], self.group is not None
        return self.kernels.logit_statistics(logits_nV, targets_n, **self._shape(rows, None), partial=sharded)

    def gradient_(
        self,
        logits_nv: Tensor,
        rows: Rows,
        statistics_3n: Tensor,
        g_n: Tensor | None,
        h_n: Tensor | None,
        k_n: Tensor | None,
        columns: slice | None = None,
    ) -> Tensor:
        """[n, v] in `product_dtype`: the gradient of the logits, which may be overwritten. For `HeadGradient.add`.

        statistics_3n are those of whole rows; g_n, h_n, k_n the gradients of logprob, entropy and logsumexp, None is 0.
        """
        dz_nv = logits_nv
        if self.narrow:
            capacity = len(logits_nv) if columns is not None else min(HELD_CHUNKS * self.chunk_rows, len(self.hidden_NH))
            dz_nv = self._buffer(self.product_dtype, capacity, logits_nv.shape[1])[self.num_held :][: len(logits_nv)]
        targets_n = self.targets_N[rows]
        if columns is not None:
            targets_n = torch.where(targets_n == IGNORED, IGNORED, targets_n - columns.start)
        shape = self._shape(rows, columns)
        self.kernels.logit_gradient(logits_nv, targets_n, statistics_3n, g_n, h_n, k_n, **shape, out_NV=dz_nv)
        return dz_nv

    def held_gradients(self) -> Tensor:
        """[num_held, V]: those of the last chunks, end to end."""
        return self._buffer(self.product_dtype, self.num_held, len(self.weight_VH))

    def _shape(self, rows: Rows, columns: slice | None) -> dict[str, float | Tensor | None]:
        inverse_temperature, softcap, keep_mask_nV = self.shape.select(rows)
        columns = slice(None) if columns is None else columns
        return {
            "inverse_temperature": inverse_temperature,
            "softcap": softcap,
            "bias_V": None if self.bias_V is None else self.bias_V[columns],
            "keep_mask_NV": None if keep_mask_nV is None else keep_mask_nV[:, columns],
        }

    def _buffer(self, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = self._buffers[dtype] = self.hidden_NH.new_empty(rows * columns, dtype=dtype)
        return buffer[: rows * columns].view(rows, columns)


def head_statistics(head: LmHead) -> Tensor:
    """[3, N]: logprob, entropy, logsumexp; 0 for ignored rows. 2 N H V operations."""
    targets_N = head.targets_N
    statistics = torch.zeros(3 if head.group is None else 5, len(targets_N), dtype=head.dtype, device=targets_N.device)
    if head.group is not None:
        statistics[0] = -torch.inf  # what a row left out adds to the other ranks': nothing
    for rows in row_pieces(targets_N != IGNORED, head.rows_within(held_chunks=0)):
        statistics[:, rows] = head.own_statistics(head.logits(rows), rows)
    return statistics if head.group is None else join_shards(statistics, targets_N, head.group)


def row_pieces(live_N: Tensor, height: int) -> Iterator[Rows]:
    """On a CPU the rows that don't live are left out; elsewhere shapes stay fixed, so that nothing waits for the host."""
    if live_N.device.type == "cpu" and not live_N.all():
        for rows in live_N.nonzero().squeeze(1).split(height):
            if len(rows):
                yield rows
    else:
        for start in range(0, len(live_N), height):
            yield slice(start, min(start + height, len(live_N)))


def local_targets(targets_N: Tensor, ignore_index: int, first_token: int) -> Tensor:
    """Columns of this rank's vocabulary rows; IGNORED where the target is ignore_index."""
    return torch.where(targets_N == ignore_index, IGNORED, targets_N - first_token)


def join_shards(partial_5N: Tensor, targets_N: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[3, N] of the whole vocabulary from each rank's partial statistics, which are overwritten."""
    softmax = OnlineSoftmax(partial_5N)
    softmax.all_reduce_(group)
    return torch.stack(softmax.finish().ignore(targets_N == IGNORED, logsumexp=0))
