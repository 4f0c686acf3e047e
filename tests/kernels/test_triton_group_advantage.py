"""The Triton form of group_advantage, interpreted and (marked gpu) compiled, against the reference in fp64."""

from itertools import product

import pytest
import torch

from strop.kernels import AdvantageSpec, group_advantage
from strop.kernels.reference import group_advantage as reference

pytest.importorskip("triton")
from strop.kernels.triton import group_advantage as form

SPECS = [
    AdvantageSpec(baseline=baseline, scale=scale, ddof=ddof, eps=eps)
    for baseline, scale, (ddof, eps) in product(("mean", "leave-one-out"), ("group", "batch", "none"), ((0, 0.0), (1, 1e-4)))
    if scale != "none" or not ddof
]


def check(run, spec: AdvantageSpec, size: int, offset: float = 0.0, device: str = "cpu") -> None:
    """Groups of 1 to 8 in random order, some of equal rewards; NaN and inf among them."""
    group_index = torch.randint(max(size // 4, 1), (size,), device=device)
    rewards = torch.randint(4, (size,), device=device) / 3 + offset
    rewards[group_index % 5 == 0] = 0.1 + offset
    if size > 8:
        rewards[3], rewards[5], rewards[7] = torch.nan, torch.inf, -torch.inf
    advantages, counts = run(form.group_advantage, rewards, group_index, spec)
    exact, exact_counts = reference.group_advantage(rewards.double(), group_index, spec)
    torch.testing.assert_close(advantages.double(), exact, rtol=2e-6, atol=1e-6)
    assert counts.tolist() == exact_counts.tolist()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_against_the_reference(interpreted, spec):
    check(lambda *arguments: interpreted(*arguments)[0], spec, 140)


def test_sizes_and_offsets(interpreted):
    """Nothing, one sample, and rewards whose common part fp32 cannot square."""
    for size, offset in ((0, 0.0), (1, 0.0), (40, 1000.0)):
        check(lambda *arguments: interpreted(*arguments)[0], AdvantageSpec(), size, offset)


def test_through_the_public_function(interpreted):
    rewards, group_index = torch.randint(3, (20,)).float(), torch.arange(20) // 4
    interpreted.check(group_advantage, rewards, group_index, AdvantageSpec(), atol=1e-6, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_on_a_device(spec):
    for size in (1, 1024, 5003):
        check(lambda function, *arguments: function(*arguments), spec, size, device="cuda")
