"""Many copies with conversion: one launch for each kind of rectangle, which one table in device memory describes.

The table is uploaded from pinned memory at each call: a CUDA graph can't capture that. (csrc/cuda/multi_tensor_copy.cu
passes its table as a kernel argument.)
"""

from collections import defaultdict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rectangles import RectanglePair, rectangle_pairs
from .ahead_of_time import AotCase

ENTRIES = 256
"""Rectangles of one launch: each program finds its own among them by one vector comparison."""
TILE = 8192
FIELDS = 8
TYPES = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip
BITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


class Kind(NamedTuple):
    """What a launch is compiled for."""

    source_type: tl.dtype
    destination_type: tl.dtype
    contiguous: bool
    """Columns have stride 1 on both sides."""
    aligned: bool
    """And addresses, row strides and columns are multiples of 16 bytes resp. elements: vector loads."""
    columns: int
    """Of a tile; TILE // columns rows."""


@triton.jit
def multi_tensor_copy_kernel(
    table_ptr, first_tiles_ptr,
    SOURCE: tl.constexpr, DESTINATION: tl.constexpr, CONTIGUOUS: tl.constexpr, ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One tile. table [n, 8] as RectanglePair; first_tiles [ENTRIES + 1]: the tiles before each entry, then a large number."""
    program = tl.program_id(0)
    first_tiles = tl.load(first_tiles_ptr + 1 + tl.arange(0, ENTRIES))
    entry = tl.sum((first_tiles <= program).to(tl.int32), axis=0)
    tile = (program - tl.load(first_tiles_ptr + entry)).to(tl.int64)
    fields = table_ptr + entry.to(tl.int64) * 8
    source = tl.load(fields).to(tl.pointer_type(SOURCE))
    destination = tl.load(fields + 1).to(tl.pointer_type(DESTINATION))
    num_rows = tl.load(fields + 2)
    num_columns = tl.load(fields + 3)
    source_row_stride = tl.load(fields + 4)
    destination_row_stride = tl.load(fields + 6)
    if ALIGNED:
        source = tl.multiple_of(source, 16)
        destination = tl.multiple_of(destination, 16)
        num_columns = tl.multiple_of(num_columns, 16)
        source_row_stride = tl.multiple_of(source_row_stride, 16)
        destination_row_stride = tl.multiple_of(destination_row_stride, 16)
    tiles_across = tl.cdiv(num_columns, COLUMNS)
    rows = (tile // tiles_across * (TILE // COLUMNS) + tl.arange(0, TILE // COLUMNS))[:, None]
    columns = (tile % tiles_across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    if CONTIGUOUS:
        source_offsets = rows * source_row_stride + columns
        destination_offsets = rows * destination_row_stride + columns
    else:
        source_offsets = rows * source_row_stride + columns * tl.load(fields + 5)
        destination_offsets = rows * destination_row_stride + columns * tl.load(fields + 7)
    values = tl.load(source + source_offsets, mask=inside)
    if SOURCE != DESTINATION:
        values = values.to(tl.float32).to(DESTINATION)
    tl.store(destination + destination_offsets, values, mask=inside)


def multi_tensor_copy(sources: list[Tensor], destinations: list[Tensor]) -> None:
    pairs: dict[Kind, list[RectanglePair]] = defaultdict(list)
    for source, destination in zip(sources, destinations, strict=True):
        if source.element_size() == 16:  # complex128: Triton has no type of 16 bytes
            source, destination = torch.view_as_real(source), torch.view_as_real(destination)
        for pair in rectangle_pairs(source, destination):
            pairs[kind_of(pair, source, destination)].append(pair)
    for kind, entries in pairs.items():
        for first in range(0, len(entries), ENTRIES):
            launch(kind, entries[first : first + ENTRIES], sources[0].device)


def kind_of(pair: RectanglePair, source: Tensor, destination: Tensor) -> Kind:
    if source.dtype == destination.dtype:
        types = (BITS[source.element_size()],) * 2
    else:
        types = TYPES[source.dtype], TYPES[destination.dtype]
    multiples = (pair.source, pair.destination, pair.columns, pair.source_row_stride, pair.destination_row_stride)
    aligned = pair.is_contiguous and all(value % 16 == 0 for value in multiples)
    return Kind(*types, pair.is_contiguous, aligned, TILE if pair.columns >= TILE // 2 else 256)


def launch(kind: Kind, entries: list[RectanglePair], device: torch.device) -> None:
    tiles = [triton.cdiv(e.rows, TILE // kind.columns) * triton.cdiv(e.columns, kind.columns) for e in entries]
    first_tiles = torch.tensor([0, *tiles]).cumsum(0)
    num_tiles = int(first_tiles[-1])
    first_tiles = torch.nn.functional.pad(first_tiles, (0, ENTRIES - len(entries)), value=2**31 - 1).int()
    table = torch.tensor(entries, dtype=torch.int64)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
        first_tiles = first_tiles.pin_memory().to(device, non_blocking=True)
    multi_tensor_copy_kernel[(num_tiles,)](
        table, first_tiles, SOURCE=kind.source_type, DESTINATION=kind.destination_type, CONTIGUOUS=kind.contiguous,
        ALIGNED=kind.aligned, COLUMNS=kind.columns, TILE=TILE, ENTRIES=ENTRIES, num_warps=8,
    )  # fmt: skip


def aot_cases() -> list[AotCase]:
    kinds = {
        "fp32 to bf16": Kind(tl.float32, tl.bfloat16, True, True, TILE),
        "fp32 to bf16, strided": Kind(tl.float32, tl.bfloat16, False, False, 256),
        "2 bytes": Kind(tl.int16, tl.int16, True, True, TILE),
        "2 bytes, narrow": Kind(tl.int16, tl.int16, True, True, 256),
    }
    return [
        AotCase(multi_tensor_copy_kernel, {
            "table_ptr": "*i64:16", "first_tiles_ptr": "*i32:16", "SOURCE": kind.source_type,
            "DESTINATION": kind.destination_type, "CONTIGUOUS": kind.contiguous, "ALIGNED": kind.aligned,
            "COLUMNS": kind.columns, "TILE": TILE, "ENTRIES": ENTRIES,
        }, 8, label=label)
        for label, kind in kinds.items()
    ]  # fmt: skip
