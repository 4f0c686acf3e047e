"""linear_policy_loss: hidden states and the LM head to the clipped GRPO loss with both gradients, 6NHV.

    OMP_NUM_THREADS=2 python benchmarks/linear_policy_loss.py [--quick] [--out FOLDER]

With an entropy bonus (every form that knows the entropy), and without (Liger's fused GRPO has none). Every token is trained
on: masked ones, which ours leaves out of the products, would be a head start. "the three bare products" are logits, d_hidden
and d_weight (on a GPU in fp32, as ours is summed), each in one piece, with nothing between them.
"""

import math

import peers
import torch
import torch.nn.functional as F
from comparison import OURS, Comparison, Target, bind, compiled, gradients, main, milliseconds_at_most, times_faster_than
from grpo_terms import CLIP, SPEC, clip_loss, tokens
from timing import Candidate

from strop.kernels import LossSpec, linear_policy_loss

BARE, MAIN_GRAD, SEQUENCES = "the three bare products", "strop, weight gradient into fp32 main_grad", 8


def eager_logprob(hidden_NH, weight_VH, targets_N):
    logprobs_NV = F.linear(hidden_NH, weight_VH).float().log_softmax(-1)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_NV.gather(1, targets_N[:, None]).squeeze(1), entropy_N


def eager_logprob_alone(hidden_NH, weight_VH, targets_N):
    logits_NV = F.linear(hidden_NH, weight_VH).float()
    return -F.cross_entropy(logits_NV, targets_N, reduction="none"), None


def bare_products(hidden_NH, weight_VH):
    logits_NV = hidden_NH @ weight_VH.T
    wide = {"out_dtype": torch.float32} if logits_NV.is_cuda else {}
    return {"three, d_hidden": logits_NV @ weight_VH, "three, d_weight": torch.mm(logits_NV.T, hidden_NH, **wide)}


def comparisons(device: torch.device, quick: bool) -> list[Comparison]:
    on_gpu = device.type == "cuda"
    rows, hidden_size, vocab = (8192, 4096, 131072) if on_gpu else (2048, 576, 49152)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shape = f"{rows} x {hidden_size} x {vocab} {str(dtype).removeprefix('torch.')}"

    def inputs():
        torch.manual_seed(0)
        hidden = torch.randn(rows, hidden_size, device=device, dtype=dtype)
        weight = (torch.randn(vocab, hidden_size, device=device) / hidden_size**0.5).to(dtype)
        batch = tokens(rows, device)
        batch["old_logprob"] = 0.5 * torch.randn(rows, device=device) - math.log(vocab)  # where random weights put logprob
        batch["mask"] = torch.ones(rows, dtype=torch.bool, device=device)
        batch["advantages"] = torch.randn(SEQUENCES, device=device).repeat_interleave(rows // SEQUENCES)
        return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(vocab, (rows,), device=device), batch

    def candidates(spec: LossSpec, logprob_forms: dict, others: dict):
        hidden, weight, targets, batch = inputs()
        leaves, count = {"hidden": hidden, "weight": weight}, float(batch["mask"].sum())
        given = batch["old_logprob"], batch["advantages"], batch["mask"]

        def differentiate(loss):
            return {"loss": loss.detach()} | gradients([loss], leaves, [torch.ones_like(loss)])

        def ours():
            return differentiate(linear_policy_loss(hidden, weight, targets, *given, spec, denominator=count).loss)

        main_grad = torch.zeros(weight.shape, device=device)

        def into_main_grad():
            loss = linear_policy_loss(hidden, weight, targets, *given, spec, denominator=count, main_grad=main_grad).loss
            return {"loss": loss.detach()} | gradients([loss], {"hidden": hidden}, [torch.ones_like(loss)])

        def composed(logprob_form):
            logprob, entropy = logprob_form(hidden, weight, targets)
            return differentiate(clip_loss(logprob, *given, entropy, count, spec.entropy_coef))

        forms = {name: bind(composed, form) for name, form in logprob_forms.items()}
        fused = {name: bind(lambda form: differentiate(form(hidden, weight, targets, given)), f) for name, f in others.items()}
        bare = Candidate(lambda: bare_products(hidden.detach(), weight.detach()))
        return {OURS: Candidate(ours), MAIN_GRAD: Candidate(into_main_grad), **forms, **fused, BARE: bare}

    def with_entropy():
        return candidates(SPEC, {
            "eager": eager_logprob,
            "torch.compile": compiled(eager_logprob, quick),
            "TRL chunked log-prob + eager loss": peers.trl_chunked(),
            "Liger scaled cross-entropy + eager loss": peers.liger_scaled(),
        }, {})  # fmt: skip

    def without_entropy():
        spec = LossSpec(aggregation="token-mean")
        return candidates(spec, {"eager": eager_logprob_alone}, {"Liger fused GRPO": liger_grpo()})

    def liger_grpo():
        module = peers.attribute("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
        if isinstance(module, str):
            return module
        loss = module(beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="dapo", compiled=not quick)

        def run(hidden, weight, targets, given):
            old, advantages, mask = (tensor.view(SEQUENCES, -1) for tensor in given)
            x, ids = hidden.view(SEQUENCES, -1, hidden_size), targets.view(SEQUENCES, -1)
            return loss(x, weight, ids, mask.float(), advantages[:, 0], old_per_token_logps=old)[0]

        return run

    def over_the_products(results):
        return results[OURS].times.median / results[BARE].times.median

    def beside_d_hidden(results):
        return (results[MAIN_GRAD].extra_bytes - rows * hidden_size * 4) / 2**30

    def memory_saved(results):
        return results["eager"].extra_bytes / max(results[OURS].extra_bytes, 1)

    targets = (
        (milliseconds_at_most(37, MAIN_GRAD), Target("GiB extra beside fp32 d_hidden", 0.5, "at most", beside_d_hidden))
        if on_gpu
        else (
            Target("of the bare products' time", 1.2, "at most", over_the_products), times_faster_than("eager", 1.5),
            Target("x less extra memory than eager", 10, "at least", memory_saved),
        )
    )  # fmt: skip
    work, tolerance = 6.0 * rows * hidden_size * vocab, 3e-2 if on_gpu else 1e-4  # bf16: rounded at different places
    op = "linear_policy_loss, forward + backward"
    return [
        Comparison(f"{op}, entropy bonus", shape, with_entropy, work, tolerance=tolerance, targets=targets),
        Comparison(f"{op}, no entropy", shape, without_entropy, work, tolerance=tolerance),
    ]


if __name__ == "__main__":
    main(__file__, __doc__, comparisons)
