"""The optimizer step that samples are packed into: how far a token of it attends."""

import numpy as np
import pytest

from strop.engine.config import Layout
from strop.engine.plan.models import SHAPES
from strop.engine.plan.packing import packed_training
from strop.engine.plan.run import PlannedRun, RolloutPlan, TrainingPlan


@pytest.mark.parametrize("prompt, mean, limit", [(500.0, 500.0, 3500), (4000.0, 500.0, 4000), (256.0, 1024.0, 3840)])
def test_attention_of_packed_samples_costs_what_their_squares_do(prompt, mean, limit):
    """Attention of a step takes the sum of the samples' squared lengths, and its tokens are the sum of the lengths."""
    training = TrainingPlan(sequence_length_tokens=16384)
    rollout = RolloutPlan(prompt_tokens=prompt, mean_response_tokens=mean, max_response_tokens=limit)
    run = PlannedRun.of(SHAPES["qwen3-8b"], 8, layout=Layout(), training=training, rollout=rollout)
    normal = np.random.default_rng(0).standard_normal(200_000)
    low, high = 0.0, float(limit)
    for _ in range(60):  # the lognormal's median, from the mean of what is drawn
        median = (low + high) / 2
        responses = np.minimum(median * np.exp(0.8 * normal), limit)
        low, high = (low, median) if responses.mean() > mean else (median, high)
    samples = prompt + responses
    assert packed_training(run).packed_length_tokens == pytest.approx((samples**2).sum() / samples.sum(), rel=0.01)
