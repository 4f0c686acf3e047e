"""Rotary positions: one read and one write of x; the angles of a token are read once for all its heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ahead_of_time import BF16, FP32, AotCase


@triton.jit(do_not_specialize=["num_tokens", "table_rows"])
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, positions_ptr, y_ptr, num_tokens, num_heads, table_rows,
    x_token_stride, x_head_stride, x_column_stride, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """y (contiguous) of TOKENS tokens x HEADS heads."""
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    heads = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, BLOCK_HALF).to(tl.int64)
    in_half = columns < HALF
    if positions_ptr is None:  # noqa: SIM108 (Triton compiles both sides of a ternary)
        rows = tokens
    else:
        rows = tl.load(positions_ptr + tokens, mask=tokens < num_tokens, other=0).to(tl.int64)
    in_table = ((rows >= 0) & (rows < table_rows))[:, None] & in_half[None, :]
    angles = rows[:, None] * HALF + columns[None, :]
    nan = float("nan")  # a row outside the table must not become a read outside of it
    cos = tl.load(cos_ptr + angles, mask=in_table, other=nan).to(tl.float32)[:, None, :]
    sin = tl.load(sin_ptr + angles, mask=in_table, other=nan).to(tl.float32)[:, None, :]
    if INVERSE:
        sin = -sin
    inside = (tokens < num_tokens)[:, None, None] & (heads < num_heads)[None, :, None] & in_half[None, None, :]
    x_start = tokens[:, None, None] * x_token_stride + heads[None, :, None] * x_head_stride
    x_offsets = x_start + columns[None, None, :] * x_column_stride
    first = tl.load(x_ptr + x_offsets, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + x_offsets + HALF * x_column_stride, mask=inside, other=0.0).to(tl.float32)
    y_offsets = (tokens[:, None, None] * num_heads + heads[None, :, None]) * (2 * HALF) + columns[None, None, :]
    tl.store(y_ptr + y_offsets, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + y_offsets + HALF, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=inside)


def tile(num_heads: int, size: int) -> dict[str, int]:
    """About 1024 pairs a program, 8 a thread; up to 16 heads share their token's angles."""
    half = size // 2
    block = triton.next_power_of_2(half)
    heads = min(triton.next_power_of_2(num_heads), 16)
    return {"HALF": half, "BLOCK_HALF": block, "TOKENS": max(1, 1024 // (block * heads)), "HEADS": heads, "num_warps": 4}


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        num_tokens, num_heads, size = x.shape
        meta = tile(num_heads, size)
        grid = (triton.cdiv(num_tokens, meta["TOKENS"]), triton.cdiv(num_heads, meta["HEADS"]))
        rope_kernel[grid](
            x, cos.contiguous(), sin.contiguous(), None if positions is None else positions.contiguous(), y,
            num_tokens, num_heads, cos.shape[0], *x.stride(), INVERSE=inverse, **meta,
        )  # fmt: skip
    return y


def aot_cases() -> list[AotCase]:
    cases = []
    for num_heads, size, positions, inverse in ((32, 128, "*i64:16", False), (9, 64, None, True), (1, 64, "*i32:16", False)):
        meta = tile(num_heads, size)
        num_warps = meta.pop("num_warps")
        arguments = {
            "x_ptr": BF16, "cos_ptr": FP32, "sin_ptr": FP32, "positions_ptr": positions, "y_ptr": BF16, "num_tokens": "i32",
            "num_heads": "i32", "table_rows": "i32", "x_token_stride": "i32:16", "x_head_stride": "i32:16",
            "x_column_stride": 1, "INVERSE": inverse, **meta,
        }  # fmt: skip
        label = f"N={num_heads} D={size}{' inverse' if inverse else ''}"
        cases.append(AotCase(rope_kernel, arguments, num_warps, label=label))
    return cases
