"""Public ops: the policy loss, its fused form with the LM head, the KL estimators and whole-sequence statistics."""

from typing import NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import STATISTICS, check_tensor
from .logprobs import linear_logprob
from .reference import kl as reference_kl
from .reference import policy_loss as reference
from .reference.correction import TokenInputs, mask_inputs
from .reference.policy_loss import SEQUENCE_FIELDS
from .reference.sequences import sequence_index
from .specs import KlEstimator, KlGradient, LossSpec


class PolicyLoss(NamedTuple):
    loss: Tensor
    """0-dim, in the dtype of logprob; its gradient reaches logprob and entropy."""
    metrics: Tensor
    """fp32 [len(METRIC_FIELDS)], detached: `combine_metrics` joins several, `summarize_metrics` reads them."""


class LinearPolicyLoss(NamedTuple):
    loss: Tensor
    logprob: Tensor
    """Detached, 0 outside the mask."""
    metrics: Tensor


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    spec: LossSpec,
    *,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_stats: Tensor | None = None,
    denominator: float | Tensor,
) -> PolicyLoss:
    """Loss of a micro-batch under `spec`, as its share of the optimizer step's loss, and metrics; no host sync.

    logprob: [T] packed or [B, L] dense, fp32 or fp64; every other token tensor has the same shape, any floating dtype.
    old_logprob: of the policy before the step's first update; None is the detached current one (ratio 1, slope A).
    mask: bool, the trainable tokens; what the others hold, NaN included, has no effect.
    ref_logprob: needed by kl_coef > 0. rollout_logprob: by a correction or opsm_delta. entropy: by entropy_coef > 0. Given
        without need, they are only measured.
    cu_seqlens: int32 or int64 [S + 1], sequence s is tokens cu_seqlens[s] : cu_seqlens[s + 1] and those behind the last are
        padding. Packed only, and needed where `spec.needs_sequences`; the rows of a dense batch are its sequences.
    sequence_stats: [S, len(SEQUENCE_FIELDS)], the sum over context-parallel ranks of `sequence_stats(...)`; None where this
        call holds whole sequences.
    denominator: > 0, counted over the whole step and all ranks; which count, `denominator_kind(spec)` says.

    Raises ValueError or TypeError naming the argument. Non-finite inputs inside the mask make the loss non-finite and are
    counted in the metrics.
    """
    tokens, index, num_sequences = check_tokens(
        logprob, old_logprob, advantages, mask, spec, rollout_logprob, cu_seqlens, ref_logprob, entropy
    )
    if spec.kl_coef and ref_logprob is None:
        raise ValueError(f"kl_coef {spec.kl_coef} needs ref_logprob: pass it, or set kl_coef to 0")
    if spec.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef {spec.entropy_coef} needs entropy: pass it, or set entropy_coef to 0")
    if sequence_stats is not None:
        check_tensor("sequence_stats", sequence_stats, STATISTICS, (num_sequences, len(SEQUENCE_FIELDS)), logprob.device)
        sequence_stats = sequence_stats.to(logprob.dtype)
    if isinstance(denominator, Tensor):
        check_tensor("denominator", denominator, (*STATISTICS, torch.int32, torch.int64), ())
    elif not denominator > 0:
        raise ValueError(f"denominator {denominator}: must be above 0, the step's count of {spec.aggregation!r}")
    return PolicyLoss(*reference.policy_loss(tokens, spec, index, num_sequences, sequence_stats, denominator))


def sequence_stats(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    spec: LossSpec,
    *,
    rollout_logprob: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """[S, len(SEQUENCE_FIELDS)]: what `policy_loss` must know of whole sequences, summed over the tokens given, detached.

    Under context parallelism each rank calls this with its tokens of the same S sequences (empty ones where it has none),
    the results are summed over the ranks and passed to `policy_loss`. Arguments and errors are those of `policy_loss`.
    """
    tokens, index, num_sequences = check_tokens(logprob, old_logprob, advantages, mask, spec, rollout_logprob, cu_seqlens)
    if index is None:
        raise ValueError("sequence_stats needs cu_seqlens for packed tokens: pass the int32 [S + 1] boundaries")
    return reference.sequence_statistics(tokens, spec, index, num_sequences)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    spec: LossSpec,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    keep_mask: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_range: tuple[int, int] | None = None,
    ignore_index: int = -100,
    main_grad: Tensor | None = None,
    deterministic: bool = False,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_stats: Tensor | None = None,
    denominator: float | Tensor,
) -> LinearPolicyLoss:
    """policy_loss(linear_logprob(hidden, weight, targets)), tokens outside the mask left out of the products.

    hidden: [T, H] or [B, L, H]; the other arguments and the errors are those of the two ops.
    """
    check_tensor("mask", mask, (torch.bool,), tuple(targets.shape), targets.device)
    result = linear_logprob(
        hidden,
        weight,
        targets.masked_fill(~mask, ignore_index),
        temperature=temperature,
        bias=bias,
        softcap=softcap,
        keep_mask=keep_mask,
        tp_group=tp_group,
        vocab_range=vocab_range,
        ignore_index=ignore_index,
        main_grad=main_grad,
        deterministic=deterministic,
    )
    loss, metrics = policy_loss(
        result.logprob,
        old_logprob,
        advantages,
        mask,
        spec,
        ref_logprob=ref_logprob,
        rollout_logprob=rollout_logprob,
        entropy=result.entropy,
        cu_seqlens=cu_seqlens,
        sequence_stats=sequence_stats,
        denominator=denominator,
    )
    return LinearPolicyLoss(loss, result.logprob.detach(), metrics)


