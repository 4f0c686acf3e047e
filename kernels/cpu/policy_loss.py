"""The policy loss of csrc/cpu/policy_loss.cpp."""

import ctypes

from torch import Tensor

from ..loss_code import LossCode
from ..native_structs import FlatLossCode, address, loss_results, loss_tokens
from . import call_parallel


def policy_loss(code: LossCode, logprob_T: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`loss_results` of the tensors that `loss_tokens` takes."""
    tokens = loss_tokens(logprob_T, *others)
    results = loss_results(code, logprob_T)
    call_parallel("policy_loss", ctypes.byref(tokens), ctypes.byref(FlatLossCode(*code)), *map(address, results))
    return results
