"""expert_order, moe_permute and moe_unpermute: tokens sorted by expert, and the weighted way back.

    OMP_NUM_THREADS=2 python benchmarks/moe_permute.py [--quick] [--out FOLDER]
"""

import torch
from comparison import OURS, Comparison, bind, box_at_least, compiled, main

from strop.kernels import expert_order, moe_permute, moe_unpermute


def eager_order(expert_ids_Tk):
    """Row of each assignment, and assignment of each row, without padding."""
    sources_R = expert_ids_Tk.flatten().argsort(stable=True)
    return sources_R.argsort().view_as(expert_ids_Tk), sources_R


def eager_permute(hidden_TH, order, choices: int):
    return hidden_TH.index_select(0, order[1] // choices)


def eager_unpermute(rows_RH, order, weights_Tk):
    chosen_TkH = rows_RH[order[0]].float()
    return (chosen_TkH * weights_Tk[:, :, None]).sum(1).to(rows_RH.dtype)


def comparisons(device: torch.device, quick: bool) -> list[Comparison]:
    on_gpu = device.type == "cuda"
    tokens, hidden_size, experts, choices = (8192, 2048, 64, 8) if on_gpu else (2048, 512, 64, 8)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shape = f"{tokens} x {hidden_size}, {choices} of {experts} experts, {str(dtype).removeprefix('torch.')}"
    row_bytes = float(hidden_size * dtype.itemsize)

    def inputs():
        torch.manual_seed(0)
        ids = torch.rand(tokens, experts, device=device).topk(choices).indices
        weights = torch.rand(tokens, choices, device=device).softmax(-1)
        return torch.randn(tokens, hidden_size, device=device, dtype=dtype), ids, weights

    def named(call, ours, eager):
        forms = {OURS: ours, "eager": eager, "torch.compile": compiled(eager, quick)}
        return {name: bind(call, form) for name, form in forms.items()}

    def order_forms():
        _, ids, _ = inputs()
        return named(lambda form: {"rows": form(ids)[0].float()}, lambda ids: expert_order(ids, experts), eager_order)

    def permute_forms():
        hidden, ids, _ = inputs()
        ours, theirs = expert_order(ids, experts), eager_order(ids)
        return named(
            lambda form: {"sorted": form()}, lambda: moe_permute(hidden, ours), lambda: eager_permute(hidden, theirs, choices)
        )

    def unpermute_forms():
        hidden, ids, weights = inputs()
        ours, theirs = expert_order(ids, experts), eager_order(ids)
        rows = moe_permute(hidden, ours)
        return named(
            lambda form: {"tokens": form()},
            lambda: moe_unpermute(rows, ours, weights), lambda: eager_unpermute(rows, theirs, weights),
        )  # fmt: skip

    tolerance, targets = (1e-2, (box_at_least(0.85),)) if on_gpu else (1e-5, ())
    moved = (tokens + tokens * choices) * row_bytes
    return [
        Comparison("expert_order", f"{tokens} x {choices}, {experts} experts", order_forms, bytes=16.0 * tokens * choices),
        Comparison("moe_permute", shape, permute_forms, bytes=moved, tolerance=tolerance, targets=targets),
        Comparison("moe_unpermute", shape, unpermute_forms, bytes=moved, tolerance=tolerance, targets=targets),
    ]


if __name__ == "__main__":
    main(__file__, __doc__, comparisons)
