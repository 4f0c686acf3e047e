"""linear_logprob: log-prob and entropy of each token under hidden x LM head, forward, and with both gradients.

    OMP_NUM_THREADS=2 python benchmarks/linear_logprob.py [--quick] [--out FOLDER]

Operations are counted as the definition needs them, 2NHV a product: one product forward, three with gradients. Forms that
keep no logits make a fourth (8NHV in all), so 75 % of the box's rate is all they can reach.
"""

import peers
import torch
import torch.nn.functional as F
from comparison import OURS, Comparison, Target, bind, compiled, gradients, main, milliseconds_at_most
from timing import Candidate

from strop.kernels import linear_logprob


def eager(hidden_NH, weight_VH, targets_N):
    logprobs_NV = F.linear(hidden_NH, weight_VH).float().log_softmax(-1)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_NV.gather(1, targets_N[:, None]).squeeze(1), entropy_N


def ours(hidden_NH, weight_VH, targets_N):
    return linear_logprob(hidden_NH, weight_VH, targets_N)[:2]


def cross_entropy(hidden_NH, weight_VH, targets_N):
    return F.linear_cross_entropy(hidden_NH, weight_VH, targets_N, options=torch.nn.LinearCrossEntropyOptions())


def comparisons(device: torch.device, quick: bool) -> list[Comparison]:
    on_gpu = device.type == "cuda"
    rows, hidden_size, vocab = (8192, 4096, 131072) if on_gpu else (2048, 576, 49152)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shape, product = f"{rows} x {hidden_size} x {vocab} {str(dtype).removeprefix('torch.')}", 2.0 * rows * hidden_size * vocab

    def inputs():
        torch.manual_seed(0)
        hidden = torch.randn(rows, hidden_size, device=device, dtype=dtype)
        weight = (torch.randn(vocab, hidden_size, device=device) / hidden_size**0.5).to(dtype)
        return hidden, weight, torch.randint(vocab, (rows,), device=device)

    def forward():
        tensors = inputs()

        @torch.no_grad()
        def call(implementation):
            return dict(zip(("logprob", "entropy"), implementation(*tensors), strict=True))

        hidden, weight, _ = tensors
        bare = Candidate(lambda: {"logits": hidden @ weight.T})
        return {name: bind(call, form) for name, form in forms().items()} | {"the bare product": bare}

    def with_gradients():
        hidden, weight, targets = inputs()
        leaves = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}
        upstream = torch.randn(2, rows, device=device).unbind()

        def call(implementation):
            outputs = implementation(hidden, weight, targets)
            return {"logprob": outputs[0].detach()} | gradients(outputs, leaves, upstream)

        return {name: bind(call, form) for name, form in forms().items()}

    def mean_cross_entropy():
        hidden, weight, targets = inputs()
        leaves = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}

        def call(implementation):
            loss = implementation(hidden, weight, targets)
            return {"loss": loss.detach()} | gradients([loss], leaves, [torch.ones_like(loss)])

        liger = peers.attribute("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
        theirs = cross_entropy if hasattr(F, "linear_cross_entropy") else f"comes with torch 2.13, this is {torch.__version__}"
        return {
            OURS: bind(call, lambda *tensors: -linear_logprob(*tensors).logprob.mean()),
            "F.linear_cross_entropy, chunked": bind(call, theirs),
            "Liger fused linear cross-entropy": bind(call, peers.on_gpu(liger, device)),
        }

    def forms():
        return {
            OURS: ours,
            "eager": eager,
            "torch.compile": compiled(eager, quick),
            "TRL chunked log-prob": peers.trl_chunked(),
            "Liger scaled cross-entropy": peers.liger_scaled(),
        }

    speed = Target("of the bare product's speed", 0.95, "at least",
                   lambda r: r["the bare product"].times.median / r[OURS].times.median)  # fmt: skip
    tolerance = 2e-2 if on_gpu else 1e-4  # bf16 products and gradients, rounded at different places
    return [
        Comparison("linear_logprob + entropy, forward", shape, forward, product, tolerance=tolerance,
                   targets=(speed, milliseconds_at_most(12.5)) if on_gpu else ()),
        Comparison("linear_logprob + entropy, forward + backward", shape, with_gradients, 3 * product, tolerance=tolerance,
                   targets=(milliseconds_at_most(50),) if on_gpu else ()),
        Comparison("mean cross-entropy, forward + backward", shape, mean_cross_entropy, 3 * product, tolerance=tolerance),
    ]  # fmt: skip


if __name__ == "__main__":
    main(__file__, __doc__, comparisons)
