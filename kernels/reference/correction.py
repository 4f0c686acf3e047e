"""The token tensors as the loss reads them, and the weight for a sampler that isn't the old policy.

w = exp(old - rollout) multiplies the policy term and carries no gradient. Sources: TIS (fengyao.notion.site/off-policy-rl),
IcePop (Ring-1T, arXiv 2510.18855), sequence masks (as TRL and verl define them).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..specs import SEQUENCE_CORRECTION, LossSpec


class TokenInputs(NamedTuple):
    """Tensors [T] with everything outside the mask replaced by 0, so that exp(garbage) is never formed."""

    mask: Tensor
    logprob: Tensor
    old: Tensor
    log_ratio: Tensor
    """D, clamped to log_ratio_limit."""
    unlimited_log_ratio: Tensor
    advantages: Tensor
    rollout: Tensor | None
    ref: Tensor | None
    entropy: Tensor | None


def mask_inputs(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    spec: LossSpec,
    rollout_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
) -> TokenInputs:
    """Only logprob and entropy keep a gradient; old_logprob None is the detached current one, so D = 0 with slope 1."""

    def inside(values: Tensor) -> Tensor:
        return torch.where(mask, values.to(logprob.dtype), 0)

    lp = inside(logprob)
    old = lp.detach() if old_logprob is None else inside(old_logprob.detach())
    log_ratio = lp - old
    limit = spec.log_ratio_limit
    return TokenInputs(
        mask=mask,
        logprob=lp,
        old=old,
        log_ratio=log_ratio if limit is None else log_ratio.clamp(-limit, limit),
        unlimited_log_ratio=log_ratio,
        advantages=inside(advantages.detach()),
        rollout=None if rollout_logprob is None else inside(rollout_logprob.detach()),
        ref=None if ref_logprob is None else inside(ref_logprob.detach()),
        entropy=None if entropy is None else inside(entropy),
    )


class CorrectionWeight(NamedTuple):
    """Detached factor [T] of the policy term; `truncated` and `masked` mark tokens whose factor a bound changed."""

    weight: Tensor
    truncated: Tensor
    masked: Tensor

    def times(self, other: "CorrectionWeight") -> "CorrectionWeight":
        return CorrectionWeight(self.weight * other.weight, self.truncated | other.truncated, self.masked | other.masked)


def unit_weight(like: Tensor) -> CorrectionWeight:
    untouched = torch.zeros_like(like, dtype=torch.bool)
    return CorrectionWeight(torch.ones_like(like), untouched, untouched)


def bounded_weight(log_weight: Tensor, spec: LossSpec, drops: bool) -> CorrectionWeight:
    """exp(log_weight) inside [low, high]: outside it, 0 where `drops`, else the nearer bound."""
    low, high = spec.correction_bounds
    weight = log_weight.exp()
    outside = (weight < low) | (weight > high)
    untouched = torch.zeros_like(outside)
    if drops:
        return CorrectionWeight(torch.where(outside, 0, weight), untouched, outside)
    return CorrectionWeight(weight.clamp(low, high), outside, untouched)


@torch.no_grad()
def token_weight(tokens: TokenInputs, spec: LossSpec) -> CorrectionWeight:
    """The factor that a token knows alone; 1 where the whole factor is its sequence's."""
    if spec.correction in ("tis", "icepop"):
        return bounded_weight(tokens.old - tokens.rollout, spec, drops=spec.correction == "icepop")
    unit = unit_weight(tokens.advantages)
    if spec.correction == "mean-mask":
        return unit._replace(weight=(tokens.old - tokens.rollout).exp())
    return unit


@torch.no_grad()
def sequence_weight(rollout_gap: Tensor, length: Tensor, spec: LossSpec) -> CorrectionWeight:
    """The factor that the whole sequence decides, from its sum of old - rollout; 1 for corrections of single tokens."""
    if spec.correction not in SEQUENCE_CORRECTION:
        return unit_weight(rollout_gap)
    if spec.correction == "mean-mask":
        kept = bounded_weight(rollout_gap / length, spec, drops=True)
        return kept._replace(weight=torch.where(kept.masked, 0, torch.ones_like(rollout_gap)))
    return bounded_weight(rollout_gap, spec, drops=spec.correction == "sequence-mask")
