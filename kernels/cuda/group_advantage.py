"""The group advantages of csrc/cuda/group_advantage.cu."""

import ctypes

import torch
from torch import Tensor

from .. import native
from ..native_structs import address, advantage_options
from ..specs import AdvantageSpec


def group_advantage(rewards_N: Tensor, group_index_N: Tensor, spec: AdvantageSpec) -> tuple[Tensor, Tensor]:
    rewards_N, group_index_N = rewards_N.contiguous(), group_index_N.contiguous()
    advantages_N = torch.empty_like(rewards_N)
    counts = torch.empty(4, dtype=torch.int64, device=rewards_N.device)
    inputs = address(rewards_N), address(group_index_N), ctypes.c_int64(len(rewards_N))
    outputs = address(advantages_N), address(counts)
    native.launch("group_advantage", rewards_N.device, *inputs, *advantage_options(spec), *outputs)
    return advantages_N, counts
