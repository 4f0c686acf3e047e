"""The policy term of one token, -A times something, for every policy of `LossSpec`.

Each function takes a = weight * A, the advantage times the (detached) weight of the rollout correction: every term is
linear in A, so a token of weight 0 is one of advantage 0 and needs no case of its own. A token with a = 0 has loss 0 and
gradient 0 even where its ratio overflows: `torch.where` picks the exponent *before* exp, because a branch that was not
selected would still send 0 * inf = NaN back.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..specs import LossSpec

VESPO_LOG_RANGE = (-18.420680743952367, 20.0)  # log 1e-8 .. 20: the authors' clamp of log w


class PolicyTerm(NamedTuple):
    """loss [T] is differentiable in log_ratio or logprob; the others are detached and feed the metrics."""

    loss: Tensor
    ratio: Tensor
    low: Tensor
    high: Tensor
    dual: Tensor


def clip_sides(ratio: Tensor, a: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Which bound cuts a token: bool [T] low, high, dual.

    For A > 0, min(r A, clip(r) A) = A min(r, 1 + high); for A < 0 it is A max(r, 1 - low), and dual_clip or delta add
    min(r, cap). So one side's gradient dies at each bound, and strictly beyond it.
    """
    lowest, highest = spec.ratio_bounds
    cap = spec.dual_clip if spec.dual_clip is not None else spec.delta
    dual = (a < 0) & (ratio > cap) if cap is not None else torch.zeros_like(a, dtype=torch.bool)
    return (a < 0) & (ratio < lowest), (a > 0) & (ratio > highest), dual


def clipped(log_ratio: Tensor, a: Tensor, spec: LossSpec, scale: Tensor | None = None) -> PolicyTerm:
    """-a clip(r) for r = scale * e^log_ratio (scale detached, 1 when None)."""
    ratio = log_ratio.detach().exp() if scale is None else scale * log_ratio.detach().exp()
    low, high, dual = clip_sides(ratio, a, spec)
    cut = low | high | dual | (a == 0)
    lowest, highest = spec.ratio_bounds
    cap = spec.dual_clip if spec.dual_clip is not None else spec.delta
    bound = torch.zeros_like(ratio).masked_fill(low, lowest).masked_fill(high, highest)
    if cap is not None:
        bound = bound.masked_fill(dual, cap)
    live = torch.where(cut, 0, log_ratio).exp()
    if scale is not None:
        live = torch.where(cut, 0, scale) * live
    return PolicyTerm(-a * torch.where(cut, bound, live), ratio, low, high, dual)


class Sequence(NamedTuple):
    """What a token [T] knows of its whole sequence, detached: L (at least 1), the sum of log ratios, and the sums of a over
    the tokens with A > 0 and with A < 0."""

    length: Tensor
    log_ratio: Tensor
    up: Tensor
    down: Tensor

    @property
    def mean_log_ratio(self) -> Tensor:
        return self.log_ratio / self.length


def gspo(log_ratio: Tensor, a: Tensor, sequence: Sequence, spec: LossSpec) -> PolicyTerm:
    """-a clip(s), s = exp(mean D). ds/dlp_t = s / L, so every token of the sequence carries the slope
    -s / L * (sum of a over the tokens that no bound cuts), on whichever rank they are."""
    ratio = sequence.mean_log_ratio.exp()
    lowest, highest = spec.ratio_bounds
    cap = spec.dual_clip if spec.dual_clip is not None else spec.delta
    up_live = ratio <= highest
    down_live = ratio >= lowest if cap is None else (ratio >= lowest) & (ratio <= cap)
    slope = sequence.up * torch.where(up_live & (sequence.up != 0), ratio, 0)
    slope = slope + sequence.down * torch.where(down_live & (sequence.down != 0), ratio, 0)
    value = clipped(sequence.mean_log_ratio, a, spec)
    carrier = log_ratio - log_ratio.detach()
    return value._replace(loss=value.loss - slope / sequence.length * carrier)


