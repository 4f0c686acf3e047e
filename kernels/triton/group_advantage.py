"""Group advantages in one launch, for groups in any order: a program compares its samples with all others.

N^2 comparisons: for the N of a rank's batch, up to about 2,000, where the launch costs as much. csrc/cuda/group_advantage.cu
adds exact integers a group in shared memory, which Triton can't address, and is preferred wherever it is installed.

Everything is relative to the sample's own reward: with d_j = r_j - r_i, r_i - mean = -(sum d_j) / n, and the squared deviations
are (d_j - sum d / n)^2. Differences of neighbouring floats are exact, so fp32 is enough.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..specs import AdvantageSpec
from .ahead_of_time import FP32, INT64, AotCase
from .tickets import takes_last_ticket, ticket_counter

SAMPLES, OTHERS = 16, 128
"""A program's samples, and what it compares them with at a time: 16 pairs a thread."""
ROWS = tl.constexpr(256)
"""Programs whose counts the last one reads at once."""


@triton.jit
def load_pairs(rewards_ptr, group_ptr, first, num_rewards, reward, group, OTHERS: tl.constexpr):
    """(index of each other sample, whether its reward is finite, whether it is also of the group, d), [SAMPLES, OTHERS]."""
    others = first + tl.arange(0, OTHERS)
    real = others < num_rewards
    rewards = tl.load(rewards_ptr + others, mask=real, other=float("nan"))
    groups = tl.load(group_ptr + others, mask=real, other=-1)
    finite = (tl.abs(rewards) < float("inf"))[None, :]
    d = tl.where(finite, rewards[None, :] - reward[:, None], 0.0)
    return others[None, :], finite, finite & (groups[None, :] == group[:, None]), d


@triton.jit
def divisor(squares, size, eps, DDOF: tl.constexpr):
    """Standard deviation + eps; with ddof 1 a lone reward divides by 1: its advantage is 0 anyway."""
    degrees = size - DDOF
    return tl.sqrt_rn(squares / tl.where(degrees > 1.0, degrees, 1.0)) + eps


@triton.jit(do_not_specialize=["num_rewards"])
def group_advantage_kernel(
    rewards_ptr, group_ptr, advantages_ptr, counts_ptr, shares_ptr, counter_ptr, num_rewards, eps,
    SCALE: tl.constexpr, LEAVE_ONE_OUT: tl.constexpr, DDOF: tl.constexpr, SAMPLES: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    samples = program * SAMPLES + tl.arange(0, SAMPLES)
    real = samples < num_rewards
    reward = tl.load(rewards_ptr + samples, mask=real, other=0.0)
    group = tl.load(group_ptr + samples, mask=real, other=-1)

    zero = tl.zeros([SAMPLES], tl.float32)
    size, total, varied, earlier, batch_size, batch_total = zero, zero, zero, zero, zero, zero
    for first in range(0, num_rewards, OTHERS):
        others, finite, same, d = load_pairs(rewards_ptr, group_ptr, first, num_rewards, reward, group, OTHERS)
        size += tl.sum(tl.where(same, 1.0, 0.0), 1)
        total += tl.sum(tl.where(same, d, 0.0), 1)
        varied += tl.sum(tl.where(same & (d != 0.0), 1.0, 0.0), 1)
        earlier += tl.sum(tl.where(same & (others < samples[:, None]), 1.0, 0.0), 1)
        batch_size += tl.sum(tl.where(finite, 1.0, 0.0), 1)
        batch_total += tl.sum(d, 1)
    mean = total / tl.where(size > 1.0, size, 1.0)

    by = zero + 1.0
    if SCALE != "none":
        center = batch_total / tl.where(batch_size > 1.0, batch_size, 1.0) if SCALE == "batch" else mean
        squares = zero
        for first in range(0, num_rewards, OTHERS):
            _, finite, same, d = load_pairs(rewards_ptr, group_ptr, first, num_rewards, reward, group, OTHERS)
            deviation = d - center[:, None]
            squares += tl.sum(tl.where(finite if SCALE == "batch" else same, deviation * deviation, 0.0), 1)
        by = divisor(squares, batch_size if SCALE == "batch" else size, eps, DDOF)
    if LEAVE_ONE_OUT:
        mean *= size / tl.where(size > 2.0, size - 1.0, 1.0)

    counts = real & (tl.abs(reward) < float("inf"))
    advantage = tl.where(counts & (varied > 0.0), -tl.div_rn(mean, by), 0.0)
    tl.store(advantages_ptr + samples, advantage, mask=real)

    speaks = counts & (earlier == 0.0)  # the first finite reward of a group speaks for it
    row = shares_ptr + program * 4
    tl.store(row, tl.sum(counts.to(tl.int32), 0))
    tl.store(row + 1, tl.sum((real & (counts == 0)).to(tl.int32), 0))
    tl.store(row + 2, tl.sum(speaks.to(tl.int32), 0))
    tl.store(row + 3, tl.sum((speaks & (varied == 0.0)).to(tl.int32), 0))
    if takes_last_ticket(counter_ptr, tl.num_programs(0)):
        four = tl.arange(0, 4)
        sums = tl.zeros([4], tl.int32)
        for first in range(0, tl.num_programs(0), ROWS):
            rows = first + tl.arange(0, ROWS)[:, None]
            cells, written = shares_ptr + rows * 4 + four[None, :], rows < tl.num_programs(0)
            sums += tl.sum(tl.load(cells, mask=written, other=0, cache_modifier=".cg"), 0)
        tl.store(counts_ptr + four, sums.to(tl.int64))


def choices(spec: AdvantageSpec) -> dict[str, str | bool | int]:
    """What the kernel is compiled for."""
    return {"SCALE": spec.scale, "LEAVE_ONE_OUT": spec.baseline == "leave-one-out", "DDOF": spec.ddof,
            "SAMPLES": SAMPLES, "OTHERS": OTHERS}  # fmt: skip


def group_advantage(rewards_N: Tensor, group_index_N: Tensor, spec: AdvantageSpec) -> tuple[Tensor, Tensor]:
    """(advantages fp32 [N], counts int64 [4]) as the reference; rewards fp32, group_index int64 in 0..N-1, any order."""
    device, num_rewards = rewards_N.device, len(rewards_N)
    advantages = torch.empty_like(rewards_N, memory_format=torch.contiguous_format)
    counts = torch.empty(4, dtype=torch.int64, device=device)
    num_programs = max(triton.cdiv(num_rewards, SAMPLES), 1)
    shares = torch.empty(num_programs, 4, dtype=torch.int32, device=device)
    group_advantage_kernel[(num_programs,)](
        rewards_N.contiguous(), group_index_N.contiguous(), advantages, counts, shares, ticket_counter(device),
        num_rewards, spec.eps, **choices(spec),
    )  # fmt: skip
    return advantages, counts


def aot_cases() -> list[AotCase]:
    shared = {"rewards_ptr": FP32, "group_ptr": INT64, "advantages_ptr": FP32, "counts_ptr": INT64, "shares_ptr": "*i32:16",
              "counter_ptr": "*i32:16", "num_rewards": "i32", "eps": "fp32"}  # fmt: skip
    specs = (AdvantageSpec(), AdvantageSpec(scale="batch", ddof=1, eps=1e-4), AdvantageSpec("leave-one-out", "none"))
    return [
        AotCase(group_advantage_kernel, {**shared, **choices(spec)}, 4, label=f"{spec.baseline} / {spec.scale}")
        for spec in specs
    ]
