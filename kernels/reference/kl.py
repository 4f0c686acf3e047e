"""Estimators of KL(current || ref) from the current policy's own tokens, d = ref - lp (joschu.net/blog/kl-approx.html)."""

import torch
from torch import Tensor

from ..specs import KlEstimator, KlGradient


def kl(
    logprob: Tensor, ref_logprob: Tensor, estimator: KlEstimator, gradient: KlGradient, log_ratio: Tensor | None
) -> Tensor:
    """Per token. log_ratio = lp - old, read by gradient 'unbiased' alone; everything differentiable is so in lp only."""
    d = ref_logprob.detach() - logprob
    match estimator:
        case "k1":
            value = -d
        case "k2":
            value = d.square() / 2
        case "k3":
            value = torch.expm1(d) - d  # e^d - d - 1 without losing a small d to the 1
    match gradient:
        case "naive":
            return value
        case "straight-through":  # value of the estimator, derivative -d of k2
            surrogate = d.square() / 2
            return value.detach() + surrogate - surrogate.detach()
        case "unbiased":  # d/dlp of r k3 = r k3 + r (1 - e^d) = -r d, whose mean under old is the derivative of the KL
            return log_ratio.exp() * value
