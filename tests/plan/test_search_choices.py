"""What a search varies beside the trainer's layout: placements with samples ahead, precisions; and what it says it didn't."""

from dataclasses import replace

import pytest

from strop.engine.config import InputError
from strop.engine.plan.candidates import SearchSpace
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import RolloutPlan, TrainingPlan
from strop.engine.plan.search import search

QWEN = SHAPES["qwen3-30b-a3b"]
SMALL = SearchSpace(tp=(1, 2), cp=(1,), pp=(1, 2), ep=(8,), schedules=("1f1b",), micro_batch_sequences=(1,), rollout_tp=(1, 2))


def test_split_layouts_ahead_are_ranked_with_colocated_ones_in_turn():
    space = replace(SMALL, placements=("colocated", "split"), split_shares=(0.5,))
    both = search(QWEN, 16, rollout=RolloutPlan(steps_ahead=1), space=space, ranked=100)
    assert {(run.placement, run.rollout.steps_ahead) for run, _ in both.ranked} == {("colocated", 0), ("split", 1)}
    assert "rollout.steps_ahead" not in {one.cause for one in both.rejected}
    alone = (
        search(
            QWEN, 16, rollout=RolloutPlan(), space=replace(space, placements=("colocated",), split_shares=SMALL.split_shares)
        )
        .ranked[0][1]
        .step_seconds
    )
    colocated = min(step.step_seconds for run, step in both.ranked if run.placement == "colocated")
    assert colocated == alone
    with pytest.raises(InputError, match="steps-ahead"):
        search(QWEN, 16, rollout=RolloutPlan(steps_ahead=1), space=SMALL)


def test_precisions_are_searched_where_they_are_allowed():
    space = replace(SMALL, rollout_tp=(), offload_optimizer=(True,))
    bf16, fp8 = (search(QWEN, 16, training=TrainingPlan(precision=one), space=space) for one in ("bf16", "fp8-blockwise"))
    assert {run.training.precision for run, _ in bf16.ranked} == {"bf16"}
    both = search(QWEN, 16, space=replace(space, precisions=("bf16", "fp8-blockwise")))
    best = {one.ranked[0][0].training.precision: one.ranked[0][1].step_seconds for one in (bf16, fp8)}
    run, step = both.ranked[0]
    assert step.step_seconds == best[run.training.precision] == min(best.values())
    with pytest.raises(InputError, match="precision"):
        search(QWEN, 16, device="a100", space=replace(space, precisions=("fp8-blockwise",)))


def test_what_is_held_fixed_is_said_with_the_flag_that_frees_it():
    held = search(QWEN, 16, space=replace(SMALL, rollout_tp=(), moment_dtype_bytes=(2, 4))).held
    assert (
        held["--space.offload-optimizer"] == "optimizer on the device wherever that fits"
        and held["--space.precisions"] == "bf16"
    )
    assert "--space.moment-dtype-bytes" not in held and "--space.placements" not in held
    assert {"--training.dispatcher", "--training.overlap-expert"} <= set(held)


def test_where_generation_dominates_few_steps_are_predicted():
    """Layouts of the trainer differ by less than a thousandth of such a step; still none that is faster is left out."""
    rollout = RolloutPlan(
        prompts_per_step=16, group_size=8, prompt_tokens=64, mean_response_tokens=8000, max_response_tokens=30000,
        offload_training=True, reference=False,
    )  # fmt: skip
    training = TrainingPlan(sequence_length_tokens=32768)
    space = SearchSpace(tp=(1, 2), cp=(1, 2, 4), pp=(1, 2, 4), ep=(8, 16), micro_batch_sequences=(1,), rollout_tp=(1, 2))
    result = search(QWEN, 32, training=training, rollout=rollout, space=space)
    first, last = result.ranked[0][1], result.ranked[-1][1]
    assert first.rollout.total_seconds > 0.7 * first.step_seconds
    assert result.evaluated_count < 100 and result.open_count == 0
    assert first.step_seconds <= last.step_seconds
