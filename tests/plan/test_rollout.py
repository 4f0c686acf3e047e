"""Generation: decode steps against published points, and what must hold of every rollout whatever the constants are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.engine.config import InputError
from strop.engine.plan.decode import HOST_SEQUENCE_SECONDS, HOST_STEP_SECONDS, GenerationEngine
from strop.engine.plan.devices import device_named
from strop.engine.plan.lengths import ResponseLengths
from strop.engine.plan.models import SHAPES
from strop.engine.plan.rollout import rollout_time
from strop.engine.plan.rollout_memory import (
    cache_bytes_per_token,
    holds_a_sequence,
    rollout_weight_bytes,
    sequence_cache_bytes,
)
from strop.engine.plan.run import PlannedRun, RolloutPlan

ANOMALY = 1.01
"""Slots that free at other times may order sequences worse (Graham's anomalies): a comparison of two waved rollouts may be off
by this factor."""


def engine(model: str, gpus: int, device: str = "h100", **plan) -> GenerationEngine:
    return GenerationEngine.of(PlannedRun(SHAPES[model], gpus, device=device, rollout=RolloutPlan(**plan)))


def rollout(model: str = "qwen3-8b", gpus: int = 8, **plan):
    return rollout_time(PlannedRun(SHAPES[model], gpus, rollout=RolloutPlan(**plan)))


# (model, GPUs, device, plan, sequences, context, seconds of a step on the GPU alone)
STEPS = [
    # aiconfigurator, static decode on h100_sxm
    ("llama3-8b", 1, "h100", {}, 256, 1024, 19.6e-3),
    ("qwen3-30b-a3b", 2, "h100", {"tp": 2, "ep": 2}, 128, 2048, 18.9e-3),
    ("qwen3-32b", 4, "h100", {"tp": 4}, 64, 2048, 12.7e-3),
    # SGLang 0.5.7, DeepSeek-R1 FP8 on 8 H200, tp 8, 1k in and out (InferenceX issue #870)
    ("deepseek-v3", 8, "h200", {"tp": 8, "weights_dtype_bytes": 1}, 16, 1536, 17.2e-3),
    ("deepseek-v3", 8, "h200", {"tp": 8, "weights_dtype_bytes": 1}, 32, 1536, 25.6e-3),
    ("deepseek-v3", 8, "h200", {"tp": 8, "weights_dtype_bytes": 1}, 64, 1536, 34.6e-3),
]


@pytest.mark.parametrize("model, gpus, device, plan, sequences, context, seconds", STEPS)
def test_decode_steps_match_published_points(model, gpus, device, plan, sequences, context, seconds):
    predicted = engine(model, gpus, device, **plan).step_seconds(sequences, context)
    on_gpu = predicted - HOST_STEP_SECONDS - HOST_SEQUENCE_SECONDS * sequences
    assert on_gpu == pytest.approx(seconds, rel=0.25), f"{on_gpu * 1e3:.1f} ms, published {seconds * 1e3:.1f}"


def test_a_single_sequence_reads_all_weights_once():
    shape = SHAPES["llama3-8b"]
    floor = 2 * (8.03e9 - shape.vocab_size * shape.hidden_size) / 3.35e12
    assert floor < engine("llama3-8b", 1).step_seconds(1, 100) < 2.5 * floor


@pytest.mark.parametrize("model, plan", [("qwen3-8b", {}), ("qwen3-30b-a3b", {"tp": 2}), ("deepseek-v3", {"tp": 32})])
def test_a_sequence_costs_less_in_a_larger_batch_and_a_step_more(model, plan):
    one = engine(model, 32, **plan)
    seconds = np.array([one.step_seconds(n, 1000) for n in (1, 4, 16, 64, 256)])
    assert (np.diff(seconds) >= 0).all() and (np.diff(seconds / [1, 4, 16, 64, 256]) < 0).all()


def test_decode_pays_for_contexts_and_for_python():
    one = engine("qwen3-8b", 1)
    assert one.step_seconds(64, 4000) > one.step_seconds(64, 1000)
    assert engine("qwen3-8b", 1, cuda_graphs=False).step_seconds(1, 100) > 2 * one.step_seconds(1, 100)


def test_window_layers_read_no_more_than_their_window():
    one = engine("gpt-oss-20b", 1)
    short, long, longer = (float(one.cache_seconds(np.array([32.0]), np.array([32.0 * n]))[0]) for n in (1000, 2000, 3000))
    assert longer - long == pytest.approx(long - short, rel=1e-6)
    every_layer_full = 2000 * 32 * cache_bytes_per_token(one.run) / 3.35e12
    assert (longer - short) < 0.7 * every_layer_full


@settings(max_examples=25, deadline=None)
@given(
    mean=st.floats(200, 3000), more=st.floats(1.02, 1.3), spread=st.floats(0.2, 1.2), prompts=st.sampled_from((16, 64, 256)),
    slots=st.sampled_from((16, 128, 1024)),
)  # fmt: skip
def test_longer_responses_and_more_samples_are_never_faster(mean, more, spread, prompts, slots):
    plan = {"response_spread": spread, "max_response_tokens": 4096, "max_sequences": slots, "prompts_per_step": prompts}
    shorter = rollout(mean_response_tokens=mean, **plan)
    longer = rollout(mean_response_tokens=mean * more, **plan)
    fuller = rollout(mean_response_tokens=mean, **plan | {"prompts_per_step": 2 * prompts})
    assert longer.total_seconds * ANOMALY >= shorter.total_seconds <= fuller.total_seconds * ANOMALY


@settings(max_examples=25, deadline=None)
@given(mean=st.floats(200, 3000), gpus=st.sampled_from((8, 16, 32)), slots=st.sampled_from((16, 128, 1024)))
def test_more_gpus_of_the_same_engines_are_never_slower(mean, gpus, slots):
    plan = {"mean_response_tokens": mean, "max_sequences": slots, "tp": 2}
    assert rollout(gpus=2 * gpus, **plan).total_seconds <= rollout(gpus=gpus, **plan).total_seconds * ANOMALY


@pytest.mark.parametrize("slots", [16, 1024])
def test_parts_make_the_total_and_the_curve_falls_to_the_last_sequence(slots):
    time = rollout(prompts_per_step=32, group_size=16, mean_response_tokens=800, max_sequences=slots)
    assert time.total_seconds == pytest.approx(time.prefill_seconds + time.decode_seconds + time.tail_seconds)
    assert min(time.prefill_seconds, time.decode_seconds, time.tail_seconds) > 0
    seconds, active = np.array(time.curve).T
    assert seconds[-1] == pytest.approx(time.decode_seconds + time.tail_seconds) and (np.diff(seconds) > 0).all()
    assert active.max() == 8 * min(slots, 64) and active[-1] >= 8 and time.waves == pytest.approx(64 / min(slots, 64))
    if slots == 1024:
        assert (np.diff(active) <= 0).all()


def test_tokens_decoded_are_those_of_the_samples():
    plan = {"prompts_per_step": 64, "group_size": 16, "mean_response_tokens": 900, "response_spread": 0.7, "max_sequences": 32}
    time = rollout(**plan)
    assert time.tokens_per_second_per_gpu * 8 * time.total_seconds == pytest.approx(1024 * 900)


def test_a_long_tail_costs_time_and_continuous_generation_hides_it():
    plan = {"mean_response_tokens": 1000, "max_response_tokens": 16384}
    even, spread = rollout(response_spread=0.1, **plan), rollout(response_spread=1.0, **plan)
    assert spread.total_seconds > 2 * even.total_seconds and spread.tail_seconds > 0.2 * spread.total_seconds
    ahead = {"response_spread": 1.0, "gpus": 8, **plan}

    def split(steps_ahead: int):
        return rollout_time(
            PlannedRun(SHAPES["qwen3-8b"], 16, placement="split", rollout=RolloutPlan(steps_ahead=steps_ahead, **ahead))
        )

    assert split(1).total_seconds == split(0).total_seconds == spread.total_seconds
    assert split(2).total_seconds < 0.6 * spread.total_seconds and split(2).tail_seconds == 0


def test_a_cache_too_small_makes_waves():
    roomy, tight = (
        rollout("llama3-70b", 8, tp=4, prompts_per_step=64, mean_response_tokens=4000, max_response_tokens=8192, **extra)
        for extra in ({}, {"memory_fraction": 0.47})
    )
    assert roomy.waves == 1 or roomy.waves < tight.waves / 2
    assert tight.waves > 2 and tight.total_seconds > 1.5 * roomy.total_seconds


def test_data_parallel_attention_and_drafting():
    wide = rollout("deepseek-v3", 64, ep=32, weights_dtype_bytes=1, prompts_per_step=64, mean_response_tokens=1000)
    assert wide.sequences_per_engine == 512
    plain, drafted = (
        rollout("deepseek-v3", 32, tp=32, prompts_per_step=4, mean_response_tokens=1000, speculative_tokens=accepted)
        for accepted in (1.0, 1.8)
    )
    assert 1 < plain.total_seconds / drafted.total_seconds < 1.8


@pytest.mark.parametrize(
    "model, gpus, plan, message",
    [
        ("deepseek-v3", 8, {"tp": 8}, "more rollout tp, pp or ep"),
        ("qwen3-8b", 8, {"mean_response_tokens": 5000}, "at most 3840"),
    ],
)
def test_what_only_a_prediction_finds_is_refused(model, gpus, plan, message):
    with pytest.raises(InputError, match=message):
        rollout(model, gpus, **plan)


def test_training_alone_has_no_rollout():
    with pytest.raises(InputError, match="only trains"):
        rollout_time(PlannedRun(SHAPES["qwen3-8b"], 8))


def test_a_cache_must_hold_the_longest_sequence():
    """As vLLM, which refuses to start where its cache is smaller than one sequence of max_model_len."""
    plan = {"tp": 2, "prompts_per_step": 64, "max_response_tokens": 8192}
    run = PlannedRun(SHAPES["llama3-70b"], 32, rollout=RolloutPlan(memory_fraction=0.9, **plan))
    one, weights, device = float(sequence_cache_bytes(run, 256 + 8192)), rollout_weight_bytes(run), device_named("h100")
    for share, fits_ in ((0.999, False), (1.001, True), (1e-9, False)):
        fraction = (weights + share * one) / device.hbm_bytes
        tight = PlannedRun(SHAPES["llama3-70b"], 32, rollout=RolloutPlan(memory_fraction=fraction, **plan))
        assert holds_a_sequence(tight) == fits_, share
        if fits_:
            assert rollout_time(tight).sequences_per_engine >= 1
        else:
            with pytest.raises(InputError, match="a sequence of 8,448 tokens takes"):
                rollout_time(tight)


def test_window_layers_keep_no_more_than_their_window():
    run = PlannedRun(SHAPES["gpt-oss-20b"], 8, rollout=RolloutPlan(tp=2))
    windows, every = 12 * 128, 12 * 8192  # of 24 layers every second one has a window of 128 tokens
    assert sequence_cache_bytes(run, 8192) / cache_bytes_per_token(run) == pytest.approx((windows + every) / 24)
    assert sequence_cache_bytes(run, 100) / cache_bytes_per_token(run) == 100


def test_every_engine_computes_a_whole_prompt():
    few, many = (rollout(gpus=gpus, prompts_per_step=8, group_size=128, prompt_tokens=8000.0) for gpus in (8, 512))
    assert many.prefill_seconds == few.prefill_seconds


def test_the_longest_response_of_all_engines_ends_a_rollout():
    """8 times the engines with as many samples each: those of each are as long, but the longest of all of them is longer, and
    is decoded alone in the end."""
    plan = {"mean_response_tokens": 1000, "max_response_tokens": 16384, "response_spread": 1.0}
    few, many = (rollout(gpus=gpus, prompts_per_step=8 * gpus, **plan) for gpus in (8, 64))
    lengths = ResponseLengths.of(1000, 16384, 1.0)
    more = lengths.expected_max_tokens(64 * 128) - lengths.expected_max_tokens(8 * 128)
    assert more > 2000 and many.total_seconds - few.total_seconds == pytest.approx(more * few.step_seconds[1], rel=0.1)
