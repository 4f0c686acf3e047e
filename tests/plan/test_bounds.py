"""What a search sorts and rejects by is never above what is predicted, where ranks and chunks are least alike."""

import pytest

from strop.engine.config import Layout
from strop.engine.plan.bounds import Bounds
from strop.engine.plan.grpo import forward_seconds
from strop.engine.plan.memory import training_memory, worst_stage
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, TrainingPlan
from strop.engine.plan.training import train_step

V3_STAGES = (4, *(4,) * 14, 1)
CASES = [
    ("qwen3-30b-a3b", Layout(pp=4, vpp=8, schedule="interleaved", ep=16), (), {}),
    ("qwen3-30b-a3b", Layout(pp=4, vpp=5, schedule="interleaved", ep=16), (), {"overlap_expert": True}),
    ("llama3-70b", Layout(tp=4, sp=True, pp=8, vpp=4, schedule="interleaved"), (), {}),
    ("llama3-70b", Layout(pp=4, vpp=4, schedule="interleaved"), (), {"recompute": ("layer",), "recompute_layers": 6}),
    ("deepseek-v3", Layout(pp=16, schedule="dualpipev", ep=16), (), {}),
    ("deepseek-v3", Layout(pp=16, schedule="dualpipe", ep=16), V3_STAGES, {"overlap_expert": True}),
    ("deepseek-v3", Layout(pp=16, schedule="zero-bubble", ep=16), V3_STAGES, {}),
    ("qwen3-30b-a3b", Layout(pp=4, ep=16), (0, 24, 24, 0), {}),
    ("gpt-oss-120b", Layout(pp=4, ep=16), (0, 12, 12, 12), {}),
    ("qwen3-30b-a3b", Layout(pp=4, vpp=2, schedule="interleaved", ep=16), (1, 23, 23, 1), {}),
]


@pytest.mark.parametrize("name, layout, stage_layers, training", CASES)
def test_bounds_where_ranks_differ(name, layout, stage_layers, training):
    plan = TrainingPlan(global_batch_sequences=2048, **training)
    run = PlannedRun.of(SHAPES[name], 256, layout=layout, stage_layers=stage_layers, training=plan)
    bounds, most_bytes = Bounds(run.shape), worst_stage(training_memory(run)).total_bytes
    assert bounds.at_least_bytes(run) <= most_bytes * (1 + 1e-9)
    if not plan.recompute_layers:  # else all layers might be those that keep less
        assert bounds.at_least_bytes(run) > 0.85 * most_bytes
    step_seconds = train_step(run).step_seconds
    assert bounds.at_least_seconds(run) + bounds.update_at_least_seconds(run) <= step_seconds * (1 + 1e-9)


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_bounds_hold_how_a_pipeline_fills_and_drains(schedule):
    """Four micro-batches on eight ranks: a forward pass alone takes 4 + 7 stages' time, not 4, and so does a step."""
    layout = Layout(pp=8, schedule=schedule, dp=1)
    training = TrainingPlan(global_batch_sequences=4, overlap_data=False)
    run = PlannedRun(SHAPES["qwen3-32b"], 8, layout=layout, training=training)
    bounds = Bounds(run.shape)
    assert 0.95 < bounds.at_least_forward_seconds(run) / forward_seconds(run) <= 1 + 1e-9
    passes = train_step(run)
    seconds = passes.step_seconds - passes.parts_seconds["optimizer"] - passes.parts_seconds["exposed_data"]
    assert 0.9 < bounds.at_least_seconds(run) / seconds <= 1 + 1e-9
