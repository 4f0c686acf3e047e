"""The policy loss of a token, its value and its slope, on tiles; slopes are written out where the reference uses autograd.

The definition is kernels/reference (policy_terms.py, correction.py, kl.py). Choices are names, known when the kernel compiles.
D = lp - old clamped to log_ratio_limit, r = e^D, a = weight * advantage, 0 where the token is dropped. What a whole sequence
decides comes as scalars or as tiles, which broadcast alike.
"""

import triton
import triton.language as tl

from ..reference.policy_terms import VESPO_LOG_RANGE
from .elementary import clamp, exp_minus_linear, expm1

VESPO_LOG_LOW, VESPO_LOG_HIGH = (tl.constexpr(bound) for bound in VESPO_LOG_RANGE)


@triton.jit
def bounded_weight(log_weight, low, high, DROPS: tl.constexpr):
    """(e^log_weight inside [low, high], whether a bound changed it): outside, 0 where DROPS, else the nearer bound."""
    weight = tl.exp(log_weight)
    outside = (weight < low) | (weight > high)
    return tl.where(outside, 0.0, weight) if DROPS else clamp(weight, low, high), outside


@triton.jit
def token_weight(rollout_gap, low, high, CORRECTION: tl.constexpr):
    """(factor of the policy term that a token knows alone, whether a bound changed it); 1 where its sequence decides."""
    if CORRECTION == "tis" or CORRECTION == "icepop":
        weight, cut = bounded_weight(rollout_gap, low, high, DROPS=CORRECTION == "icepop")
    else:
        weight = tl.exp(rollout_gap) if CORRECTION == "mean-mask" else tl.zeros_like(rollout_gap) + 1.0
        cut = tl.zeros_like(rollout_gap) > 0
    return weight, cut


@triton.jit
def sequence_weight(rollout_gap, length, low, high, CORRECTION: tl.constexpr):
    """(factor that the whole sequence decides, whether it is a bound's), from its sum of old - rollout."""
    if CORRECTION == "mean-mask":
        _, cut = bounded_weight(rollout_gap / length, low, high, DROPS=True)
        weight = tl.where(cut, 0.0, 1.0)
    else:
        weight, cut = bounded_weight(rollout_gap, low, high, DROPS=CORRECTION == "sequence-mask")
    return weight, cut


@triton.jit
def clip_log_ratio(log_ratio, advantages, ratio_low, ratio_high):
    """gmpo's D: cut above where A > 0 and below elsewhere."""
    low, high = tl.log(ratio_low), tl.log(ratio_high)
    from_above = tl.where(log_ratio > high, high, log_ratio)
    return tl.where(advantages > 0, from_above, tl.where(log_ratio < low, low, log_ratio))


@triton.jit
def sequence_log_ratio(
    log_ratio, rollout_gap, weight, cut, advantages, ratio_low, ratio_high, POLICY: tl.constexpr, CORRECTION: tl.constexpr
):  # fmt: skip
    """What the sequence's sum of D adds up. weight, cut: of `token_weight`."""
    if POLICY == "gmpo":
        log_ratio = clip_log_ratio(log_ratio, advantages, ratio_low, ratio_high)
    elif POLICY == "vespo":
        log_ratio = clamp(log_ratio, -VESPO_LOG_HIGH, VESPO_LOG_HIGH)
        if CORRECTION != "none":  # log w without the detour over its exponential: thousands of roundings would add up
            log_ratio += clamp(tl.where(cut, tl.log(weight), rollout_gap), VESPO_LOG_LOW, VESPO_LOG_HIGH)
    return log_ratio


@triton.jit
def vespo_phi(log_w, k, decay):
    """e^lambda w^k e^(-lambda w)."""
    return tl.exp(decay + k * log_w - decay * tl.exp(log_w))


@triton.jit
def sequence_slope(ratio, up, down, length, ratio_low, ratio_high, ratio_cap, POLICY: tl.constexpr):
    """gspo and gmpo: what every token's D gets through the sequence's ratio, ds/dD = s / L. up and down: the sums of a over
    tokens with A > 0 and with A < 0."""
    if POLICY == "gspo":
        up_lives = (ratio <= ratio_high) & (up != 0.0)
        down_lives = (ratio >= ratio_low) & (ratio <= ratio_cap) & (down != 0.0)
        slope = up * tl.where(up_lives, ratio, 0.0) + down * tl.where(down_lives, ratio, 0.0)
    else:
        slope = (up + down) * tl.where(up + down == 0.0, 0.0, ratio)
    return -slope / length


