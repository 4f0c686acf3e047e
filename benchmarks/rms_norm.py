"""rms_norm, forward, and with the gradients of input and weight.

    OMP_NUM_THREADS=2 python benchmarks/rms_norm.py [--quick] [--out FOLDER]
"""

import peers
import torch
import torch.nn.functional as F
from comparison import OURS, Comparison, bind, box_at_least, compiled, gradients, main

from strop.kernels import rms_norm

EPS = 1e-6


def eager(x_NH, weight_H):
    wide_NH = x_NH.float()
    return (wide_NH * (wide_NH.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight_H).to(x_NH.dtype)


def library(x_NH, weight_H):
    return F.rms_norm(x_NH, weight_H.shape, weight_H, EPS)


def comparisons(device: torch.device, quick: bool) -> list[Comparison]:
    on_gpu = device.type == "cuda"
    rows, hidden_size = (8192, 4096) if on_gpu else (8192, 576)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shape, size = f"{rows} x {hidden_size} {str(dtype).removeprefix('torch.')}", float(rows * hidden_size * dtype.itemsize)

    def forms(call):
        liger = peers.on_gpu(peers.attribute("liger_kernel.transformers.functional", "liger_rms_norm"), device)
        liger_call = liger if isinstance(liger, str) else lambda x, weight: liger(x, weight, EPS, in_place=False)
        named = {OURS: lambda x, weight: rms_norm(x, weight, EPS), "eager": eager, "F.rms_norm": library,
                 "torch.compile": compiled(eager, quick), "Liger": liger_call}  # fmt: skip
        return {name: bind(call, form) for name, form in named.items()}

    def inputs():
        torch.manual_seed(0)
        x = torch.randn(rows, hidden_size, device=device, dtype=dtype)
        return x, 1 + 0.1 * torch.randn(hidden_size, device=device, dtype=dtype), torch.randn_like(x)

    def forward():
        x, weight, _ = inputs()

        @torch.no_grad()
        def call(implementation):
            return {"y": implementation(x, weight)}

        return forms(call)

    def with_gradients():
        x, weight, upstream = inputs()
        leaves = {"x": x.requires_grad_(), "weight": weight.requires_grad_()}
        return forms(lambda implementation: gradients([implementation(x, weight)], leaves, [upstream]))

    tolerance, targets = (1e-2, (box_at_least(0.85),)) if on_gpu else (1e-5, ())
    return [
        Comparison("rms_norm, forward", shape, forward, bytes=2 * size, tolerance=tolerance, targets=targets),
        Comparison("rms_norm, forward + backward", shape, with_gradients, bytes=5 * size, tolerance=tolerance, targets=targets),
    ]


if __name__ == "__main__":
    main(__file__, __doc__, comparisons)
