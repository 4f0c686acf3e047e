"""Device facts and the time curves of one GPU's work, against measured kernels that the curves were not fitted on."""

from dataclasses import replace

import numpy as np
import pytest

from strop.engine.config import InputError
from strop.engine.plan.devices import DEVICES, device_named
from strop.engine.plan.efficiency import (
    ATTENTION_BACKWARD_FLOPS,
    attention_seconds,
    gemm_seconds,
    grouped_gemm_seconds,
    memory_bound_seconds,
    peak_flops_per_second,
    sustained_fraction,
)

# (m, n, k, microseconds) of bf16 products: a random sample (m >= 1024 and below) of the points that the fit didn't see; medians
# of vLLM, SGLang and TensorRT-LLM in aiconfigurator-core 0.12.0, systems/data/*_sxm/gemm.
HELD_OUT_PRODUCTS = {
    "h100": [
        (4, 10240, 8192, 64.3), (10, 51200, 16384, 608.0), (12, 768, 16384, 13.7), (13, 65536, 1024, 51.1),
        (15, 1536, 4096, 9.2), (17, 4096, 7168, 25.1), (81, 1024, 1536, 4.8), (113, 10240, 51200, 396.9),
        (224, 4096, 16384, 67.2), (513, 2560, 3584, 16.2), (1024, 1536, 65536, 273.7), (1280, 512, 2560, 9.8),
        (1280, 12288, 3584, 146.1), (2048, 2048, 4096, 45.2), (2049, 65536, 3072, 1036.6), (2305, 10240, 6144, 403.0),
        (2561, 3584, 2048, 51.9), (2561, 4096, 2560, 76.0), (2561, 10240, 512, 48.6), (3328, 4096, 16384, 593.6),
        (3585, 768, 2048, 18.3), (3841, 1536, 512, 11.0), (4097, 3584, 6144, 232.9), (4352, 7168, 6144, 483.2),
    ],
    "h200": [
        (12, 768, 16384, 11.0), (15, 1536, 4096, 8.2), (81, 1024, 1536, 4.9), (113, 10240, 51200, 281.2),
        (1280, 512, 2560, 8.4), (2049, 65536, 3072, 1157.1), (2305, 10240, 6144, 406.7), (2561, 10240, 512, 47.3),
        (3328, 4096, 16384, 584.0), (4097, 3584, 6144, 232.9),
    ],
    "a100": [
        (6, 3584, 5120, 32.1), (9, 5120, 768, 15.4), (48, 1024, 2048, 8.4), (256, 6144, 12288, 162.7),
        (1024, 2048, 1536, 43.0), (1537, 6144, 2560, 220.1), (1793, 2560, 2048, 113.9), (2049, 65536, 4096, 4729.0),
        (2305, 51200, 51200, 50940.1), (3072, 8192, 10240, 2211.1), (3841, 7168, 4096, 970.2), (4096, 2048, 3584, 275.8),
    ],
    "b200": [
        (12, 768, 16384, 9.3), (15, 1536, 4096, 6.6), (81, 1024, 1536, 4.9), (113, 10240, 51200, 160.1),
        (1024, 1536, 65536, 144.8), (1280, 512, 2560, 5.7), (2048, 2048, 4096, 24.1), (2049, 65536, 3072, 578.3),
        (2305, 10240, 6144, 189.2), (2561, 10240, 512, 21.2), (3328, 4096, 16384, 289.3), (4097, 3584, 6144, 141.1),
    ],
}  # fmt: skip
# (groups, rows a group, n, k, TFLOPS) on H800: DeepGEMM's first README, all 28 of it; fp8-blockwise was fitted on it too.
DEEPGEMM = [
    (1, 64, 2112, 7168, 206), (1, 64, 24576, 1536, 289), (1, 64, 32768, 512, 219), (1, 64, 7168, 16384, 336),
    (1, 64, 4096, 7168, 287), (1, 64, 7168, 2048, 295), (1, 128, 2112, 7168, 352), (1, 128, 24576, 1536, 535),
    (1, 128, 32768, 512, 358), (1, 128, 7168, 16384, 645), (1, 128, 4096, 7168, 533), (1, 128, 7168, 2048, 510),
    (1, 4096, 2112, 7168, 1058), (1, 4096, 24576, 1536, 990), (1, 4096, 32768, 512, 590), (1, 4096, 7168, 16384, 1358),
    (1, 4096, 4096, 7168, 1304), (1, 4096, 7168, 2048, 1025), (4, 8192, 4096, 7168, 1297), (4, 8192, 7168, 2048, 1099),
    (8, 4096, 4096, 7168, 1288), (8, 4096, 7168, 2048, 1093), (1, 1024, 4096, 7168, 1233), (1, 1024, 7168, 2048, 925),
    (2, 512, 4096, 7168, 1040), (2, 512, 7168, 2048, 916), (4, 256, 4096, 7168, 932), (4, 256, 7168, 2048, 815),
]  # fmt: skip
# (device, head_dim, sequence, TFLOPS): causal forward attention, medians over batches and heads above 1 TFLOP a call, from
# context_attention of the same tables: FlashAttention-3 of vLLM (H100, H200), -2 (A100), TensorRT-LLM's kernel (B200).
ATTENTION = [
    ("h100", 64, 2048, 366), ("h100", 128, 2048, 469), ("h100", 128, 8192, 577), ("h100", 192, 2048, 555),
    ("h100", 256, 8192, 697), ("h200", 128, 4096, 526), ("h200", 64, 8192, 459), ("a100", 128, 2048, 149),
    ("a100", 128, 8192, 172), ("b200", 128, 2048, 892), ("b200", 64, 8192, 729), ("b200", 256, 8192, 1334),
]  # fmt: skip


