"""The policy loss of a packed batch, its gradient and its metrics, in one launch.

A program owns every so manieth block of tokens of a sequence (of all tokens where there are no sequences); before, it sums what
the whole sequence has in common, which is cheap to do several times. Each program writes its share of every metric into a row
of a workspace, and the one that finishes last adds the rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..loss_code import CORRECTIONS, KL_ESTIMATORS, KL_GRADIENTS, NUM_CHOICES, POLICIES, LossCode, encode
from ..metrics import METRIC_FIELDS
from ..specs import SEQUENCE_CORRECTION, SEQUENCE_RATIO, LossSpec
from .ahead_of_time import BOOL, FP32, INT64, AotCase
from .elementary import clamp, exp_minus_linear, from_order_key, order_key
from .loss_shares import (
    CLIP_LOW,
    GROUPS,
    LOSS,
    MAXIMA,
    MINIMA,
    NUM_FIELDS,
    SEQUENCES,
    TOKENS,
    add_shares,
    largest_key,
    stack_eight,
    stack_four,
)
from .policy_terms import (
    VESPO_LOG_HIGH,
    VESPO_LOG_LOW,
    kl_slope,
    kl_value,
    policy_term,
    sequence_slope,
    sequence_weight,
    token_weight,
    vespo_phi,
)
from .sequence_sums import ALIGNMENT, count, inside_mask, read_sums, sum_sequence, trainable
from .tickets import ticket_counter

WIDTH = tl.constexpr(4)
"""Tokens that a thread loads at once: 16 bytes of fp32."""
NUM_WARPS = 4
LANES, BLOCK_TOKENS = 32 * NUM_WARPS, 32 * NUM_WARPS * WIDTH.value
PROGRAMS = 264
"""Two for each of an H100's 132 multiprocessors share the blocks of few long sequences; all run at the same time."""


@triton.jit
def inside(boundary, num_tokens):
    """The nearest boundary in 0..num_tokens."""
    return tl.minimum(tl.maximum(boundary, 0), num_tokens)


@triton.jit
def clear(slopes_ptr, first_token, num_tokens, step, local):
    for first in range(first_token, num_tokens, step):
        tl.store(slopes_ptr + first + local, tl.zeros_like(local).to(tl.float32), mask=first + local < num_tokens)


