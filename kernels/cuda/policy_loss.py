"""The policy loss, its gradients and its metrics by csrc/cuda/policy_loss.cu: one launch, no host sync."""

import ctypes

import torch
from torch import Tensor

from .. import native
from ..launch_memory import zeroed_memory
from ..loss_code import LossCode
from ..metrics import METRIC_FIELDS
from ..native_structs import FlatLossCode, address, loss_tokens


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
    """(loss, metrics, d_logprob_T, d_entropy_T); d_entropy_T is None where code.entropy_coef is 0.

    Token tensors fp32 and mask bool [T], cu_seqlens int64 [S + 1] ascending from 0, sequence_stats fp32 [S, 6]: contiguous.
    """
    tokens = loss_tokens(
        logprob_T, old_T, advantages_T, mask_T, ref_T, rollout_T, entropy_T, cu_seqlens, sequence_stats, denominator
    )
    loss, metrics = logprob_T.new_empty(()), logprob_T.new_empty(len(METRIC_FIELDS))
    d_logprob_T = torch.empty_like(logprob_T)
    d_entropy_T = torch.empty_like(logprob_T) if code.entropy_coef else None
    scratch = workspace(logprob_T.device, tokens.num_tokens, tokens.num_sequences)
    outputs = map(address, (loss, metrics, d_logprob_T, d_entropy_T, scratch))
    native.launch("policy_loss", logprob_T.device, ctypes.byref(tokens), ctypes.byref(FlatLossCode(*code)), *outputs)
    return loss, metrics, d_logprob_T, d_entropy_T


def workspace(device: torch.device, num_tokens: int, num_sequences: int) -> Tensor:
    """Bytes whose count of finished blocks is 0 whenever a launch on the current stream starts."""
    size_of = native.library("cuda").strop_cuda_policy_loss_workspace
    size_of.restype, size_of.argtypes = ctypes.c_int64, (ctypes.c_int64, ctypes.c_int64)
    return zeroed_memory("policy_loss", size_of(num_tokens, num_sequences), device)
