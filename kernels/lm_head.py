"""The LM head in chunks of rows: products by torch, softmax rows by the kernels that `dispatch.form` names.

    head = LmHead(...); gradient = HeadGradient(head, needs, main_grad)
    for rows in head.chunks(live_N):
        logits_nV = head.logits(rows)                       # one buffer for all chunks
        statistics_3n = head.statistics(logits_nV, rows)    # logprob, entropy, logsumexp; joined over tp_group
        gradient.add(rows, head.gradient_(logits_nV, rows, statistics_3n, g_n, h_n, k_n))
    d_hidden, d_weight, d_bias = gradient.finish()

`rows` is a slice or an index tensor, `per_row[rows]` serves both. N rows, n rows of a chunk, H hidden, V vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from .dispatch import form
from .reference.softmax import IGNORED, LogitShape, OnlineSoftmax, Upstream, statistics_dtype

AVAILABLE = ("reference",)
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""What the buffers of a chunk may take."""
CAST_ELEMENTS = 2**21
"""Weights converted at a time where the product can't read their dtype."""

Rows = slice | Tensor


class LmHead:
    """hidden [N, H] times weight [V, H], whole rows of logits in fp32 (fp64 for fp64 inputs)."""

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
        narrow = hidden_NH.is_cuda and hidden_NH.dtype == weight_VH.dtype
        self.product_dtype = hidden_NH.dtype if narrow else self.dtype
        """What products multiply; they accumulate in `dtype`. Only CUDA has products of bf16 or fp16 with fp32 results."""
        self._logits: Tensor | None = None
        self._slopes: Tensor | None = None

    @property
    def chunk_rows(self) -> int:
        itemsize = self.dtype.itemsize + (self.product_dtype.itemsize if self.product_dtype != self.dtype else 0)
        rows = CHUNK_BYTES.get(self.hidden_NH.device.type, CHUNK_BYTES["cpu"]) // (itemsize * max(len(self.weight_VH), 1))
        return min(max(rows // 16 * 16, 16), 1024)

    def chunks(self, live_N: Tensor) -> Iterator[Rows]:
        """live_N: bool, the rows that count. On a CPU the others are left out of every product; elsewhere shapes stay fixed,
        so that nothing waits for the host."""
        if live_N.device.type == "cpu" and not live_N.all():
            yield from live_N.nonzero().squeeze(1).split(self.chunk_rows) if live_N.any() else ()
            return
        for start in range(0, len(live_N), self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, len(live_N)))

    def logits(self, rows: Rows) -> Tensor:
        """[n, V] in `dtype`, before bias, softcap and temperature; valid until the next call."""
        x_nH = self.hidden_NH[rows].to(self.product_dtype)
        if self._logits is None:
            self._logits = x_nH.new_empty(self.chunk_rows, len(self.weight_VH), dtype=self.dtype)
        logits_nV = self._logits[: len(x_nH)]
        for columns, block in self.weight_blocks():
            multiply(x_nH, block.t(), logits_nV[:, columns])
        return logits_nV

    def weight_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, [v, H] in `product_dtype`): all of the weight where it has that dtype."""
        vocab, hidden_size = self.weight_VH.shape
        height = max(CAST_ELEMENTS // max(hidden_size, 1), 1)
        if self.weight_VH.dtype == self.product_dtype:
            height = max(vocab, 1)
        for start in range(0, vocab, height):
            columns = slice(start, min(start + height, vocab))
            yield columns, self.weight_VH[columns].to(self.product_dtype)

    def statistics(self, logits_nV: Tensor, rows: Rows) -> Tensor:
        """[3, n]: logprob, entropy, logsumexp over the vocabulary of all ranks; 0 for ignored rows."""
        if self.group is None:
            return self.own_statistics(logits_nV, rows)
        return join_shards(self.own_statistics(logits_nV, rows), self.targets_N[rows], self.group)

    def own_statistics(self, logits_nV: Tensor, rows: Rows) -> Tensor:
        """What this rank knows without the others: [3, n] without a group, [5, n] (`OnlineSoftmax`) with one."""
        sharded = self.group is not None
        return self.kernels.logit_statistics(logits_nV, self.targets_N[rows], **self._shape(rows), partial=sharded)

    def gradient_(
        self, logits_nV: Tensor, rows: Rows, statistics_3n: Tensor, g_n: Tensor | None, h_n: Tensor | None, k_n: Tensor | None
    ) -> Tensor:
        """[n, V] in `product_dtype`: the gradient of the logits, which are overwritten. Valid until the next call."""
        out_nV = logits_nV
        if self.product_dtype != self.dtype:
            if self._slopes is None:
                self._slopes = torch.empty_like(self._logits, dtype=self.product_dtype)
            out_nV = self._slopes[: len(logits_nV)]
        targets_n = self.targets_N[rows]
        self.kernels.logit_gradient(
            logits_nV, targets_n, statistics_3n, g_n, h_n, k_n, **self._shape(rows), out_NV=out_nV
        )
        return out_nV

    def _shape(self, rows: Rows) -> dict[str, float | Tensor | None]:
        inverse_temperature, softcap, keep_mask_nV = self.shape.select(rows)
        return {
            "inverse_temperature": inverse_temperature,
            "softcap": softcap,
            "bias_V": self.bias_V,
            "keep_mask_NV": keep_mask_nV,
        }


class HeadGradient:
    """Gradients of hidden, weight and bias, summed over the chunks in fp32 (fp64 for fp64 inputs)."""

    def __init__(self, head: LmHead, needs: tuple[bool, bool, bool], main_grad_VH: Tensor | None):
        """needs: whether hidden's, weight's, bias's gradient is wanted. Weight's is added to main_grad_VH, if given."""
        needs_hidden, needs_weight, needs_bias = needs
        self.head = head
        self.d_hidden_NH = torch.zeros_like(head.hidden_NH, dtype=head.dtype) if needs_hidden else None
        self.main_grad_VH = main_grad_VH if needs_weight else None
        self.d_weight_VH = self.main_grad_VH
        if needs_weight and main_grad_VH is None:
            self.d_weight_VH = torch.zeros_like(head.weight_VH, dtype=head.dtype)
        self.d_bias_V = torch.zeros_like(head.bias_V, dtype=head.dtype) if needs_bias else None

    def add(self, rows: Rows, dz_nV: Tensor) -> None:
        head = self.head
        if self.d_hidden_NH is not None:
            d_x_nH = torch.zeros(len(dz_nV), head.hidden_NH.shape[1], dtype=head.dtype, device=dz_nV.device)
            for columns, block in head.weight_blocks():
                add_product_(d_x_nH, dz_nV[:, columns], block)
            self.d_hidden_NH[rows] = d_x_nH
        if self.d_weight_VH is not None:
            add_product_(self.d_weight_VH, dz_nV.t(), head.hidden_NH[rows].to(head.product_dtype))
        if self.d_bias_V is not None:
            self.d_bias_V += dz_nV.sum(0, dtype=head.dtype)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the dtypes of hidden, weight and bias; None for what is not wanted, and for weight where main_grad has it."""
        head = self.head
        d_hidden, d_weight, d_bias = self.d_hidden_NH, self.d_weight_VH, self.d_bias_V
        if d_hidden is not None:
            if head.group is not None:
                dist.all_reduce(d_hidden, group=head.group)  # each rank has multiplied its own vocabulary rows
            d_hidden = d_hidden.to(head.hidden_NH.dtype)
        d_weight = None if d_weight is None or self.main_grad_VH is not None else d_weight.to(head.weight_VH.dtype)
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(head.bias_V.dtype)


