"""multi_tensor_copy: every weight of a model into a rollout engine's own fused ones, with a cast.

    OMP_NUM_THREADS=2 python benchmarks/multi_tensor_copy.py [--quick] [--out FOLDER]

A model's shapes: q, k and v go into parts of one fused tensor, gate and up of another, the rest one to one; fp32 to bf16.
"""

import torch
from comparison import OURS, Comparison, bind, box_at_least, compiled, main

from strop.kernels import multi_tensor_copy


def one_by_one(sources, destinations):
    for source, destination in zip(sources, destinations, strict=True):
        destination.copy_(source)


def foreach(sources, destinations):
    torch._foreach_copy_(destinations, sources)


def comparisons(device: torch.device, quick: bool) -> list[Comparison]:
    on_gpu = device.type == "cuda"
    layers, hidden, inner, kv = (16, 4096, 12288, 1024) if on_gpu else (10, 576, 1536, 192)
    elements = layers * hidden * (2 * hidden + 2 * kv + 3 * inner + 2)

    def forms():
        torch.manual_seed(0)
        sources, destinations, fused = [], [], {}
        for layer in range(layers):
            parts = {"qkv": (hidden, kv, kv), "o": (hidden,), "gate_up": (inner, inner), "norm": (1,), "norm2": (1,)}
            for name, sizes in parts.items():
                whole = torch.empty(sum(sizes), hidden, device=device, dtype=torch.bfloat16)
                fused[f"{name} {layer}"] = whole
                destinations += whole.split(sizes)
                sources += [torch.randn(size, hidden, device=device) for size in sizes]
            fused[f"down {layer}"] = torch.empty(hidden, inner, device=device, dtype=torch.bfloat16)
            destinations.append(fused[f"down {layer}"])
            sources.append(torch.randn(hidden, inner, device=device))

        def call(implementation):
            implementation(sources, destinations)
            return {"last": fused[f"down {layers - 1}"], "first": fused["qkv 0"]}

        named = {OURS: multi_tensor_copy, "eager, one copy_ each": one_by_one, "torch._foreach_copy_": foreach,
                 "torch.compile": compiled(one_by_one, quick)}  # fmt: skip
        return {name: bind(call, form) for name, form in named.items()}

    targets = (box_at_least(0.85),) if on_gpu else ()
    shape = f"{layers} layers of {hidden}, {elements / 1e6:.0f} M elements"
    return [Comparison("multi_tensor_copy fp32 -> bf16", shape, forms, bytes=6.0 * elements, tolerance=0.0, targets=targets)]


if __name__ == "__main__":
    main(__file__, __doc__, comparisons)
