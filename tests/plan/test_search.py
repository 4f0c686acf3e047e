"""The search against the same space tried one by one, its reasons against the runs they are about, and its budget."""

import re
from dataclasses import replace

import pytest

from strop.engine.config import InputError, Layout
from strop.engine.plan.bounds import Bounds
from strop.engine.plan.candidates import SearchSpace, layouts, recompute_choices
from strop.engine.plan.check import check, works
from strop.engine.plan.devices import DEVICES
from strop.engine.plan.memory import memory_per_rank, training_memory, worst_stage
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, RolloutPlan, TrainingPlan
from strop.engine.plan.search import search
from strop.engine.plan.stage_balance import balanced_stage_layers
from strop.engine.plan.training import train_step
from strop.engine.plan.validation import problems

QWEN = SHAPES["qwen3-30b-a3b"]
HBM_BYTES = DEVICES["h100"].hbm_bytes
SMALL = SearchSpace(
    tp=(1, 2), cp=(1, 2), cp_kinds=("ring",), pp=(1, 2, 4), ep=(1, 8, 16), micro_batch_sequences=(1, 4),
    schedules=("1f1b", "interleaved", "dualpipev"), vpp=(2, 3), offload_optimizer=(False, True),
)  # fmt: skip
PLAN = TrainingPlan(global_batch_sequences=64)
ROLLOUT = RolloutPlan(
    prompts_per_step=16, group_size=8, prompt_tokens=100, mean_response_tokens=600, max_response_tokens=2048,
    offload_training=True, reference=False,
)  # fmt: skip


def everything(space: SearchSpace, gpus: int) -> list[PlannedRun]:
    """Each layout of the space with each recomputation and offload, in no clever order."""
    base = PlannedRun(QWEN, gpus, training=PLAN)
    runs = []
    for run in layouts(base, space):
        for recompute in recompute_choices(QWEN, space):
            for offload in space.offload_optimizer:
                training = replace(run.training, recompute=recompute, offload_optimizer=offload)
                runs.append(replace(run, training=training))
    return runs


@pytest.fixture(scope="module")
def found():
    return search(QWEN, 16, training=PLAN, space=SMALL)


def test_settings_of_the_experts_exchange_exclude_no_layout_without_one():
    """They have no effect where nothing is exchanged, and a run with them isn't valid there."""
    base = PlannedRun(QWEN, 16, training=replace(PLAN, overlap_expert=True, dispatch_dtype_bytes=1, expert_imbalance=1.2))
    runs = [run for run in layouts(base, replace(SMALL, tp=(1,), cp=(1,), pp=(1,), micro_batch_sequences=(1,)))]
    assert {run.layout.ep: problems(run) for run in runs} == {1: [], 8: [], 16: []}
    assert {run.layout.ep for run in runs if run.training.overlap_expert} == {8, 16}


def test_winner_is_the_fastest_of_all_tried_one_by_one(found):
    working = [run for run in everything(SMALL, 16) if not problems(run) and works(run, HBM_BYTES)]
    seconds = sorted(train_step(run).step_seconds for run in working)
    assert len(working) > 100
    best = [prediction.step_seconds for _, prediction in found.ranked]
    assert best == sorted(best)
    assert best[0] == pytest.approx(seconds[0], rel=1e-12)
    assert found.evaluated_count < len(working) / 2, "the bounds save nothing"


def test_ranked_layouts_work_and_are_predicted_again_alike(found):
    for run, prediction in found.ranked:
        assert check(run) == []
        assert train_step(run).step_seconds == prediction.step_seconds


def test_rejections_are_truthful(found):
    """Every reason is one that the run has: its problem, or memory above the budget with any allowed setting."""
    memory = [one for one in found.rejected if one.cause == "memory"]
    invalid = [one for one in found.rejected if one.cause != "memory"]
    assert memory and invalid
    for run, reason in invalid[::5]:
        assert reason in {str(problem) for problem in problems(run)}
    for one in memory[::5]:
        assert problems(one.run) == []
        worst = worst_stage(memory_per_rank(one.run))
        assert worst.total_bytes == one.need_bytes > HBM_BYTES
        assert one.at_least_bytes <= one.need_bytes * (1 + 1e-9)
        assert f"stage {worst.stage.index} needs {worst.total_bytes / 2**30:.1f} GiB" in one.reason
        for recompute in recompute_choices(QWEN, SMALL):
            other = replace(one.run, training=replace(one.run.training, recompute=recompute))
            assert worst_stage(memory_per_rank(other)).total_bytes > HBM_BYTES


def test_reasons_are_counted(found):
    assert sum(count for _, count in found.reasons()) == len(found.rejected)
    counts = [count for _, count in found.reasons()]
    assert counts == sorted(counts, reverse=True)


