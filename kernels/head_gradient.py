"""Gradients of an LM head, piece by piece.

    head, gradient = LmHead(...), HeadGradient(head, needs, main_grad)
    for rows in head.chunks(live_N):
        logits_nV = head.logits(rows)                       # one buffer for all chunks
        statistics_3n = head.statistics(logits_nV, rows)    # logprob, entropy, logsumexp; joined over the group
        gradient.add(rows, head.gradient_(logits_nV, rows, statistics_3n, g_n, h_n, k_n))
    d_hidden, d_weight, d_bias = gradient.finish()

makes gradients in the forward (6 N H V operations in all). `head_gradient` is the backward pass of linear_logprob.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from . import products
from .lm_head import HELD_CHUNKS, LmHead, Rows
from .reference.softmax import IGNORED, Upstream


class HeadGradient:
    """Gradients of hidden, weight and bias, summed over the pieces in fp32 (fp64 for fp64 inputs).

    Memory beyond the results: for a weight of bf16 or fp16 without main_grad the sum in fp32, V x H where pieces are whole
    rows; for hidden states of bf16 or fp16 an fp32 sum of the piece where that is whole rows and there is no group, of all N
    rows otherwise.
    """

    def __init__(self, head: LmHead, needs: tuple[bool, bool, bool], main_grad_VH: Tensor | None):
        """needs: whether hidden's, weight's, bias's gradient is wanted. Weight's is added to main_grad_VH, if given."""
        self.needs_hidden, self.needs_weight, needs_bias = needs
        self.head, self.main_grad_VH = head, main_grad_VH
        self.d_hidden_NH: Tensor | None = None
        self.d_weight_VH: Tensor | None = None
        self.d_bias_V = torch.zeros_like(head.bias_V, dtype=head.dtype) if needs_bias else None
        self._waiting: list[Rows] = []
        self._columns: slice | None = None
        self._sum_vH: Tensor | None = None
        """Of weight's gradient in the columns of the last piece, in `head.dtype`."""

    def add(self, rows: Rows, dz_nv: Tensor, columns: slice | None = None) -> None:
        """dz_nv: what `head.gradient_` gave last. The pieces of the same columns follow one another."""
        head = self.head
        if not head.narrow or columns is not None:
            self._multiply(rows, dz_nv, columns)
            return
        self._waiting.append(rows)
        head.num_held += len(dz_nv)
        if head.num_held + head.chunk_rows > HELD_CHUNKS * head.chunk_rows:
            self._multiply_waiting()

    def _multiply_waiting(self) -> None:
        if self._waiting:
            dz_nV = self.head.held_gradients()
            self._multiply(joined(self._waiting), dz_nV, None)
            self._waiting.clear()
            self.head.num_held = 0

    def _multiply(self, rows: Rows, dz_nv: Tensor, columns: slice | None) -> None:
        head = self.head
        columns = slice(0, len(head.weight_VH)) if columns is None else columns
        if self.needs_hidden:
            self._add_to_hidden(rows, dz_nv, columns)
        if self.needs_weight:
            self._add_to_weight(dz_nv, head.kept_hidden(rows), columns)
        if self.d_bias_V is not None:
            self.d_bias_V[columns] += dz_nv.sum(0, dtype=head.dtype)

    def _add_to_hidden(self, rows: Rows, dz_nv: Tensor, columns: slice) -> None:
        head = self.head
        if self.d_hidden_NH is None:
            complete = head.group is None and columns == slice(0, len(head.weight_VH))  # nothing will be added to these rows
            self.d_hidden_NH = torch.zeros_like(head.hidden_NH, dtype=None if complete else head.dtype)
        in_place = isinstance(rows, slice) and self.d_hidden_NH.dtype == head.dtype
        total_nH = self.d_hidden_NH[rows].to(head.dtype)
        for part, block in head.weight_blocks(columns):
            products.add_product_(total_nH, dz_nv[:, part], block)
        if not in_place:
            self.d_hidden_NH[rows] = total_nH.to(self.d_hidden_NH.dtype)

    def _add_to_weight(self, dz_nv: Tensor, x_nH: Tensor, columns: slice) -> None:
        if self.main_grad_VH is not None:
            products.add_product_(self.main_grad_VH[columns], dz_nv.t(), x_nH)
        elif columns == self._columns:
            products.add_product_(self._sum_vH, dz_nv.t(), x_nH)
        else:
            self._store_weight_sum()
            self._columns = columns
            weight_VH, dtype = self.head.weight_VH, self.head.dtype
            if weight_VH.dtype == dtype:
                self._sum_vH = self._own_weight_gradient()[columns]
            else:
                self._sum_vH = torch.empty_like(weight_VH[columns], dtype=dtype)
            products.multiply(dz_nv.t(), x_nH, self._sum_vH)

    def _own_weight_gradient(self) -> Tensor:
        if self.d_weight_VH is None:
            self.d_weight_VH = torch.empty_like(self.head.weight_VH)
        return self.d_weight_VH

    def _store_weight_sum(self) -> None:
        if self._sum_vH is not None and self._sum_vH.dtype != self.head.weight_VH.dtype:
            self._own_weight_gradient()[self._columns] = self._sum_vH

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the dtypes of hidden, weight and bias; None for what is not wanted, and for weight where main_grad has it."""
        self._multiply_waiting()
        head, d_hidden, d_bias = self.head, self.d_hidden_NH, self.d_bias_V
        head.release_buffers()  # before more memory is taken
        if self.needs_hidden and d_hidden is None:
            d_hidden = torch.zeros_like(head.hidden_NH, dtype=head.dtype)
        if d_hidden is not None:
            if head.group is not None:
                dist.all_reduce(d_hidden, group=head.group)  # each rank has multiplied its own vocabulary rows
            d_hidden = d_hidden.to(head.hidden_NH.dtype)
        if self.needs_weight and self.main_grad_VH is None:
            self._store_weight_sum() if self._columns is not None else self._own_weight_gradient().zero_()
        return d_hidden, self.d_weight_VH, None if d_bias is None else d_bias.to(head.bias_V.dtype)


def head_gradient(
    gradient: HeadGradient, statistics_3N: Tensor, g_N: Tensor | None, h_N: Tensor | None, k_N: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`gradient.finish()` after all rows with a non-zero upstream gradient. Logits are made again: 6 N H V operations for the
    gradients of hidden and weight, 4 for one of them."""
    head = gradient.head
    upstream = Upstream(*(None if values is None else values.contiguous() for values in (g_N, h_N, k_N)))  # often expanded
    for columns, row_tiles in head.tiles(upstream.live_rows(head.targets_N != IGNORED)):
        for rows in row_tiles:
            own = (statistics_3N[:, rows], *upstream.select(rows))
            gradient.add(rows, head.gradient_(head.logits(rows, columns), rows, *own, columns), columns)
    return gradient.finish()


def joined(pieces: list[Rows]) -> Rows:
    """Consecutive slices, or indices, as one."""
    if isinstance(pieces[0], Tensor):
        return torch.cat(pieces)
    return slice(pieces[0].start, pieces[-1].stop)