@pytest.mark.parametrize("name", HELD_OUT_PRODUCTS)
def test_products_that_were_not_fitted(name):
    """The three backends differ by 7% (median) and 18% (90th percentile) among themselves on H100: no curve can do better."""
    points = HELD_OUT_PRODUCTS[name]
    predicted = [gemm_seconds(DEVICES[name], m, n, k, "bf16", sustained=False) for m, n, k, _ in points]
    errors = np.abs(np.array(predicted) / [microseconds / 1e6 for *_, microseconds in points] - 1)
    report = [f"{point}: {error:.0%}" for point, error in zip(points, errors, strict=True)]
    assert np.median(errors) < 0.10, report
    assert np.quantile(errors, 0.9) < 0.30, report


def test_fp8_products_as_deepgemm_measured_them():
    rates = [
        2 * groups * m * n * k / grouped_gemm_seconds(DEVICES["h800"], groups, m, n, k, "fp8-blockwise", sustained=False) / 1e12
        for groups, m, n, k, _ in DEEPGEMM
    ]
    errors = np.abs(np.array(rates) / [tflops for *_, tflops in DEEPGEMM] - 1)
    report = [f"{point}: {error:.0%}" for point, error in zip(DEEPGEMM, errors, strict=True)]
    assert np.median(errors) < 0.08 and np.quantile(errors, 0.9) < 0.25 and errors.max() < 0.35, report


@pytest.mark.parametrize("size, tflops", [(2048, 1011), (4096, 1217), (8192, 1290), (16384, 1377), (32768, 1382)])
def test_sustained_fp8_products_of_cublaslt(size, tflops):
    """Azure ND H100 v5 benchmarking guide: FP8, random values, 10,000 warm iterations, so at sustained clocks."""
    rate = 2 * size**3 / gemm_seconds(DEVICES["h100"], size, size, size, "fp8-tensorwise") / 1e12
    assert rate == pytest.approx(tflops, rel=0.07)


def test_experts_of_the_dualpipe_trace():
    """Forward and input-gradient products of 4 MoE layers, 23.1 TFLOP in 22.9 ms (deepseek-ai/profile-data, H800, EP64), beside
    a communication kernel that holds 20 of 132 multiprocessors."""
    h800 = DEVICES["h800"]
    left = replace(h800, streaming_multiprocessors=112, fp8_flops_per_second=h800.fp8_flops_per_second * 112 / 132)
    rows = 4096 * 8 // 4  # a token has 8 copies, a rank 4 experts
    sizes = [(4096, 7168), (7168, 2048), (7168, 4096), (2048, 7168)]  # up + gate, down, and their input gradients
    seconds = 4 * sum(grouped_gemm_seconds(left, 4, rows, n, k, "fp8-blockwise") for n, k in sizes)
    assert 4 * sum(2 * 4 * rows * n * k for n, k in sizes) == pytest.approx(23.1e12, rel=0.01)
    assert seconds == pytest.approx(22.9e-3, rel=0.10)


@pytest.mark.parametrize("name, head_dim, sequence, tflops", ATTENTION)
def test_attention_forward(name, head_dim, sequence, tflops):
    """10%: the table's own spread over batches and heads at one length is as large."""
    flops = 4e12
    rate = flops / attention_seconds(DEVICES[name], flops, False, head_dim, sequence) / 1e12
    assert rate == pytest.approx(tflops, rel=0.10)


