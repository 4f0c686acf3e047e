"""group_advantage: rewards and group numbers in, (reward - mean) / std of the group out.

    OMP_NUM_THREADS=2 python benchmarks/group_advantage.py [--quick] [--out FOLDER]
"""

import torch
from comparison import OURS, Comparison, bind, compiled, main, milliseconds_at_most
from policy_loss import GRAPH, REFERENCE, with_reference
from timing import Candidate, in_graph

from strop.kernels import AdvantageSpec, group_advantage

GROUP = 8


def rectangular(rewards_N, group_index_N):
    """As trainers write it whose groups are equally long, in order, finite and never constant."""
    rewards_PG = rewards_N.view(-1, GROUP)
    centered_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return (centered_PG / rewards_PG.std(1, keepdim=True, correction=0)).flatten()


def scattered(rewards_N, group_index_N):
    """The same for groups in any order and of any length."""
    sums = rewards_N.new_zeros(3, len(rewards_N))
    sums[0].index_add_(0, group_index_N, rewards_N)
    sums[1].index_add_(0, group_index_N, torch.ones_like(rewards_N))
    mean_G = sums[0] / sums[1].clamp(min=1)
    centered_N = rewards_N - mean_G[group_index_N]
    sums[2].index_add_(0, group_index_N, centered_N.square())
    return centered_N / (sums[2] / sums[1].clamp(min=1)).sqrt()[group_index_N]


def comparisons(device: torch.device, quick: bool) -> list[Comparison]:
    num, on_gpu = 8192, device.type == "cuda"

    def forms():
        torch.manual_seed(0)
        rewards, index = torch.randn(num, device=device), torch.arange(num, device=device) // GROUP

        def ours():
            return {"advantages": group_advantage(rewards, index, AdvantageSpec()).advantages}

        def call(implementation):
            return {"advantages": implementation(rewards, index)}

        found = {OURS: Candidate(ours), REFERENCE: with_reference(ours), "eager, any groups": bind(call, scattered),
                 "eager, equal groups in order": bind(call, rectangular),
                 "torch.compile, any groups": bind(call, compiled(scattered, quick))}  # fmt: skip
        return found | ({GRAPH: in_graph(ours)} if on_gpu else {})

    targets = (milliseconds_at_most(0.01, GRAPH),) if on_gpu else ()
    return [Comparison("group_advantage", f"N = {num}, groups of {GROUP}", forms, bytes=16.0 * num, targets=targets)]


if __name__ == "__main__":
    main(__file__, __doc__, comparisons)
