"""Sums over packed sequences: values, and that no addition's order is left to chance."""

import math
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from strop.kernels import LossSpec, linear_policy_loss, policy_loss, sequence_stats
from strop.kernels.reference.sequences import sequence_sums, tokens_before

ENDS = torch.tensor([0, 3, 3, 10, 17])  # an empty sequence, and padding behind 17
SPECS = [
    LossSpec(),
    LossSpec(aggregation="token-mean"),
    LossSpec(policy="gspo", aggregation="token-mean"),
    LossSpec(correction="sequence-mask", correction_low=0.5, correction_high=2.0),
    LossSpec(opsm_delta=0.1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_those_of_slices(dtype):
    columns = [torch.randn(20, dtype=dtype) for _ in range(3)]
    for column in columns:
        column[17:] = math.nan
    sums = sequence_sums(columns, ENDS)
    slices = [torch.stack([c[start:stop].sum() for c in columns]) for start, stop in pairwise(ENDS)]
    torch.testing.assert_close(sums, torch.stack(slices))
    mask = torch.rand(20) < 0.5
    assert tokens_before(mask, ENDS).tolist() == [int(mask[:end].sum()) for end in ENDS]


def test_a_nan_stays_in_its_sequence():
    column = torch.ones(20)
    column[4] = math.nan
    torch.testing.assert_close(sequence_sums([column], ENDS).flatten(), torch.tensor([3, 0, math.nan, 7]), equal_nan=True)


@pytest.mark.parametrize(("num_tokens", "ends", "sums"), [(0, [0], []), (0, [0, 0, 0], [0, 0]), (5, [0], []), (1, [0, 1], [1])])
def test_nothing_to_add(num_tokens, ends, sums):
    ends = torch.tensor(ends)
    assert sequence_sums([torch.ones(num_tokens)] * 2, ends).tolist() == [[s, s] for s in sums]
    assert tokens_before(torch.ones(num_tokens, dtype=torch.bool), ends).diff().tolist() == sums


def test_boundaries_outside_the_tokens_read_nothing_there():
    """Values aren't checked on a GPU; memory is."""
    ends = torch.tensor([-3, 2, 9])
    assert sequence_sums([torch.ones(5)], ends).tolist() == [[2], [3]]
    assert tokens_before(torch.ones(5, dtype=torch.bool), ends).tolist() == [0, 2, 5]


def test_compiles_for_any_number_of_tokens():
    def both(columns, mask, ends):
        return sequence_sums(columns, ends), tokens_before(mask, ends)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (20, 23):
        arguments = [torch.randn(length) for _ in range(3)], torch.rand(length) < 0.5, ENDS
        torch.testing.assert_close(compiled(*arguments), both(*arguments), rtol=0, atol=0)


class AdditionsInAnyOrder(TorchDispatchMode):
    """Collects the torch ops that add floats with atomics, or otherwise in an order of their own, on CUDA."""

    ATOMIC = ("index_add", "scatter_add", "scatter_reduce", "index_put", "bincount", "histc")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.removeprefix("aten::").strip("_")
        scans = name in ("cumsum", "cumprod") and arguments[0].is_floating_point()
        adds = name in self.ATOMIC and (name != "index_put" or True in arguments[3:])
        if scans or adds:
            self.found.append(name)
        return function(*arguments, **(options or {}))


def batch(device="cpu", num_tokens=20, ends=ENDS):
    generator = torch.Generator().manual_seed(0)
    old, advantages, rollout = (torch.randn(num_tokens, generator=generator).to(device) for _ in range(3))
    mask = (torch.rand(num_tokens, generator=generator) < 0.7).to(device)
    return (old, advantages, mask), {"rollout_logprob": rollout, "cu_seqlens": ends.to(device)}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.policy}-{spec.correction}-{spec.opsm_delta}")
def test_no_addition_is_left_to_chance(spec):
    tokens, keywords = batch()
    hidden, weight, targets = torch.randn(20, 4), torch.randn(9, 4, requires_grad=True), torch.randint(0, 9, (20,))
    lp = torch.randn(20, requires_grad=True)
    with AdditionsInAnyOrder() as seen:
        sequence_stats(lp, *tokens, spec, **keywords)
        policy_loss(lp, *tokens, spec, **keywords, denominator=3.0).loss.backward()
        linear_policy_loss(hidden, weight, targets, *tokens, spec, **keywords, denominator=3.0).loss.backward()
    assert not seen.found
    with AdditionsInAnyOrder() as seen:
        torch.zeros(3).index_add_(0, torch.tensor([1, 1]), torch.ones(2))
    assert seen.found == ["index_add"]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.policy}-{spec.correction}-{spec.opsm_delta}")
def test_columns_that_the_spec_does_not_need_are_zero(spec):
    tokens, keywords = batch()
    stats = sequence_stats(torch.randn(20), *tokens, spec, **keywords)
    assert stats.is_contiguous(), "collectives want that"
    mask = tokens[2]
    assert stats[:, 0].tolist() == [int(mask[start:stop].sum()) for start, stop in pairwise(ENDS)]
    assert bool(stats[:, 1:].any()) == spec.needs_sequence_sums


@pytest.mark.gpu
def test_same_bits_on_a_gpu():
    ends = torch.tensor([0, 5000, 5000, 5001, 30000, 65000])
    tokens, keywords = batch("cuda", 65536, ends)
    logprob = torch.randn(65536, device="cuda")
    results = [sequence_stats(logprob, *tokens, SPECS[2], **keywords) for _ in range(5)]
    exact = sequence_stats(logprob.double(), *tokens, SPECS[2], **keywords)
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0].double(), exact, rtol=1e-5, atol=1e-2)  # sums of 35000 fp32 terms
