"""Seconds of a GRPO step and what a whole run costs: generation, scoring, log-probs, training and weight sync put together.

Colocated, all GPUs take turns. Split, some only generate; with steps_ahead both sides work at once and the slower one is the
step. Tokens a second count prompts and responses, over all GPUs (NeMo-RL docs/about/performance-summary.md).
"""

from dataclasses import dataclass, replace

from ..config import InputError
from .devices import device_named
from .layer_time import Work
from .packing import packed_training
from .rollout import RolloutTime, rollout_time
from .run import PlannedRun, RolloutPlan
from .schedules import forward_only_seconds
from .states import rank_state_bytes
from .training import StepTime, chunk_times, pipeline_hop, train_step
from .weight_sync import WeightSyncTime, weight_sync_time

SAMPLE_SECONDS = 2e-3
"""Host time of one sample outside generation: collecting, padding, advantages, sending to the trainer's ranks (NeMo-RL PR
#1052: 4.0 s of a step, for its recipes' 2,048 samples)."""
SWITCH_SECONDS = 3.0
"""Colocated: engines sleep, wake and drop their cache; allocators give memory back, twice a step. Fitted, with ..."""
HOST_COPY_FRACTION = 0.25
"""... what copies of optimizer states and weights into pageable host memory achieve of PCIe's bandwidth, all GPUs of a node at
once, on NeMo-RL v0.3's refit seconds (5, 14, 7, 12)."""
POWER_FRACTION = {"training": 0.9, "rollout": 0.65, "waiting": 0.2}
"""Of the board's limit: training draws nearly all of it, decoding is bound by memory (POLCA, arXiv 2308.12908, section 3), and
an idle GPU that holds weights keeps its clocks."""
LEARNING_PARTS = ("old_logprobs", "reference_logprobs", "training")
"""Of GrpoStep.parts_seconds: what the training GPUs compute."""


@dataclass(frozen=True)
class GrpoStep:
    """One step; the parts add up to it."""

    parts_seconds: dict[str, float]
    """Colocated and on-policy split: everything in turn. With steps_ahead: of the training GPUs, rollout_wait among it."""
    step_seconds: float
    tokens: float
    """Prompts and responses of the step's samples."""
    tokens_per_second_per_gpu: float
    rollout: RolloutTime
    training: StepTime
    """Of one optimizer step; a GRPO step has optimizer_steps x train_epochs of them."""
    weight_sync: WeightSyncTime
    rollout_idle_seconds: float
    """Split: for which the generating GPUs wait for the trainer."""


@dataclass(frozen=True)
class WholeRun:
    """Of all steps. GPUs alone: without hosts, network, cooling (PUE) and restarts."""

    seconds: float
    gpu_hours: float
    energy_kwh: float
    tokens: float
    """Trained on; a GRPO run's prompts and responses."""


def optimizer_step_run(run: PlannedRun) -> PlannedRun:
    """The run as its trainer sees one optimizer step of a GRPO step (`packed_training`).

    Raises InputError where the longest sample doesn't fit into a sequence.
    """
    plan, limit = run.rollout, run.training.sequence_length_tokens
    if plan.longest_sample_tokens > limit:
        raise InputError(
            f"a prompt of {plan.prompt_tokens:g} and a response of {plan.max_response_tokens} tokens don't fit into "
            f"sequence_length_tokens {limit}: give at least {plan.longest_sample_tokens}"
        )
    return replace(run, training=packed_training(run), rollout=None, gpus=run.training_gpus, placement="colocated")


