"""What a forward pass needs besides its input: `ForwardContext`.

The same Transformer trains and generates; only the attention part of the context differs. `Packed`: sequences end to
end, each attending to itself. `Paged`: new tokens of running sequences, whose earlier keys and values lie in cache blocks.

Both are turned into rectangles (`rectangles.py`) once, on first use, and every layer shares the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .rectangles import PagedPlan, Rectangles, packed_rectangles


@dataclass(frozen=True)
class Packed:
    """S sequences end to end: sequence s is tokens cu_seqlens[s] : cu_seqlens[s + 1], causal within itself.

    Tokens beyond cu_seqlens[-1] are padding: they attend to nothing, attention gives them zeros.
    """

    cu_seqlens: Tensor
    """int32 [S + 1], non-decreasing from 0; equal neighbours are empty slots."""
    max_seqlen: int
    """No sequence is longer. A host number, so that shapes on the GPU never depend on data."""


@dataclass(frozen=True)
class Paged:
    """B rows of a running batch; row b feeds tokens cu_seqlens_q[b] : cu_seqlens_q[b + 1] (1 when decoding, a chunk of
    the prompt when prefilling). They are the last keys of the row; it sees those and everything before them.

    Layers write the new keys and values into the caches in place, then read: gradients must be off. Every token belongs to
    a row. A caller that wants a fixed batch size (CUDA graphs) adds rows of its own over a block that nobody else uses.
    """

    key_cache: Sequence[Tensor] | Tensor
    """One [num_blocks, block_size, K, D] for each layer of this model (stage), or one tensor with that as leading axis.
    Contiguous, and finite everywhere from the start (allocate with zeros): unused slots are masked, and NaN survives a mask."""
    value_cache: Sequence[Tensor] | Tensor
    block_tables: Tensor
    """int32 or int64 [B, blocks]: position p of row b lies in block block_tables[b, p // block_size], slot p % block_size.
    Rows may share blocks; entries past a row's length must still be valid block numbers (0 will do)."""
    lengths: Tensor
    """int32 or int64 [B]: keys visible to row b after this step, so its last token has position lengths[b] - 1."""
    cu_seqlens_q: Tensor
    """int32 [B + 1], increasing from 0 to T."""
    max_seqlen_q: int
    """No row feeds more tokens than this; 1 is pure decoding. A host number, like Packed.max_seqlen."""
    block_size: int


@dataclass(frozen=True)
class ForwardContext:
    """Everything the layers share in one forward pass over T tokens."""

    positions: Tensor
    """int64 [T]: position of each token in its sequence, from 0."""
    attention: Packed | Paged
    routing: None = None
    """Record / replay of expert choices: comes with the first MoE family."""
    context_parallel: None = None
    """Which part of every sequence this rank holds: comes with context parallelism."""

    def __post_init__(self) -> None:
        if self.routing is not None or self.context_parallel is not None:
            raise NotImplementedError("ForwardContext.routing and .context_parallel are not implemented yet: leave them None")

    @staticmethod
    def one_sequence(length: int, device: torch.device | str = "cpu") -> "ForwardContext":
        """One unpadded sequence of `length` tokens."""
        ends = torch.tensor([0, length], dtype=torch.int32, device=device)
        return ForwardContext(torch.arange(length, device=device), Packed(ends, length))

    @cached_property
    def packed_plan(self) -> Rectangles:
        """Layout of a Packed context; computed on first use, then shared by all layers."""
        packed = self.attention
        assert isinstance(packed, Packed)
        return packed_rectangles(packed.cu_seqlens, packed.max_seqlen, len(self.positions), self._on_host)

    @cached_property
    def paged_plan(self) -> PagedPlan:
        """Slots, layout and masks of a Paged context; computed on first use, then shared by all layers."""
        paged = self.attention
        assert isinstance(paged, Paged)
        return PagedPlan.of(
            paged.block_tables,
            paged.lengths,
            paged.cu_seqlens_q,
            paged.max_seqlen_q,
            paged.block_size,
            self.positions,
            paged.key_cache[0].dtype,
            self._on_host,
        )

    @property
    def _on_host(self) -> bool:
        return self.positions.device.type == "cpu"
