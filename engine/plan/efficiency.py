"""Seconds of one GPU's work: matrix products, attention, and kernels bound by memory.

A product is cut into tiles of its output; the multiprocessors work on them in waves, each wave at a fraction of the peak plus
the time to fill and drain it; few tiles are cut again along k (split-k). No product beats its memory traffic. The constants are
fitted on the tables of aiconfigurator-core 0.12.0 (systems/data/{a100,h100,h200,b200}_sxm/gemm, medians of vLLM, SGLang and
TensorRT-LLM; n, k >= 512). Error on the points that weren't used, median / 90th percentile, from 1024 rows on and below:

    bf16   H100 5% / 16% and 6% / 19%; H200 6% / 17% and 7% / 22%; A100 4% / 13% and 8% / 29%; B200 5% / 16% and 9% / 21%
           (the three backends differ by 7% / 18% among themselves on H100)
    fp8    H100 11% / 31% per tensor (TensorRT-LLM), 10% / 28% in blocks (SGLang's DeepGEMM) from 1024 rows on, with one pass
           over the input added, which these tables quantise as they go; below, their quantising kernels decide (30%, 12%), and
           the backends differ by 26% / 65%

FP8 constants are those of products alone: from cuBLASLt's 1.29-1.38 PFLOPS (Azure ND H100 v5 guide, 10,000 warm iterations) and
the 28 shapes of DeepGEMM's first README on H800, 206 to 1358 TFLOPS: error 5% / 23%.
"""

import math
from typing import Literal

from ..config import InputError
from .devices import Architecture, DeviceFacts

Precision = Literal["bf16", "fp8-tensorwise", "fp8-blockwise", "fp32"]

SUSTAINED_FRACTION: dict[tuple[Architecture, Precision], float] = {
    ("ampere", "bf16"): 0.98,
    ("hopper", "bf16"): 0.87,
    ("hopper", "fp8-tensorwise"): 0.95,
    ("hopper", "fp8-blockwise"): 0.95,
    ("blackwell", "bf16"): 0.85,
    ("blackwell", "fp8-tensorwise"): 0.9,
    ("blackwell", "fp8-blockwise"): 0.9,
}
"""The clock of tensor cores in a long training step over their clock in a microbenchmark of a few milliseconds: at its power
limit the board lowers it. Measured as products of more than 10 ms against shorter ones in the same tables (H100 bf16: 0.86 in
SGLang's, 0.90 in TensorRT-LLM's, 1.0 in vLLM's; FP8 0.93-0.99; A100 0.98; B200 bf16 0.83; B200 FP8 assumed). 1 where nothing is
said: H20's tensor cores and products in fp32 don't reach the limit."""
FULL_POWER_WATTS: dict[Architecture, float] = {"ampere": 400, "hopper": 700, "h20": 400, "blackwell": 1000}
"""Power limit of the boards that SUSTAINED_FRACTION was measured on ..."""
POWER_EXPONENT = 1.0
"""... and how the clock follows another limit: 1/3 where the voltage falls with it, up to 1 where the voltage is at its lowest.
Fitted on rows at 500 W (benchmarks/planner.py --fit), at its bound: part of the power never becomes clock."""

