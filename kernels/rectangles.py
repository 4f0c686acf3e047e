"""Two equally shaped tensors as pairs of strided rectangles, the form in which the copy kernels take them."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class RectanglePair(NamedTuple):
    """rows x columns elements; addresses are bytes, strides elements. Columns are the axis of the smaller strides."""

    source: int
    destination: int
    rows: int
    columns: int
    source_row_stride: int
    source_column_stride: int
    destination_row_stride: int
    destination_column_stride: int

    @property
    def is_contiguous(self) -> bool:
        """Along the rows, on both sides."""
        return self.source_column_stride == 1 and self.destination_column_stride == 1


def rectangle_pairs(source: Tensor, destination: Tensor) -> Iterator[RectanglePair]:
    """The fewest rectangles: axes that both sides run through without a gap are joined, outer ones beyond two are unrolled."""
    axes = [axis for axis in zip(source.shape, source.stride(), destination.stride(), strict=True) if axis[0] != 1]
    axes.sort(key=lambda axis: (-abs(axis[2]), -abs(axis[1])))
    joined: list[tuple[int, int, int]] = []
    for size, source_stride, destination_stride in axes:
        if joined and joined[-1][1:] == (size * source_stride, size * destination_stride):
            joined[-1] = (joined[-1][0] * size, source_stride, destination_stride)
        else:
            joined.append((size, source_stride, destination_stride))
    *outer, rows, columns = [(1, 0, 0)] * max(2 - len(joined), 0) + joined
    if columns[0] == 1:
        columns = (1, 1, 1)
    if source.numel() == 0:
        return
    for index in itertools.product(*(range(size) for size, _, _ in outer)):
        source_offset = sum(i * axis[1] for i, axis in zip(index, outer, strict=True))
        destination_offset = sum(i * axis[2] for i, axis in zip(index, outer, strict=True))
        yield RectanglePair(
            source.data_ptr() + source_offset * source.element_size(),
            destination.data_ptr() + destination_offset * destination.element_size(),
            rows[0], columns[0], rows[1], columns[1], rows[2], columns[2],
        )  # fmt: skip
