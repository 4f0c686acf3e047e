"""Rotary positions (arXiv 2104.09864) in the half-split form of Hugging Face: the pairs are (x[i], x[i + D/2])."""

import torch
from torch import Tensor

from .precision import wide


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    """x [T, N, D], cos and sin [P, D/2], positions [T] or None (token t has row t) -> [T, N, D] contiguous.

    inverse rotates back, which is also the transpose: the backward of a rotation.
    """
    rows = slice(None) if positions is None else positions
    c, s = wide(cos[rows])[:, None], wide(sin[rows])[:, None]
    if inverse:
        s = -s
    first, second = wide(x).chunk(2, dim=-1)
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)
