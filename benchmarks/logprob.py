"""logprob: log-prob and entropy of logits that exist, forward, and with the gradient written over the logits.

    OMP_NUM_THREADS=2 python benchmarks/logprob.py [--quick] [--out FOLDER]
"""

import peers
import torch
import torch.nn.functional as F
from comparison import OURS, Comparison, bind, box_at_least, compiled, gradients, main, milliseconds_at_most
from timing import Candidate

from strop.kernels import logprob


def eager(logits_NV, targets_N):
    logprobs_NV = logits_NV.float().log_softmax(-1)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_NV.gather(1, targets_N[:, None]).squeeze(1), entropy_N


def comparisons(device: torch.device, quick: bool) -> list[Comparison]:
    on_gpu = device.type == "cuda"
    rows, vocab = (8192, 131072) if on_gpu else (1024, 49152)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shape = f"{rows} x {vocab} {str(dtype).removeprefix('torch.')}"
    logits_bytes = float(rows * vocab * dtype.itemsize)

    def inputs():
        torch.manual_seed(0)
        return torch.randn(rows, vocab, device=device, dtype=dtype) * 2, torch.randint(vocab, (rows,), device=device)

    def others():
        trl = peers.on_gpu(peers.attribute("trl.kernels", "selective_log_softmax_and_entropy"), device)
        return {"eager": eager, "torch.compile": compiled(eager, quick), "TRL fused log-prob + entropy": trl}

    def forward():
        tensors = inputs()

        @torch.no_grad()
        def call(implementation):
            return dict(zip(("logprob", "entropy"), implementation(*tensors)[:2], strict=True))

        return {name: bind(call, form) for name, form in {OURS: logprob, **others()}.items()}

    def with_gradient():
        original, targets = inputs()
        logits = original * torch.ones((), device=device, requires_grad=True)  # computed, which in place asks for
        upstream = torch.randn(2, rows, device=device).unbind()

        @torch.no_grad()
        def restore():
            logits.copy_(original)

        def call(implementation):
            outputs = implementation(logits, targets)[:2]
            return {"logprob": outputs[0].detach()} | gradients(outputs, {"logits": logits}, upstream)

        def in_place():
            return {"logprob": call(lambda *tensors: logprob(*tensors, inplace_backward=True))["logprob"]}

        forms = {name: bind(call, form) for name, form in {"strop, logits kept": logprob, **others()}.items()}
        liger = peers.on_gpu(peers.attribute("liger_kernel.transformers.functional", "liger_cross_entropy"), device)

        def sum_call(implementation):
            loss = implementation(logits, targets, reduction="sum")
            return {"d_sum": torch.autograd.grad(loss, logits)[0]}

        offered = {OURS: Candidate(in_place), **forms, "F.cross_entropy, no entropy": bind(sum_call, F.cross_entropy),
                   "Liger cross-entropy, no entropy, in place": bind(sum_call, liger)}  # fmt: skip
        return {name: one if isinstance(one, str) else one._replace(before=restore) for name, one in offered.items()}

    tolerance = 1e-2 if on_gpu else 1e-4
    return [
        Comparison("logprob + entropy, forward", shape, forward, bytes=logits_bytes, tolerance=tolerance,
                   targets=(box_at_least(0.92),) if on_gpu else ()),
        Comparison("logprob + entropy, forward + backward in place", shape, with_gradient, bytes=3 * logits_bytes,
                   tolerance=tolerance, targets=(milliseconds_at_most(2.4),) if on_gpu else ()),
    ]  # fmt: skip


if __name__ == "__main__":
    main(__file__, __doc__, comparisons)
