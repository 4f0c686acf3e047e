"""The metrics of one `policy_loss` call, in the slot order of METRIC_FIELDS."""

import torch
from torch import Tensor

from ..metrics import MAXIMA, MINIMA, SUMS
from ..specs import LossSpec
from .correction import CorrectionWeight, TokenInputs
from .kl import kl
from .policy_terms import PolicyTerm


@torch.no_grad()
def loss_metrics(
    tokens: TokenInputs,
    spec: LossSpec,
    term: PolicyTerm,
    parts: list[Tensor],
    correction: CorrectionWeight,
    opsm_masked: Tensor,
    statistics: Tensor | None,
) -> Tensor:
    """fp32 [len(METRIC_FIELDS)] on the device of the tokens; a slot without input holds its reduction's identity."""
    mask = tokens.mask
    infinity = float("inf")

    def total(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0).sum()

    def smallest(values: Tensor) -> Tensor:
        return torch.where(mask, values, infinity).amin() if mask.numel() else values.new_full((), infinity)

    def largest(values: Tensor) -> Tensor:
        return -smallest(-values)

    gap = tokens.unlimited_log_ratio
    count = mask.sum()
    zero = torch.zeros_like(gap).sum()
    given = (tokens.logprob, tokens.old, tokens.advantages, tokens.ref, tokens.rollout, tokens.entropy)
    values = {
        "tokens": count,
        "nonfinite": total(~torch.stack([t.isfinite() for t in given if t is not None]).all(0)),
        "loss": parts[0] + parts[1] + parts[2],
        "policy_loss": parts[0],
        "kl_loss": parts[1],
        "entropy_loss": parts[2],
        "clip_low": total(term.low),
        "clip_high": total(term.high),
        "clip_dual": total(term.dual),
        "ratio_sum": total(term.ratio),
        "ratio_min": smallest(term.ratio),
        "ratio_max": largest(term.ratio),
        "old_k1_sum": total(-gap),
        "old_k3_sum": total(torch.expm1(gap) - gap),
        "log_ratio_abs_sum": total(gap.abs()),
        "log_ratio_abs_max": largest(gap.abs()),
    }
    if statistics is not None:
        values["sequences"] = (statistics[:, 0] > 0).sum()
    if spec.log_ratio_limit is not None:
        values["log_ratio_limited"] = total(gap.abs() > spec.log_ratio_limit)
    if tokens.ref is not None:
        values["ref_tokens"] = count
        values["ref_kl_sum"] = total(kl(tokens.logprob, tokens.ref, spec.kl_estimator, "naive", gap))
    if tokens.entropy is not None:
        values["entropy_tokens"] = count
        values["entropy_sum"] = total(tokens.entropy)
    if tokens.rollout is not None:
        rollout_gap = tokens.old - tokens.rollout
        weight = rollout_gap.exp() if spec.correction == "none" else correction.weight
        values |= {
            "rollout_tokens": count,
            "rollout_gap_abs_sum": total(rollout_gap.abs()),
            "rollout_gap_abs_max": largest(rollout_gap.abs()),
            "weight_sum": total(weight),
            "weight_square_sum": total(weight.square()),
            "weight_min": smallest(weight),
            "weight_max": largest(weight),
            "weight_truncated": total(correction.truncated),
            "weight_masked": total(correction.masked),
            "opsm_masked": total(opsm_masked),
        }
    identities = dict.fromkeys(SUMS, zero) | dict.fromkeys(MINIMA, zero + infinity) | dict.fromkeys(MAXIMA, zero - infinity)
    return torch.stack([values.get(name, identity).float() for name, identity in identities.items()])
