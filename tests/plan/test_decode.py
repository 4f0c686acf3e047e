"""Steps of a generation engine against calculations by hand: weights and cache read, drafts, experts, its pipeline filled."""

import numpy as np
import pytest

from strop.engine.plan import decode
from strop.engine.plan.decode import (
    CACHE_BYTES_FRACTION,
    CACHE_LAYER_SECONDS,
    HOST_STEP_SECONDS,
    PREFILL_CHUNK_TOKENS,
    GenerationEngine,
)
from strop.engine.plan.devices import device_named
from strop.engine.plan.efficiency import HBM_FRACTION, LAUNCH_SECONDS, grouped_gemm_seconds
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, RolloutPlan


def engine(model: str, gpus: int, **plan) -> GenerationEngine:
    return GenerationEngine.of(PlannedRun(SHAPES[model], gpus, rollout=RolloutPlan(memory_fraction=0.95, **plan)))


@pytest.mark.parametrize("weight_bytes", [0.5, 1, None])
def test_a_product_of_few_rows_takes_the_time_to_read_its_matrix(weight_bytes):
    h100 = device_named("h100")
    read = (weight_bytes or 2) * 16384 * 16384 / (HBM_FRACTION["hopper"] * h100.hbm_bytes_per_second)
    seconds = grouped_gemm_seconds(h100, 1, 1, 16384, 16384, "bf16", sustained=False, weight_bytes=weight_bytes)
    assert seconds == pytest.approx(read + LAUNCH_SECONDS["hopper"], rel=0.01)


@pytest.mark.parametrize("model, tp, matrices", [("llama3-70b", 2, 68.45e9), ("qwen3-32b", 1, 31.2e9)])
def test_few_sequences_decode_faster_by_the_bytes_that_narrow_weights_save(model, tp, matrices):
    sixteen, eight, four = (engine(model, 8, tp=tp, weights_dtype_bytes=width) for width in (2, 1, 0.5))
    bandwidth = HBM_FRACTION["hopper"] * device_named("h100").hbm_bytes_per_second * tp
    for wide, narrow, saved_bytes in ((sixteen, eight, 1), (eight, four, 0.5)):
        saved = wide.rows_seconds(4) - narrow.rows_seconds(4)
        assert saved == pytest.approx(saved_bytes * matrices / bandwidth, rel=0.15)


def test_four_bits_save_reading_and_no_multiplication():
    """W4A16: at a few thousand rows the tensor cores decide, and they multiply in bf16."""
    sixteen, eight, four = (
        engine("qwen3-32b", 8, weights_dtype_bytes=width).prefill_seconds(8192, 512) for width in (2, 1, 0.5)
    )
    assert four == pytest.approx(sixteen, rel=0.01) and eight < 0.8 * four
    a100 = PlannedRun.of(SHAPES["qwen3-8b"], 8, device="a100", rollout=RolloutPlan(weights_dtype_bytes=0.5))
    assert GenerationEngine.of(a100).precision == "bf16", "no FP8 tensor cores are needed"


@pytest.mark.parametrize("chunks", [1, 3, 100])
def test_prompts_go_through_every_stage_of_a_pipeline(chunks):
    """One chunk takes as long as without a pipeline, each further one a stage's time."""
    common = {"tp": 8, "weights_dtype_bytes": 1}
    whole = engine("llama3.1-405b", 32, **common).prefill_seconds(chunks * PREFILL_CHUNK_TOKENS, 2048)
    staged = engine("llama3.1-405b", 32, pp=4, **common).prefill_seconds(chunks * PREFILL_CHUNK_TOKENS, 2048)
    one_chunk = whole / chunks - HOST_STEP_SECONDS
    assert staged - chunks * HOST_STEP_SECONDS == pytest.approx(one_chunk * (chunks + 3) / 4, rel=0.04), "and hops beside"


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_the_cache_of_all_layers_is_read_once_a_step(tp, pp):
    """Qwen3-8B: 2 x 8 heads of 128 in 36 layers and 2 bytes, over tp; pipeline ranks read theirs at the same time."""
    one = engine("qwen3-8b", 8, tp=tp, pp=pp)
    read_bytes = 2 * 8 * 128 * 36 * 2 * 64_000 / tp / pp
    seconds = float(one.cache_seconds(np.array([32.0]), np.array([64_000.0]))[0]) - 36 * CACHE_LAYER_SECONDS
    assert seconds == pytest.approx(read_bytes / (CACHE_BYTES_FRACTION * 3.35e12))


def test_a_draft_takes_a_layer_and_the_head():
    """Qwen3-8B with one row: reading 192.9 M weights of a layer and 622 M of the head in bf16, with little beside."""
    plain, drafted = (engine("qwen3-8b", 1, speculative_tokens=tokens).rows_seconds(1) for tokens in (1.0, 2.0))
    read_seconds = 2 * (192.9e6 + 151_936 * 4096) / 3.35e12
    assert read_seconds < drafted - plain < 1.5 * read_seconds


def test_experts_compute_the_tokens_of_all_replicas(monkeypatch):
    """8 replicas of 4 sequences choose 8 of 128 experts each: 128 x (1 - (15 / 16)^32) = 112 of them, 14 a GPU, 32 rows."""
    seen = set()

    def record(device, groups, m, n, k, precision, **_):
        seen.add((groups, round(m * groups), n, k))
        return 0.0

    monkeypatch.setattr(decode, "grouped_gemm_seconds", record)
    engine("qwen3-30b-a3b", 8, ep=8).rows_seconds(4)
    assert {(14, 32, 2 * 768, 2048), (14, 32, 2048, 768)} <= seen
