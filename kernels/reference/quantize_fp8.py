"""Block-wise FP8 E4M3: scale = max |x| / 448 over the block, q = x / scale. All in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126
"""The smallest normal number: its reciprocal is finite."""


def quantize_fp8(x: Tensor, block_rows: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """x [..., M, K] -> (q [..., M, K], scale [..., ceil(M / block_rows), ceil(K / 128)])."""
    m, k = x.shape[-2:]
    padded = F.pad(x.float(), (0, -k % 128, 0, -m % block_rows))
    blocks = padded.unflatten(-1, (-1, 128)).unflatten(-3, (-1, block_rows))  # [..., M / rows, rows, K / 128, 128]
    largest = blocks.abs().amax((-3, -1))
    scale = block_scale(largest, power_of_two)
    q = (blocks * scale.reciprocal()[..., :, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    q = q.flatten(-2).flatten(-3, -2)[..., :m, :k]
    return q.to(torch.float8_e4m3fn).contiguous(), scale


def block_scale(largest: Tensor, power_of_two: bool) -> Tensor:
    """The fp32 scale of blocks whose largest magnitude is given."""
    scale = (largest / E4M3_MAX).clamp(min=SMALLEST_SCALE)
    if power_of_two:
        bits = scale.view(torch.int32)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)  # one exponent up unless the mantissa is 0
    scale = torch.where(largest == 0, 1.0, scale)
    return torch.where(largest.isfinite(), scale, torch.nan)


def dequantize_fp8(q: Tensor, scale: Tensor, block_rows: int) -> Tensor:
    """fp32 [..., M, K]: what q and scale stand for."""
    m, k = q.shape[-2:]
    spread = scale.repeat_interleave(block_rows, -2)[..., :m, :].repeat_interleave(128, -1)[..., :k]
    return q.float() * spread
