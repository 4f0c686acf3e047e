"""The loss of one micro-batch: model, LM head and policy loss in a line."""

import torch
from torch import Tensor

from ...kernels import LogprobResult, LossSpec, PolicyLoss, linear_logprob, policy_loss, summarize_metrics
from ..batch import PackedBatch
from ..model.context import ForwardContext, Packed
from ..model.transformer import Transformer


def batch_logprobs(model: Transformer, batch: PackedBatch, max_seqlen: int) -> LogprobResult:
    """Log-prob of each target at its sampling temperature, and entropy, fp32 [T]; 0 where there is no target.

    max_seqlen: a host number that no sequence exceeds. In backward, the LM head's gradient goes straight into the
    `main_grad` of its weight where that exists, without a temporary of V x H.
    """
    if len(batch.tokens) == 0:  # padding only, and cut off
        return LogprobResult(*(torch.zeros_like(batch.temperature) for _ in range(3)))
    context = ForwardContext(batch.positions, Packed(batch.cu_seqlens, max_seqlen))
    hidden_TH = model(batch.tokens, context)
    weight_VH = model.lm_head_weight
    main_grad = getattr(weight_VH, "main_grad", None) if torch.is_grad_enabled() and weight_VH.requires_grad else None
    return linear_logprob(hidden_TH, weight_VH, batch.targets, temperature=batch.temperature, main_grad=main_grad)


@torch.no_grad()
def sequence_logprobs(model: Transformer, tokens: Tensor) -> Tensor:
    """Log-probs of tokens[1:] given what precedes them, at temperature 1. int64 [T], T >= 2 -> fp32 [T - 1].

    This rank alone, no collective: the trainer's side of the proof that rollouts use its weights.
    """
    hidden_TH = model(tokens, ForwardContext.one_sequence(len(tokens), tokens.device))
    return linear_logprob(hidden_TH[:-1], model.lm_head_weight, tokens[1:]).logprob


def objective(model: Transformer, batch: PackedBatch, spec: LossSpec, denominator: float, max_seqlen: int) -> PolicyLoss:
    """(this micro-batch's share of the mini-batch's loss, metrics). A batch of padding only gives exactly 0 and no gradient.

    denominator: counted over the whole mini-batch and all ranks, so that shares and their gradients simply add up.
    """
    current = batch_logprobs(model, batch, max_seqlen)
    return policy_loss(
        current.logprob,
        batch.old_logprob,
        batch.advantages,
        batch.mask,
        spec,
        ref_logprob=batch.ref_logprob,
        rollout_logprob=batch.rollout_logprob,
        entropy=current.entropy,
        cu_seqlens=batch.cu_seqlens,
        denominator=denominator,
    )


METRIC_NAMES = {
    "tokens": "tokens/trained",
    "ref_kl_mean": "kl/ref",
    "old_k3_mean": "kl/old",
    "entropy_mean": "entropy",
    "clip_low_fraction": "clip/low",
    "clip_high_fraction": "clip/high",
    "clip_dual_fraction": "clip/dual",
    "ratio_mean": "ratio/mean",
    "ratio_min": "ratio/min",
    "ratio_max": "ratio/max",
    "rollout_gap_abs_mean": "mismatch/mean",
    "rollout_gap_abs_max": "mismatch/max",
    "weight_mean": "correction/mean",
    "weight_min": "correction/min",
    "weight_max": "correction/max",
    "weight_truncated_fraction": "correction/truncated",
    "weight_masked_fraction": "correction/masked",
    "opsm_masked_fraction": "correction/opsm_masked",
    "weight_ess": "correction/effective_samples",
}
"""Name in `kernels.summarize_metrics` -> key in a run's metrics. mismatch is |log-prob of the trainer before the rollout's
first update - that of the rollout engine|; correction is the weight exp(the same difference), applied or not."""


def named_metrics(metrics: Tensor, num_updates: int) -> dict[str, float]:
    """metrics: combined over micro-batches, ranks and a rollout's `num_updates` optimizer steps. Loss: their mean."""
    summary = summarize_metrics(metrics)
    named = {key: summary[name] for name, key in METRIC_NAMES.items() if name in summary}
    return {"loss": summary["loss"] / num_updates} | named