def grpo_step(run: PlannedRun) -> GrpoStep:
    """Predict one GRPO step of a run whose settings `PlannedRun.of` has checked.

    Raises InputError where it has no rollout, its engines have no memory for a KV cache, or its longest sample doesn't fit into
    a packed sequence.
    """
    plan = run.rollout
    if plan is None:
        raise InputError("this run only trains: give it a rollout to plan a GRPO step")
    rollout, sync, step_run = rollout_time(run), weight_sync_time(run), optimizer_step_run(run)
    training = train_step(step_run)
    forward = forward_seconds(step_run) * plan.optimizer_steps
    reference_seconds = forward + (host_copy_seconds(step_run, ("weights",)) if plan.offload_training else 0.0)
    learner = {
        "data": plan.samples * SAMPLE_SECONDS,
        "old_logprobs": forward if plan.old_logprobs else 0.0,
        "reference_logprobs": reference_seconds if plan.reference else 0.0,
        "training": training.step_seconds * plan.optimizer_steps * plan.train_epochs,
        "weight_sync": sync.seconds,
    }
    generator_seconds = rollout.total_seconds + plan.reward_seconds
    idle = 0.0
    if plan.steps_ahead:
        learner_seconds = sum(learner.values())
        parts = {"rollout_wait": max(0.0, generator_seconds + sync.seconds - learner_seconds), **learner}
        idle = max(0.0, learner_seconds - generator_seconds - sync.seconds)
    else:
        parts = {
            "prefill": rollout.prefill_seconds,
            "decode": rollout.decode_seconds,
            "tail": rollout.tail_seconds,
            "reward": plan.reward_seconds,
            **learner,
        }
        if run.placement == "colocated":
            parts["switch"] = 0.0 if plan.weight_sync == "alias" else SWITCH_SECONDS
            parts["offload"] = host_copy_seconds(step_run, offloaded_states(plan)) if plan.offload_training else 0.0
        else:
            idle = sum(learner.values()) - sync.seconds
    seconds = sum(parts.values())
    tokens = plan.samples * (plan.prompt_tokens + plan.mean_response_tokens)
    return GrpoStep(parts, seconds, tokens, tokens / seconds / run.gpus, rollout, training, sync, idle)


def forward_seconds(run: PlannedRun) -> float:
    """Log-probs of all micro-batches of an optimizer step: forward passes alone."""
    work, layout = Work(run, device_named(run.device)), run.layout
    stages = [chunk.stage_seconds() for chunk in chunk_times(work)]
    return forward_only_seconds(layout.schedule, stages, layout.pp, run.microbatches, pipeline_hop(work)[1])


def offloaded_states(plan: RolloutPlan) -> tuple[str, ...]:
    """The states (fields of StateBytes) that offload_training moves: engines that generate with the trainer's weights keep
    them on the device."""
    return ("optimizer",) if plan.weight_sync == "alias" else ("weights", "optimizer")


def host_copy_seconds(run: PlannedRun, states: tuple[str, ...]) -> float:
    """These states (fields of StateBytes) of the fullest rank to the host's memory and back."""
    device = device_named(run.device)
    moved = max(sum(getattr(rank_state_bytes(run, stage), name) for name in states) for stage in run.stages())
    return 2 * moved / (HOST_COPY_FRACTION * device.pcie_bytes_per_second)


def whole_run(run: PlannedRun) -> WholeRun:
    """All steps of a run. Energy: each GPU's board power by what it does (POWER_FRACTION)."""
    device = device_named(run.device)
    if run.rollout is None:
        step = train_step(run).step_seconds
        watt_seconds, tokens = run.gpus * step * POWER_FRACTION["training"], run.step_tokens
    else:
        grpo = grpo_step(run)
        step, tokens = grpo.step_seconds, grpo.tokens
        generating = grpo.rollout.total_seconds * run.rollout_gpus
        learning = sum(grpo.parts_seconds[name] for name in LEARNING_PARTS) * run.training_gpus
        waiting = step * run.gpus - generating - learning
        watt_seconds = sum(
            seconds * POWER_FRACTION[name]
            for name, seconds in (("rollout", generating), ("training", learning), ("waiting", waiting))
        )
    seconds = run.steps * step
    joules = run.steps * watt_seconds * device.power_watts
    return WholeRun(seconds, seconds * run.gpus / 3600, joules / 3.6e6, run.steps * tokens)