# num_tokens stays specialised: its multiples of 16 take loads of 16 bytes under a mask, and there are but two kinds.
@triton.jit(do_not_specialize=["num_sequences"])
def policy_loss_kernel(
    logprob_ptr, old_ptr, advantages_ptr, mask_ptr, ref_ptr, rollout_ptr, entropy_ptr, cu_seqlens_ptr, statistics_ptr,
    denominator_ptr, loss_ptr, metrics_ptr, d_logprob_ptr, d_entropy_ptr, shares_ptr, counters_ptr,
    num_tokens, num_sequences,
    ratio_low, ratio_high, ratio_cap, sapo_tau_positive, sapo_tau_negative, vespo_k_positive, vespo_lambda_positive,
    vespo_k_negative, vespo_lambda_negative, kl_coef, entropy_coef, correction_low, correction_high, opsm_delta,
    log_ratio_limit,
    POLICY: tl.constexpr, DIVIDE_BY_LENGTH: tl.constexpr, KL_ESTIMATOR: tl.constexpr, KL_GRADIENT: tl.constexpr,
    CORRECTION: tl.constexpr, HAS_OPSM: tl.constexpr, HAS_KL: tl.constexpr, WHOLE_RATIO: tl.constexpr,
    WHOLE_WEIGHT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """WHOLE_RATIO, WHOLE_WEIGHT: the policy's ratio, the rollout correction is that of the whole sequence."""
    sequence, chunk = tl.program_id(0), tl.program_id(1)
    local = (tl.arange(0, LANES) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    step = tl.num_programs(1).to(tl.int64) * LANES * WIDTH
    offset = chunk.to(tl.int64) * LANES * WIDTH
    exists = sequence < num_sequences
    start = sequence.to(tl.int64) * 0
    stop = start + num_tokens
    if cu_seqlens_ptr is not None:  # the programs behind the last sequence have no tokens and clear the padding's slopes
        # Boundaries that nobody checked may give wrong numbers, but no access outside the tensors.
        start = inside(tl.load(cu_seqlens_ptr + sequence, mask=sequence > 0, other=0), num_tokens)
        stop = inside(tl.load(cu_seqlens_ptr + sequence + 1, mask=exists, other=0), num_tokens)
        padding = tl.where(exists, num_tokens, start + offset)
        clear(d_logprob_ptr, padding, num_tokens, step, local)
        if d_entropy_ptr is not None:
            clear(d_entropy_ptr, padding, num_tokens, step, local)
    begin = start // ALIGNMENT * ALIGNMENT + offset

    NEEDS_SUMS: tl.constexpr = WHOLE_RATIO or WHOLE_WEIGHT or HAS_OPSM
    length, ratio_of_all, slope_of_all, log_w, whole = 1.0, 1.0, 0.0, 0.0, 1.0
    drifted, whole_cut = 0.0, 0.0  # 1 for true: the interpreter can't broadcast a bool
    num_live = 0.0
    if statistics_ptr is not None:
        num_live, log_ratio_sum, gap_sum, drift_sum, up, down = read_sums(statistics_ptr, sequence, exists)
    elif cu_seqlens_ptr is not None:  # where the tokens don't need it, one program counts them for the metrics
        wanted = (chunk == 0) | (begin < stop) if NEEDS_SUMS or DIVIDE_BY_LENGTH else chunk == 0
        num_live, log_ratio_sum, gap_sum, drift_sum, up, down = sum_sequence(
            logprob_ptr, old_ptr, advantages_ptr, mask_ptr, rollout_ptr, start, tl.where(wanted, stop, 0), num_tokens,
            ratio_low, ratio_high, correction_low, correction_high, log_ratio_limit, POLICY, CORRECTION, NEEDS_SUMS, LANES,
        )  # fmt: skip
    if NEEDS_SUMS or DIVIDE_BY_LENGTH:
        length = tl.where(num_live > 1.0, num_live, 1.0)
    if WHOLE_WEIGHT:
        whole, bounded = sequence_weight(gap_sum, length, correction_low, correction_high, CORRECTION)
        whole_cut = tl.where(bounded, 1.0, 0.0)
    if HAS_OPSM:
        drifted = tl.where(drift_sum / length > opsm_delta, 1.0, 0.0)
        down = tl.where(drifted > 0, 0.0, down)
    if POLICY == "vespo":
        log_w = clamp(log_ratio_sum, VESPO_LOG_LOW, VESPO_LOG_HIGH)
        ratio_of_all = tl.exp(log_w)
    elif WHOLE_RATIO:
        ratio_of_all = tl.exp(log_ratio_sum / length)
        slope_of_all = sequence_slope(ratio_of_all, up * whole, down * whole, length, ratio_low, ratio_high, ratio_cap, POLICY)
    phi_up = vespo_phi(log_w, vespo_k_positive, vespo_lambda_positive) if POLICY == "vespo" else 1.0
    phi_down = vespo_phi(log_w, vespo_k_negative, vespo_lambda_negative) if POLICY == "vespo" else 1.0
    share = 1.0 / tl.load(denominator_ptr)
    if DIVIDE_BY_LENGTH:
        share /= length

    # This program's share of METRIC_FIELDS: sums 0..7, 8..15, 16..23 and 24..25, two minima, four maxima.
    sums_a, sums_d = tl.zeros([LANES, 8], tl.float32), tl.zeros([LANES, 2], tl.float32)
    sums_b, sums_c = sums_a, sums_a
    minima = order_key(tl.full([LANES, 2], -float("inf"), tl.float32))
    maxima = order_key(tl.full([LANES, 4], -float("inf"), tl.float32))
    none, no_key = tl.zeros([LANES], tl.float32), order_key(tl.full([LANES], -float("inf"), tl.float32))
    CUT_IS_REMOVED: tl.constexpr = CORRECTION == "icepop" or CORRECTION == "mean-mask" or CORRECTION == "sequence-mask"
    for first in range(begin, stop, step):
        in_memory, live = trainable(mask_ptr, first, local, start, stop, num_tokens)
        lp = inside_mask(logprob_ptr, first, local, in_memory, live)
        old = inside_mask(old_ptr, first, local, in_memory, live) if old_ptr is not None else lp
        advantages = inside_mask(advantages_ptr, first, local, in_memory, live)
        rollout = inside_mask(rollout_ptr, first, local, in_memory, live) if rollout_ptr is not None else old
        ref = inside_mask(ref_ptr, first, local, in_memory, live) if ref_ptr is not None else lp
        zero = tl.zeros_like(lp)
        entropy = inside_mask(entropy_ptr, first, local, in_memory, live) if entropy_ptr is not None else zero

        difference, rollout_gap = lp - old, old - rollout
        log_ratio = clamp(difference, -log_ratio_limit, log_ratio_limit)
        limited = tl.abs(difference) > log_ratio_limit
        weight, cut = token_weight(rollout_gap, correction_low, correction_high, CORRECTION)
        weight, cut = weight * whole, cut | (zero + whole_cut > 0)
        dropped = drifted * advantages < 0
        a = tl.where(dropped, 0.0, 1.0 if POLICY == "vespo" else weight) * advantages
        loss, slope, ratio, low, high, dual = policy_term(
            lp, log_ratio, tl.where(limited, 0.0, 1.0), a, advantages, ratio_of_all, slope_of_all,
            tl.where(a >= 0, phi_up, phi_down), ratio_low, ratio_high, ratio_cap, sapo_tau_positive, sapo_tau_negative, POLICY,
        )  # fmt: skip

        distance = ref - lp
        kl = kl_value(distance, KL_ESTIMATOR)
        kl_loss, entropy_loss = zero, zero
        if HAS_KL:
            kl_loss, d_kl = kl, kl_slope(distance, KL_ESTIMATOR, KL_GRADIENT)
            if KL_GRADIENT == "unbiased":  # r k3, and r k3 + r (1 - e^d) = -r d; where D is clamped, r has no slope
                kl_loss, d_kl = tl.exp(log_ratio) * kl, tl.exp(log_ratio) * tl.where(limited, d_kl, -distance)
            kl_loss *= kl_coef
            slope += kl_coef * d_kl
        owned = (first + local >= start) & (first + local < stop)
        tl.store(d_logprob_ptr + first + local, tl.where(live, share * slope, 0.0), mask=owned)
        if d_entropy_ptr is not None:
            entropy_loss = -entropy_coef * entropy
            tl.store(d_entropy_ptr + first + local, tl.where(live, -entropy_coef * share, 0.0), mask=owned)

        infinity = float("inf")
        finite = (tl.abs(lp) < infinity) & (tl.abs(old) < infinity) & (tl.abs(advantages) < infinity)
        finite &= (tl.abs(ref) < infinity) & (tl.abs(rollout) < infinity) & (tl.abs(entropy) < infinity)
        tokens = count(live)
        policy_share, kl_share = tl.sum(tl.where(live, loss, 0.0), 1), tl.sum(kl_loss, 1)
        entropy_share = tl.sum(entropy_loss, 1)
        sums_a += stack_eight(
            tokens, none, tokens - count(live & finite), policy_share + kl_share + entropy_share,
            policy_share, kl_share, entropy_share, count(live & low),
        )  # fmt: skip
        sums_b += stack_eight(
            count(live & high), count(live & dual), tl.sum(tl.where(live, ratio, 0.0), 1), tl.sum(-difference, 1),
            tl.sum(exp_minus_linear(difference), 1), tl.sum(tl.abs(difference), 1), count(limited),
            tokens if ref_ptr is not None else none,
        )  # fmt: skip
        # Without rollout, its fields hold nothing.
        gap_share, weight_share, square_share, cut_share, dropped_share = none, none, none, none, none
        least_weight, most_weight, most_gap = no_key, no_key, no_key
        if rollout_ptr is not None:
            if CORRECTION == "none":
                weight = tl.exp(rollout_gap)
            weight = tl.where(live, weight, 0.0)
            gap_share = tl.sum(tl.abs(rollout_gap), 1)
            weight_share, square_share = tl.sum(weight, 1), tl.sum(weight * weight, 1)
            cut_share, dropped_share = count(live & cut), count(live & dropped)
            least_weight, most_weight = largest_key(live, -weight), largest_key(live, weight)
            most_gap = largest_key(live, tl.abs(rollout_gap))
        sums_c += stack_eight(
            tl.sum(kl, 1) if ref_ptr is not None else none, tokens if entropy_ptr is not None else none,
            tl.sum(entropy, 1) if entropy_ptr is not None else none, tokens if rollout_ptr is not None else none,
            gap_share, weight_share, square_share, none if CUT_IS_REMOVED else cut_share,
        )  # fmt: skip
        sums_d += tl.join(cut_share if CUT_IS_REMOVED else none, dropped_share)
        minima = tl.maximum(minima, tl.join(largest_key(live, -ratio), least_weight))
        maxima = tl.maximum(
            maxima, stack_four(largest_key(live, ratio), most_weight, largest_key(live, tl.abs(difference)), most_gap)
        )  # fmt: skip

    two, four, eight = tl.arange(0, 2), tl.arange(0, 4), tl.arange(0, 8)
    sums_a = tl.sum(sums_a, 0)
    share = tl.where(tl.sum(tl.where(eight == TOKENS, sums_a, 0.0), 0) > 0, share, 0.0)  # not 0 / 0 where nothing is trainable
    has_tokens = tl.where(exists & (chunk == 0) & (num_live > 0), 1.0, 0.0)
    sums_a = tl.where((eight >= LOSS) & (eight < CLIP_LOW), share * sums_a, sums_a)
    row = shares_ptr + (sequence.to(tl.int64) * tl.num_programs(1) + chunk) * NUM_FIELDS
    tl.store(row + eight, tl.where(eight == SEQUENCES, has_tokens, sums_a))
    tl.store(row + 8 + eight, tl.sum(sums_b, 0))
    tl.store(row + 16 + eight, tl.sum(sums_c, 0))
    tl.store(row + 24 + two, tl.sum(sums_d, 0))
    tl.store(row + MINIMA + two, -from_order_key(tl.max(minima, 0)))
    tl.store(row + MAXIMA + four, from_order_key(tl.max(maxima, 0)))
    num_programs = tl.num_programs(0) * tl.num_programs(1)
    program = sequence * tl.num_programs(1) + chunk
    add_shares(shares_ptr, counters_ptr, loss_ptr, metrics_ptr, program, num_programs)


def choices(code: LossCode) -> dict[str, str | bool]:
    """What a kernel is compiled for."""
    policy, correction = POLICIES[code.policy], CORRECTIONS[code.correction]
    return {
        "POLICY": policy,
        "DIVIDE_BY_LENGTH": bool(code.divide_by_length),
        "KL_ESTIMATOR": KL_ESTIMATORS[code.kl_estimator],
        "KL_GRADIENT": KL_GRADIENTS[code.kl_gradient],
        "CORRECTION": correction,
        "HAS_OPSM": bool(code.has_opsm),
        "HAS_KL": code.kl_coef != 0,
        "WHOLE_RATIO": policy in SEQUENCE_RATIO,
        "WHOLE_WEIGHT": correction in SEQUENCE_CORRECTION,
    }


def policy_loss(
    code: LossCode,
    logprob_T: Tensor,
    old_T: Tensor | None,
    advantages_T: Tensor,
    mask_T: Tensor,
    ref_T: Tensor | None,
    rollout_T: Tensor | None,
    entropy_T: Tensor | None,
    cu_seqlens: Tensor | None,
    sequence_stats: Tensor | None,
    denominator: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(loss 0-dim, metrics [len(METRIC_FIELDS)], d_logprob [T], d_entropy [T] or None where entropy_coef is 0), all fp32.

    Token tensors fp32 [T], mask bool, all contiguous; cu_seqlens int64 [S + 1], None only where the code needs no sequences;
    sequence_stats fp32 [S, 6]; denominator fp32 0-dim on the device.
    """
    device, num_tokens = logprob_T.device, len(logprob_T)
    loss = torch.empty((), dtype=torch.float32, device=device)
    metrics = torch.empty(len(METRIC_FIELDS), dtype=torch.float32, device=device)
    d_logprob = torch.empty_like(logprob_T)
    d_entropy = torch.empty_like(logprob_T) if code.entropy_coef else None
    num_sequences = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    chunks = min(max(triton.cdiv(num_tokens, BLOCK_TOKENS), 1), triton.cdiv(PROGRAMS, max(num_sequences, 1)))
    grid = (1 if cu_seqlens is None else num_sequences + 1, chunks)
    shares = torch.empty(*grid, len(METRIC_FIELDS), dtype=torch.float32, device=device)
    policy_loss_kernel[grid](
        logprob_T, old_T, advantages_T, mask_T, ref_T, rollout_T, entropy_T, cu_seqlens, sequence_stats, denominator,
        loss, metrics, d_logprob, d_entropy, shares, ticket_counter(device, 1 + GROUPS.value), num_tokens, num_sequences,
        *map(float, code.numbers), **choices(code), LANES=LANES, num_warps=NUM_WARPS,
    )  # fmt: skip
    return loss, metrics, d_logprob, d_entropy


def aot_cases() -> list[AotCase]:
    """Every policy and every correction, each with what goes along with it in practice."""
    given = dict.fromkeys(("logprob_ptr", "old_ptr", "advantages_ptr", "denominator_ptr", "loss_ptr", "metrics_ptr",
                           "d_logprob_ptr", "shares_ptr"), FP32)  # fmt: skip
    absent = dict.fromkeys(("ref_ptr", "rollout_ptr", "entropy_ptr", "cu_seqlens_ptr", "statistics_ptr", "d_entropy_ptr"))
    sizes = {"num_tokens": "i32:16", "num_sequences": "i32", "LANES": LANES}
    numbers = dict.fromkeys(LossCode._fields[NUM_CHOICES:], "fp32")
    shared = {**given, **absent, **sizes, **numbers, "mask_ptr": BOOL, "counters_ptr": "*i32:16"}
    packed = {"cu_seqlens_ptr": INT64}
    with_rollout = {**packed, "rollout_ptr": FP32}
    everything = {**with_rollout, "ref_ptr": FP32, "entropy_ptr": FP32, "d_entropy_ptr": FP32}
    specs = [
        (LossSpec(aggregation="token-mean"), {}),
        (LossSpec(), packed),
        (LossSpec(kl_coef=0.1, entropy_coef=0.1, correction="tis", opsm_delta=0.1), everything),
        (LossSpec(kl_coef=0.1, kl_gradient="unbiased", correction="icepop"), {**everything, "d_entropy_ptr": None}),
        (LossSpec(policy="gspo"), with_rollout),
        (LossSpec(policy="gspo-token", correction="sequence-truncate"), {**with_rollout, "statistics_ptr": FP32}),
        (LossSpec(policy="gmpo", correction="mean-mask", correction_low=0.9, correction_high=1.1), with_rollout),
        (LossSpec(policy="cispo", clip_high=5.0, kl_coef=0.1, kl_estimator="k2", correction="sequence-mask",
                  entropy_coef=0.1), everything),
        (LossSpec(policy="sapo", log_ratio_limit=20.0), packed),
        (LossSpec(policy="vespo", correction="tis", entropy_coef=0.1), everything),
        (LossSpec(policy="reinforce", aggregation="constant"), {"old_ptr": None}),
        (LossSpec(policy="reinforce"), {**packed, "num_tokens": 1}),  # Triton compiles a 1 into the kernel
    ]  # fmt: skip
    return [
        AotCase(policy_loss_kernel, {**shared, **choices(encode(spec)), **tensors}, NUM_WARPS,
                label=f"{spec.policy} {spec.correction}{' packed' if 'cu_seqlens_ptr' in tensors else ''}"
                      f"{' T=1' if 'num_tokens' in tensors else ''}")
        for spec, tensors in specs
    ]  # fmt: skip
