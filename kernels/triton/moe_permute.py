"""Tokens sorted by expert and back: the order in three small launches, then one gather each way.

Every output element is summed and written by one program, in a fixed order, so all results are the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ahead_of_time import BF16, FP32, AotCase

ASSIGNMENTS = 256
"""Assignments that one program counts and ranks."""
CHUNK = 32
"""Assignments compared with all others of the program at a time: 8192 comparisons, 32 a thread of 8 warps."""
INT32 = "*i32:16"


@triton.jit(do_not_specialize=["num_assignments"])
def count_kernel(ids_ptr, prefix_ptr, num_assignments, num_experts, ASSIGNMENTS: tl.constexpr, EXPERTS: tl.constexpr):
    """Row b of prefix gets the number of assignments to each expert in block b. EXPERTS > num_experts: the last is nobody."""
    block = tl.program_id(0)
    places = block * ASSIGNMENTS + tl.arange(0, ASSIGNMENTS)
    ids = tl.load(ids_ptr + places, mask=places < num_assignments, other=-1).to(tl.int32)
    ids = tl.where((ids < 0) | (ids >= num_experts), EXPERTS - 1, ids)
    experts = tl.arange(0, EXPERTS)
    tl.store(prefix_ptr + block.to(tl.int64) * num_experts + experts, tl.histogram(ids, EXPERTS), mask=experts < num_experts)


@triton.jit(do_not_specialize=["num_blocks"])
def offset_kernel(
    prefix_ptr, counts_ptr, offsets_ptr, num_blocks, num_experts,
    MULTIPLE: tl.constexpr, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """One program: prefix becomes the exclusive sum over the blocks before; counts and padded offsets follow."""
    experts = tl.arange(0, EXPERTS)
    real = experts < num_experts
    counts = tl.zeros([EXPERTS], dtype=tl.int32)
    for first in range(0, num_blocks, BLOCKS):
        blocks = first + tl.arange(0, BLOCKS)
        cells = prefix_ptr + blocks[:, None].to(tl.int64) * num_experts + experts[None, :]
        inside = (blocks < num_blocks)[:, None] & real[None, :]
        own = tl.load(cells, mask=inside, other=0)
        tl.store(cells, tl.cumsum(own, axis=0) - own + counts[None, :], mask=inside)
        counts += tl.sum(own, axis=0)
    tl.store(counts_ptr + experts, counts, mask=real)
    padded = (counts + (MULTIPLE - 1)) // MULTIPLE * MULTIPLE
    tl.store(offsets_ptr + experts + 1, tl.cumsum(padded, axis=0), mask=real)
    tl.store(offsets_ptr, 0)


@triton.jit(do_not_specialize=["num_assignments"])
def place_kernel(
    ids_ptr, prefix_ptr, offsets_ptr, rows_ptr, sources_ptr, num_assignments, num_experts,
    ASSIGNMENTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """row = start of the expert + its assignments in the blocks before + those before in this block."""
    block = tl.program_id(0)
    first = block * ASSIGNMENTS
    own = tl.arange(0, ASSIGNMENTS)
    ids = tl.load(ids_ptr + first + own, mask=first + own < num_assignments, other=-1).to(tl.int32)
    rank = tl.zeros([ASSIGNMENTS], dtype=tl.int32)
    for start in range(0, ASSIGNMENTS, CHUNK):
        before = start + tl.arange(0, CHUNK)
        others = tl.load(ids_ptr + first + before, mask=first + before < num_assignments, other=-1).to(tl.int32)
        earlier = (others[None, :] == ids[:, None]) & (before[None, :] < own[:, None])
        rank += tl.sum(earlier.to(tl.int32), axis=1)
    takes_part = (ids >= 0) & (ids < num_experts)
    in_blocks_before = tl.load(prefix_ptr + block.to(tl.int64) * num_experts + ids, mask=takes_part, other=0)
    row = tl.load(offsets_ptr + ids, mask=takes_part, other=0) + in_blocks_before + rank
    tl.store(rows_ptr + first + own, tl.where(takes_part, row, -1), mask=first + own < num_assignments)
    tl.store(sources_ptr + row, first + own, mask=takes_part)


@triton.jit(do_not_specialize=["num_rows"])
def permute_kernel(
    hidden_ptr, sources_ptr, out_ptr, num_rows, size, token_stride, column_stride,
    CHOICES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    source = tl.load(sources_ptr + rows, mask=rows < num_rows, other=-1)
    tokens = (source // CHOICES).to(tl.int64)[:, None]
    inside = columns < size
    cells = hidden_ptr + tokens * token_stride + columns * column_stride
    values = tl.load(cells, mask=inside & (source >= 0)[:, None], other=0.0)
    tl.store(out_ptr + rows[:, None] * size + columns, values, mask=inside & (rows < num_rows)[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def unpermute_kernel(
    expert_out_ptr, weights_ptr, rows_ptr, out_ptr, num_tokens, size, row_stride, column_stride,
    CHOICES: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = (tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (tokens < num_tokens)[:, None] & (columns < size)
    total = tl.zeros([TOKENS, BLOCK], dtype=tl.float32)
    for choice in range(CHOICES):
        row = tl.load(rows_ptr + tokens * CHOICES + choice, mask=tokens < num_tokens, other=-1).to(tl.int64)[:, None]
        cells = expert_out_ptr + row * row_stride + columns * column_stride
        values = tl.load(cells, mask=inside & (row >= 0), other=0.0).to(tl.float32)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + tokens * CHOICES + choice, mask=tokens < num_tokens, other=0.0)
            values = values * weight.to(tl.float32)[:, None]
        total += values
    tl.store(out_ptr + tokens[:, None] * size + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def unpermute_backward_kernel(
    dout_ptr, expert_out_ptr, weights_ptr, sources_ptr, dexpert_out_ptr, dweights_ptr, num_rows, size,
    dout_token_stride, dout_column_stride, row_stride, column_stride, CHOICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its gradient is w dout of its token, and the dot product of dout with it is the gradient of w."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(sources_ptr + row)
    token = (source // CHOICES).to(tl.int64)
    weight = tl.load(weights_ptr + source, mask=source >= 0, other=0.0).to(tl.float32)
    dot = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, size, BLOCK):
        columns = first + tl.arange(0, BLOCK).to(tl.int64)
        inside = columns < size
        live = inside & (source >= 0)
        dout = tl.load(dout_ptr + token * dout_token_stride + columns * dout_column_stride, mask=live, other=0.0).to(tl.float32)
        held = tl.load(expert_out_ptr + row * row_stride + columns * column_stride, mask=live, other=0.0).to(tl.float32)
        dot += dout * held
        tl.store(dexpert_out_ptr + row * size + columns, (weight * dout).to(dexpert_out_ptr.dtype.element_ty), mask=inside)
    tl.store(dweights_ptr + source, tl.sum(dot, axis=0), mask=source >= 0)


def expert_order(
    expert_ids: Tensor, num_experts: int, multiple_of: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=expert_ids.device)

    ids, num_assignments = expert_ids.contiguous(), expert_ids.numel()
    num_blocks, experts = triton.cdiv(num_assignments, ASSIGNMENTS), table_width(num_experts)
    rows, counts, offsets = integers(*expert_ids.shape), integers(num_experts), integers(num_experts + 1)
    sources, prefix = integers(num_rows).fill_(-1), integers(num_blocks, num_experts)
    if num_blocks:
        count_kernel[(num_blocks,)](ids, prefix, num_assignments, num_experts, ASSIGNMENTS=ASSIGNMENTS, EXPERTS=experts)
    offset_kernel[(1,)](
        prefix, counts, offsets, num_blocks, num_experts, MULTIPLE=multiple_of, num_warps=8, **offset_tile(experts)
    )
    if num_blocks:
        place_kernel[(num_blocks,)](
            ids, prefix, offsets, rows, sources, num_assignments, num_experts, ASSIGNMENTS=ASSIGNMENTS, CHUNK=CHUNK,
            num_warps=8,
        )  # fmt: skip
    return rows, sources, counts, offsets


def table_width(num_experts: int) -> int:
    """A power of two with room for the assignments that take no part."""
    return triton.next_power_of_2(num_experts + 1)


def offset_tile(experts: int) -> dict[str, int]:
    return {"BLOCKS": max(4096 // experts, 1), "EXPERTS": experts}


def move_tile(size: int, rows_name: str) -> dict[str, int]:
    """2048 elements a program, 16 a thread."""
    block = min(triton.next_power_of_2(size), 1024)
    return {rows_name: 2048 // block, "BLOCK": block}


def moe_permute(hidden: Tensor, rows: Tensor, sources: Tensor) -> Tensor:
    num_rows, size = sources.shape[0], hidden.shape[1]
    out = torch.empty(num_rows, size, dtype=hidden.dtype, device=hidden.device)
    if out.numel():
        meta = move_tile(size, "ROWS")
        grid = (triton.cdiv(num_rows, meta["ROWS"]), triton.cdiv(size, meta["BLOCK"]))
        permute_kernel[grid](hidden, sources, out, num_rows, size, *hidden.stride(), CHOICES=rows.shape[1], **meta)
    return out


def moe_unpermute(expert_out: Tensor, weights: Tensor | None, rows: Tensor) -> Tensor:
    (num_tokens, choices), size = rows.shape, expert_out.shape[1]
    out = torch.empty(num_tokens, size, dtype=expert_out.dtype, device=expert_out.device)
    if out.numel():
        meta = move_tile(size, "TOKENS")
        grid = (triton.cdiv(num_tokens, meta["TOKENS"]), triton.cdiv(size, meta["BLOCK"]))
        weights = None if weights is None else weights.contiguous()
        unpermute_kernel[grid](expert_out, weights, rows, out, num_tokens, size, *expert_out.stride(), CHOICES=choices, **meta)
    return out


def moe_unpermute_backward(
    dout: Tensor, expert_out: Tensor, weights: Tensor, rows: Tensor, sources: Tensor
) -> tuple[Tensor, Tensor]:
    num_rows, size = expert_out.shape
    dexpert_out = torch.empty(num_rows, size, dtype=expert_out.dtype, device=expert_out.device)
    dweights = torch.zeros(weights.shape, dtype=torch.float32, device=weights.device)
    if dexpert_out.numel():
        unpermute_backward_kernel[(num_rows,)](
            dout, expert_out, weights.contiguous(), sources, dexpert_out, dweights, num_rows, size,
            *dout.stride(), *expert_out.stride(), CHOICES=rows.shape[1], BLOCK=min(triton.next_power_of_2(size), 2048),
        )  # fmt: skip
    return dexpert_out, dweights.to(weights.dtype)


def aot_cases() -> list[AotCase]:
    integers = {"num_assignments": "i32", "num_experts": "i32:16"}
    cases = [
        AotCase(place_kernel, {"ids_ptr": "*i64:16", "prefix_ptr": INT32, "offsets_ptr": INT32, "rows_ptr": INT32,
                               "sources_ptr": INT32, **integers, "ASSIGNMENTS": ASSIGNMENTS, "CHUNK": CHUNK}, 8),
    ]  # fmt: skip
    for num_experts, multiple_of in ((8, 1), (256, 128)):
        experts, label = table_width(num_experts), f"E={num_experts}"
        count = {"ids_ptr": "*i64:16", "prefix_ptr": INT32, **integers, "ASSIGNMENTS": ASSIGNMENTS, "EXPERTS": experts}
        offset = {"prefix_ptr": INT32, "counts_ptr": INT32, "offsets_ptr": INT32, "num_blocks": "i32",
                  "num_experts": "i32:16", "MULTIPLE": multiple_of, **offset_tile(experts)}  # fmt: skip
        cases += [AotCase(count_kernel, count, 4, label=label), AotCase(offset_kernel, offset, 8, label=label)]
    for size, choices in ((576, 2), (2048, 8)):
        label = f"H={size} k={choices}"
        sizes = {"size": "i32:16", "column_stride": 1, "CHOICES": choices}
        permute = {"hidden_ptr": BF16, "sources_ptr": INT32, "out_ptr": BF16, "num_rows": "i32", "token_stride": "i32:16",
                   **sizes, **move_tile(size, "ROWS")}  # fmt: skip
        unpermute = {"expert_out_ptr": BF16, "weights_ptr": FP32, "rows_ptr": INT32, "out_ptr": BF16, "num_tokens": "i32",
                     "row_stride": "i32:16", **sizes, **move_tile(size, "TOKENS")}  # fmt: skip
        backward = {"dout_ptr": BF16, "expert_out_ptr": BF16, "weights_ptr": FP32, "sources_ptr": INT32,
                    "dexpert_out_ptr": BF16, "dweights_ptr": FP32, "num_rows": "i32", "dout_token_stride": "i32:16",
                    "dout_column_stride": 1, "row_stride": "i32:16", **sizes,
                    "BLOCK": min(triton.next_power_of_2(size), 2048)}  # fmt: skip
        cases.append(AotCase(permute_kernel, permute, 4, label=label))
        cases.append(AotCase(unpermute_kernel, unpermute, 4, label=label))
        cases.append(AotCase(unpermute_kernel, unpermute | {"weights_ptr": None}, 4, label=f"{label} unweighted"))
        cases.append(AotCase(unpermute_backward_kernel, backward, 4, label=label))
    return cases
