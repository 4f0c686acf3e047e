"""Sampling: the random numbers, the drawn distribution, truncation, and independence of everything but the key."""

import time

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from strop.engine.protocols import Sampling
from strop.engine.rollout.philox import philox4x32, uniform
from strop.engine.rollout.sampling import CHUNK, SamplingRows, chunk_masses, invert_cdf, sample
from strop.engine.rollout.truncation import Truncation

CPU = torch.device("cpu")
TINY = 2.0**-53


def draw(logits, samplings, ids=None, positions=None):
    ids = list(range(len(logits))) if ids is None else ids
    positions = torch.zeros(len(logits), dtype=torch.int64) if positions is None else positions
    return sample(logits.clone(), SamplingRows.of(samplings, ids, CPU), positions)


def random_logits(rows, vocab, scale=3.0, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def test_philox_gives_the_published_vectors():
    """tests/kat_vectors of the Random123 distribution, the three lines 'philox4x32 10': counter, key -> output."""
    vectors = """
    00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
    ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
    243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
    """
    words = torch.tensor([[int(word, 16) for word in line.split()] for line in vectors.strip().splitlines()])
    assert torch.equal(philox4x32(words[:, :4].T, words[:, 4:6].T), words[:, 6:].T)


def test_uniforms_are_uniform_and_use_all_64_bits_of_seed_and_id():
    ids = torch.arange(50_000)
    u = uniform(torch.full_like(ids, 7), ids, torch.zeros_like(ids))
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u.float(), bins=100, min=0, max=1)
    chi_square = ((counts - 500) ** 2 / 500).sum().item()
    assert 99 - 4 * 14 < chi_square < 99 + 4 * 14  # 99 degrees of freedom, standard deviation 14
    keys = [(7, 1, 0), (7, 1, 1), (7, 2, 0), (8, 1, 0), (7, 1 + 2**32, 0), (7 + 2**32, 1, 0), (-1, 1, 0), (7, 2**63 - 1, 0)]
    seeds, sample_ids, positions = torch.tensor(keys).T
    assert len(set(uniform(seeds, sample_ids, positions).tolist())) == len(keys)


@pytest.mark.parametrize("setting", [{}, {"temperature": 1.5, "top_k": 40}, {"top_p": 0.8}, {"temperature": 0.8, "min_p": 0.1}])
def test_draws_follow_the_distribution(setting):
    """Chi-square of 100,000 draws against the exact probabilities, both tails (vocabulary of 300: 2 1/3 chunks)."""
    sampling, draws, vocab = Sampling(**setting), 100_000, 300
    logits = random_logits(1, vocab, scale=1.0)
    counts = torch.zeros(vocab)
    for start in range(0, draws, 20_000):
        ids = list(range(start, start + 20_000))
        counts += torch.bincount(draw(logits.expand(len(ids), -1), [sampling] * len(ids), ids).tokens, minlength=vocab)
    expected = expected_distribution(logits, sampling)[0].exp() * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5, f"{chi_square:.1f}, {freedom} degrees of freedom"


def expected_distribution(logits, sampling):
    """Log-probabilities after the warpers of transformers, in its order."""
    scores = logits
    if sampling.temperature != 1:
        scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    return scores.double().log_softmax(-1)


def test_truncation_and_logprobs_are_those_of_transformers():
    """Every combination in one batch, each row with its own setting; sharp to nearly flat rows of 5000 tokens."""
    samplings = [
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for temperature in (1.0, 0.7, 1.4)
        for top_k in (0, 1, 20, 3000)
        for top_p in (1.0, 0.9, 0.3)
        for min_p in (0.0, 0.1)
    ]
    logits = random_logits(len(samplings), 5000) * torch.linspace(0.05, 1.5, len(samplings)).unsqueeze(1)
    rows = SamplingRows.of(samplings, list(range(len(samplings))), CPU)
    drawn = sample(logits.clone(), rows, torch.zeros(len(samplings), dtype=torch.int64))
    masks = dict(zip(drawn.truncated_rows.tolist(), drawn.keep_mask, strict=True))
    assert drawn.keep_mask.shape == (len(samplings) - 3, 5000)  # 3 settings of 72 cut nothing
    raw = logits.double().log_softmax(-1)
    for row, sampling in enumerate(samplings):
        expected = expected_distribution(logits[row : row + 1], sampling)[0]
        token = drawn.tokens[row]
        if row in masks:
            assert torch.equal(masks[row], expected > -torch.inf), sampling
        assert drawn.logprobs[row] == pytest.approx(expected[token].item(), abs=2e-6), sampling
        assert drawn.raw_logprobs[row] == pytest.approx(raw[row, token].item(), abs=2e-6), sampling


