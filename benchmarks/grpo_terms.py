"""The clipped token loss of GRPO as one writes it in plain torch, and the tokens to try it on: what a fused loss replaces."""

import torch
from torch import Tensor

from strop.kernels import LossSpec

CLIP, ENTROPY_COEF = 0.2, 0.01
SPEC = LossSpec(aggregation="token-mean", entropy_coef=ENTROPY_COEF)


def clip_loss(logprob, old_logprob, advantages, mask, entropy, denominator, entropy_coef: float = ENTROPY_COEF) -> Tensor:
    """SPEC's loss: a handful of elementwise operations, no metrics."""
    ratio = (logprob - old_logprob).exp()
    terms = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    if entropy_coef:
        terms = terms - entropy_coef * entropy
    return (terms * mask).sum() / denominator


def tokens(num: int, device: torch.device) -> dict[str, Tensor]:
    """fp32 [T] near what training sees: ratios around 1, one token in eight masked."""
    logprob = -torch.rand(num, device=device) * 4
    return {
        "old_logprob": logprob + 0.1 * torch.randn(num, device=device),
        "advantages": torch.randn(num, device=device),
        "mask": torch.arange(num, device=device) % 8 > 0,
        "logprob": logprob,
        "entropy": torch.rand(num, device=device) * 5,
    }
