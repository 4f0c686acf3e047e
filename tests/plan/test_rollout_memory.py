"""Memory of generation: weights by hand, and sequences that a cache holds against counting them one by one."""

import heapq
from dataclasses import replace

import numpy as np
import pytest

from strop.engine.config import GIB
from strop.engine.plan.decode import GenerationEngine
from strop.engine.plan.devices import device_named
from strop.engine.plan.lengths import ResponseLengths
from strop.engine.plan.models import SHAPES
from strop.engine.plan.rollout import most_active, rollout_time, samples_of_a_prompt
from strop.engine.plan.rollout_memory import cache_bytes_per_token, rollout_kv_cache_bytes, rollout_weight_bytes
from strop.engine.plan.run import PlannedRun, RolloutPlan


@pytest.mark.parametrize(
    "model, plan, gigabytes",
    [
        # Parameters in billions: outside the layers' matrices (vocabulary matrices, the router and norms), and inside.
        ("qwen3-8b", {"weights_dtype_bytes": 1}, 2 * 1.2450 + 6.9458),
        ("llama3-8b", {"weights_dtype_bytes": 1}, 2 * 1.0509 + 6.9793),
        ("qwen3-30b-a3b", {"weights_dtype_bytes": 1}, 2 * 0.6351 + 29.8970),
        ("llama3-70b", {"weights_dtype_bytes": 0.5, "tp": 8}, (2 * 2.1013 + 0.5 * 68.4524) / 8),
        ("llama3-8b", {"weights_dtype_bytes": 4}, 4 * 8.0303),
    ],
)
def test_only_the_layers_matrices_have_less_than_16_bits(model, plan, gigabytes):
    run = PlannedRun(SHAPES[model], 8, rollout=RolloutPlan(**plan))
    assert rollout_weight_bytes(run) == pytest.approx(gigabytes * 1e9, rel=1e-3)


def with_cache(tokens: float, **plan) -> GenerationEngine:
    """Qwen3-8B on 8 engines of one GPU, each with a cache of so many tokens."""
    run = PlannedRun(SHAPES["qwen3-8b"], 8, rollout=RolloutPlan(**plan))
    fraction = (rollout_weight_bytes(run) + tokens * cache_bytes_per_token(run)) / device_named("h100").hbm_bytes
    run = replace(run, rollout=replace(run.rollout, memory_fraction=fraction))
    assert rollout_kv_cache_bytes(run) == pytest.approx(tokens * cache_bytes_per_token(run)) and fraction < 1
    return GenerationEngine.of(run)


def slots(one: GenerationEngine) -> float:
    return most_active(one)


@pytest.mark.parametrize("group, prompt, response", [(16, 8192, 512), (16, 256, 512), (4, 4096, 1024), (1, 4096, 1024)])
def test_a_prompt_is_held_once_for_its_samples(group, prompt, response):
    """Of one length, sequences end together: their cache is full just before, with the prompts of all begun groups."""
    cache_tokens = 40_000
    one = with_cache(
        cache_tokens, prompts_per_step=512 // group * 8, group_size=group, prompt_tokens=prompt,
        mean_response_tokens=response, max_response_tokens=response,
    )  # fmt: skip
    counted = 0
    while -(-(counted + 1) // group) * prompt + (counted + 1) * response <= cache_tokens:
        counted += 1
    # Whole groups are counted, a mean of half a group predicted.
    most_off = 0.02 * counted + (group - 1) / 2 * prompt / (response + prompt / group)
    assert abs(slots(one) - counted) <= most_off + 1


def test_samples_on_other_replicas_share_nothing():
    common = {"prompt_tokens": 4096.0, "mean_response_tokens": 500.0, "response_spread": 0.1, "max_response_tokens": 600}
    alone = with_cache(20_000, prompts_per_step=256, group_size=1, **common)
    assert slots(alone) == pytest.approx(20_000 / (4096 + 500), rel=0.05)
    spread = with_cache(20_000, prompts_per_step=2, group_size=16, **common)
    assert samples_of_a_prompt(spread) == 4, "8 engines have 32 samples of 2 prompts, so 4 of one prompt"
    assert slots(spread) == 4 == rollout_time(spread.run).sequences_per_engine
    whole = with_cache(20_000, prompts_per_step=64, group_size=16, **common)
    assert samples_of_a_prompt(whole) == 16 and slots(whole) > 2 * slots(alone)


@pytest.mark.parametrize("cache_tokens", [60_000, 120_000])
def test_mixed_ages_fill_the_cache_on_average(cache_tokens):
    """Sequences drawn from the distribution, started in order as slots free: prompts stay until their last sample ends."""
    group, prompt, limit = 16, 4096, 2048
    plan = {"prompt_tokens": prompt, "mean_response_tokens": 512.0, "max_response_tokens": limit, "group_size": group}
    one = with_cache(cache_tokens, prompts_per_step=8 * 64, **plan)
    count, samples = int(slots(one)), 16_000
    assert 1 < count < 1024
    lengths = ResponseLengths.of(512.0, limit, one.plan.response_spread)
    drawn = np.exp(lengths.log_mean + lengths.spread * np.random.default_rng(0).standard_normal(samples))
    responses = np.minimum(drawn, limit)
    free, starts = [0.0] * count, np.empty(samples)
    for index, length in enumerate(responses):
        starts[index] = heapq.heappop(free)
        heapq.heappush(free, starts[index] + length)
    ends = starts + responses
    first, last = starts[samples // 4], starts[3 * samples // 4]
    begin, end = np.maximum(starts, first), np.minimum(ends, last)
    decoded = np.where(end > begin, (end - begin) * ((begin + end) / 2 - starts), 0.0).sum()
    begun, ended = starts.reshape(-1, group).min(axis=1), ends.reshape(-1, group).max(axis=1)
    prompt_steps = np.maximum(np.minimum(ended, last) - np.maximum(begun, first), 0.0).sum()
    held_tokens = (decoded + prompt * prompt_steps) / (last - first)
    assert held_tokens == pytest.approx(cache_tokens, rel=0.05)


def test_long_prompts_are_no_reason_for_more_tensor_parallelism():
    """64 x 16 samples with prompts of 8,192 tokens: 2 GPUs an engine hold a replica's 32 prompts, 4 gain little."""
    plan = {"prompt_tokens": 8192.0, "mean_response_tokens": 512.0, "max_response_tokens": 2048, "memory_fraction": 0.85}
    two, four = (rollout_time(PlannedRun(SHAPES["qwen3-32b"], 8, rollout=RolloutPlan(tp=tp, **plan))) for tp in (2, 4))
    cache_tokens = (0.85 * device_named("h100").hbm_bytes - 32.8e9) / (64 * 2 * 4 * 128 * 2)
    assert 16 * 8192 + 256 * 512 < cache_tokens < 256 * 8192 and cache_tokens * 131072 > 20 * GIB
    assert two.sequences_per_engine == 256 and two.waves == 1
    assert two.total_seconds < 1.1 * four.total_seconds
