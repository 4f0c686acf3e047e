"""The compiled CUDA kernel of `group_advantage` against the reference in fp64."""

import math
from itertools import product

import pytest
import torch

from strop.kernels import AdvantageSpec, group_advantage

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("baseline", "scale", "ddof"), product(("mean", "leave-one-out"), ("group", "batch", "none"), (0, 1)))
def test_cuda_kernel_equals_the_reference(monkeypatch, baseline, scale, ddof):
    spec = AdvantageSpec(baseline=baseline, scale=scale, ddof=ddof if scale != "none" else 0)
    torch.manual_seed(0)
    for size in (0, 1, 33, 513, 8192):
        rewards = torch.randn(size).round(decimals=1) + 3
        rewards[::50] = math.nan
        groups = torch.randint(0, max(size // 8, 1), (size,))
        monkeypatch.setenv("STROP_KERNELS", "reference")
        expected = group_advantage(rewards.double(), groups, spec)
        monkeypatch.setenv("STROP_KERNELS", "native")
        got, again = (group_advantage(rewards.cuda(), groups.cuda(), spec) for _ in range(2))
        torch.testing.assert_close(got.advantages.cpu(), expected.advantages.float(), rtol=1e-5, atol=1e-6)
        assert torch.equal(got.counts.cpu(), expected.counts)
        assert torch.equal(got.advantages, again.advantages)
