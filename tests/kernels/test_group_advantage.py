"""`group_advantage` against each convention's formula, and the compiled kernels against the reference."""

import ctypes
import math
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import strop.kernels.native as native
from strop.kernels import ADVANTAGE_COUNTS, AdvantageSpec, group_advantage

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


@pytest.fixture(scope="session")
def cpu_library(tmp_path_factory) -> Path:
    """csrc/cpu compiled as setup.py does, for the case that strop was installed without a compiler."""
    installed = native.FOLDER / "strop_cpu.so"
    if installed.exists():
        return native.FOLDER
    if shutil.which("g++") is None:
        pytest.skip("needs g++, or strop installed with one")
    folder = tmp_path_factory.mktemp("native")
    sources = [str(path) for path in (ROOT / "csrc/cpu").glob("*.cpp")]
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared"]
    subprocess.run(["g++", *flags, *sources, "-o", str(folder / "strop_cpu.so")], check=True)
    return folder


@pytest.fixture
def native_cpu(cpu_library, monkeypatch):
    """STROP_KERNELS=native with the compiled library in place."""
    monkeypatch.setattr(native, "FOLDER", cpu_library)
    monkeypatch.setenv("STROP_KERNELS", "native")
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_compiled_cpu_kernel_has_the_bits_of_the_reference(native_cpu, monkeypatch):
    torch.manual_seed(0)
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


def test_the_implementation_is_chosen_by_device_dtype_and_one_variable(native_cpu, monkeypatch, tmp_path):
    rewards, groups = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    assert native.is_chosen(rewards)
    with pytest.raises(TypeError, match=r"STROP_KERNELS=native takes float32 rewards, got torch.float64"):
        group_advantage(rewards.double(), groups, AdvantageSpec())
    monkeypatch.setenv("STROP_KERNELS", "auto")
    assert native.is_chosen(rewards) and not native.is_chosen(rewards.double())
    monkeypatch.setenv("STROP_KERNELS", "reference")
    assert not native.is_chosen(rewards)
    monkeypatch.setenv("STROP_KERNELS", "fast")
    with pytest.raises(ValueError, match="STROP_KERNELS=fast: choose from auto, reference, native"):
        group_advantage(rewards, groups, AdvantageSpec())

    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.library.cache_clear()
    monkeypatch.delenv("STROP_KERNELS")
    assert group_advantage(rewards, groups, AdvantageSpec()).advantages.tolist() == [1, -1]
    monkeypatch.setenv("STROP_KERNELS", "native")
    with pytest.raises(RuntimeError, match=r"strop_cpu.so is not in .*install strop again with a compiler"):
        group_advantage(rewards, groups, AdvantageSpec())


def test_the_library_of_another_version_is_refused(native_cpu, monkeypatch):
    header = (ROOT / "csrc/include/strop.h").read_text()
    assert int(re.search(r"STROP_ABI_VERSION (\d+)", header)[1]) == native.ABI_VERSION
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    with pytest.raises(RuntimeError, match=r"has interface \d+, this version of strop needs \d+: install strop again"):
        native.library("cpu")


@pytest.mark.parametrize("backwards", [0, 1])
def test_cuda_kernel_on_the_cpu(emulated_library, backwards):
    """csrc/cuda through the emulation, with threads and blocks in both orders, against the fp64 reference."""
    library = emulated_library(ROOT / "csrc/cuda/group_advantage.cu")
    library.strop_emulation_order(backwards)
    for size in (0, 1, 7, 40):
        rewards = torch.randn(size).round(decimals=1)
        rewards[torch.rand(size) < 0.05] = math.nan
        groups = torch.randint(0, max(size // 4, 1), (size,))
        for spec in SPECS:
            advantages, counts = torch.empty(size), torch.empty(4, dtype=torch.int64)
            addresses = [ctypes.c_void_p(t.data_ptr()) for t in (rewards, groups, advantages, counts)]
            options = native.SCALES[spec.scale], native.BASELINES[spec.baseline], spec.ddof, ctypes.c_double(spec.eps)
            status = library.strop_cuda_group_advantage(
                *addresses[:2], ctypes.c_int64(size), *options, *addresses[2:], ctypes.c_void_p(None)
            )
            expected = group_advantage(rewards.double(), groups, spec)
            assert status == 0
            torch.testing.assert_close(advantages, expected.advantages.float(), rtol=1e-5, atol=1e-6)
            assert torch.equal(counts, expected.counts)


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
