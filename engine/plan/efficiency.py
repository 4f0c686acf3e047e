"""Seconds of one GPU's work: matrix products, attention and memory-bound passes, as curves over the device's peaks."""

import math
from typing import Literal

from ..config import InputError
from .devices import DeviceFacts

Precision = Literal["bf16", "fp8-tensorwise", "fp8-blockwise", "fp32"]

SUSTAINED_FRACTION: dict[str, float] = {"bf16": 0.85, "fp8-tensorwise": 0.85, "fp8-blockwise": 0.85, "fp32": 1.0}
"""Clock of the tensor cores inside a long training step over their clock in an isolated microbenchmark: at the board's
power limit the clock falls (H100: 1.98 GHz -> about 1.4-1.7 GHz)."""

MAINLOOP_FRACTION: dict[str, float] = {"bf16": 0.86, "fp8-tensorwise": 0.72, "fp8-blockwise": 0.70, "fp32": 0.8}
"""Rate of a tile's inner loop over the peak, at microbenchmark clocks."""
TILES: tuple[tuple[int, int, float], ...] = ((128, 256, 1.0), (128, 128, 0.92), (64, 256, 0.85), (64, 128, 0.75))
"""Rows and columns of the output that one multiprocessor computes at once, and the inner loop's rate over the best tile's."""
PROLOGUE_SECONDS = 1.5e-6
"""Of a wave of tiles: filling the pipeline of loads and writing the output."""
LAUNCH_SECONDS = 4e-6
"""From one kernel's start to the next one's, when it does nothing."""
HBM_FRACTION = 0.8
"""Achieved of the stated memory bandwidth (aiconfigurator-core 0.12.0, systems/*.yaml; 2.2-2.7 of 3.35 TB/s in GEMMs and
MoE decode)."""
ELEMENT_BYTES: dict[str, int] = {"bf16": 2, "fp8-tensorwise": 1, "fp8-blockwise": 1, "fp32": 4}


def peak_flops_per_second(device: DeviceFacts, precision: Precision) -> float:
    """Dense peak of the device. Raises InputError where it can't compute in this precision."""
    peaks = {"bf16": device.bf16_flops_per_second, "fp32": device.fp32_flops_per_second}
    peak = peaks.get(precision, device.fp8_flops_per_second)
    if not peak:
        raise InputError(f"precision {precision}: {device.name} has no FP8 tensor cores; use bf16")
    return peak


def gemm_seconds(
    device: DeviceFacts, m: float, n: float, k: float, precision: Precision, count: int = 1, sustained: bool = True
) -> float:
    """`count` products [m, k] x [k, n], one after another.

    `sustained`: at the clocks of a training step; False: as a microbenchmark times an isolated product.
    """
    return count * grouped_gemm_seconds(device, 1, m, n, k, precision, sustained)


def grouped_gemm_seconds(
    device: DeviceFacts, groups: int, rows_per_group: float, n: float, k: float, precision: Precision, sustained: bool = True
) -> float:
    """`groups` products [rows, k] x [k, n] in one kernel: the experts of one rank, equally loaded."""
    peak = peak_flops_per_second(device, precision) * MAINLOOP_FRACTION[precision]
    rate_per_multiprocessor = peak * (SUSTAINED_FRACTION[precision] if sustained else 1.0) / device.streaming_multiprocessors
    compute_seconds = min(
        math.ceil(groups * math.ceil(rows_per_group / rows) * math.ceil(n / columns) / device.streaming_multiprocessors)
        * (2 * rows * columns * k / (rate_per_multiprocessor * fraction) + PROLOGUE_SECONDS)
        for rows, columns, fraction in TILES
    )
    element_bytes = ELEMENT_BYTES[precision]
    moved_bytes = groups * ((rows_per_group + n) * k * element_bytes + rows_per_group * n * max(2, element_bytes))
    return LAUNCH_SECONDS + max(compute_seconds, moved_bytes / (HBM_FRACTION * device.hbm_bytes_per_second))


def attention_seconds(
    device: DeviceFacts, flops: float, backward: bool, head_dim: int, sequence: int, sustained: bool = True
) -> float:
    """Attention's core (scores, softmax, weighted values) by a flash kernel in bf16.

    `flops`: of the *forward* core with the mask's share already taken (causal: half), also where `backward` asks for the
    seconds of its backward pass, which computes 2.5 times as much. `head_dim`: of queries and keys.
    """
    best = {True: {64: 0.42, 128: 0.54, 192: 0.52, 256: 0.50}, False: {64: 0.45, 128: 0.65, 192: 0.64, 256: 0.60}}[backward]
    width = min(best, key=lambda dim: abs(dim - head_dim))
    achieved = best[width] * sequence / (sequence + (512 if backward else 400))
    rate = achieved * device.bf16_flops_per_second * (SUSTAINED_FRACTION["bf16"] if sustained else 1.0)
    return LAUNCH_SECONDS + flops * (2.5 if backward else 1.0) / rate


def memory_bound_seconds(device: DeviceFacts, moved_bytes: float, kernels: int = 1) -> float:
    """`kernels` element-wise kernels (or decode attention's reading of keys and values) that move these bytes in total."""
    return kernels * LAUNCH_SECONDS + moved_bytes / (HBM_FRACTION * device.hbm_bytes_per_second)
