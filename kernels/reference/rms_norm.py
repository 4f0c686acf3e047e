"""RMSNorm (arXiv 1910.07467): y = x r w with r = 1 / sqrt(mean(x^2) + eps), rounded once, at the end."""

from torch import Tensor

from .precision import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., H] -> (y [..., H] contiguous, r [...] in fp32 or fp64)."""
    x_wide = wide(x)
    rstd = (x_wide.square().mean(-1) + eps).rsqrt()
    return (x_wide * rstd[..., None] * wide(weight)).to(x.dtype).contiguous(), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dweight): with n = x r and g = dy w, dx = r (g - n mean(g n)) and dw = sum of dy n over the rows."""
    dy_wide = wide(dy)
    normed = wide(x) * rstd[..., None]
    g = dy_wide * wide(weight)
    dx = rstd[..., None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    dweight = (dy_wide * normed).flatten(0, -2).sum(0)
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype)
