import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels import ExpertOrder, expert_order, moe_permute, moe_unpermute


def random_ids(num_tokens: int, choices: int, num_experts: int, dropped: float = 0.0) -> torch.Tensor:
    """Distinct experts for each token; a share of the assignments is -1."""
    ids = torch.rand(num_tokens, num_experts).argsort(1)[:, :choices]
    return torch.where(torch.rand(ids.shape) < dropped, -1, ids)


def expected_order(ids: torch.Tensor, num_experts: int, multiple_of: int) -> tuple[list, list, list, list]:
    """The definition, in Python: (rows, sources, counts, offsets)."""
    flat = ids.flatten().tolist()
    rows, sources, counts, offsets = [-1] * len(flat), [], [], [0]
    for expert in range(num_experts):
        mine = [a for a, e in enumerate(flat) if e == expert]
        for a in mine:
            rows[a] = len(sources)
            sources.append(a)
        sources += [-1] * (-len(mine) % multiple_of)
        counts.append(len(mine))
        offsets.append(len(sources))
    return rows, sources, counts, offsets


SIZES = st.tuples(st.integers(0, 40), st.integers(1, 3), st.integers(3, 9), st.sampled_from([1, 4, 16]))


@given(SIZES, st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([torch.int32, torch.int64]))
@settings(max_examples=60, deadline=None)
def test_order(sizes, dropped, dtype):
    num_tokens, choices, num_experts, multiple_of = sizes
    ids = random_ids(num_tokens, choices, num_experts, dropped).to(dtype)
    order = expert_order(ids, num_experts, multiple_of)
    rows, sources, counts, offsets = expected_order(ids, num_experts, multiple_of)
    assert order.rows.flatten().tolist() == rows
    assert order.sources.tolist()[: len(sources)] == sources
    assert set(order.sources.tolist()[len(sources) :]) <= {-1}
    assert order.counts.tolist() == counts and order.offsets.tolist() == offsets
    assert len(order.sources) % multiple_of == 0


def test_worst_case_is_reached():
    """One assignment for each expert: every one is padded to the full."""
    order = expert_order(torch.arange(5)[:, None], 9, 16)
    assert len(order.sources) == order.offsets[-1] == 5 * 16


@pytest.mark.parametrize("multiple_of", [1, 8])
def test_gradients_are_exact(multiple_of):
    order = expert_order(random_ids(6, 2, 4, dropped=0.2), 4, multiple_of)
    hidden = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    expert_out = torch.randn(len(order.sources), 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda hidden: moe_permute(hidden, order), (hidden,))
    assert torch.autograd.gradcheck(lambda x, w: moe_unpermute(x, order, w), (expert_out, weights))


