"""The tokens of a packed sequence as tiles, and what they have in common."""

import triton
import triton.language as tl

from .elementary import clamp
from .policy_terms import sequence_log_ratio, token_weight

ALIGNMENT = tl.constexpr(16)
"""Tiles start at a multiple of this, so that loads are 16 bytes wide, also of the mask's bytes."""


@triton.jit
def inside_mask(values_ptr, first, local, in_memory, live):
    """A tile of token values, 0 where they don't count: whatever they hold, exp(garbage) is never formed."""
    return tl.where(live, tl.load(values_ptr + first + local, mask=in_memory, other=0.0), 0.0)


@triton.jit
def trainable(mask_ptr, first, local, start, stop, num_tokens):
    """(which tokens of a tile exist, which of them are in start..stop and in the mask): a neighbour's are read and dropped."""
    in_memory = local < (num_tokens - first).to(tl.int32)
    live = tl.load(mask_ptr + first + local, mask=in_memory, other=0) != 0
    return in_memory, live & (local >= (start - first).to(tl.int32)) & (local < (stop - first).to(tl.int32))


@triton.jit
def count(cells):
    """[LANES, WIDTH] -> [LANES], how many are true."""
    return tl.sum(tl.where(cells, 1.0, 0.0), 1)


@triton.jit
def sum_sequence(
    logprob_ptr, old_ptr, advantages_ptr, mask_ptr, rollout_ptr, start, stop, num_tokens,
    ratio_low, ratio_high, correction_low, correction_high, log_ratio_limit,
    POLICY: tl.constexpr, CORRECTION: tl.constexpr, NEEDS_SUMS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The six SEQUENCE_FIELDS of tokens start..stop; 0 for all but the first unless NEEDS_SUMS."""
    WIDTH: tl.constexpr = 16 if NEEDS_SUMS else 64  # 64 bytes a thread and array
    local = (tl.arange(0, LANES) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    tokens = tl.zeros([LANES], tl.float32)
    log_ratios, gaps, drifts, ups, downs = tokens, tokens, tokens, tokens, tokens
    for first in range(start // ALIGNMENT * ALIGNMENT, stop, LANES * WIDTH):
        in_memory, live = trainable(mask_ptr, first, local, start, stop, num_tokens)
        tokens += count(live)
        if NEEDS_SUMS:
            lp = inside_mask(logprob_ptr, first, local, in_memory, live)
            old = inside_mask(old_ptr, first, local, in_memory, live) if old_ptr is not None else lp
            rollout = inside_mask(rollout_ptr, first, local, in_memory, live) if rollout_ptr is not None else old
            advantages = inside_mask(advantages_ptr, first, local, in_memory, live)
            weight, cut = token_weight(old - rollout, correction_low, correction_high, CORRECTION)
            log_ratio = clamp(lp - old, -log_ratio_limit, log_ratio_limit)
            log_ratio = sequence_log_ratio(
                log_ratio, old - rollout, weight, cut, advantages, ratio_low, ratio_high, POLICY, CORRECTION
            )  # fmt: skip
            log_ratios += tl.sum(tl.where(live, log_ratio, 0.0), 1)
            gaps += tl.sum(old - rollout, 1)
            drifts += tl.sum(rollout - lp, 1)
            a = weight * advantages
            ups += tl.sum(tl.where(a < 0, 0.0, a), 1)
            downs += tl.sum(tl.where(a > 0, 0.0, a), 1)
    return tl.sum(tokens, 0), tl.sum(log_ratios, 0), tl.sum(gaps, 0), tl.sum(drifts, 0), tl.sum(ups, 0), tl.sum(downs, 0)


@triton.jit
def read_sums(statistics_ptr, sequence, exists):
    """The six SEQUENCE_FIELDS of a sequence of which other ranks hold parts."""
    row = statistics_ptr + sequence.to(tl.int64) * 6
    tokens, log_ratio = tl.load(row, mask=exists, other=0.0), tl.load(row + 1, mask=exists, other=0.0)
    gap, drift = tl.load(row + 2, mask=exists, other=0.0), tl.load(row + 3, mask=exists, other=0.0)
    return tokens, log_ratio, gap, drift, tl.load(row + 4, mask=exists, other=0.0), tl.load(row + 5, mask=exists, other=0.0)
