"""`group_advantage` against each convention's formula, and the compiled kernels against the reference."""

import math
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels import ADVANTAGE_COUNTS, AdvantageSpec, group_advantage, native
from strop.kernels.cpu import group_advantage as cpu
from strop.kernels.cuda import group_advantage as cuda

ROOT = Path(__file__).parents[2]
SPECS = [
    AdvantageSpec(baseline=baseline, scale=scale, ddof=ddof, eps=eps)
    for baseline, scale, ddof, eps in product(("mean", "leave-one-out"), ("group", "batch", "none"), (0, 1), (0.0, 1e-4))
    if scale != "none" or not (ddof or eps)
]


def by_hand(rewards: list[float], groups: list[int], spec: AdvantageSpec) -> list[float]:
    """The definition, with Python's numbers."""

    def std(values: list[float]) -> float:
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(len(values) - spec.ddof, 1))

    finite = [r for r in rewards if math.isfinite(r)]
    advantages = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group and math.isfinite(r)]
        if not math.isfinite(reward) or min(members) == max(members):
            advantages.append(0.0)
            continue
        if spec.baseline == "mean":
            advantage = reward - math.fsum(members) / len(members)
        else:
            advantage = reward - (math.fsum(members) - reward) / (len(members) - 1)
        if spec.scale != "none":
            advantage /= std(members if spec.scale == "group" else finite) + spec.eps
        advantages.append(advantage)
    return advantages


@st.composite
def batches(draw):
    """Rewards with repeats, NaN, inf, singletons and unordered groups."""
    size = draw(st.integers(1, 24))
    groups = draw(st.lists(st.integers(0, min(size - 1, 4)), min_size=size, max_size=size))
    reward = st.one_of(st.sampled_from([0.0, 1.0, 0.1, math.nan, math.inf, -math.inf]), st.floats(-100, 100, width=32))
    return draw(st.lists(reward, min_size=size, max_size=size)), groups


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batch=batches(), spec=st.sampled_from(SPECS))
def test_every_convention_equals_its_definition(batch, spec):
    rewards, groups = batch
    advantages, counts = group_advantage(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), spec)
    expected = torch.tensor(by_hand(rewards, groups, spec), dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=1e-9)
    finite = {g: {r for r, own in zip(rewards, groups, strict=True) if own == g and math.isfinite(r)} for g in groups}
    finite = {g: values for g, values in finite.items() if values}
    total = sum(map(math.isfinite, rewards))
    constant = sum(len(values) == 1 for values in finite.values())
    assert dict(zip(ADVANTAGE_COUNTS, counts.tolist(), strict=True)) == {
        "rewards": total, "nonfinite_rewards": len(rewards) - total, "groups": len(finite), "constant_groups": constant
    }  # fmt: skip


def test_the_conventions_of_other_trainers_on_one_group():
    """Rewards (1, 0, 0, 1, 1): mean 0.6, squared deviations 1.2, std sqrt(1.2 / 5) or sqrt(1.2 / 4)."""
    rewards, groups = torch.tensor([1.0, 0, 0, 1, 1]), torch.zeros(5, dtype=torch.int64)

    def first(**settings):
        return group_advantage(rewards, groups, AdvantageSpec(**settings)).advantages[0].item()

    assert first() == pytest.approx(0.4 / math.sqrt(0.24))  # R1
    assert first(ddof=1, eps=1e-6) == pytest.approx(0.4 / (math.sqrt(0.3) + 1e-6))  # verl
    assert first(ddof=1, eps=1e-4) == pytest.approx(0.4 / (math.sqrt(0.3) + 1e-4))  # TRL
    assert first(eps=1e-4) == pytest.approx(0.4 / (math.sqrt(0.24) + 1e-4))  # Megatron-RL
    assert first(scale="none") == pytest.approx(0.4)  # Dr. GRPO
    assert first(scale="none", baseline="leave-one-out") == pytest.approx(0.5)  # RLOO: 1 - mean(0, 0, 1, 1)


