"""What the planner knows of GPUs: peaks, memories and links as their makers and users state them."""

from dataclasses import dataclass, replace
from typing import Literal

from ..config import GIB, InputError

GB = 1e9
TERA = 1e12

Architecture = Literal["ampere", "hopper", "h20", "blackwell"]
"""h20: Hopper with tensor cores cut to a quarter a multiprocessor, so that little else can limit its products."""


@dataclass(frozen=True)
class DeviceFacts:
    """One kind of GPU in its usual server. Peaks are dense (no sparsity); links are per GPU and direction."""

    name: str
    streaming_multiprocessors: int
    bf16_flops_per_second: float
    fp8_flops_per_second: float
    """0: it has no FP8 tensor cores."""
    fp32_flops_per_second: float
    """Outside the tensor cores, as products run in full fp32."""
    hbm_bytes: float
    """Memory as its driver reports it, before any context."""
    hbm_bytes_per_second: float
    nvlink_bytes_per_second: float
    nic_bytes_per_second: float
    """Of the one network card that each GPU has to itself in these servers."""
    pcie_bytes_per_second: float
    power_watts: float
    """Board power limit; a training step draws nearly all of it."""
    in_network_reduction: bool
    """The NVLink switch sums all-reduces itself (NVLS; third-generation NVSwitch, Hopper and later)."""
    architecture: Architecture
    """Which curves of engine.plan.efficiency its kernels follow."""
    source: str
    gpus_per_node: int = 8
    node_host_bytes: float = 2 * 1024 * GIB
    """Installed memory of a node's host. 2 TB, 32 DIMMs of 64 GB, in NVIDIA's own servers: DGX A100 640GB, DGX H100 / H200, DGX
    B200 (user guides; the last takes 4 TB). Assumed of H800, H20 and Grand Teton, which others build."""


H100 = DeviceFacts(
    name="h100",
    streaming_multiprocessors=132,
    bf16_flops_per_second=989.4 * TERA,
    fp8_flops_per_second=1978.9 * TERA,
    fp32_flops_per_second=66.9 * TERA,
    hbm_bytes=85.03e9,
    hbm_bytes_per_second=3350 * GB,
    nvlink_bytes_per_second=450 * GB,
    nic_bytes_per_second=50 * GB,
    pcie_bytes_per_second=64 * GB,
    power_watts=700,
    in_network_reduction=True,
    architecture="hopper",
    source="H100 SXM5 80 GB: NVIDIA H100 Tensor Core GPU Architecture whitepaper; one ConnectX-7 NDR 400 Gb/s a GPU (DGX H100)",
)
DEVICES: dict[str, DeviceFacts] = {
    device.name: device
    for device in (
        H100,
        replace(
            H100,
            name="h100-96gb-500w",
            hbm_bytes=102.0e9,
            hbm_bytes_per_second=2400 * GB,
            power_watts=500,
            source="H100 with 96 GB of HBM2e at 2.4 TB/s and a 500 W limit (Meta's Grand Teton): torchtitan benchmarks/",
        ),
        replace(
            H100,
            name="h800",
            nvlink_bytes_per_second=200 * GB,
            source="H800 SXM 80 GB, an H100 with NVLink cut to 400 GB/s in both directions: arXiv 2505.09343, section 2.2",
        ),
        replace(
            H100,
            name="h200",
            hbm_bytes=150.1e9,
            hbm_bytes_per_second=4800 * GB,
            source="H200 SXM 141 GB: NVIDIA H200 datasheet; the compute of an H100",
        ),
        replace(
            H100,
            name="h20",
            streaming_multiprocessors=78,
            bf16_flops_per_second=148 * TERA,
            fp8_flops_per_second=296 * TERA,
            fp32_flops_per_second=44 * TERA,
            hbm_bytes=102.0e9,
            hbm_bytes_per_second=4000 * GB,
            power_watts=400,
            architecture="h20",
            source="H20 SXM 96 GB: NVIDIA H20 datasheet (148 / 296 dense bf16 / fp8 TFLOPS, 4.0 TB/s, 900 GB/s NVLink, 400 W)",
        ),
        DeviceFacts(
            name="a100",
            streaming_multiprocessors=108,
            bf16_flops_per_second=312 * TERA,
            fp8_flops_per_second=0,
            fp32_flops_per_second=19.5 * TERA,
            hbm_bytes=85.03e9,
            hbm_bytes_per_second=2039 * GB,
            nvlink_bytes_per_second=300 * GB,
            nic_bytes_per_second=25 * GB,
            pcie_bytes_per_second=32 * GB,
            power_watts=400,
            in_network_reduction=False,
            architecture="ampere",
            source="A100 SXM4 80 GB: NVIDIA A100 datasheet; one ConnectX-6 HDR 200 Gb/s a GPU (DGX A100)",
        ),
        DeviceFacts(
            name="b200",
            streaming_multiprocessors=148,
            bf16_flops_per_second=2250 * TERA,
            fp8_flops_per_second=4500 * TERA,
            fp32_flops_per_second=75 * TERA,
            hbm_bytes=191.5e9,
            hbm_bytes_per_second=7700 * GB,
            nvlink_bytes_per_second=900 * GB,
            nic_bytes_per_second=50 * GB,
            pcie_bytes_per_second=64 * GB,
            power_watts=1000,
            in_network_reduction=True,
            architecture="blackwell",
            source="B200 SXM 180 GB: NVIDIA Blackwell datasheet, HGX B200 (62 TB/s of memory for eight; the DGX's has 64); "
            "one ConnectX-7 400 Gb/s a GPU",
        ),
    )
}


def device_named(name: str) -> DeviceFacts:
    """The facts of the device of this name. Raises InputError naming the known ones."""
    if name not in DEVICES:
        raise InputError(f"--device {name}: not known; one of {', '.join(DEVICES)}")
    return DEVICES[name]
