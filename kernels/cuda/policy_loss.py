"""The policy loss, its gradients and its metrics by csrc/cuda/policy_loss.cu: one launch, no host sync."""

import ctypes

import torch
from torch import Tensor

from .. import native
from ..launch_memory import zeroed_memory
from ..loss_code import LossCode
from ..native_structs import FlatLossCode, address, loss_results, loss_tokens


def policy_loss(code: LossCode, logprob_T: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`loss_results` of the tensors that `loss_tokens` takes; cu_seqlens ascending from 0."""
    tokens = loss_tokens(logprob_T, *others)
    results = loss_results(code, logprob_T)
    scratch = workspace(logprob_T.device, tokens.num_tokens, tokens.num_sequences)
    outputs = map(address, (*results, scratch))
    native.launch("policy_loss", logprob_T.device, ctypes.byref(tokens), ctypes.byref(FlatLossCode(*code)), *outputs)
    return results


def workspace(device: torch.device, num_tokens: int, num_sequences: int) -> Tensor:
    """Bytes whose count of finished blocks is 0 whenever a launch on the current stream starts."""
    size_of = native.library("cuda").strop_cuda_policy_loss_workspace
    size_of.restype, size_of.argtypes = ctypes.c_int64, (ctypes.c_int64, ctypes.c_int64)
    return zeroed_memory("policy_loss", size_of(num_tokens, num_sequences), device)
