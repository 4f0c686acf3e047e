"""policy_loss and kl: token tensors in; loss, gradients and (policy_loss) 31 metrics out.

    OMP_NUM_THREADS=2 python benchmarks/policy_loss.py [--quick] [--out FOLDER]

The work is nothing, launches are everything: on a GPU "the launch in a CUDA graph" is the device's own time of the one launch
that computes value, slopes and metrics (and of zeroing its counter, which only a captured call needs). "plain torch" is
kernels/reference with the same metrics, "eager" a few lines without any.
"""

import os

import torch
from comparison import OURS, Comparison, bind, compiled, gradients, main, milliseconds_at_most, times_faster_than
from grpo_terms import SPEC, clip_loss, tokens
from timing import Candidate, in_graph

from strop.kernels import kl, policy_loss

GRAPH, REFERENCE = "strop, the launch in a CUDA graph", "plain torch (STROP_KERNELS=reference)"


def with_reference(run):
    """`run` with every op in plain torch."""

    def call():
        before = os.environ.get("STROP_KERNELS")
        os.environ["STROP_KERNELS"] = "reference"
        try:
            return run()
        finally:
            del os.environ["STROP_KERNELS"]
            if before is not None:
                os.environ["STROP_KERNELS"] = before

    return Candidate(call)


def comparisons(device: torch.device, quick: bool) -> list[Comparison]:
    num, on_gpu = 32768, device.type == "cuda"

    def loss_forms():
        torch.manual_seed(0)
        batch = tokens(num, device)
        leaves = {name: batch[name].requires_grad_() for name in ("logprob", "entropy")}
        given, entropy = [batch[name] for name in ("logprob", "old_logprob", "advantages", "mask")], batch["entropy"]
        denominator = batch["mask"].sum().float()

        def differentiate(loss):
            return {"loss": loss.detach()} | gradients([loss], leaves, [torch.ones_like(loss)])

        def ours():
            result = policy_loss(*given, SPEC, entropy=entropy, denominator=denominator)
            return differentiate(result.loss) | {"metrics": result.metrics}

        @torch.no_grad()
        def launch():
            result = policy_loss(*given, SPEC, entropy=entropy, denominator=denominator)
            return {"loss": result.loss, "metrics": result.metrics}

        def eager(implementation):
            return differentiate(implementation(*given, entropy, denominator))

        forms = {OURS: Candidate(ours), REFERENCE: with_reference(ours), "eager, no metrics": bind(eager, clip_loss),
                 "torch.compile, no metrics": bind(eager, compiled(clip_loss, quick))}  # fmt: skip
        return forms | ({GRAPH: in_graph(launch)} if on_gpu else {})

    def kl_forms():
        torch.manual_seed(0)
        logprob, ref = (-torch.rand(num, device=device) for _ in range(2))
        logprob.requires_grad_()
        upstream = torch.randn(num, device=device)

        def call(implementation):
            value = implementation(logprob, ref)
            return {"kl": value.detach()} | gradients([value], {"logprob": logprob}, [upstream])

        def k3(logprob, ref):
            difference = ref - logprob
            return difference.exp() - difference - 1

        @torch.no_grad()
        def launch():
            return {"kl": kl(logprob, ref)}

        forms = {OURS: bind(call, kl), "eager": bind(call, k3), "torch.compile": bind(call, compiled(k3, quick))}
        return forms | ({GRAPH: in_graph(launch)} if on_gpu else {})

    device_time = (milliseconds_at_most(0.01, GRAPH),) if on_gpu else ()
    native = () if on_gpu else (times_faster_than(REFERENCE, 5), times_faster_than("eager, no metrics", 5))
    moved = 4.0 * num * (4 + 2) + num  # four fp32 inputs, two gradients, the mask
    return [
        Comparison("policy_loss, forward + backward", f"T = {num}", loss_forms, bytes=moved, targets=device_time + native),
        Comparison("kl (k3), forward + backward", f"T = {num}", kl_forms, bytes=16.0 * num, targets=device_time),
    ]


if __name__ == "__main__":
    main(__file__, __doc__, comparisons)
