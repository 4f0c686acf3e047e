"""RMSNorm, forward and backward: one read of x (and dy), one write; dw in fp32 by two deterministic stages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ahead_of_time import BF16, FP32, AotCase
from .rows import as_rows

MAX_SIZE = 8192
"""Longest row that the registers of one program hold."""
MAX_PARTIALS = 396
"""Rows of the first stage's partial sums of dw: three programs for each of an H100's 132 multiprocessors. While one waits for
the sum of its row, the others read theirs."""


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_forward_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, num_rows, size, x_row_stride, x_column_stride,
    EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    inside = (rows < num_rows)[:, None] & (columns < size)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_row_stride + columns[None, :] * x_column_stride, mask=inside, other=0.0)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < size, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / size + EPS)
    y = x * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + rows[:, None] * size + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "tiles_per_program"])
def rms_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, num_rows, size, tiles_per_program,
    dy_row_stride, dy_column_stride, x_row_stride, x_column_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p owns `tiles_per_program` consecutive tiles of rows; row p of partial gets their sum of dy n."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    in_row = columns < size
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    for tile in range(tiles_per_program):
        rows = (program * tiles_per_program + tile) * ROWS + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & in_row[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * dy_row_stride + columns[None, :] * dy_column_stride, mask=inside, other=0.0)
        x = tl.load(x_ptr + rows[:, None] * x_row_stride + columns[None, :] * x_column_stride, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)[None, :]  # cached; frees registers
        dy = dy.to(tl.float32)
        normed = x.to(tl.float32) * rstd
        g = dy * weight
        dx = rstd * (g - normed * (tl.sum(g * normed, axis=1) / size)[:, None])
        tl.store(dx_ptr + rows[:, None] * size + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += tl.sum(dy * normed, axis=0)
    tl.store(partial_ptr + program * size + columns, dweight, mask=in_row)


def tile(size: int) -> dict[str, int]:
    """ROWS x BLOCK elements a program, 16 a thread."""
    block = triton.next_power_of_2(size)
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(max(rows * block // 512, 4), 16)}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the reference. ValueError where a row is longer than MAX_SIZE."""
    if x.shape[-1] > MAX_SIZE:
        raise ValueError(f"rms_norm: rows of {x.shape[-1]} are longer than {MAX_SIZE}, what one program holds in registers; "
                         "STROP_KERNELS=reference has no limit")  # fmt: skip
    x_NH, weight = as_rows(x), weight.contiguous()
    num_rows, size = x_NH.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        meta = tile(size)
        grid = (triton.cdiv(num_rows, meta["ROWS"]),)
        rms_norm_forward_kernel[grid](x_NH, weight, y, rstd, num_rows, size, *x_NH.stride(), EPS=eps, **meta)
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dy_NH, x_NH, weight = as_rows(dy), as_rows(x), weight.contiguous()
    num_rows, size = x_NH.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return dx, torch.zeros_like(weight)
    meta = tile(size)
    num_tiles = triton.cdiv(num_rows, meta["ROWS"])
    tiles_per_program = triton.cdiv(num_tiles, MAX_PARTIALS)
    num_programs = triton.cdiv(num_tiles, tiles_per_program)
    partial = torch.empty(num_programs, size, dtype=torch.float32, device=x.device)
    rms_norm_backward_kernel[(num_programs,)](
        dy_NH, x_NH, weight, rstd, dx, partial, num_rows, size, tiles_per_program, *dy_NH.stride(), *x_NH.stride(), **meta
    )
    return dx, partial.sum(0).to(weight.dtype)


def aot_cases() -> list[AotCase]:
    cases = []
    for size in (128, 576, 4096, MAX_SIZE):
        meta = tile(size)
        num_warps = meta.pop("num_warps")
        stride = "i32:16"
        shared = {"num_rows": "i32", "size": "i32:16", "x_row_stride": stride, "x_column_stride": 1, **meta}
        forward = {"x_ptr": BF16, "weight_ptr": BF16, "y_ptr": BF16, "rstd_ptr": FP32, "EPS": 1e-6, **shared}
        backward = {
            "dy_ptr": BF16, "x_ptr": BF16, "weight_ptr": BF16, "rstd_ptr": FP32, "dx_ptr": BF16, "partial_ptr": FP32,
            "tiles_per_program": "i32", "dy_row_stride": stride, "dy_column_stride": 1, **shared,
        }  # fmt: skip
        cases.append(AotCase(rms_norm_forward_kernel, forward, num_warps, label=f"H={size}"))
        cases.append(AotCase(rms_norm_backward_kernel, backward, num_warps, label=f"H={size}"))
    return cases