def test_equal_rewards_give_zero_not_rounding_noise():
    """0.1 + 0.1 + 0.1 is not 3 * 0.1: mean and std are both rounding errors, and their quotient would be +-1."""
    rewards = torch.tensor([0.1] * 3 + [0.7] * 6 + [1.0, 0.0], dtype=torch.float64)
    groups = torch.tensor([0] * 3 + [1] * 6 + [2, 2])
    advantages, counts = group_advantage(rewards, groups, AdvantageSpec())
    assert advantages.tolist() == [0] * 9 + [1, -1]
    assert counts.tolist() == [11, 0, 3, 2]


@pytest.fixture
def compiled_for_cpu():
    if native.library("cpu") is None:
        pytest.skip(native.why_missing("cpu"))


def test_compiled_cpu_kernel_has_the_bits_of_the_reference(compiled_for_cpu, monkeypatch):
    for size in (0, 1, 7, 500):
        rewards = torch.randn(size).round(decimals=1)
        rewards[torch.rand(size) < 0.05] = math.nan
        groups = torch.randint(0, max(size // 4, 1), (size,))
        for spec in SPECS:
            monkeypatch.setenv("STROP_KERNELS", "native")
            compiled = group_advantage(rewards, groups, spec)
            strided = group_advantage(rewards.repeat_interleave(2)[::2], groups.repeat_interleave(2)[::2], spec)
            monkeypatch.setenv("STROP_KERNELS", "reference")
            reference = group_advantage(rewards, groups, spec)
            for got in (compiled, strided):
                assert torch.equal(got.advantages.view(torch.int32), reference.advantages.view(torch.int32)), spec
                assert torch.equal(got.counts, reference.counts)


def test_it_is_an_op_without_gradient(compiled_for_cpu):
    rewards, groups = torch.tensor([1.0, 0.0, 3.0], requires_grad=True), torch.tensor([0, 0, 0])
    assert not group_advantage(rewards, groups, AdvantageSpec()).advantages.requires_grad
    op = torch.ops.strop.group_advantage.default
    options = ("mean", "group", 0, 0.0)
    with pytest.raises(RuntimeError, match="has no gradient: advantages are constants of the loss"):
        op(rewards, groups, *options)[0].sum().backward()
    torch.library.opcheck(op, (rewards.detach(), groups, *options))
    compiled = torch.compile(group_advantage, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rewards, groups, AdvantageSpec()), group_advantage(rewards, groups, AdvantageSpec()))


def test_the_library_is_of_this_version():
    header = (ROOT / "csrc/include/strop.h").read_text()
    assert int(re.search(r"STROP_ABI_VERSION (\d+)", header)[1]) == native.ABI_VERSION


def test_a_refused_call_is_an_error(compiled_for_cpu):
    outside = torch.tensor([0, 2])
    with pytest.raises(RuntimeError, match="strop_cpu_group_advantage failed with status 1"):
        cpu.group_advantage(torch.tensor([1.0, 0.0]), outside, AdvantageSpec())


def assert_cuda_is_exact(rewards: torch.Tensor, groups: torch.Tensor, spec: AdvantageSpec) -> torch.Tensor:
    """The advantages, which differ from the reference in fp64 by the rounding of five fp32 operations."""
    advantages, counts = cuda.group_advantage(rewards, groups, spec)
    expected = group_advantage(rewards.double(), groups, spec)
    torch.testing.assert_close(advantages, expected.advantages.float(), rtol=3e-7, atol=0)
    assert torch.equal(counts, expected.counts)
    return advantages


def test_cuda_kernel_on_the_cpu(emulated_cuda):
    for size in (0, 1, 7, 40, 1500):
        rewards = torch.randn(size).round(decimals=1)
        rewards[torch.rand(size) < 0.05] = math.nan
        for num_groups in {max(size // 4, 1), 1}:
            groups = torch.randint(0, num_groups, (size,))
            for spec in SPECS if size < 100 else SPECS[::7]:
                assert_cuda_is_exact(rewards, groups.sort().values, spec)
                assert_cuda_is_exact(rewards, groups, spec)


@pytest.mark.parametrize("spec", [AdvantageSpec(), AdvantageSpec(scale="batch"), AdvantageSpec(scale="none")], ids=str)
def test_cuda_kernel_sums_exactly(emulated_cuda, spec):
    """Groups of every magnitude, groups whose common part hides their differences in fp32, denormals, both zeros."""
    rows = [torch.randn(8), torch.randn(8) * 1e-30, torch.randn(8) * 1e30, torch.full((8,), 16777215.0), torch.zeros(8),
            torch.randint(0, 2, (8,)) * 2.0**-10 + 4096, torch.randint(0, 5, (8,)) * 2.0**-149]  # fmt: skip
    rows[3][2], rows[4][1] = 16777214.0, -0.0
    if spec.scale == "batch":  # whose largest dwarfs the rest, also in fp64
        del rows[2]
    rewards, groups = torch.cat(rows), torch.arange(len(rows)).repeat_interleave(8)
    advantages = assert_cuda_is_exact(rewards, groups, spec)
    order = torch.randperm(len(rewards))
    shuffled = assert_cuda_is_exact(rewards[order], groups[order], spec)
    assert torch.equal(shuffled.view(torch.int32), advantages[order].view(torch.int32))


def test_cuda_kernels_where_one_block_ends(emulated_cuda):
    """8192 samples are one block's; of more, each is compared with all."""
    for size, rtol in ((8192, 3e-7), (8193, 1e-5)):
        rewards, groups = torch.randint(4, (size,)) / 3, torch.arange(size) // 16
        advantages, counts = cuda.group_advantage(rewards, groups, AdvantageSpec())
        expected = group_advantage(rewards.double(), groups, AdvantageSpec())
        torch.testing.assert_close(advantages, expected.advantages.float(), rtol=rtol, atol=1e-6 if size > 8192 else 0)
        assert torch.equal(counts, expected.counts)


def test_cuda_kernel_refuses_groups_that_are_no_slot(emulated_cuda):
    """Nobody checks the values on a device: an index outside gives NaN, and its neighbours their own advantages."""
    advantages, _ = cuda.group_advantage(torch.tensor([1.0, 0.0, 5.0, 5.0]), torch.tensor([0, 0, 4, -1]), AdvantageSpec())
    assert advantages[:2].tolist() == [1, -1] and advantages[2:].isnan().all()


def test_bad_arguments_are_named():
    rewards, groups = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    with pytest.raises(ValueError, match=r"group_index holds 2, not in 0..1: number the groups from 0"):
        group_advantage(rewards, groups + 2, AdvantageSpec())
    with pytest.raises(ValueError, match="group_index holds -1"):
        group_advantage(rewards, groups - 1, AdvantageSpec())
    with pytest.raises(TypeError, match=r"group_index has dtype torch.int32"):
        group_advantage(rewards, groups.int(), AdvantageSpec())
    with pytest.raises(TypeError, match="rewards is a list"):
        group_advantage([1.0, 0.0], groups, AdvantageSpec())
    with pytest.raises(ValueError, match=r"rewards has shape \(1, 2\): flatten it"):
        group_advantage(rewards[None], groups[None], AdvantageSpec())
    with pytest.raises(ValueError, match="eps -1"):
        AdvantageSpec(eps=-1)
    with pytest.raises(ValueError, match="ddof 2: choose from 0, 1"):
        AdvantageSpec(ddof=2)
    with pytest.raises(ValueError, match="have no effect with scale 'none'"):
        AdvantageSpec(scale="none", eps=1e-4)
    with pytest.raises(ValueError, match="baseline 'median': choose from mean, leave-one-out"):
        AdvantageSpec(baseline="median")
