"""Rewards of a group to advantages. Sums run in fp64 in the order of the rewards, so that the C++ twin can be bit-equal."""

import torch
from torch import Tensor

from ..specs import AdvantageSpec


def group_advantage(rewards: Tensor, group_index: Tensor, spec: AdvantageSpec) -> tuple[Tensor, Tensor]:
    """(advantages [N] in the dtype of rewards, counts int64 [4]): see `strop.kernels.group_advantage`."""
    slots = len(rewards)  # group_index lies in 0..N-1, so N slots hold every group without asking the device how many there are
    valid = rewards.isfinite()
    values = torch.where(valid, rewards.double(), 0)
    size = _sums(valid.double(), group_index, slots)
    mean = _sums(values, group_index, slots) / size.clamp(min=1)
    deviation = torch.where(valid, values - mean[group_index], 0)

    infinity = float("inf")
    low, high = (
        torch.full_like(mean, start).scatter_reduce(0, group_index, torch.where(valid, values, start), how)
        for start, how in ((infinity, "amin"), (-infinity, "amax"))
    )
    varied = (high > low)[group_index] & valid  # equal rewards: 0, not the rounding error of their mean over itself
    scale = torch.ones_like(mean)
    if spec.scale == "group":
        scale = _std(_sums(deviation.square(), group_index, slots), size, spec)
    elif spec.scale == "batch":
        total = valid.double().sum()
        from_mean = torch.where(valid, values - _sum(values) / total.clamp(min=1), 0)
        scale = _std(_sum(from_mean.square()), total, spec).expand_as(mean)
    others = (size - 1).clamp(min=1)
    factor = size / others if spec.baseline == "leave-one-out" else torch.ones_like(mean)
    advantages = torch.where(varied, factor[group_index] * deviation / scale[group_index], 0)

    groups = (size > 0).sum()
    counts = torch.stack([valid.sum(), (~valid).sum(), groups, groups - (high > low).sum()])
    return advantages.to(rewards.dtype), counts


def _sums(values: Tensor, group_index: Tensor, slots: int) -> Tensor:
    return values.new_zeros(slots).index_add(0, group_index, values)


def _sum(values: Tensor) -> Tensor:
    """One after the other, like the groups' sums (`sum` adds pairwise)."""
    return _sums(values, torch.zeros_like(values, dtype=torch.int64), 1)[0]


def _std(squares: Tensor, count: Tensor, spec: AdvantageSpec) -> Tensor:
    """Divisor: standard deviation + eps. With ddof 1 a lone reward divides by 1: its advantage is 0 anyway."""
    return (squares / (count - spec.ddof).clamp(min=1)).sqrt() + spec.eps
