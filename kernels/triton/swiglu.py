"""SwiGLU's product: one read of each input, one write; the backward recomputes the sigmoid."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ahead_of_time import BF16, AotCase
from .rows import as_rows


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_forward_kernel(
    gate_ptr, up_ptr, y_ptr, num_rows, size, gate_row_stride, gate_column_stride, up_row_stride, up_column_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (rows < num_rows) & (columns < size)
    gate = tl.load(gate_ptr + rows * gate_row_stride + columns * gate_column_stride, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_row_stride + columns * up_column_stride, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + rows * size + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, num_rows, size, dy_row_stride, dy_column_stride,
    gate_row_stride, gate_column_stride, up_row_stride, up_column_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (rows < num_rows) & (columns < size)
    dy = tl.load(dy_ptr + rows * dy_row_stride + columns * dy_column_stride, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows * gate_row_stride + columns * gate_column_stride, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_row_stride + columns * up_column_stride, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * up * s * (1.0 + gate * (1.0 - s))
    dup = dy * gate * s
    tl.store(dgate_ptr + rows * size + columns, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + rows * size + columns, dup.to(dup_ptr.dtype.element_ty), mask=inside)


def tile(size: int) -> dict[str, int]:
    """2048 elements a program, 16 a thread."""
    block = min(triton.next_power_of_2(size), 1024)
    return {"ROWS": 2048 // block, "BLOCK": block, "num_warps": 4}


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        gate_NF, up_NF = as_rows(gate), as_rows(up)
        (num_rows, size), meta = gate_NF.shape, tile(gate_NF.shape[1])
        grid = (triton.cdiv(num_rows, meta["ROWS"]), triton.cdiv(size, meta["BLOCK"]))
        swiglu_forward_kernel[grid](gate_NF, up_NF, y, num_rows, size, *gate_NF.stride(), *up_NF.stride(), **meta)
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    if dy.numel():
        dy_NF, gate_NF, up_NF = as_rows(dy), as_rows(gate), as_rows(up)
        (num_rows, size), meta = gate_NF.shape, tile(gate_NF.shape[1])
        grid = (triton.cdiv(num_rows, meta["ROWS"]), triton.cdiv(size, meta["BLOCK"]))
        strides = (*dy_NF.stride(), *gate_NF.stride(), *up_NF.stride())
        swiglu_backward_kernel[grid](dy_NF, gate_NF, up_NF, dgate, dup, num_rows, size, *strides, **meta)
    return dgate, dup


def aot_cases() -> list[AotCase]:
    cases = []
    for size in (768, 12288):
        meta = tile(size)
        num_warps = meta.pop("num_warps")
        strides = {f"{name}_row_stride": "i32:16" for name in ("gate", "up")}
        strides |= {f"{name}_column_stride": 1 for name in ("gate", "up")}
        forward = {"gate_ptr": BF16, "up_ptr": BF16, "y_ptr": BF16, "num_rows": "i32", "size": "i32:16", **strides, **meta}
        dy = {"dy_ptr": BF16, "dgate_ptr": BF16, "dup_ptr": BF16, "dy_row_stride": "i32:16", "dy_column_stride": 1}
        backward = {**forward, **dy}
        del backward["y_ptr"]
        cases.append(AotCase(swiglu_forward_kernel, forward, num_warps, label=f"F={size}"))
        cases.append(AotCase(swiglu_backward_kernel, backward, num_warps, label=f"F={size}"))
    return cases
