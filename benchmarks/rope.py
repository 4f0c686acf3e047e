"""rope: queries and keys of one projection rotated together; the gradient is the same rotation backwards.

    OMP_NUM_THREADS=2 python benchmarks/rope.py [--quick] [--out FOLDER]
"""

import peers
import torch
from comparison import OURS, Comparison, bind, box_at_least, compiled, main

from strop.kernels import rope


def eager(x_TND, cos_TF, sin_TF):
    """As transformers does it, with tables doubled beforehand."""
    cos_TF, sin_TF = (torch.cat((table, table), -1)[:, None].to(x_TND.dtype) for table in (cos_TF, sin_TF))
    first, second = x_TND.chunk(2, -1)
    return x_TND * cos_TF + torch.cat((-second, first), -1) * sin_TF


def comparisons(device: torch.device, quick: bool) -> list[Comparison]:
    on_gpu = device.type == "cuda"
    tokens, heads, keys, size = (8192, 32, 8, 128) if on_gpu else (8192, 9, 3, 64)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shape = f"{tokens} x ({heads} + {keys}) x {size} {str(dtype).removeprefix('torch.')}"

    def forms():
        torch.manual_seed(0)
        x = torch.randn(tokens, heads + keys, size, device=device, dtype=dtype)
        angles = torch.arange(tokens, device=device)[:, None] / 10000 ** (torch.arange(0, size, 2, device=device) / size)
        cos, sin = angles.cos(), angles.sin()

        @torch.no_grad()
        def call(implementation):
            return {"y": implementation(x, cos, sin)}

        def liger():
            found = peers.on_gpu(peers.attribute("liger_kernel.ops.rope", "rope_forward"), device)
            if isinstance(found, str):
                return found
            doubled = [torch.cat((table, table), -1)[None].to(dtype) for table in (cos, sin)]
            q, k = (part.transpose(0, 1)[None].contiguous() for part in x.split([heads, keys], 1))

            def run(x, cos, sin):  # in place on a layout of its own: what is compared is the time
                found(q, k, *doubled)
                return x

            return lambda x, cos, sin: run(x, cos, sin)[:0]

        named = {OURS: rope, "eager": eager, "torch.compile": compiled(eager, quick), "Liger, in place": liger()}
        return {name: bind(call, form) for name, form in named.items()}

    moved = 2.0 * tokens * (heads + keys) * size * dtype.itemsize
    tolerance, targets = (1e-2, (box_at_least(0.85),)) if on_gpu else (1e-5, ())
    return [Comparison("rope", shape, forms, bytes=moved, tolerance=tolerance, targets=targets)]


if __name__ == "__main__":
    main(__file__, __doc__, comparisons)