def kl(
    logprob: Tensor,
    ref_logprob: Tensor,
    *,
    estimator: KlEstimator = "k3",
    gradient: KlGradient = "naive",
    old_logprob: Tensor | None = None,
) -> Tensor:
    """Per-token estimate of KL(current || reference) from the current policy's tokens, of logprob's shape and dtype.

    With d = ref - lp: k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1. gradient and old_logprob (read by 'unbiased' alone; None is the
    detached current one) are those of `LossSpec.kl_gradient`. For a KL in the reward, detach the result and subtract it.
    Raises ValueError for other names and for 'unbiased' with an estimator other than k3.
    """
    for name, value, choices in (("estimator", estimator, get_args(KlEstimator)), ("gradient", gradient, get_args(KlGradient))):
        if value not in choices:
            raise ValueError(f"{name} {value!r}: choose from {', '.join(choices)}")
    if gradient == "unbiased" and estimator != "k3":
        raise ValueError(f"gradient 'unbiased' is r * k3, got estimator {estimator!r}: take 'k3'")
    check_tensor("logprob", logprob, STATISTICS)
    for name, tensor in (("ref_logprob", ref_logprob), ("old_logprob", old_logprob)):
        if tensor is not None:
            check_tensor(name, tensor, STATISTICS, tuple(logprob.shape), logprob.device)
    old = logprob if old_logprob is None else old_logprob
    return reference_kl.kl(logprob, ref_logprob.to(logprob.dtype), estimator, gradient, logprob - old.detach())


def check_tokens(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    spec: LossSpec,
    rollout_logprob: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[TokenInputs, Tensor | None, int]:
    """(masked inputs flattened to [T], each token's sequence or None, number of sequences)."""
    check_tensor("logprob", logprob, STATISTICS)
    if logprob.dim() not in (1, 2):
        raise ValueError(f"logprob has shape {tuple(logprob.shape)}: pass packed [T] or dense [B, L]")
    shape, device = tuple(logprob.shape), logprob.device
    check_tensor("mask", mask, (torch.bool,), shape, device)
    named = {
        "old_logprob": old_logprob, "advantages": advantages, "rollout_logprob": rollout_logprob, "ref_logprob": ref_logprob,
        "entropy": entropy,
    }  # fmt: skip
    for name, tensor in named.items():
        if tensor is not None or name == "advantages":
            check_tensor(name, tensor, (*STATISTICS, torch.bfloat16, torch.float16), shape, device)
    if spec.needs_rollout_logprob and rollout_logprob is None:
        why = f"correction {spec.correction!r}" if spec.correction != "none" else f"opsm_delta {spec.opsm_delta}"
        raise ValueError(f"{why} needs rollout_logprob: pass the sampler's log-probs, or turn it off")
    if logprob.dim() == 2:
        if cu_seqlens is not None:
            raise ValueError(f"cu_seqlens goes with packed [T] tensors, logprob is dense {shape}: leave it out, or flatten")
        cu_seqlens = torch.arange(shape[0] + 1, device=device) * shape[1]
    elif cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), device=device)
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
            raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected [S + 1]")
    elif spec.needs_sequences:
        raise ValueError(
            f"policy {spec.policy!r}, aggregation {spec.aggregation!r}, correction {spec.correction!r} and opsm_delta "
            f"{spec.opsm_delta} need whole sequences: pass cu_seqlens, or dense [B, L] tensors"
        )
    flat = {name: None if tensor is None else tensor.reshape(-1) for name, tensor in named.items()}
    tokens = mask_inputs(logprob.reshape(-1), mask=mask.reshape(-1), spec=spec, **flat)
    if cu_seqlens is None:
        return tokens, None, 0
    return tokens, sequence_index(cu_seqlens, tokens.logprob.numel()), len(cu_seqlens) - 1
