"""Packed and paged attention against one sequence at a time, on every awkward shape."""

import itertools

import pytest
import torch
from torch import Tensor

from strop.engine.model.attention import packed_attention
from strop.engine.model.config import ModelConfig
from strop.engine.model.context import ForwardContext, Packed, Paged
from strop.engine.model.rectangles import PagedPlan, by_length, packed_rectangles
from strop.engine.model.transformer import Transformer

N, K, D = 6, 2, 8
UNEVEN = [5, 300, 0, 1, 100, 64, 3, 0, 71, 250, 2]


def random_qkv(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, heads, D, generator=generator, dtype=dtype).requires_grad_() for heads in (N, K, K)]


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for one sequence, every query head with its group's key head."""
    k, v = (x.repeat_interleave(N // K, dim=1) for x in (k, v))
    scores = torch.einsum("qnd,knd->nqk", q, k) / D**0.5
    hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("nqk,knd->qnd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("on_host", [True, False], ids=["cpu plan", "device plan"])
@pytest.mark.parametrize(
    ("lengths", "padding"), [(UNEVEN, 0), (UNEVEN, 9), ([7, 7, 7], 0), ([7, 7], 3), ([1], 0), ([0, 0, 4, 0], 1)]
)
def test_packed_equals_each_sequence_by_hand(lengths, padding, on_host):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    used = int(cu_seqlens[-1])
    packed = Packed(cu_seqlens, max_seqlen=max(lengths) + 2)
    plan = packed_rectangles(cu_seqlens, packed.max_seqlen, used + padding, on_host)
    inputs = random_qkv(used + padding)
    upstream = torch.randn(used + padding, N, D, dtype=torch.float64)
    out = packed_attention(*inputs, packed, plan)
    gradients = torch.autograd.grad((out * upstream).sum(), inputs)
    assert bool((out[used:] == 0).all()) and all(bool((g[used:] == 0).all()) for g in gradients), "padding must stay out"
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        parts = [x[start:end] for x in inputs]
        expected = attention_by_hand(*parts)
        torch.testing.assert_close(out[start:end], expected, atol=1e-12, rtol=0)
        for ours, theirs in zip(
            gradients, torch.autograd.grad((expected * upstream[start:end]).sum(), inputs, allow_unused=True), strict=True
        ):
            torch.testing.assert_close(ours[start:end], theirs[start:end], atol=1e-12, rtol=0)


def test_rectangles_bound_the_waste_and_keep_equal_lengths_in_place():
    groups = by_length(UNEVEN, short=64)
    assert sorted(i for group in groups for i in group) == [i for i, length in enumerate(UNEVEN) if length]
    for group in groups:
        longest = max(UNEVEN[i] for i in group)
        assert longest <= 64 or min(UNEVEN[i] for i in group) >= 0.7 * longest
    even = packed_rectangles(torch.tensor([0, 8, 16, 24], dtype=torch.int32), 8, 24, on_host=True)
    assert even.in_order and even.shapes == ((3, 8),)


@pytest.mark.parametrize(
    ("ends", "max_seqlen", "tokens", "message"),
    [([0, 5, 3], 9, 9, "rise"), ([0, 5], 4, 9, "max_seqlen is 4"), ([0, 5, 9], 9, 8, "there are 8 tokens")],
)
def test_impossible_packing_is_caught(ends, max_seqlen, tokens, message):
    with pytest.raises(AssertionError, match=message):
        packed_rectangles(torch.tensor(ends, dtype=torch.int32), max_seqlen, tokens, on_host=True)


@pytest.fixture
def model() -> Transformer:
    config = ModelConfig("qwen3", 61, 48, 64, 3, N, K, D, 512, qk_norm=True, tie_embeddings=True, init_std=0.2)
    model = Transformer(config, dtype=torch.float64, device="cpu")
    model.init_weights(seed=0)
    return model


class Cache:
    """Blocks of 4 tokens, owned by the rows in a shuffled order; unwritten slots hold 1000, so that reading one shows."""

    def __init__(self, model: Transformer, rows: int, shared_blocks: int = 0) -> None:
        shape = (model.config.num_layers, 200, 4, K, D)
        self.keys, self.values = (torch.full(shape, 1e3, dtype=torch.float64) for _ in range(2))
        self.tables = 1 + torch.randperm(199, generator=torch.Generator().manual_seed(2))[: rows * 30].view(rows, 30)
        self.tables[:, :shared_blocks] = self.tables[0, :shared_blocks]

    def context(self, fed: list[tuple[int, int, int]]) -> ForwardContext:
        """fed: (row, first position, end position) of the tokens that each row of this step feeds."""
        lengths = torch.tensor([end for _, _, end in fed], dtype=torch.int32)
        counts = torch.tensor([end - start for _, start, end in fed])
        return ForwardContext(
            torch.cat([torch.arange(start, end) for _, start, end in fed]),
            Paged(
                self.keys,
                self.values,
                self.tables[[row for row, _, _ in fed]].int(),
                lengths,
                torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int(),
                int(counts.max()),
                block_size=4,
            ),
        )


def test_paged_equals_packed_through_prefill_chunks_and_decoding(model):
    ids = torch.randint(0, 61, (3, 111), generator=torch.Generator().manual_seed(1))
    cache = Cache(model, rows=3)
    steps = [
        [(0, 0, 9), (1, 0, 1)],  # prefill beside a one-token prompt
        [(1, 1, 2), (0, 9, 30), (2, 0, 8)],  # a decoding row, a second chunk, a prompt of exactly two blocks
        [(0, 30, 31), (1, 2, 3), (2, 8, 9)],  # pure decoding; row 2 starts a block
        [(0, 31, 32), (1, 3, 4), (2, 9, 10)],
        [(2, 10, 110), (0, 32, 33)],
        [(0, 33, 34), (2, 110, 111), (1, 4, 5)],  # decoding rows of very different lengths: two key windows
    ]
    with torch.no_grad():
        expected = [model(row, ForwardContext.one_sequence(111)) for row in ids]
        for fed in steps:
            tokens = torch.cat([ids[row, start:end] for row, start, end in fed])
            ctx = cache.context(fed)
            actual = model(tokens, ctx)
            wanted = torch.cat([expected[row][start:end] for row, start, end in fed])
            torch.testing.assert_close(actual, wanted, atol=1e-12, rtol=0)
    assert len(ctx.paged_plan.windows) == 2


def test_rows_share_the_blocks_of_a_common_prompt(model):
    prompt, tails = torch.arange(8), torch.tensor([[11, 12], [21, 22], [31, 32]])
    cache = Cache(model, rows=3, shared_blocks=2)
    with torch.no_grad():
        model(prompt, cache.context([(0, 0, 8)]))  # computed once, read by all three
        for step in range(2):
            actual = model(tails[:, step], cache.context([(row, 8 + step, 9 + step) for row in range(3)]))
            for row in range(3):
                whole = torch.cat([prompt, tails[row, : step + 1]])
                expected = model(whole, ForwardContext.one_sequence(len(whole)))[-1]
                torch.testing.assert_close(actual[row], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("fed", [[(0, 0, 9), (1, 0, 1)], [(0, 3, 4), (1, 11, 12)]], ids=["prefill", "decode"])
def test_device_plan_of_a_paged_step_equals_the_cpu_plan(model, fed):
    """What a GPU would compute, computed here: more key slots and filled places, the same tokens in the same places."""
    ctx = Cache(model, rows=2).context(fed)
    paged = ctx.attention
    values = torch.randn(len(ctx.positions), 3)
    plans = [
        PagedPlan.of(
            paged.block_tables, paged.lengths, paged.cu_seqlens_q, paged.max_seqlen_q, 4, ctx.positions, torch.float32, on_host
        )
        for on_host in (True, False)
    ]
    assert torch.equal(plans[0].slots, plans[1].slots)
    for plan in plans:
        assert torch.equal(plan.rectangles.unfold(plan.rectangles.fold(values)), values)
        seen = [(window.bias == 0).sum(-1).squeeze(1) for window in plan.windows]
        assert torch.equal(plan.rectangles.unfold(seen), ctx.positions + 1), "a token sees itself and all before it"


def test_paged_refuses_gradients_and_impossible_rows(model):
    ctx = Cache(model, rows=2).context([(0, 0, 3)])
    with pytest.raises(AssertionError, match="no_grad"):
        model(torch.arange(3), ctx)
    with torch.no_grad(), pytest.raises(AssertionError, match="4 tokens but 3 positions"):
        model(torch.arange(4), ctx)
    with torch.no_grad(), pytest.raises(AssertionError, match=r"rows feed \[3\] tokens, 5 were given"):
        model(torch.arange(5), ForwardContext(torch.arange(5), ctx.attention))


def test_fields_of_later_features_are_refused():
    with pytest.raises(NotImplementedError, match="routing"):
        ForwardContext(torch.arange(3), Packed(torch.tensor([0, 3]), 3), routing="replay")
