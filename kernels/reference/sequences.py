"""Sums over the sequences of a packed batch, with fixed shapes and without a host sync."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad


def sequence_index(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [T]: the sequence of each token, S for the padding behind cu_seqlens[-1]. Empty sequences own no token."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)


def sequence_sums(columns: Iterable[Tensor], cu_seqlens: Tensor) -> Tensor:
    """K tensors [T] -> [S, K]; the padding's sum is dropped. Not differentiable.

    Bit-equal from run to run on CUDA too, where index_add adds in the order in which threads arrive: there segment_reduce
    gives each segment of a 1-dim tensor to one block. So the K tensors lie end to end and their segments go to one call.
    """
    values_KT = torch.stack(tuple(columns))
    (num_columns, num_tokens), num_sequences = values_KT.shape, len(cu_seqlens) - 1
    if not num_tokens:
        return values_KT.new_zeros(num_sequences, num_columns)
    starts = torch.arange(num_columns, device=cu_seqlens.device)[:, None] * num_tokens
    segments = (starts + cu_seqlens.clamp(0, num_tokens)).flatten()  # one more a tensor: its padding, up to the next's start
    ends = torch.cat((segments, segments.new_full((1,), values_KT.numel())))
    sums = torch.segment_reduce(values_KT.flatten(), "sum", offsets=ends, unsafe=True)  # unsafe: lengths aren't read
    return sums.view(num_columns, num_sequences + 1)[:, :num_sequences].t().contiguous()


def tokens_before(mask_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """int64 [S + 1]: the trainable tokens before each boundary. Integers add up to the same in any order."""
    return pad(mask_T.cumsum(0), (1, 0))[cu_seqlens.clamp(0, len(mask_T))]


def per_token(sums: Tensor, index: Tensor) -> Tensor:
    """[S, K] -> [T, K]: each token reads its sequence's row, the padding reads zeros."""
    padded = sums.new_zeros(sums.shape[0] + 1, sums.shape[1])
    padded[:-1] = sums
    return padded[index]
