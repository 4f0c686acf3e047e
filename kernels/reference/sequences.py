"""Sums over the sequences of a packed batch, with fixed shapes and without a host sync."""

import torch
from torch import Tensor


def sequence_index(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [T]: the sequence of each token, S for the padding behind cu_seqlens[-1]. Empty sequences own no token."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)


def sequence_sums(values: Tensor, index: Tensor, num_sequences: int) -> Tensor:
    """[T, K] -> [S, K]; the padding's sum is dropped."""
    sums = values.new_zeros(num_sequences + 1, values.shape[1])
    return sums.index_add(0, index, values)[:num_sequences]


def per_token(sums: Tensor, index: Tensor) -> Tensor:
    """[S, K] -> [T, K]: each token reads its sequence's row, the padding reads zeros."""
    padded = sums.new_zeros(sums.shape[0] + 1, sums.shape[1])
    padded[:-1] = sums
    return padded[index]