def test_attention_of_the_dualpipe_trace():
    """MLA, 128 heads, 4096 tokens: forward 1.237 ms, backward 3.78 ms on the 112 multiprocessors that communication leaves."""
    h800 = DEVICES["h800"]
    left = replace(h800, streaming_multiprocessors=112, bf16_flops_per_second=h800.bf16_flops_per_second * 112 / 132)
    flops = 128 * 4096**2 / 2 * 2 * (192 + 128)
    assert attention_seconds(left, flops, False, 192, 4096) == pytest.approx(1.237e-3, rel=0.20)
    assert attention_seconds(left, flops, True, 192, 4096) == pytest.approx(3.78e-3, rel=0.20)


def test_h20_attention():
    """FlashAttention-3 on H20, head dimension 128, causal, 2048 tokens: 107.8 TFLOPS of 148 (flash-attention issue #1310)."""
    assert 1e12 / attention_seconds(DEVICES["h20"], 1e12, False, 128, 2048) / 1e12 == pytest.approx(107.8, rel=0.05)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_more_work_is_never_faster(device):
    rows = [1, 2, 7, 16, 64, 100, 127, 128, 129, 500, 1000, 1024, 1025, 4000, 4096, 8192, 20000]
    precisions = ["bf16", "fp32"] + (["fp8-tensorwise", "fp8-blockwise"] if device.fp8_flops_per_second else [])
    for precision in precisions:
        for n, k in [(512, 7168), (4096, 4096), (7168, 2048), (152064, 2048), (64, 64), (1, 1)]:
            for sustained in (True, False):
                by_rows = [gemm_seconds(device, m, n, k, precision, sustained=sustained) for m in rows]
                assert np.all(np.isfinite(by_rows)) and by_rows[0] > 0
                assert by_rows == sorted(by_rows), (precision, n, k, by_rows)
                by_groups = [grouped_gemm_seconds(device, g, 100, n, k, precision, sustained) for g in (1, 2, 3, 8, 64, 256)]
                assert by_groups == sorted(by_groups), (precision, n, k, by_groups)
            by_depth = [gemm_seconds(device, 300, n, depth, precision) for depth in (1, 64, 500, 4096, 20000)]
            assert by_depth == sorted(by_depth), (precision, n, by_depth)
    for backward in (False, True):
        by_length = [attention_seconds(device, s**2 * 1e4, backward, 128, s) for s in (1, 128, 1000, 4096, 131072)]
        assert by_length == sorted(by_length) and np.all(np.isfinite(by_length))
    by_bytes = [memory_bound_seconds(device, moved, kernels) for moved, kernels in [(0, 1), (1e6, 1), (1e9, 1), (1e9, 9)]]
    assert by_bytes == sorted(by_bytes) and by_bytes[0] > 0


def test_no_curve_beats_its_peak():
    for device in DEVICES.values():
        for precision in ["bf16", "fp8-blockwise"][: 2 if device.fp8_flops_per_second else 1]:
            flops = 2 * 32768**3
            assert flops / gemm_seconds(device, 32768, 32768, 32768, precision) < peak_flops_per_second(device, precision)
        assert (
            1e15 * ATTENTION_BACKWARD_FLOPS / attention_seconds(device, 1e15, True, 128, 10**6) < device.bf16_flops_per_second
        )
        assert 1e12 / memory_bound_seconds(device, 1e12) < device.hbm_bytes_per_second


@pytest.mark.parametrize("device", [d for d in DEVICES.values() if d.fp8_flops_per_second], ids=lambda d: d.name)
def test_fp8_is_never_slower_than_bf16_at_large_sizes(device):
    for n, k in [(4096, 7168), (7168, 2048), (8192, 8192)]:
        for precision in ("fp8-tensorwise", "fp8-blockwise"):
            assert gemm_seconds(device, 8192, n, k, precision) < gemm_seconds(device, 8192, n, k, "bf16")


def test_less_power_is_a_lower_clock():
    full, limited = DEVICES["h100"], DEVICES["h100-96gb-500w"]
    assert sustained_fraction(limited, "bf16") < sustained_fraction(full, "bf16") <= 1.0
    assert gemm_seconds(limited, 8192, 8192, 8192, "bf16") > gemm_seconds(full, 8192, 8192, 8192, "bf16")
    assert sustained_fraction(DEVICES["h20"], "bf16") == 1.0


def test_hosts_have_what_their_servers_are_sold_with():
    """32 DIMMs of 64 GB, as the makers of memory count: 2 TB of DGX A100 640GB, H100, H200 and B200."""
    assert {device.node_host_bytes for device in DEVICES.values()} == {32 * 64 * 2**30}


def test_mistakes_name_the_value_and_the_fix():
    with pytest.raises(InputError, match="h100, h100-96gb-500w"):
        device_named("h101")
    with pytest.raises(InputError, match=r"fp8-blockwise: a100 .* use bf16"):
        gemm_seconds(DEVICES["a100"], 8, 8, 8, "fp8-blockwise")