def test_search_is_deterministic(found):
    again = search(QWEN, 16, training=PLAN, space=SMALL)
    assert again.ranked == found.ranked
    assert again.rejected == found.rejected


def test_budget_too_small_says_the_smallest_need():
    space = replace(SMALL, tp=(1, 2), cp=(1,), pp=(1, 2))
    none = search(QWEN, 16, training=PLAN, space=space, memory_bytes=8e9)
    assert none.ranked == ()
    needs = [worst_stage(memory_per_rank(run)).total_bytes for run in everything(space, 16) if not problems(run)]
    assert none.smallest_need_bytes == pytest.approx(min(needs))
    assert search(QWEN, 16, training=PLAN, space=space, memory_bytes=min(needs) + 1).ranked


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name, gpus", [("qwen3-30b-a3b", 16), ("deepseek-v3", 512), ("llama3-70b", 64)])
def test_bounds_are_below_predictions_and_near_them(name, gpus, overlap):
    shape = SHAPES[name]
    overlap = overlap and shape.moe is not None
    training = TrainingPlan(global_batch_sequences=1024, overlap_expert=overlap, recompute=("norms", "activation"))
    runs = [run for run in layouts(PlannedRun(shape, gpus, training=training), SearchSpace()) if run.microbatches]
    bounds, ratios = Bounds(shape), []
    for run in [run for run in runs[:: max(1, len(runs) // 40)] if not problems(run)]:
        step = train_step(run)
        at_least_seconds = bounds.at_least_seconds(run) + bounds.update_at_least_seconds(run)
        assert at_least_seconds <= step.step_seconds * (1 + 1e-9), run.layout
        assert bounds.at_least_bytes(run) <= worst_stage(training_memory(run)).total_bytes * (1 + 1e-9), run.layout
        ratios.append(at_least_seconds / step.step_seconds)
    assert sorted(ratios)[len(ratios) // 2] > 0.75


@pytest.mark.parametrize("placement", ["colocated", "split"])
def test_grpo_layouts_are_ranked_with_their_engines(placement):
    space = SearchSpace(
        tp=(1, 2), cp=(1,), pp=(1, 2), ep=(8,), schedules=("1f1b",), micro_batch_sequences=(1,), rollout_tp=(1, 2, 4),
        rollout_ep=(1, 8), offload_optimizer=(True,), placements=(placement,), split_shares=(0.5,),
    )  # fmt: skip
    rollout = ROLLOUT if placement == "colocated" else replace(ROLLOUT, offload_training=False, steps_ahead=1)
    result = search(QWEN, 32, training=TrainingPlan(sequence_length_tokens=4096), rollout=rollout, space=space)
    assert result.ranked
    times = [prediction.step_seconds for _, prediction in result.ranked]
    assert times == sorted(times)
    for run, prediction in result.ranked:
        assert run.placement == placement and check(run) == []
        assert run.rollout_gpus == (16 if placement == "split" else 32)
        assert prediction.step_seconds == pytest.approx(sum(prediction.parts_seconds.values()))


def test_default_adam_of_30b_does_not_fit_8_gpus_and_the_check_says_what_does():
    """scale.md of the states: 76.8 GB on each of 8 GPUs, before activations and the CUDA context."""
    run = PlannedRun.of(QWEN, 8, layout=Layout(ep=8), training=TrainingPlan(global_batch_sequences=64, recompute=("layer",)))
    states = worst_stage(memory_per_rank(run)).parts_bytes
    assert sum(states[part] for part in ("weights", "gradients", "optimizer")) == pytest.approx(76.8e9, rel=0.01)
    (problem,) = check(run)
    assert problem.setting == "device" and "optimizer" in problem.reason
    assert problem.nearest
    for change in problem.nearest:
        need_gib = float(re.search(r"\(([\d.]+) GiB", change)[1])
        assert need_gib * 2**30 <= HBM_BYTES * 1.001


def test_check_names_the_wrong_degree():
    run = PlannedRun(
        SHAPES["llama3-8b"], 12, layout=Layout(tp=6, sp=True, dp=2), training=TrainingPlan(global_batch_sequences=12)
    )
    assert any(problem.setting == "layout.tp" and problem.nearest for problem in check(run))


def test_unknown_device_is_a_mistake():
    with pytest.raises(InputError, match="h300"):
        search(QWEN, 8, device="h300")


def test_stages_are_balanced_against_the_head():
    assert balanced_stage_layers(SHAPES["deepseek-v3"], 16, 4096) == (*(4,) * 15, 1)
    assert balanced_stage_layers(QWEN, 1, 4096) == (48,)
    stages = balanced_stage_layers(QWEN, 4, 4096)
    assert sum(stages) == 48 and stages[-1] < min(stages[:-1])