def head_statistics(head: LmHead) -> Tensor:
    """[3, N]: logprob, entropy, logsumexp; 0 for ignored rows. 2 N H V operations."""
    targets_N = head.targets_N
    statistics = torch.zeros(3 if head.group is None else 5, len(targets_N), dtype=head.dtype, device=targets_N.device)
    if head.group is not None:
        statistics[0] = -torch.inf  # what a row left out adds to the other ranks': nothing
    for rows in head.chunks(targets_N != IGNORED):
        statistics[:, rows] = head.own_statistics(head.logits(rows), rows)
    return statistics if head.group is None else join_shards(statistics, targets_N, head.group)


def head_gradient(
    gradient: HeadGradient, statistics_3N: Tensor, g_N: Tensor | None, h_N: Tensor | None, k_N: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`gradient.finish()` after all rows with a non-zero upstream gradient. 6 N H V operations: logits are made again."""
    head, upstream = gradient.head, Upstream(g_N, h_N, k_N)
    for rows in head.chunks(upstream.live_rows(head.targets_N != IGNORED)):
        logits_nV = head.logits(rows)
        gradient.add(rows, head.gradient_(logits_nV, rows, statistics_3N[:, rows], *upstream.select(rows)))
    return gradient.finish()


def local_targets(targets_N: Tensor, ignore_index: int, first_token: int) -> Tensor:
    """Columns of this rank's vocabulary rows; IGNORED where the target is ignore_index."""
    return torch.where(targets_N == ignore_index, IGNORED, targets_N - first_token)


def join_shards(partial_5N: Tensor, targets_N: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[3, N] of the whole vocabulary from each rank's partial statistics, which are overwritten."""
    softmax = OnlineSoftmax(partial_5N)
    softmax.all_reduce_(group)
    return torch.stack(softmax.finish().ignore(targets_N == IGNORED, logsumexp=0))


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, accumulated in the dtype of total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