def test_a_layer_of_experts():
    """Permute, a different matrix for each expert, unpermute = every token through its experts, weighted; gradients too."""
    num_tokens, choices, num_experts, size = 30, 3, 5, 4
    hidden = torch.randn(num_tokens, size, dtype=torch.float64, requires_grad=True)
    matrices = torch.randn(num_experts, size, size, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(num_tokens, choices, dtype=torch.float64, requires_grad=True)
    ids = random_ids(num_tokens, choices, num_experts)
    order = expert_order(ids, num_experts, multiple_of=8)
    permuted, offsets = moe_permute(hidden, order), order.offsets.tolist()
    out = [permuted[a:b] @ matrices[e] for e, (a, b) in enumerate(itertools.pairwise(offsets))]
    garbage = torch.full((len(permuted) - offsets[-1], size), torch.nan, dtype=torch.float64)
    result = moe_unpermute(torch.cat([*out, garbage]), order, weights)
    expected = (torch.einsum("th,tkhi->tki", hidden, matrices[ids]) * weights[..., None]).sum(1)
    torch.testing.assert_close(result, expected)
    inputs, upstream = (hidden, matrices, weights), torch.randn_like(result)
    torch.testing.assert_close(torch.autograd.grad(result, inputs, upstream), torch.autograd.grad(expected, inputs, upstream))


TRITON_CASES = [(1, 1, 1, 1), (13, 2, 5, 16), (300, 3, 7, 8), (0, 2, 4, 8), (5, 1, 64, 128), (150, 8, 300, 1)]


@pytest.mark.parametrize("num_tokens, choices, num_experts, multiple_of", TRITON_CASES)
def test_triton(interpreted, num_tokens, choices, num_experts, multiple_of):
    ids = random_ids(num_tokens, choices, num_experts, dropped=0.1)
    interpreted.check(expert_order, ids, num_experts, multiple_of)
    interpreted.check(expert_order, ids.T.contiguous().T.int(), num_experts, multiple_of)
    order = expert_order(ids, num_experts, multiple_of)
    size = 70 if num_tokens < 100 else 3
    hidden = torch.randn(num_tokens, size, requires_grad=True)
    expert_out = torch.randn(len(order.sources), size)
    expert_out[order.sources < 0] = torch.nan  # never read
    weights = torch.rand(num_tokens, choices, requires_grad=True)
    interpreted.check(moe_permute, hidden, order, upstream=[torch.randn_like(expert_out)])
    interpreted.check(moe_unpermute, expert_out.requires_grad_(), order, weights, upstream=[torch.randn_like(hidden)])


def test_triton_strides_and_half(interpreted):
    order = expert_order(random_ids(9, 2, 4), 4)
    hidden = torch.randn(2100, 9, dtype=torch.float16).T.requires_grad_()
    expert_out = torch.randn(18, 4200, dtype=torch.float16)[:, ::2].requires_grad_()
    weights = torch.rand(2, 9).T.requires_grad_()
    upstream = torch.randn(2100, 9, dtype=torch.float16).T
    interpreted.check(moe_permute, hidden, order, upstream=[torch.randn(18, 2100, dtype=torch.float16)], rtol=2e-3, atol=2e-3)
    interpreted.check(moe_unpermute, expert_out, order, weights, upstream=[upstream], rtol=2e-3, atol=2e-3)


def test_compiles_and_passes_opcheck():
    ids = random_ids(6, 2, 4)
    hidden, weights = torch.randn(6, 8, requires_grad=True), torch.rand(6, 2, requires_grad=True)

    def layer(hidden, weights):
        order = expert_order(ids, 4, 4)
        return moe_unpermute(moe_permute(hidden, order).sin(), order, weights)

    upstream = torch.randn(6, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(hidden, weights)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, (hidden, weights), upstream),
        torch.autograd.grad(layer(hidden, weights), (hidden, weights), upstream),
    )
    order = expert_order(ids, 4, 4)
    ops, expert_out = torch.ops.strop, torch.randn(len(order.sources), 8, requires_grad=True)
    torch.library.opcheck(ops.expert_order.default, (ids, 4, 4))
    torch.library.opcheck(ops.moe_permute.default, (hidden, order.rows, order.sources))
    torch.library.opcheck(ops.moe_unpermute.default, (expert_out, weights, order.rows, order.sources))


def test_refuses():
    ids = random_ids(6, 2, 4)
    order = expert_order(ids, 4)
    with pytest.raises(ValueError, match="expert id 3 in expert_ids, but num_experts is 3"):
        expert_order(torch.tensor([[3]]), 3)
    with pytest.raises(ValueError, match="num_experts is 4 and multiple_of 0"):
        expert_order(ids, 4, 0)
    with pytest.raises(ValueError, match="expert_ids has shape"):
        expert_order(ids.flatten(), 4)
    with pytest.raises(TypeError, match=r"expert_ids has dtype torch\.float32"):
        expert_order(ids.float(), 4)
    with pytest.raises(ValueError, match="2\\^31 rows"):
        expert_order(torch.empty(2**20, 2**11, dtype=torch.int32, device="meta"), 4)
    with pytest.raises(ValueError, match=r"hidden has shape \(5, 8\): \(6, 8\) is needed"):
        moe_permute(torch.ones(5, 8), order)
    with pytest.raises(ValueError, match=r"expert_out has shape \(11, 8\)"):
        moe_unpermute(torch.ones(11, 8), order, torch.ones(6, 2))
    with pytest.raises(ValueError, match=r"weights has shape \(6,\)"):
        moe_unpermute(torch.ones(12, 8), order, torch.ones(6))
    with pytest.raises(TypeError, match=r"weights has dtype torch\.int64"):
        moe_unpermute(torch.ones(12, 8), order, ids)
    with pytest.raises(ValueError, match="order is on meta"):
        moe_permute(torch.ones(6, 8), ExpertOrder(*(t.to("meta") for t in order)))
    hidden = torch.ones(6, 8, requires_grad=True)
    gradient = torch.autograd.grad(moe_permute(hidden, order).square().sum(), hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward isn't supported"):
        gradient.sum().backward()
