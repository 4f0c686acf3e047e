"""The policy loss: policy term x rollout correction + KL - entropy bonus, summed with the step's denominator."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..specs import LossSpec
from . import policy_terms
from .correction import TokenInputs, mask_inputs, sequence_weight, token_weight, unit_weight
from .kl import kl
from .metrics import loss_metrics
from .policy_terms import PolicyTerm, Sequence
from .sequences import per_token, sequence_index, sequence_sums, tokens_before

SEQUENCE_FIELDS = ("tokens", "log_ratio", "rollout_gap", "rollout_drift", "advantage_up", "advantage_down")
"""Columns of the sequence statistics. Each is a sum over trainable tokens, so context-parallel ranks add theirs: 1; D (gmpo:
clipped, vespo: clamped and with log w); old - rollout; rollout - lp; token weight * A where A > 0; the same where A < 0."""


def read_tokens(
    spec: LossSpec,
    logprob_T: Tensor,
    old_T: Tensor | None,
    advantages_T: Tensor,
    mask_T: Tensor,
    ref_T: Tensor | None,
    rollout_T: Tensor | None,
    entropy_T: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[TokenInputs, Tensor | None]:
    """(tokens, index int64 [T] of each one's sequence). Padding behind cu_seqlens[-1], of index S, is outside the mask."""
    index = None
    if cu_seqlens is not None:
        index = sequence_index(cu_seqlens, len(logprob_T))
        mask_T = mask_T & (index < len(cu_seqlens) - 1)
    return mask_inputs(logprob_T, old_T, advantages_T, mask_T, spec, rollout_T, ref_T, entropy_T), index


def sequence_stats(
    spec: LossSpec,
    logprob_T: Tensor,
    old_T: Tensor | None,
    advantages_T: Tensor,
    mask_T: Tensor,
    rollout_T: Tensor | None,
    cu_seqlens: Tensor,
) -> Tensor:
    """[S, len(SEQUENCE_FIELDS)] of the tokens given, in the dtype of logprob; only their count unless spec needs more."""
    if not spec.needs_sequence_sums:
        counts = tokens_before(mask_T, cu_seqlens).diff().to(logprob_T.dtype)
        return pad(counts[:, None], (0, len(SEQUENCE_FIELDS) - 1))
    tokens, _ = read_tokens(spec, logprob_T, old_T, advantages_T, mask_T, None, rollout_T, None, cu_seqlens)
    return sequence_statistics(tokens, spec, cu_seqlens)


@torch.no_grad()
def sequence_statistics(tokens: TokenInputs, spec: LossSpec, cu_seqlens: Tensor) -> Tensor:
    weight = token_weight(tokens, spec).weight
    log_ratio = tokens.log_ratio
    if spec.policy == "gmpo":
        log_ratio = policy_terms.clip_log_ratio(log_ratio, tokens.advantages, spec)
    elif spec.policy == "vespo":
        low, high = policy_terms.VESPO_LOG_RANGE
        log_ratio = log_ratio.clamp(-high, high) + torch.where(tokens.mask, weight.log().clamp(low, high), 0)
    rollout = tokens.old if tokens.rollout is None else tokens.rollout
    a = weight * tokens.advantages
    columns = (
        tokens.mask.to(a.dtype),
        log_ratio,
        tokens.old - rollout,
        rollout - tokens.logprob,
        a.clamp(min=0),
        a.clamp(max=0),
    )
    return sequence_sums(columns, cu_seqlens)


def policy_loss(
    spec: LossSpec,
    logprob_T: Tensor,
    old_T: Tensor | None,
    advantages_T: Tensor,
    mask_T: Tensor,
    ref_T: Tensor | None,
    rollout_T: Tensor | None,
    entropy_T: Tensor | None,
    cu_seqlens: Tensor | None,
    statistics: Tensor | None,
    denominator: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """(loss, metrics), the loss differentiable any number of times in logprob and entropy.

    cu_seqlens: int [S + 1]; None only where the spec needs no sequences.
    statistics: of whole sequences of which other ranks hold parts; None computes them from the tokens.
    """
    tokens, index = read_tokens(spec, logprob_T, old_T, advantages_T, mask_T, ref_T, rollout_T, entropy_T, cu_seqlens)
    if statistics is None and cu_seqlens is not None:
        statistics = sequence_statistics(tokens, spec, cu_seqlens)
    weight = token_weight(tokens, spec)
    dropped = torch.zeros_like(tokens.mask)
    sequence = None
    if spec.needs_sequences:
        length, log_ratio, rollout_gap, rollout_drift, up, down = per_token(statistics.detach(), index).unbind(1)
        length = length.clamp(min=1)
        whole = sequence_weight(rollout_gap, length, spec)
        weight = weight.times(whole)
        if spec.opsm_delta is not None:
            drifted = rollout_drift / length > spec.opsm_delta
            down = torch.where(drifted, 0, down)
            dropped = drifted & (tokens.advantages < 0)
        sequence = Sequence(length, log_ratio, up * whole.weight, down * whole.weight)
    applied = unit_weight(tokens.advantages) if spec.policy == "vespo" else weight  # vespo's phi holds the weight already
    term = policy_term(tokens, spec, torch.where(dropped, 0, applied.weight) * tokens.advantages, sequence)

    kl_term = entropy_term = torch.zeros_like(tokens.log_ratio)
    if spec.kl_coef:
        kl_term = spec.kl_coef * kl(tokens.logprob, tokens.ref, spec.kl_estimator, spec.kl_gradient, tokens.log_ratio)
    if spec.entropy_coef:
        entropy_term = -spec.entropy_coef * tokens.entropy
    share = tokens.mask.to(tokens.log_ratio.dtype) / denominator
    share = share.masked_fill(~tokens.mask, 0)  # not 0 / 0 where nothing is trainable and the denominator counts that
    if spec.aggregation == "sequence-mean":
        share = share / sequence.length
    parts = [(share * torch.where(tokens.mask, part, 0)).sum() for part in (term.loss, kl_term, entropy_term)]
    return parts[0] + parts[1] + parts[2], loss_metrics(tokens, spec, term, parts, weight, dropped, statistics)


def policy_term(tokens: TokenInputs, spec: LossSpec, a: Tensor, sequence: Sequence | None) -> PolicyTerm:
    """The term of `spec.policy` with a = final weight * A."""
    match spec.policy:
        case "clip":
            return policy_terms.clipped(tokens.log_ratio, a, spec)
        case "gspo":
            return policy_terms.gspo(tokens.log_ratio, a, sequence, spec)
        case "gspo-token":
            return policy_terms.gspo_token(tokens.log_ratio, a, sequence, spec)
        case "gmpo":
            return policy_terms.gmpo(tokens.log_ratio, a, tokens.advantages, sequence, spec)
        case "cispo":
            return policy_terms.cispo(tokens.logprob, tokens.log_ratio, a, spec)
        case "sapo":
            return policy_terms.sapo(tokens.log_ratio, a, spec)
        case "vespo":
            return policy_terms.vespo(tokens.logprob, sequence, a, spec)
        case "reinforce":
            return policy_terms.reinforce(tokens.logprob, tokens.log_ratio, a)
