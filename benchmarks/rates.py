"""What this machine can do: the rate of a large matrix product and of a large copy, against which kernels are judged."""

from typing import NamedTuple

import torch
from timing import milliseconds

GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
GEMM_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}


class Rates(NamedTuple):
    flops: float
    """Floating-point operations a second of a square product: bf16 on a GPU, fp32 on a CPU."""
    bytes: float
    """Bytes a second, read and written, of a copy in memory."""

    @classmethod
    def measure(cls, device: torch.device) -> "Rates":
        size, dtype = GEMM_SIZE[device.type], GEMM_DTYPE[device.type]
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        product = torch.empty_like(a)
        gemm = milliseconds(lambda: torch.mm(a, b, out=product), device)
        source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
        target = torch.empty_like(source)
        copy = milliseconds(lambda: target.copy_(source), device)
        return cls(2 * size**3 / gemm * 1e3, 2 * source.nbytes / copy * 1e3)

    def __str__(self) -> str:
        return f"matrix product {self.flops / 1e12:.3g} TFLOP/s, copy {self.bytes / 1e9:.4g} GB/s"