@triton.jit
def clip_sides(ratio, a, ratio_low, ratio_high, ratio_cap):
    """Which bound cuts a token: low, high, dual."""
    return (a < 0) & (ratio < ratio_low), (a > 0) & (ratio > ratio_high), (a < 0) & (ratio > ratio_cap)


@triton.jit
def clipped(ratio, a, ratio_low, ratio_high, ratio_cap):
    """(loss, slope in log r) of -a clip(r). A token with a = 0 has neither even where r overflows."""
    low, high, dual = clip_sides(ratio, a, ratio_low, ratio_high, ratio_cap)
    bound = tl.where(low, ratio_low, tl.where(high, ratio_high, tl.where(dual, ratio_cap, 0.0)))
    cut = low | high | dual | (a == 0)
    live = tl.where(cut, 0.0, ratio)
    return -a * tl.where(cut, bound, ratio), -a * live


@triton.jit
def sapo(log_ratio, a, tau_positive, tau_negative):
    """(loss, slope in D) of -a (4 / tau) sigmoid(tau (r - 1)). The slope dies long before r overflows: e^-104 is 0 in fp32."""
    tau = tl.where(a > 0, tau_positive, tau_negative)
    x = tau * expm1(log_ratio)
    tail = tl.exp(-tl.abs(x))
    whole = 1.0 / (1.0 + tail)
    gate = tl.where(x < 0, tail * whole, whole)
    flat = (x > 104.0) | (a == 0)
    slope = -4.0 * a * (tail * whole * whole) * tl.exp(tl.where(flat, 0.0, log_ratio))
    return -a * 4.0 / tau * gate, tl.where(flat, 0.0, slope)


@triton.jit
def policy_term(
    logprob, log_ratio, moves, a, advantages, sequence_ratio, sequence_slope, phi,
    ratio_low, ratio_high, ratio_cap, tau_positive, tau_negative, POLICY: tl.constexpr,
):  # fmt: skip
    """(loss, slope in lp, ratio, low, high, dual): low, high, dual say which bound cuts the token.

    moves: dD/dlp, 0 where log_ratio_limit clamps. phi: vespo's factor.
    """
    nothing = log_ratio - log_ratio  # NaN where D isn't finite, so that its sequence's ratio doesn't hide it
    ratio = tl.exp(log_ratio)
    if POLICY == "gspo" or POLICY == "gmpo" or POLICY == "vespo":
        ratio = tl.zeros_like(log_ratio) + sequence_ratio
    elif POLICY == "gspo-token":
        ratio = sequence_ratio + nothing
    low, high, dual = clip_sides(ratio, a, ratio_low, ratio_high, ratio_cap)
    if POLICY == "clip" or POLICY == "gspo-token":
        loss, slope = clipped(ratio, a, ratio_low, ratio_high, ratio_cap)
        slope *= moves
    elif POLICY == "gspo":
        loss, _ = clipped(ratio, a, ratio_low, ratio_high, ratio_cap)
        loss += sequence_slope * nothing
        slope = sequence_slope * moves
    elif POLICY == "gmpo":
        low, high, dual = clip_sides(tl.exp(log_ratio), a, ratio_low, ratio_high, ratio_cap)
        inside = clip_log_ratio(log_ratio, advantages, ratio_low, ratio_high)
        loss = -a * tl.where(a == 0, 0.0, ratio) + sequence_slope * (inside - inside)
        slope = tl.where(inside == log_ratio, sequence_slope * moves, 0.0)
    elif POLICY == "cispo":
        slope = -clamp(ratio, ratio_low, ratio_high) * a
        loss = slope * logprob
        low, high = (a != 0) & (ratio < ratio_low), (a != 0) & (ratio > ratio_high)
    elif POLICY == "sapo":
        loss, slope = sapo(log_ratio, a, tau_positive, tau_negative)
        slope *= moves
    else:  # vespo, reinforce
        slope = -phi * a
        loss = slope * logprob
    return loss, slope, ratio, low, high, dual


@triton.jit
def kl_value(d, ESTIMATOR: tl.constexpr):
    """Of d = ref - lp."""
    if ESTIMATOR == "k1":
        value = -d
    elif ESTIMATOR == "k2":
        value = d * d * 0.5
    else:
        value = exp_minus_linear(d)
    return value


@triton.jit
def kl_slope(d, ESTIMATOR: tl.constexpr, GRADIENT: tl.constexpr):
    """Derivative in lp, for 'unbiased' without its factor r."""
    if GRADIENT == "straight-through" or ESTIMATOR == "k2":
        slope = -d
    elif ESTIMATOR == "k1":
        slope = tl.full(d.shape, 1.0, tl.float32)
    else:
        slope = -expm1(d)
    return slope