def gspo_token(log_ratio: Tensor, a: Tensor, sequence: Sequence, spec: LossSpec) -> PolicyTerm:
    """-a clip(sg[s] * exp(lp - sg lp)): the sequence's ratio, each token's own slope."""
    return clipped(log_ratio - log_ratio.detach(), a, spec, scale=sequence.mean_log_ratio.exp())


def clip_log_ratio(log_ratio: Tensor, advantages: Tensor, spec: LossSpec) -> Tensor:
    """gmpo's D: cut above where A > 0 and below elsewhere, as min(r A, clip(r) A) cuts r."""
    lowest, highest = map(math.log, spec.ratio_bounds)
    return torch.where(advantages > 0, log_ratio.clamp(max=highest), log_ratio.clamp(min=lowest))


def gmpo(log_ratio: Tensor, a: Tensor, advantages: Tensor, sequence: Sequence, spec: LossSpec) -> PolicyTerm:
    """-a s, s = exp(mean of the clipped D); `sequence` was summed over the clipped D."""
    ratio = sequence.mean_log_ratio.exp()
    clipped_log_ratio = clip_log_ratio(log_ratio, advantages, spec)
    total = sequence.up + sequence.down
    slope = total * torch.where(total == 0, 0, ratio) / sequence.length
    loss = -a * torch.where(a == 0, 0, ratio) - slope * (clipped_log_ratio - clipped_log_ratio.detach())
    low, high, dual = clip_sides(log_ratio.detach().exp(), a, spec)
    return PolicyTerm(loss, ratio, low, high, dual)


def cispo(logprob: Tensor, log_ratio: Tensor, a: Tensor, spec: LossSpec) -> PolicyTerm:
    """-sg(clip(r)) a lp."""
    lowest, highest = spec.ratio_bounds
    ratio = log_ratio.detach().exp()
    live = a != 0
    loss = -ratio.clamp(lowest, highest) * a * logprob
    return PolicyTerm(loss, ratio, live & (ratio < lowest), live & (ratio > highest), torch.zeros_like(live))


def sapo(log_ratio: Tensor, a: Tensor, spec: LossSpec) -> PolicyTerm:
    """-a (4 / tau) sigmoid(tau (r - 1)). Where the sigmoid is 1 to the last bit of fp64 its slope is 0, but r may overflow."""
    tau = torch.full_like(a, spec.sapo_tau_negative).masked_fill(a > 0, spec.sapo_tau_positive)
    ratio = log_ratio.detach().exp()
    saturated = tau * (ratio - 1) > 745
    live = torch.where(saturated | (a == 0), 0, log_ratio).exp()
    gate = torch.where(saturated, 1, torch.sigmoid(tau * (live - 1)))
    untouched = torch.zeros_like(saturated)
    return PolicyTerm(-a * 4 / tau * gate, ratio, untouched, untouched, untouched)


def vespo(logprob: Tensor, sequence: Sequence, a: Tensor, spec: LossSpec) -> PolicyTerm:
    """-sg(phi) a lp, phi of the sequence's w; the token weights are part of w, so a holds none."""
    log_w = sequence.log_ratio.clamp(*VESPO_LOG_RANGE)
    w = log_w.exp()
    rises = a >= 0
    k, decay = (
        torch.full_like(a, negative).masked_fill(rises, positive)
        for positive, negative in zip(spec.vespo_positive, spec.vespo_negative, strict=True)
    )
    phi = (decay + k * log_w - decay * w).exp()
    untouched = torch.zeros_like(rises)
    return PolicyTerm(-phi * a * logprob, w, untouched, untouched, untouched)


def reinforce(logprob: Tensor, log_ratio: Tensor, a: Tensor) -> PolicyTerm:
    """-a lp."""
    untouched = torch.zeros_like(a, dtype=torch.bool)
    return PolicyTerm(-a * logprob, log_ratio.detach().exp(), untouched, untouched, untouched)