def test_ties_are_cut_by_token_id():
    equal = torch.zeros(1, 8)
    assert draw(equal, [Sampling(top_k=3)]).keep_mask[0].tolist() == [True] * 3 + [False] * 5
    assert draw(equal, [Sampling(top_p=0.5)]).keep_mask[0].tolist() == [True] * 4 + [False] * 4
    assert draw(equal, [Sampling(min_p=0.5)]).keep_mask[0].all()
    some = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]])
    assert draw(some, [Sampling(top_k=4)]).keep_mask[0].tolist() == [False, True, True, True, True, False]
    rounded = random_logits(64, 500, scale=1.0).bfloat16().float()
    assert torch.equal(draw(rounded, [Sampling(top_k=1)] * 64).tokens, rounded.argmax(1))


@pytest.mark.parametrize("num_candidates", [1, 7, 128])
def test_truncation_does_not_depend_on_how_many_logits_are_ranked_first(num_candidates):
    settings = [Sampling(top_k=5), Sampling(top_p=0.97), Sampling(min_p=0.02), Sampling(top_k=100, top_p=0.5, temperature=2.0)]
    logits = random_logits(4, 640, scale=1.0).bfloat16().float()  # with ties
    whole = Truncation.of(settings, CPU)
    narrow = Truncation(**{**vars(whole), "candidates": (num_candidates,)})
    mass = (logits - logits.amax(1, keepdim=True)).double().div(whole.temperature).exp().sum(1, keepdim=True)
    assert torch.equal(whole.kept(logits, mass), narrow.kept(logits, mass))


def test_a_row_is_the_same_in_any_batch():
    """Bit for bit: reversed, alone, in halves, and with other settings in the neighbouring rows."""
    logits = random_logits(12, 1000)
    settings = [Sampling(temperature=t, top_k=k, seed=3) for t in (1.0, 0.0, 0.7) for k in (0, 5)] * 2
    positions = torch.arange(12)

    def rows(order):
        drawn = draw(logits[order], [settings[i] for i in order], [100 + i for i in order], positions[order])
        return {i: values for i, *values in zip(order, drawn.tokens, drawn.logprobs, drawn.raw_logprobs, strict=True)}

    together = rows(list(range(12)))
    for split in ([list(reversed(range(12)))], [list(range(6)), list(range(6, 12))], [[i] for i in range(12)]):
        parts = {i: values for order in split for i, values in rows(order).items()}
        assert parts == together


def test_shards_of_whole_chunks_give_the_same_masses():
    """What tensor parallelism will gather: bit-equal chunk masses for 1, 2, 3, 4 and 12 shards of the vocabulary."""
    weights = random_logits(5, 12 * CHUNK).exp()
    whole = chunk_masses(weights)
    for shards in (2, 3, 4, 12):
        parts = [chunk_masses(part.contiguous()) for part in weights.chunk(shards, dim=1)]
        assert torch.equal(torch.cat(parts, dim=1), whole)


