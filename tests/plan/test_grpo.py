"""A GRPO step's parts, placements and staleness; packing; whole runs."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.engine.config import InputError, Layout
from strop.engine.plan.collectives import collective_seconds
from strop.engine.plan.devices import device_named
from strop.engine.plan.grpo import LEARNING_PARTS, forward_seconds, grpo_step, host_copy_seconds, optimizer_step_run, whole_run
from strop.engine.plan.layer_time import Work
from strop.engine.plan.models import SHAPES
from strop.engine.plan.packing import packed_sequences
from strop.engine.plan.run import PlannedRun, RolloutPlan, TrainingPlan
from strop.engine.plan.training import chunk_times, train_step

ONE_RANK = Layout()


def planned(all_gpus: int = 16, layout: Layout = ONE_RANK, sequence: int = 4608, **rollout) -> PlannedRun:
    placement = "split" if rollout.get("gpus") else "colocated"
    dp = (all_gpus - rollout.get("gpus", 0)) // (layout.tp * layout.cp * layout.pp)
    training = TrainingPlan(sequence_length_tokens=sequence, global_batch_sequences=48 * dp, recompute=("layer",))
    plan = RolloutPlan(**rollout)
    return PlannedRun.of(SHAPES["qwen3-8b"], all_gpus, layout=layout, training=training, rollout=plan, placement=placement)


@pytest.mark.parametrize("rollout", [{}, {"gpus": 8}, {"gpus": 8, "steps_ahead": 1}, {"gpus": 8, "steps_ahead": 4}])
@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2), Layout(tp=2, sp=True), Layout(cp=2)])
def test_parts_make_the_step(rollout, layout):
    step = grpo_step(planned(layout=layout, reward_seconds=3.0, **rollout))
    assert step.step_seconds == pytest.approx(sum(step.parts_seconds.values())) and min(step.parts_seconds.values()) >= 0
    assert step.tokens_per_second_per_gpu * 16 * step.step_seconds == pytest.approx(1024 * (256 + 1024)) == step.tokens
    waits = step.parts_seconds.get("rollout_wait", 0.0)
    assert waits == 0 or step.rollout_idle_seconds == 0, "one side waits for the other, not both"


@settings(max_examples=20, deadline=None)
@given(
    rollout_gpus=st.sampled_from((4, 8, 12)), mean=st.floats(300, 3000), spread=st.floats(0.1, 1.2),
    ahead=st.integers(1, 8), continuous=st.booleans(),
)  # fmt: skip
def test_working_ahead_is_never_slower_than_in_turn(rollout_gpus, mean, spread, ahead, continuous):
    common = {"gpus": rollout_gpus, "mean_response_tokens": mean, "response_spread": spread}
    in_turn = grpo_step(planned(**common))
    stale = grpo_step(planned(steps_ahead=ahead, continuous=continuous, **common))
    assert stale.step_seconds <= in_turn.step_seconds
    assert stale.step_seconds >= max(stale.rollout.total_seconds, sum(stale.parts_seconds[name] for name in LEARNING_PARTS))


@settings(max_examples=15, deadline=None)
@given(gpus=st.sampled_from((8, 16, 32)), mean=st.floats(300, 3000), more=st.floats(1.05, 1.3))
def test_longer_responses_take_longer_and_more_gpus_do_not(gpus, mean, more):
    shorter, longer = (grpo_step(planned(gpus, mean_response_tokens=tokens)).step_seconds for tokens in (mean, mean * more))
    wider = grpo_step(planned(2 * gpus, mean_response_tokens=mean)).step_seconds
    # Packing is in whole sequences and micro-batches in whole numbers a replica: a longer mean may pack a little better.
    assert longer >= shorter * 0.98 and wider <= shorter * 1.02


def test_what_is_not_computed_costs_nothing():
    step = grpo_step(planned(weight_sync="alias", reference=False, old_logprobs=False))
    zero = ("reference_logprobs", "old_logprobs", "weight_sync", "switch", "offload", "reward")
    assert all(step.parts_seconds[name] == 0 for name in zero)
    offloaded = grpo_step(planned(offload_training=True)).parts_seconds
    kept = grpo_step(planned()).parts_seconds
    assert offloaded["offload"] > 0 == kept["offload"] and offloaded["reference_logprobs"] > kept["reference_logprobs"]


def test_engines_on_the_trainers_weights_leave_them_where_they_are():
    alias, copied = (planned(weight_sync=tier, offload_training=True) for tier in ("alias", "local_copy"))
    moved = {run: host_copy_seconds(optimizer_step_run(run), ("optimizer",)) for run in (alias, copied)}
    weights_seconds = host_copy_seconds(optimizer_step_run(copied), ("weights",))
    assert grpo_step(alias).parts_seconds["offload"] == moved[alias]
    assert grpo_step(copied).parts_seconds["offload"] == pytest.approx(moved[copied] + weights_seconds) and weights_seconds > 0


def test_training_is_that_of_the_optimizer_steps():
    run = planned(optimizer_steps=4, train_epochs=2)
    step, one = grpo_step(run), optimizer_step_run(run)
    assert step.parts_seconds["training"] == pytest.approx(8 * train_step(one).step_seconds)
    assert one.rollout is None and one.training.global_batch_sequences % one.layout.dp == 0
    capacity = 4 * one.step_tokens
    assert 1 <= capacity / step.tokens < 1.2, "packed sequences hold the samples, with little left over"


def test_log_probs_take_a_forward_pass():
    for layout in (Layout(), Layout(pp=4), Layout(tp=2, sp=True)):
        one = optimizer_step_run(planned(layout=layout))
        parts = train_step(one).parts_seconds
        busy = parts["forward"] + parts["exposed_tensor"] / 3
        assert busy * 0.95 <= forward_seconds(one) < 0.6 * train_step(one).step_seconds


def test_log_probs_of_interleaved_chunks_wait_for_one_chunk_of_each_rank():
    """12 chunks of 3 layers on 4 ranks: 3 passes a micro-batch, and 3 more until the last rank has begun."""
    run = PlannedRun.of(
        SHAPES["qwen3-8b"], 4, layout=Layout(pp=4, vpp=3, schedule="interleaved"),
        training=TrainingPlan(global_batch_sequences=8),
    )  # fmt: skip
    first, *inner, last = (chunk.stage_seconds().forward for chunk in chunk_times(Work(run, device_named("h100"))))
    assert max(inner) == pytest.approx(min(inner)) and first < 1.1 * inner[0]
    # The last rank is the busiest, since it has the head.
    assert forward_seconds(run) == pytest.approx(first + 2 * inner[0] + 8 * (2 * inner[0] + last), rel=0.02)


def test_split_trains_on_fewer_gpus():
    colocated, split = grpo_step(planned(16)), grpo_step(planned(16, gpus=8))
    assert split.parts_seconds["training"] > 1.8 * colocated.parts_seconds["training"]
    assert split.rollout_idle_seconds > 0 and "switch" not in split.parts_seconds


def test_packing():
    assert packed_sequences([60, 50, 40, 30, 20], 100) == 2
    assert packed_sequences([51] * 8, 100) == 8 and packed_sequences([50] * 8, 100) == 4
    lengths = [float(37 * i % 1000 + 1) for i in range(500)]
    assert math.ceil(sum(lengths) / 2000) <= packed_sequences(lengths, 2000) <= 1.02 * sum(lengths) / 2000 + 1


def test_micro_batches_follow_padding_and_schedule():
    short = {"mean_response_tokens": 2600, "response_spread": 0.1}
    padded, as_long = (optimizer_step_run(planned(pad_packed=padded, **short)).training for padded in (True, False))
    assert padded.sequence_length_tokens == 4608 > as_long.sequence_length_tokens > 2700
    assert padded.global_batch_sequences == as_long.global_batch_sequences
    assert as_long.packed_length_tokens < 3000
    interleaved = optimizer_step_run(planned(layout=Layout(pp=4, vpp=2, schedule="interleaved")))
    assert interleaved.microbatches % 4 == 0


def test_whole_runs_add_up():
    run = planned(16, gpus=8, steps_ahead=1)
    one, hundred = whole_run(run), whole_run(replace(run, steps=100))
    assert hundred.gpu_hours == pytest.approx(100 * one.gpu_hours) == pytest.approx(hundred.seconds * 16 / 3600)
    assert hundred.tokens == pytest.approx(100 * grpo_step(run).tokens)
    kilowatts = hundred.energy_kwh / (hundred.seconds / 3600)
    assert 0.2 * 16 * 0.7 <= kilowatts <= 0.9 * 16 * 0.7
    training = PlannedRun.of(SHAPES["qwen3-8b"], 16, layout=Layout(tp=2, sp=True), steps=10)
    assert whole_run(training).energy_kwh == pytest.approx(whole_run(training).gpu_hours * 0.7 * 0.9)
    assert whole_run(training).tokens == 10 * training.step_tokens


@pytest.mark.parametrize(
    "run, message",
    [
        (PlannedRun.of(SHAPES["qwen3-8b"], 16), "only trains"),
        (replace(planned(), training=TrainingPlan(sequence_length_tokens=4000)), "at least 4096"),
    ],
)
def test_mistakes_name_the_fix(run, message):
    with pytest.raises(InputError, match=message):
        grpo_step(run)


def test_engines_of_an_on_policy_split_wait_while_the_others_learn():
    """Not for the weights, which they receive themselves."""
    step = grpo_step(planned(16, gpus=8, reward_seconds=3.0))
    learning = sum(step.parts_seconds[name] for name in ("data", *LEARNING_PARTS))
    assert step.parts_seconds["weight_sync"] > 0 and step.rollout_idle_seconds == pytest.approx(learning)


@pytest.mark.parametrize("ahead", [0, 1])
def test_energy_is_that_of_what_each_gpu_does(ahead):
    """Of 700 W boards: 8 GPUs generate at 0.65 and wait at 0.2, 8 learn at 0.9 and wait at 0.2."""
    run = planned(16, gpus=8, steps_ahead=ahead)
    step = grpo_step(run)
    learning = sum(step.parts_seconds[name] for name in LEARNING_PARTS)
    generating = step.rollout.total_seconds
    shares = 0.65 * generating + 0.2 * (step.step_seconds - generating) + 0.9 * learning + 0.2 * (step.step_seconds - learning)
    assert whole_run(run).energy_kwh == pytest.approx(8 * shares * 700 / 3.6e6)


def test_log_probs_of_one_micro_batch_pass_all_hops():
    """One sequence through 4 ranks: every rank's forward pass in turn, and 3 messages between them."""
    run = PlannedRun.of(
        SHAPES["qwen3-8b"], 4, layout=Layout(pp=4),
        training=TrainingPlan(global_batch_sequences=1, sequence_length_tokens=65536),
    )  # fmt: skip
    work = Work(run, device_named("h100"))
    passes = sum(chunk.stage_seconds().forward for chunk in chunk_times(work))
    hop_seconds = collective_seconds(device_named("h100"), "send_recv", 2 * 65536 * 4096, 4, 4)
    assert forward_seconds(run) - passes == pytest.approx(3 * hop_seconds, rel=1e-6)
