"""How sequences of different lengths become rectangles, the only shape scaled_dot_product_attention takes.

A rectangle is some sequences side by side, each filled up at its end with zeros. Filling does no harm: causal queries never
look at a key behind them, and the outputs of filled places are dropped.

On the CPU the host reads the lengths and sorts the sequences into rectangles by length (`on_host`). On other devices that
would wait for the device: there is one rectangle, computed there, whose shape depends on host numbers only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHORT = 64
"""Sequences of up to this many tokens share a rectangle: filling them up costs less than one more attention call."""
RATIO = 0.7
"""A longer rectangle takes only sequences of at least this part of its width, so that at most 1 / RATIO^2 = 2 times the
necessary attention scores are computed."""


@dataclass(frozen=True)
class Rectangles:
    """A one-to-one map between T packed tokens and places in rectangles; both directions are differentiable."""

    shapes: tuple[tuple[int, int], ...]
    """(sequences, width) of each rectangle."""
    places: Tensor
    """int64 [T]: the place of each token in all rectangles end to end; `size` for padding, which has no place."""
    has_padding: bool
    """Some tokens may be padding (always assumed where the host doesn't know)."""
    in_order: bool
    """There is one rectangle and it holds exactly the T tokens in their order: nothing has to be moved."""

    @property
    def size(self) -> int:
        return sum(sequences * width for sequences, width in self.shapes)

    @staticmethod
    def of(cu_seqlens: Tensor, groups: Sequence[tuple[Tensor, int]], num_tokens: int, on_host: bool) -> "Rectangles":
        """One rectangle for each of `groups` = (int64 [s] sequences, width of at least their longest).

        cu_seqlens: int [S + 1]; num_tokens: T, including padding beyond cu_seqlens[-1]; on_host: look at the values.
        """
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        shapes = tuple((len(sequences), width) for sequences, width in groups)
        first_place, size = torch.zeros_like(starts), 0
        for (sequences, _), (count, width) in zip(groups, shapes, strict=True):
            first_place[sequences] = size + width * torch.arange(count, device=starts.device)
            size += count * width
        steps = torch.arange(num_tokens, device=starts.device)
        sequence = torch.searchsorted(ends, steps, right=True)
        is_padding = sequence == len(ends)
        sequence = sequence.clamp(max=len(ends) - 1)
        places = torch.where(is_padding, size, first_place[sequence] + steps - starts[sequence])
        if not on_host:
            return Rectangles(shapes, places, has_padding=True, in_order=False)
        in_order = len(shapes) == 1 and torch.equal(places, torch.arange(size))
        return Rectangles(shapes, places, bool(is_padding.any()), in_order)

    def fold(self, x: Tensor) -> list[Tensor]:
        """[T, ...] -> [s, width, ...] of each rectangle, zeros in filled places."""
        if self.in_order:
            return [x.unflatten(0, self.shapes[0])]
        flat = x.new_zeros(self.size + 1, *x.shape[1:]).index_copy_(0, self.places, x)
        pieces = flat[:-1].split([sequences * width for sequences, width in self.shapes])
        return [piece.unflatten(0, shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def unfold(self, rectangles: Sequence[Tensor]) -> Tensor:
        """The inverse: [s, width, ...] of each rectangle -> [T, ...], zeros for padding."""
        pieces = [rectangle.flatten(0, 1) for rectangle in rectangles]
        if self.in_order:
            return pieces[0]
        if self.has_padding:
            pieces.append(pieces[0].new_zeros(1, *pieces[0].shape[1:]))
        return (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).index_select(0, self.places)


def by_length(lengths: Sequence[int], short: int) -> list[list[int]]:
    """Indices of the non-empty sequences, divided into groups of similar length (`short`, RATIO), each in ascending order."""
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length == 0:
            break
        if not groups or (longest > short and length < RATIO * longest):
            groups.append([])
            longest = length
        groups[-1].append(index)
    return [sorted(group) for group in groups]


def packed_rectangles(cu_seqlens: Tensor, max_seqlen: int, num_tokens: int, on_host: bool) -> Rectangles:
    """cu_seqlens and max_seqlen as in context.Packed; num_tokens is T with padding; on_host: see the file's head."""
    if not on_host:
        every = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
        return Rectangles.of(cu_seqlens, [(every, max_seqlen)], num_tokens, on_host)
    lengths = cu_seqlens.diff().tolist()
    assert int(cu_seqlens[0]) == 0 and min(lengths) >= 0, f"cu_seqlens must rise from 0: {cu_seqlens.tolist()}"
    assert 0 < max(lengths) <= max_seqlen, f"the longest sequence has {max(lengths)} tokens, but max_seqlen is {max_seqlen}"
    assert int(cu_seqlens[-1]) <= num_tokens, f"cu_seqlens ends at {int(cu_seqlens[-1])}, but there are {num_tokens} tokens"
    groups = [(torch.tensor(group), max(lengths[i] for i in group)) for group in by_length(lengths, SHORT)]
    return Rectangles.of(cu_seqlens, groups, num_tokens, on_host)


@dataclass(frozen=True)
class KeyWindow:
    """The cached keys that the rows of one rectangle read."""

    blocks: Tensor
    """int64 [s * n]: n cache blocks for each row, in order of position."""
    bias: Tensor
    """[s, 1, width, n * block_size] in the cache's dtype: 0 where the query sees the key, -inf where it must not."""


@dataclass(frozen=True)
class PagedPlan:
    """Where the new keys and values of a step are written and which blocks each query reads; the same for all layers."""

    slots: Tensor
    """int64 [T]: flat cache slot, block * block_size + offset, of each token."""
    rectangles: Rectangles
    windows: tuple[KeyWindow, ...]
    """One for each rectangle."""

    @staticmethod
    def of(
        block_tables: Tensor,
        lengths: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        block_size: int,
        positions: Tensor,
        dtype: torch.dtype,
        on_host: bool,
    ) -> "PagedPlan":
        """Arguments as in context.Paged; positions int64 [T]; dtype that of the cache; on_host: see the file's head."""
        tables, device, num_tokens = block_tables.long(), positions.device, len(positions)
        if on_host:
            fed, visible = cu_seqlens_q.diff().tolist(), lengths.tolist()
            assert min(fed) > 0 and int(cu_seqlens_q[-1]) == num_tokens, f"rows feed {fed} tokens, {num_tokens} were given"
            assert max(fed) <= max_seqlen_q, f"a row feeds {max(fed)} tokens, but max_seqlen_q is {max_seqlen_q}"
            groups = [
                (torch.tensor(rows), max(fed[r] for r in rows), -(-max(visible[r] for r in rows) // block_size))
                for alike in by_length(fed, short=1)
                for rows in ([alike[i] for i in part] for part in by_length([visible[r] for r in alike], SHORT))
            ]
        else:
            groups = [(torch.arange(len(lengths), device=device), max_seqlen_q, tables.shape[1])]
        rectangles = Rectangles.of(cu_seqlens_q, [(rows, width) for rows, width, _ in groups], num_tokens, on_host)
        windows = []
        # Filled places have position 0: they see the row's first key, so no softmax is over nothing.
        for (rows, _, num_blocks), query_positions in zip(groups, rectangles.fold(positions), strict=True):
            keys = torch.arange(num_blocks * block_size, device=device)
            hidden = keys > query_positions[:, None, :, None]
            bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
            windows.append(KeyWindow(tables[rows, :num_blocks].flatten(), bias))
        row = torch.searchsorted(cu_seqlens_q[1:].long(), torch.arange(num_tokens, device=device), right=True)
        slots = tables[row, positions // block_size] * block_size + positions % block_size
        return PagedPlan(slots, rectangles, tuple(windows))
