"""Block-wise FP8."""

from typing import Literal

import torch
from torch import Tensor

from .checks import require_dims, require_floating
from .dispatch import define_op, form

AVAILABLE = ("reference", "triton")
BLOCKS = ((1, 128), (128, 128))


def quantize_fp8(
    x: Tensor, block: tuple[Literal[1, 128], Literal[128]] = (1, 128), *, power_of_two_scales: bool = False
) -> tuple[Tensor, Tensor]:
    """x as float8_e4m3fn with one fp32 scale a block: x is about q.float() * scale, as DeepSeek-V3 (arXiv 2412.19437, 3.3).

    x: [..., M, K], float32, bfloat16, float16 or float64, any strides (x.mT quantises along the other axis).
    block: (1, 128) for activations and gradients, (128, 128) for weights; blocks at the right and lower edge may be smaller.
    power_of_two_scales: round scales up to powers of two (exact to multiply with, and what E8M0 scale formats hold).

    Returns q [..., M, K], contiguous, and scale [..., ceil(M / block[0]), ceil(K / 128)] = max |x| of the block / 448, at
    least 2^-126, and 1 for a block of zeros. Values are clamped to +-448, the format's largest: a cast alone makes NaN of
    what rounding pushed beyond it in older versions of torch. A block that holds a NaN or an infinity gets the scale NaN.
    Computed in fp32, whatever x is; no gradient flows: an FP8 layer has its own backward.

    Raises TypeError for other dtypes, ValueError for another block or fewer than 2 axes.
    """
    require_floating("quantize_fp8", x=x)
    require_dims("quantize_fp8", "x", x, "[..., M, K] (x[None] for one row)", least=2)
    if tuple(block) not in BLOCKS:
        raise ValueError(f"quantize_fp8: block is {block}: choose (1, 128) for activations or (128, 128) for weights")
    return _quantize_fp8(x.detach(), block[0], power_of_two_scales)


def _run(x: Tensor, block_rows: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    return form("quantize_fp8", x, AVAILABLE).quantize_fp8(x, block_rows, power_of_two)


def _fake(x: Tensor, block_rows: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    *batch, m, k = x.shape
    scales = (*batch, (m + block_rows - 1) // block_rows, (k + 127) // 128)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(scales, dtype=torch.float32)


_quantize_fp8 = define_op(
    "quantize_fp8(Tensor x, int block_rows, bool power_of_two) -> (Tensor, Tensor)",
    _run, _fake, why_no_gradient="rounding has none",
)  # fmt: skip