def test_extreme_uniforms_never_draw_a_zero_probability_token():
    """u = 0, just above it, and the largest below 1; mass at either end of the vocabulary, in one token, and spread out."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.zeros(4 * CHUNK) for _ in range(4)]
    rows[0][0] = rows[1][-1] = rows[2][200] = 1.0
    rows[3][130:133] = torch.tensor([1e-30, 1.0, 1e-38])
    for _ in range(500):
        sparse = torch.rand(4 * CHUNK, generator=generator) < 0.1
        rows.append(torch.rand(4 * CHUNK, generator=generator) ** 30 * sparse)
    weights = torch.stack(rows)
    for u in (0.0, TINY, 0.5, 1 - TINY):
        tokens = invert_cdf(weights, chunk_masses(weights), torch.full((len(rows),), u, dtype=torch.float64))
        assert (weights.gather(1, tokens.unsqueeze(1)) > 0).all(), u
        assert tokens[:3].tolist() == [0, 4 * CHUNK - 1, 200]
    first = invert_cdf(weights, chunk_masses(weights), torch.zeros(len(rows), dtype=torch.float64))
    assert torch.equal(first, (weights > 0).int().argmax(1))


def test_a_draw_just_below_and_above_each_boundary():
    """u on either side of every cumulative probability picks the neighbouring tokens: the inverse CDF in vocabulary order."""
    weights = torch.rand(1, 3 * CHUNK, generator=torch.Generator().manual_seed(2)) + 0.1
    cumulative = weights.double().cumsum(1)[0] / weights.double().sum()
    tokens = torch.arange(3 * CHUNK - 1)
    many = weights.expand(len(tokens), -1).contiguous()
    assert torch.equal(invert_cdf(many, chunk_masses(many), cumulative[:-1] - 1e-6), tokens)
    assert torch.equal(invert_cdf(many, chunk_masses(many), cumulative[:-1] + 1e-6), tokens + 1)


def test_degenerate_rows():
    certain = torch.full((3, 300), -torch.inf)
    certain[:, 7] = torch.tensor([0.0, 1e4, -1e4])
    drawn = draw(certain, [Sampling(), Sampling(temperature=0.1), Sampling(temperature=0)])
    assert drawn.tokens.tolist() == [7, 7, 7] and drawn.logprobs.tolist() == [0, 0, 0]
    two = certain.clone()
    two[:, 5] = two[:, 7]
    assert draw(two, [Sampling(top_k=50)] * 3).keep_mask.sum(1).tolist() == [2, 2, 2]
    huge = torch.tensor([[1e4, 1e4 - 1, -1e4] + [-1e4] * 5])
    drawn = draw(huge, [Sampling()])
    assert drawn.logprobs[0] == pytest.approx([-0.31326, -1.31326][drawn.tokens[0]], abs=1e-4)
    for bad in (torch.nan, torch.inf):
        poisoned = torch.zeros(1, 300)
        poisoned[0, 3] = bad
        for sampling in (Sampling(), Sampling(temperature=0), Sampling(top_p=0.5), Sampling(top_k=3)):
            assert draw(poisoned, [sampling]).logprobs.isnan().all()
    assert draw(torch.full((1, 300), -torch.inf), [Sampling()]).logprobs.isnan().all()


def test_greedy_logprobs_are_those_of_temperature_one():
    logits = random_logits(4, 300)
    drawn = draw(logits, [Sampling(temperature=0, top_k=3, top_p=0.5)] * 4)
    assert torch.equal(drawn.tokens, logits.argmax(1)) and drawn.keep_mask is None
    assert torch.allclose(drawn.logprobs, logits.log_softmax(1).amax(1), atol=1e-6)
    assert torch.equal(drawn.logprobs, drawn.raw_logprobs)


def test_cost_for_32_rows_of_49152(record_property):
    """A decode step of the 135M model costs about 120 ms; sampling must stay a few per cent of it (CPU time)."""
    logits, scratch = random_logits(32, 49152), torch.empty(32, 49152)
    positions = torch.zeros(32, dtype=torch.int64)
    for setting, limit_ms in (({}, 20), ({"temperature": 0.7}, 25), ({"top_k": 50}, 60)):
        rows = SamplingRows.of([Sampling(**setting)] * 32, list(range(32)), CPU)
        times = []
        for _ in range(7):
            start = time.process_time()
            sample(logits, rows, positions, scratch)
            times.append((time.process_time() - start) * 1e3)
        record_property(str(setting), round(min(times), 2))
        assert min(times) < limit_ms, f"{setting}: {min(times):.1f} ms"
