"""Block-wise FP8: x is read once and q written once; bit-equal to the reference (IEEE division and product)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ahead_of_time import BF16, FP8, FP32, AotCase

ROWS_OF_LINES = 16
"""Rows of a program where every row has its own scale: 2048 values, 16 a thread."""


@triton.jit(do_not_specialize=["num_rows", "scale_rows", "row_tiles"])
def quantize_fp8_kernel(
    x_ptr, q_ptr, scale_ptr, num_rows, size, scale_rows, scale_columns, row_tiles,
    x_batch_stride, x_row_stride, x_column_stride,
    SQUARE: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS x 128 values of one matrix of the batch, with one scale for each row or, where SQUARE, one for all.

    Programs 0 .. row_tiles - 1 along the first axis (the only one longer than 65,535) are those of the first matrix.
    """
    batch, row_tile = (tl.program_id(0) // row_tiles).to(tl.int64), (tl.program_id(0) % row_tiles).to(tl.int64)
    rows = (row_tile * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1).to(tl.int64) * 128 + tl.arange(0, 128))[None, :]
    inside = (rows < num_rows) & (columns < size)
    cells = x_ptr + batch * x_batch_stride + rows * x_row_stride + columns * x_column_stride
    x = tl.load(cells, mask=inside, other=0.0).to(tl.float32)
    magnitude = tl.abs(x)
    largest = tl.max(magnitude, axis=1, keep_dims=True)
    finite = tl.min((magnitude < float("inf")).to(tl.int32), axis=1, keep_dims=True)  # a maximum may drop a NaN
    scale_row = rows
    if SQUARE:
        largest = tl.max(largest, axis=0, keep_dims=True)
        finite = tl.min(finite, axis=0, keep_dims=True)
        scale_row = (row_tile + tl.arange(0, 1))[:, None]
    scale = tl.maximum(tl.div_rn(largest, 448.0), 1.1754943508222875e-38)  # 2^-126
    if POWER_OF_TWO:
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
    scale = tl.where(largest == 0.0, 1.0, scale)
    q = tl.minimum(tl.maximum(x * tl.div_rn(1.0, scale), -448.0), 448.0)
    q = tl.where(finite != 0, q, float("nan"))
    scale = tl.where(finite != 0, scale, float("nan"))
    tl.store(q_ptr + (batch * num_rows + rows) * size + columns, q.to(q_ptr.dtype.element_ty), mask=inside)
    scale_cells = scale_ptr + (batch * scale_rows + scale_row) * scale_columns + tl.program_id(1)
    tl.store(scale_cells, scale, mask=scale_row < scale_rows)


def tile(block_rows: int) -> dict[str, int | bool]:
    return {"SQUARE": True, "ROWS": 128, "num_warps": 8} if block_rows == 128 else {
        "SQUARE": False, "ROWS": ROWS_OF_LINES, "num_warps": 4}  # fmt: skip


def quantize_fp8(x: Tensor, block_rows: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    *batch, num_rows, size = x.shape
    scale_rows, scale_columns = triton.cdiv(num_rows, block_rows), triton.cdiv(size, 128)
    # The interpreter casts to FP8 wrongly, so on the CPU torch does.
    q_dtype = torch.float8_e4m3fn if x.is_cuda else torch.float32
    q = torch.empty(x.shape, dtype=q_dtype, device=x.device)
    scale = torch.empty(*batch, scale_rows, scale_columns, dtype=torch.float32, device=x.device)
    if x.numel():
        x_BMK, meta = x.reshape(-1, num_rows, size), tile(block_rows)
        row_tiles = triton.cdiv(num_rows, meta["ROWS"])
        quantize_fp8_kernel[(x_BMK.shape[0] * row_tiles, scale_columns)](
            x_BMK, q, scale, num_rows, size, scale_rows, scale_columns, row_tiles, *x_BMK.stride(),
            POWER_OF_TWO=power_of_two, **meta,
        )  # fmt: skip
    return q.to(torch.float8_e4m3fn), scale


def aot_cases() -> list[AotCase]:
    cases = []
    for block_rows, power_of_two in ((1, False), (1, True), (128, False)):
        meta = tile(block_rows)
        num_warps = meta.pop("num_warps")
        arguments = {
            "x_ptr": BF16, "q_ptr": FP8, "scale_ptr": FP32, "num_rows": "i32", "size": "i32:16", "scale_rows": "i32",
            "scale_columns": "i32:16", "row_tiles": "i32", "x_batch_stride": "i64:16", "x_row_stride": "i32:16",
            "x_column_stride": 1, "POWER_OF_TWO": power_of_two, **meta,
        }  # fmt: skip
        label = f"{block_rows}x128{' 2^n' if power_of_two else ''}"
        cases.append(AotCase(quantize_fp8_kernel, arguments, num_warps, label=label))
    transposed = cases[0].arguments | {"x_row_stride": 1, "x_column_stride": "i32:16"}
    return [*cases, AotCase(quantize_fp8_kernel, transposed, 4, label="1x128 transposed")]
