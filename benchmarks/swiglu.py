"""swiglu: silu(gate) * up, forward, and with both gradients.

    OMP_NUM_THREADS=2 python benchmarks/swiglu.py [--quick] [--out FOLDER]
"""

import peers
import torch
import torch.nn.functional as F
from comparison import OURS, Comparison, bind, box_at_least, compiled, gradients, main

from strop.kernels import swiglu


def eager(gate_TF, up_TF):
    return F.silu(gate_TF) * up_TF


def comparisons(device: torch.device, quick: bool) -> list[Comparison]:
    on_gpu = device.type == "cuda"
    rows, width = (8192, 12288) if on_gpu else (8192, 1536)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shape, size = f"{rows} x {width} {str(dtype).removeprefix('torch.')}", float(rows * width * dtype.itemsize)

    def forms(call):
        liger = peers.on_gpu(peers.attribute("liger_kernel.transformers.functional", "liger_swiglu"), device)
        named = {OURS: swiglu, "eager": eager, "torch.compile": compiled(eager, quick), "Liger": liger}
        return {name: bind(call, form) for name, form in named.items()}

    def inputs():
        torch.manual_seed(0)
        return (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(3))

    def forward():
        gate, up, _ = inputs()

        @torch.no_grad()
        def call(implementation):
            return {"y": implementation(gate, up)}

        return forms(call)

    def with_gradients():
        gate, up, upstream = inputs()
        leaves = {"gate": gate.requires_grad_(), "up": up.requires_grad_()}
        return forms(lambda implementation: gradients([implementation(gate, up)], leaves, [upstream]))

    tolerance, targets = (1e-2, (box_at_least(0.85),)) if on_gpu else (1e-5, ())
    return [
        Comparison("swiglu, forward", shape, forward, bytes=3 * size, tolerance=tolerance, targets=targets),
        Comparison("swiglu, forward + backward", shape, with_gradients, bytes=8 * size, tolerance=tolerance, targets=targets),
    ]


if __name__ == "__main__":
    main(__file__, __doc__, comparisons)
