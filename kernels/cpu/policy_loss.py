"""The policy loss of csrc/cpu/policy_loss.cpp."""

import ctypes

import torch
from torch import Tensor

from ..loss_code import LossCode
from ..metrics import METRIC_FIELDS
from ..native_structs import FlatLossCode, address, loss_tokens
from . import call_parallel


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
    tokens = loss_tokens(
        logprob_T, old_T, advantages_T, mask_T, ref_T, rollout_T, entropy_T, cu_seqlens, sequence_stats, denominator
    )
    loss, metrics = logprob_T.new_empty(()), logprob_T.new_empty(len(METRIC_FIELDS))
    d_logprob_T = torch.empty_like(logprob_T)
    d_entropy_T = torch.empty_like(logprob_T) if code.entropy_coef else None
    outputs = (address(tensor) for tensor in (loss, metrics, d_logprob_T, d_entropy_T))
    call_parallel("policy_loss", ctypes.byref(tokens), ctypes.byref(FlatLossCode(*code)), *outputs)
    return loss, metrics, d_logprob_T, d_entropy_T
