"""quantize_fp8: a tensor to E4M3 with one scale for each 1 x 128 (activations) or 128 x 128 (weights) block.

    OMP_NUM_THREADS=2 python benchmarks/quantize_fp8.py [--quick] [--out FOLDER]
"""

import torch
from comparison import OURS, Comparison, bind, box_at_least, compiled, main

from strop.kernels import quantize_fp8

LARGEST = 448.0


def eager(x_MK, block_rows: int):
    rows, columns = x_MK.shape
    blocks = x_MK.float().view(rows // block_rows, block_rows, columns // 128, 128)
    scale = blocks.abs().amax((1, 3)) / LARGEST
    q = (blocks / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return q.view(rows, columns), scale


def comparisons(device: torch.device, quick: bool) -> list[Comparison]:
    on_gpu = device.type == "cuda"
    rows, columns = (8192, 4096) if on_gpu else (4096, 1024)
    dtype = torch.bfloat16 if on_gpu else torch.float32

    def forms(block_rows: int):
        def make():
            torch.manual_seed(0)
            x = torch.randn(rows, columns, device=device, dtype=dtype)

            def call(implementation):
                q, scale = implementation(x, block_rows)
                return {"q": q, "scale": scale}

            def ours(x, block_rows):
                return quantize_fp8(x, (block_rows, 128))

            named = {OURS: ours, "eager": eager, "torch.compile": compiled(eager, quick)}
            return {name: bind(call, form) for name, form in named.items()}

        return make

    shape, moved = f"{rows} x {columns} {str(dtype).removeprefix('torch.')}", float(rows * columns * (dtype.itemsize + 1))
    targets = (box_at_least(0.85),) if on_gpu else ()
    # Where x / scale is a rounding error from a tie, dividing and multiplying by the reciprocal take different neighbours.
    return [
        Comparison(f"quantize_fp8 {n} x 128", shape, forms(n), bytes=moved, tolerance=2e-3, targets=targets) for n in (1, 128)
    ]


if __name__ == "__main__":
    main(__file__, __doc__, comparisons)
