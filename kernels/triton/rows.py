"""Tensors as a kernel sees them: rows of one stride."""

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """[..., H] -> [N, H]; copies only where the leading axes have no common stride."""
    return x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
