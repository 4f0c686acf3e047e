"""The search against the same space tried one by one, its reasons against the runs they are about, and its budget."""

import re
from dataclasses import replace

import pytest

from strop.engine.config import InputError, Layout
from strop.engine.plan.bounds import Bounds
from strop.engine.plan.candidates import SearchSpace, layouts, recompute_choices
from strop.engine.plan.check import check
from strop.engine.plan.devices import DEVICES
from strop.engine.plan.engine_choices import engine_groups
from strop.engine.plan.grpo import grpo_step, optimizer_step_run
from strop.engine.plan.memory import fits, memory_per_rank, training_memory, worst_stage
from strop.engine.plan.models import SHAPES
from strop.engine.plan.packing import with_batch
from strop.engine.plan.run import PlannedRun, RolloutPlan, TrainingPlan
from strop.engine.plan.search import MEMORY_RESERVE, search
from strop.engine.plan.search_layout import OfLayout
from strop.engine.plan.stage_balance import balanced_stage_layers
from strop.engine.plan.training import train_step
from strop.engine.plan.validation import problems

QWEN = SHAPES["qwen3-30b-a3b"]
BUDGET_BYTES = (1 - MEMORY_RESERVE) * DEVICES["h100"].hbm_bytes
SMALL = SearchSpace(
    tp=(1, 2), cp=(1, 2), cp_kinds=("ring",), pp=(1, 2, 4), ep=(1, 8, 16), micro_batch_sequences=(1, 4),
    schedules=("1f1b", "interleaved", "dualpipev"), vpp=(2, 3), fsdp=(False,),
    offload_optimizer=(False, True),
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
    working = [run for run in everything(SMALL, 16) if not problems(run) and fits(run, BUDGET_BYTES)]
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
    for run, reason in ((one.run, one.reason) for one in invalid[::5]):
        assert reason in {str(problem) for problem in problems(run)}
    for one in memory[::5]:
        assert problems(one.run) == []
        worst = worst_stage(memory_per_rank(one.run))
        assert worst.total_bytes == one.need_bytes > BUDGET_BYTES
        assert one.at_least_bytes <= one.need_bytes * (1 + 1e-9)
        assert f"stage {worst.stage.index} needs {worst.total_bytes / 2**30:.1f} GiB" in one.reason
        for recompute in recompute_choices(QWEN, SMALL):
            other = replace(one.run, training=replace(one.run.training, recompute=recompute))
            assert worst_stage(memory_per_rank(other)).total_bytes > BUDGET_BYTES


def test_reasons_are_counted_and_say_which_layout_they_are_about(found):
    groups = found.groups()
    assert sum(group.count for group in groups) == len(found.rejected)
    assert [group.count for group in groups] == sorted((group.count for group in groups), reverse=True)
    assert len({group.cause for group in groups}) == len(groups), "a setting is one group, whatever its values"
    (memory,) = [group for group in groups if group.cause == "memory"]
    assert memory.nearest.need_bytes == min(one.need_bytes for one in found.rejected if one.cause == "memory")
    layout = memory.nearest.run.layout
    (reason,) = [reason for reason, count in found.reasons() if memory.nearest.reason in reason and count == memory.count]
    assert f"dp {layout.dp}" in reason and "micro-batch" in reason


def test_ranked_layouts_leave_the_reserve_and_differ_in_their_degrees(found):
    """Of layouts that differ only in stages, schedule or recomputation people see one."""
    assert found.budget_bytes == pytest.approx(BUDGET_BYTES)
    assert all(worst_stage(memory_per_rank(run)).total_bytes <= BUDGET_BYTES for run, _ in found.ranked)
    layouts_found = [run.layout for run, _ in found.ranked]
    degrees = {(one.tp, one.cp, one.pp, one.ep, one.etp) for one in layouts_found}
    assert len(degrees) == len(layouts_found) > 3


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
    for run in [run for run in runs[:: max(1, len(runs) // 30)] if not problems(run)]:
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
        rollout_ep=(1, 8), offload_optimizer=(True,), placements=(placement,),
        **({"split_shares": (0.5,)} if placement == "split" else {}),
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


def test_unknown_device_is_a_mistake():
    with pytest.raises(InputError, match="h300"):
        search(QWEN, 8, device="h300")


def test_stages_are_balanced_against_the_head():
    assert balanced_stage_layers(SHAPES["deepseek-v3"], 16, 4096) == (*(4,) * 15, 1)
    assert balanced_stage_layers(QWEN, 1, 4096) == (48,)
    stages = balanced_stage_layers(QWEN, 4, 4096)
    assert sum(stages) == 48 and stages[-1] < min(stages[:-1])


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("placement, ahead", [("colocated", 0), ("split", 0), ("split", 1)])
def test_bounds_of_grpo_steps_are_below_predictions_and_near_them(placement, ahead, offload):
    rollout = replace(ROLLOUT, reference=True, optimizer_steps=2, train_epochs=2, steps_ahead=ahead, offload_training=False)
    base = PlannedRun(QWEN, 32, training=TrainingPlan(offload_optimizer=offload), rollout=rollout)
    groups, _ = engine_groups(base, SearchSpace(placements=(placement,)))
    bounds, ratios = Bounds(QWEN), []
    for engines in groups:
        runs = list(layouts(engines[0].run, SearchSpace(micro_batch_sequences=(1, 4), fsdp=(True,))))
        for run in runs[:: max(1, len(runs) // 12)]:
            run = with_batch(run)
            if problems(run):
                continue
            seconds, step_run = grpo_step(run).step_seconds, optimizer_step_run(run)
            before, after = (
                bounds.grpo_at_least_seconds(run, step_run, engines[0].seconds, settled) for settled in (False, True)
            )
            assert before <= after <= seconds * (1 + 1e-9), run.layout
            assert bounds.at_least_bytes(run) <= worst_stage(training_memory(run)).total_bytes * (1 + 1e-9)
            ratios.append(after / seconds)
    assert len(ratios) > 12 and sorted(ratios)[len(ratios) // 2] > 0.8


def test_engines_are_ordered_and_take_no_more_memory_than_they_use():
    groups, failed = engine_groups(PlannedRun(QWEN, 16, rollout=replace(ROLLOUT, offload_training=False)), SearchSpace())
    assert {group[0].run.rollout.offload_training for group in groups} == {False, True} and failed == []
    for group in groups:
        order = [(one.seconds, one.run.rollout.memory_fraction) for one in group]
        assert order == sorted(order)
        assert order[0][1] < RolloutPlan().memory_fraction, "so few sequences fit into less"


@pytest.mark.parametrize("name, fsdp", [("qwen3-8b", ()), ("qwen3-30b-a3b", ()), ("qwen3-30b-a3b", (False,))])
def test_grpo_works_out_of_the_box_on_one_node(name, fsdp):
    """The engines' share of memory, the trainer's states beside them and, if it must be, Adam's place are the search's."""
    space = SearchSpace(pp=(1,), tp=(1,), fsdp=fsdp, rollout_tp=(1, 2))
    result = search(SHAPES[name], 8, rollout=RolloutPlan(), space=space)
    assert result.ranked and result.seconds < 30
    run, predicted = result.ranked[0]
    assert check(run) == [] and grpo_step(run).step_seconds == predicted.step_seconds
    assert run.training.offload_optimizer == (fsdp == (False,)), "Adam goes to the host only where it must"


def test_engines_of_the_trainers_weights_have_its_degrees():
    space = SearchSpace(tp=(1, 2), pp=(1, 2), schedules=("1f1b",), micro_batch_sequences=(1,))
    result = search(SHAPES["qwen3-1.7b"], 8, rollout=replace(ROLLOUT, weight_sync="alias"), space=space)
    assert result.ranked
    for run, _ in result.ranked:
        assert check(run) == [] and (run.rollout.tp, run.rollout.pp) == (run.layout.tp, run.layout.pp)


def test_where_nothing_fits_the_ways_out_work():
    space = SearchSpace(tp=(1,), cp=(1,), pp=(1,), fsdp=(False,), offload_optimizer=(False,), recompute=((),))
    result = search(SHAPES["qwen3-14b"], 8, training=PLAN, space=space)
    assert result.ranked == () and result.ways_out()
    for way in result.ways_out():
        assert check(way.run) == [] and way.need_bytes <= BUDGET_BYTES
        assert train_step(way.run).step_seconds == way.seconds


@pytest.mark.parametrize(
    "space, named",
    [
        ({"pp": (0,)}, "--space.pp 0: must be at least 1"),
        ({"pp": (3,)}, "--space.pp 3: can't divide 8 GPUs"),
        ({"tp": (16,)}, "--space.tp 16: can't divide 8 GPUs and 32 heads; 1, 2, 4, 8 can"),
        ({"tp": (8,), "pp": (8,)}, "no layout"),
        ({"split_shares": (1.0,)}, "--space.split-shares 1: a share is above 0 and below 1"),
        ({"rollout_tp": (2,)}, "--space.rollout-tp has no effect without a rollout"),
        ({"schedules": ()}, "--space.schedules without a value"),
        ({"moment_dtype_bytes": (3,)}, "--space.moment-dtype-bytes 3"),
    ],
)
def test_values_that_no_layout_has_are_mistakes(space, named):
    with pytest.raises(InputError, match=named):
        search(QWEN, 8, space=SearchSpace(**space))


@pytest.mark.parametrize(
    "gpus, training, rollout, named",
    [
        (8, {"sequence_length_tokens": -5}, None, "sequence-length-tokens"),
        (0, {}, None, "gpus"),
        (8, {}, {"response_spread": 100.0}, "response-spread"),
        (8, {}, {"memory_fraction": 2.0}, "memory-fraction"),
        (8, {}, {"steps_ahead": 1}, "steps-ahead"),
        (8, {}, {"gpus": 4}, "rollout.gpus"),
        (8, {}, {"max_response_tokens": 9000}, "sequence-length-tokens"),
    ],
)
def test_mistakes_are_said_once_before_anything_is_searched(gpus, training, rollout, named):
    plan = None if rollout is None else RolloutPlan(**rollout)
    with pytest.raises(InputError, match=named) as mistake:
        search(QWEN, gpus, training=TrainingPlan(**training), rollout=plan)
    assert len(str(mistake.value).splitlines()) == 1


def test_too_few_gpus_are_said_to_be_so():
    result = search(SHAPES["deepseek-v3"], 8, space=SearchSpace(tp=(8,), pp=(1,)))
    reason = result.groups()[0].nearest.reason
    assert result.ranked == ()
    assert re.match(r"weights, gradients and optimizer states alone fill 1\d\d GPUs of 76\.8 GiB, and 8 ", reason)


def test_default_candidates_are_plausible():
    """No degrees that divide no heads, short contexts stay whole, few chunks."""
    runs = [run.layout for run in layouts(PlannedRun(SHAPES["qwen3-8b"], 24, training=PLAN), SearchSpace())]
    assert {run.tp for run in runs} == {1, 2, 4, 8} and {run.cp for run in runs} == {1} and max(run.vpp for run in runs) <= 8


@pytest.mark.parametrize("name", ["qwen3-4b", "llama3-8b"])
def test_bounds_of_fsdp_with_and_without_a_pipeline_do_not_share_what_they_know(name):
    """16 GPUs and two stages of 16 have as many replicas of a layer, but only the first gather its weights in every pass."""
    training = TrainingPlan(fsdp=True, precision="fp8-tensorwise", sequence_length_tokens=1024)
    plain = PlannedRun.of(SHAPES[name], 16, training=training)
    pipeline = PlannedRun.of(SHAPES[name], 32, layout=Layout(pp=2), training=training)
    for runs in ((plain, pipeline), (pipeline, plain)):
        shared = Bounds(SHAPES[name])
        for run in runs:
            at_least_seconds = shared.at_least_seconds(run)
            assert at_least_seconds == Bounds(SHAPES[name]).at_least_seconds(run)
            assert at_least_seconds <= train_step(run).step_seconds


@pytest.mark.parametrize(
    "other, beside_fastest_engines, outdone",
    [
        ({"recompute": ("norms", "activation")}, False, True),
        ({"recompute": ("norms",)}, False, False),  # another part
        ({"recompute": ("layer",)}, False, True),  # holds all parts
        ({"offload_optimizer": True}, True, True),
        ({"offload_optimizer": True}, False, False),  # it makes room for faster engines
        ({"fsdp": True}, True, False),
        ({}, True, True),
    ],
)
def test_what_is_surely_no_faster_than_what_fits_is_not_tried(other, beside_fastest_engines, outdone):
    fits_already = replace(PLAN, recompute=("activation",))
    of_layout = OfLayout(open=1, fitting=[(fits_already, beside_fastest_engines)])
    assert of_layout.outdoes(replace(fits_already, **other)) == outdone


def test_every_layout_is_predicted_rejected_or_outpaced():
    """With one setting a layout, so that each is predicted at most once."""
    space = replace(
        SMALL, micro_batch_sequences=(1,), offload_optimizer=(True,), recompute=(("layer",),), schedules=("1f1b", "dualpipev")
    )
    few = search(QWEN, 16, training=PLAN, space=space, ranked=1)
    candidates = len(list(layouts(PlannedRun(QWEN, 16, training=PLAN), space)))
    assert few.outpaced_count > 0 and few.evaluated_count > 0
    assert few.evaluated_count + len(few.rejected) + few.outpaced_count == candidates


def test_a_limit_of_time_says_what_it_left_open():
    none = search(QWEN, 16, training=PLAN, space=SMALL, limit_seconds=0.0)
    assert (none.ranked, none.evaluated_count, none.outpaced_count) == ((), 0, 0) and none.open_count > 0
    calls = []
    whole = search(QWEN, 16, training=PLAN, space=SMALL, limit_seconds=1e9, progress=lambda *counts: calls.append(counts))
    assert whole.open_count == 0 and whole.open_at_least_seconds == 0.0 and whole.outpaced_count > 0
    assert all(evaluated <= whole.evaluated_count for evaluated, _ in calls)