MAINLOOP_FRACTION: dict[Architecture, dict[Precision, float]] = {
    "ampere": {"bf16": 0.824, "fp32": 0.8},
    "hopper": {"bf16": 0.82, "fp8-tensorwise": 0.72, "fp8-blockwise": 0.72, "fp32": 0.8},
    "h20": {"bf16": 0.90, "fp8-tensorwise": 0.90, "fp8-blockwise": 0.90, "fp32": 0.8},
    "blackwell": {"bf16": 0.72, "fp8-tensorwise": 0.60, "fp8-blockwise": 0.66, "fp32": 0.8},
}
"""Rate of full waves over the peak, at a microbenchmark's clock. h20: no public table; FlashMLA and FlashAttention-3 reach 0.87
there (issues FlashMLA #30, flash-attention #1310)."""
WAVE_SECONDS: dict[Architecture, dict[Precision, float]] = {
    "ampere": {"bf16": 2.1e-6, "fp32": 2.1e-6},
    "hopper": {"bf16": 0.3e-6, "fp8-tensorwise": 1.5e-6, "fp8-blockwise": 2.5e-6, "fp32": 1e-6},
    "h20": {"bf16": 0.3e-6, "fp8-tensorwise": 1.5e-6, "fp8-blockwise": 2.5e-6, "fp32": 1e-6},
    "blackwell": {"bf16": 0.15e-6, "fp8-tensorwise": 0.25e-6, "fp8-blockwise": 0.3e-6, "fp32": 1e-6},
}
"""Of a wave, before its first multiplication and after its last."""
LAUNCH_SECONDS: dict[Architecture, float] = {"ampere": 4.0e-6, "hopper": 2.4e-6, "h20": 2.4e-6, "blackwell": 2.0e-6}
"""From one kernel's end to the next one's start on the GPU, when the host isn't late."""
SPLIT_SECONDS = 2.7e-6
"""Of adding up the parts of a product that was split along k, beside their bytes."""
TILES = ((128, 256), (128, 128), (64, 128))
"""Rows and columns of the output that one multiprocessor computes at a time."""
WIDENING_TILES = ((16, 128),)
"""More of them in kernels that read weights of 4 bits and widen them (Marlin): made for few rows, and in none of the tables."""
SPLITS = (1, 2, 4, 8, 16)
"""Parts along k that one tile is cut into ..."""
MIN_SPLIT_DEPTH = 128
"""... none of them shorter than this."""
HBM_FRACTION: dict[Architecture, float] = {"ampere": 0.72, "hopper": 0.80, "h20": 0.80, "blackwell": 0.74}
"""Achieved of the stated memory bandwidth by products of few rows."""
STREAM_FRACTION = 0.86
"""The same by kernels that read and write in order: copies at 2.90 and triads at 2.97 of 3.35 TB/s (Azure ND H100 v5 guide)."""
ELEMENT_BYTES: dict[Precision, int] = {"bf16": 2, "fp8-tensorwise": 1, "fp8-blockwise": 1, "fp32": 4}

ATTENTION_FRACTION: dict[Architecture, dict[int, tuple[float, float]]] = {
    "ampere": {64: (0.52, 430), 128: (0.582, 430)},
    "hopper": {64: (0.513, 830), 128: (0.639, 724), 192: (0.722, 565), 256: (0.755, 700)},
    "h20": {64: (0.90, 450), 128: (0.90, 480)},
    "blackwell": {64: (0.347, 660), 128: (0.575, 876), 256: (0.653, 960)},
}
"""Head dimension of queries and keys -> (fraction of the bf16 peak that causal flash attention approaches with the sequence,
tokens of the sequence at which it reaches half of that). Fitted on context_attention of the same tables (FlashAttention-3 on
Hopper, -2 on A100, TensorRT-LLM's kernel on B200), within 5% from 512 to 16,384 tokens; h20: flash-attention issue #1310;
ampere 64: that of 128 in the ratio of the FlashAttention-2 paper. The clock is not lowered under load: the softmax leaves
the tensor cores idle for much of the time, and the DualPipe trace shows it (MLA 556 TFLOPS on 112 of 132 multiprocessors)."""
ATTENTION_BACKWARD_FLOPS = 2.5
"""Five products instead of two, over those of the forward pass."""
ATTENTION_BACKWARD_FRACTION = 0.82
"""Rate of the backward pass over the forward one's: 455 / 556 in the DualPipe trace (deepseek-ai/profile-data), 0.79-0.85 on
B200 (flash-attention pull request #2280)."""
QUERY_TILE = 128
"""Rows of queries that one multiprocessor works on (FlashAttention 2 and 3)."""


def peak_flops_per_second(device: DeviceFacts, precision: Precision) -> float:
    """Dense peak of the device. Raises InputError where it can't compute in this precision."""
    peaks = {"bf16": device.bf16_flops_per_second, "fp32": device.fp32_flops_per_second}
    peak = peaks.get(precision, device.fp8_flops_per_second)
    if not peak:
        raise InputError(f"precision {precision}: {device.name} has no FP8 tensor cores; use bf16")
    return peak


def sustained_fraction(device: DeviceFacts, precision: Precision) -> float:
    """Clock of the tensor cores in a training step over a microbenchmark's, at this device's power limit."""
    return min(1.0, SUSTAINED_FRACTION.get((device.architecture, precision), 1.0) * limited_clock(device))


def limited_clock(device: DeviceFacts) -> float:
    """The clock under load at this device's power limit over that at the usual limit of its kind."""
    return (device.power_watts / FULL_POWER_WATTS[device.architecture]) ** POWER_EXPONENT


