"""Public op: the policy loss on the LM head, log-probs and loss in one."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_tensor
from .logprobs import linear_logprob
from .policy import policy_loss
from .specs import LossSpec


class LinearPolicyLoss(NamedTuple):
    loss: Tensor
    logprob: Tensor
    """Detached, 0 outside the mask."""
    metrics: Tensor


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
