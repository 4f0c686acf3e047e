"""Public op: advantages of the samples of a group."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import INDEX, STATISTICS, check_instance, check_tensor, values_may_be_read
from .dispatch import define_op, form
from .specs import AdvantageSpec, Baseline, Scale

AVAILABLE = ("reference", "triton", "cuda", "cpu")

ADVANTAGE_COUNTS = ("rewards", "nonfinite_rewards", "groups", "constant_groups")
"""Names of the counts: finite rewards; NaN or inf ones; groups with a finite reward; those of them with equal rewards only."""


class GroupAdvantage(NamedTuple):
    advantages: Tensor
    """[N], dtype and device of rewards."""
    counts: Tensor
    """int64 [len(ADVANTAGE_COUNTS)] on the same device; ranks add theirs."""


def group_advantage(rewards: Tensor, group_index: Tensor, spec: AdvantageSpec) -> GroupAdvantage:
    """Advantage of each sample within its group (R1 eq. 3 by default: (r - mean) / std).

    rewards: fp32 or fp64 [N]. A NaN or infinite reward takes no part in its group's statistics, gets 0 and is counted.
    group_index: int64 [N], in 0..N-1, in any order; samples with the same number are one group. Groups must be whole;
        with spec.scale "batch" so must the batch.
    A group of equal rewards (or a single one) gets 0 and is counted, whatever eps.

    Not differentiable: rewards are read as constants. On a CPU fp32 has the same bits in C++ and in the reference; elsewhere
    there is no host sync. Raises ValueError or TypeError naming the argument; group_index values are checked on a CPU and
    under STROP_KERNELS_DEBUG=1.
    """
    check_instance("spec", spec, AdvantageSpec)
    check_tensor("rewards", rewards, STATISTICS)
    if rewards.dim() != 1:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}: flatten it to [N]")
    check_tensor("group_index", group_index, INDEX, tuple(rewards.shape), rewards.device, "pass one a reward")
    if values_may_be_read(rewards.device) and len(rewards):
        low, high = (int(value) for value in torch.aminmax(group_index))
        if low < 0 or high >= len(rewards):
            wrong = low if low < 0 else high
            raise ValueError(f"group_index holds {wrong}, not in 0..{len(rewards) - 1}: number the groups from 0")
    return GroupAdvantage(*_group_advantage(rewards.detach(), group_index, spec.baseline, spec.scale, spec.ddof, spec.eps))


def _run(
    rewards: Tensor, group_index: Tensor, baseline: Baseline, scale: Scale, ddof: int, eps: float
) -> tuple[Tensor, Tensor]:
    spec = AdvantageSpec(baseline=baseline, scale=scale, ddof=ddof, eps=eps)
    return form("group_advantage", rewards, AVAILABLE).group_advantage(rewards, group_index, spec)


def _fake(rewards: Tensor, group_index: Tensor, *spec) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape), group_index.new_empty(len(ADVANTAGE_COUNTS))


_group_advantage = define_op(
    "group_advantage(Tensor rewards, Tensor group_index, str baseline, str scale, int ddof, float eps)"
    " -> (Tensor advantages, Tensor counts)",
    _run,
    _fake,
    why_no_gradient="advantages are constants of the loss",
)