def gemm_seconds(device: DeviceFacts, m: float, n: float, k: float, precision: Precision, sustained: bool = True) -> float:
    """A product [m, k] x [k, n], its inputs in `precision` already and the result in bf16.

    `sustained`: at the clocks of a training step; False: as a microbenchmark times it.
    Raises InputError where the device can't compute in this precision.
    """
    return grouped_gemm_seconds(device, 1, m, n, k, precision, sustained)


def grouped_gemm_seconds(
    device: DeviceFacts,
    groups: int,
    rows_per_group: float,
    n: float,
    k: float,
    precision: Precision,
    sustained: bool = True,
    weight_bytes: float | None = None,
) -> float:
    """`groups` products [rows, k] x [k, n] in one kernel: the experts of one rank, equally loaded. As `gemm_seconds`.

    `weight_bytes`: of an element of the [k, n] matrices as they are read, where that is narrower than the `precision` that
    multiplies them.

    Nothing more is needed for groups than their tiles: of DeepGEMM's grouped products on H800, those of 4096 or more rows a
    group come out within 7%, those of 256 rows up to 24% too fast.
    """
    peak = peak_flops_per_second(device, precision)
    rate = peak * MAINLOOP_FRACTION[device.architecture][precision] / device.streaming_multiprocessors
    rate *= sustained_fraction(device, precision) if sustained else 1.0
    wave = WAVE_SECONDS[device.architecture][precision]
    memory_rate = HBM_FRACTION[device.architecture] * device.hbm_bytes_per_second
    element_bytes = ELEMENT_BYTES[precision]
    weight_bytes = weight_bytes or element_bytes
    candidates = []
    for rows, columns in TILES + (WIDENING_TILES if weight_bytes < element_bytes else ()):
        tiles = groups * math.ceil(rows_per_group / rows) * math.ceil(n / columns)
        for split in SPLITS:
            if split > 1 and (tiles >= device.streaming_multiprocessors or k < MIN_SPLIT_DEPTH * split):
                break
            waves = math.ceil(split * tiles / device.streaming_multiprocessors)
            seconds = waves * (2 * rows * columns * (k / split) / rate + wave)
            if split > 1:  # parts are written and read in fp32
                seconds += SPLIT_SECONDS + 8 * split * groups * rows_per_group * n / memory_rate
            candidates.append(seconds)
    inputs_bytes = (rows_per_group * element_bytes + n * weight_bytes) * k
    moved_bytes = groups * (inputs_bytes + rows_per_group * n * max(2, element_bytes))
    return LAUNCH_SECONDS[device.architecture] + max(min(candidates), moved_bytes / memory_rate)


def attention_seconds(
    device: DeviceFacts, flops: float, backward: bool, head_dim: int, sequence: float, precision: Precision = "bf16"
) -> float:
    """Attention's core (scores, softmax, weighted values) by a flash kernel in bf16, or by one of its kind in fp32, which is
    assumed to reach the same fraction of its peak.

    `flops`: of the *forward* core without what the mask leaves out (causal: half), also where `backward` asks for the seconds
    of its backward pass. `head_dim`: of queries and keys. `sequence`: tokens that attend to each other.
    """
    curves = ATTENTION_FRACTION[device.architecture]
    full, half = curves[min(curves, key=lambda width: abs(width - head_dim))]
    rate = peak_flops_per_second(device, precision) * min(1.0, limited_clock(device))
    rate *= ATTENTION_BACKWARD_FRACTION if backward else 1.0
    flops *= ATTENTION_BACKWARD_FLOPS if backward else 1.0
    longest_tile = 4 * min(QUERY_TILE, sequence) * sequence * head_dim * (ATTENTION_BACKWARD_FLOPS if backward else 1.0)
    seconds = max(
        flops / (rate * full * sequence / (sequence + half)),
        min(flops, longest_tile) / (rate * full / device.streaming_multiprocessors),
    )
    return LAUNCH_SECONDS[device.architecture] + seconds


def memory_bound_seconds(device: DeviceFacts, moved_bytes: float, kernels: int = 1) -> float:
    """`kernels` element-wise kernels that read and write these bytes in total."""
    memory_rate = STREAM_FRACTION * device.hbm_bytes_per_second
    return kernels * LAUNCH_SECONDS[device.architecture] + moved_bytes / memory_rate
