"""Which generation engines a search looks at, and what each takes: seconds of a step and memory of its GPUs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ..config import InputError, Layout
from .candidates import SearchSpace, divisors
from .decode import GenerationEngine
from .devices import device_named
from .facts import train_flops_per_token
from .memory import colocated_rollout_memory, generating_gpu_bytes, offloads_weights, weight_sync_memory, worst_stage
from .rollout import most_active, rollout_time
from .rollout_fit import rollout_problems
from .rollout_memory import rollout_kv_cache_bytes, rollout_weight_bytes
from .run import PlannedRun
from .weight_sync import weight_sync_time

LARGEST_ROLLOUT_ENGINE_GPUS = 64
"""Of one engine in a search: the largest that the published rollouts have (expert parallelism of slime and verl)."""
MEMORY_FRACTION_STEP, LEAST_MEMORY_FRACTION = 0.1, 0.2
"""Colocated engines get what rollout.memory_fraction says, or so much less."""

LIKELY_UTILIZATION = 0.3
"""Of the peak, by a trainer."""


@dataclass(frozen=True)
class Engines:
    """Generation engines of one kind on their GPUs; for training alone, none."""

    run: PlannedRun
    """With the rollout part decided, everything else open."""
    seconds: float = 0.0
    """Of a GRPO step, for generation, scoring and weight sync; they don't depend on the trainer's layout."""


def engine_groups(base: PlannedRun, space: SearchSpace) -> tuple[list[list[Engines]], list[tuple[PlannedRun, str]]]:
    """(groups of engines, fastest first and of equally fast ones those with least memory; engines whose memory holds no
    sequence, and why).

    A group has one number of training GPUs, and its trainer either stays on the device or leaves it.
    """
    if base.rollout is None:
        return [[Engines(base)]], []
    groups: dict[tuple, list[Engines]] = {}
    failed: dict[tuple, tuple[PlannedRun, str]] = {}
    known: dict[tuple, float] = {}
    for run in rollouts(base, space):
        plan = run.rollout
        kind = _kind(run)
        try:
            # Memory matters only by how many sequences it holds at once.
            key = (*kind, most_active(GenerationEngine.of(run)))
            if key not in known:
                known[key] = rollout_time(run).total_seconds + plan.reward_seconds + weight_sync_time(run).seconds
        except InputError as error:
            failed.setdefault(kind, (run, str(error)))  # of the largest share of memory, which comes first
            continue
        groups.setdefault((run.placement, plan.gpus, plan.offload_training), []).append(Engines(run, known[key]))
    ordered = [
        sorted(group, key=lambda one: (one.seconds, one.run.rollout.memory_fraction, one.run.rollout.tp))
        for group in groups.values()
    ]
    worked = {_kind(one.run) for group in ordered for one in group}
    return ordered, [failure for kind, failure in failed.items() if kind not in worked]


def beside(run: PlannedRun, engines: list[Engines], budget_bytes: float) -> PlannedRun | None:
    """The run, whose own rollout is one of the engines, with the fastest of them that leave its trainer enough memory, and on
    GPUs of their own what lies outside PyTorch."""
    if run.rollout is None:
        return run
    if run.placement == "split":
        fitting = (one.run for one in engines if sum(generating_gpu_bytes(one.run).values()) <= budget_bytes)
        return next((replace(run, rollout=engine.rollout) for engine in fitting), None)
    if run.rollout.shares_weights:
        axes = ("tp", "pp", "ep")
        engines = [one for one in engines if all(getattr(one.run.rollout, axis) == getattr(run.layout, axis) for axis in axes)]
    if run.rollout.weight_sync == "alias":  # what the cache gets depends on the layout too
        for full in (replace(run, rollout=one.run.rollout) for one in engines):
            if worst_stage(colocated_rollout_memory(full)).total_bytes <= budget_bytes:
                return full
        return None
    trainer_bytes = worst_stage(colocated_rollout_memory(run)).total_bytes - _device_bytes(run)
    syncing_bytes = 0.0
    if offloads_weights(run):
        syncing_bytes = worst_stage(weight_sync_memory(run)).total_bytes - rollout_weight_bytes(run)
    for one in engines:
        needs = (trainer_bytes + _device_bytes(one.run), syncing_bytes + rollout_weight_bytes(one.run))
        if max(needs) <= budget_bytes:
            return replace(run, rollout=one.run.rollout)
    return None


def likely_seconds(engines: list[Engines]) -> float:
    """Of a step: of the engines, and of a trainer as fast as most are. It only orders what is looked at."""
    run, plan, fastest = engines[0].run, engines[0].run.rollout, engines[0].seconds
    if plan is None:
        return 0.0
    length, passes = run.training.attention_length_tokens, plan.train_epochs + (plan.old_logprobs + plan.reference) / 3
    tokens = plan.samples * (plan.prompt_tokens + plan.mean_response_tokens)
    peak = run.training_gpus * device_named(run.device).bf16_flops_per_second
    learner = passes * tokens * train_flops_per_token(run.shape, length) / (LIKELY_UTILIZATION * peak)
    return max(fastest, learner) if plan.steps_ahead else fastest + learner


def with_own_engines(run: PlannedRun) -> PlannedRun:
    """With engines that generate with the trainer's weights: those of its degrees."""
    if not run.rollout.shares_weights:
        return run
    layout = run.layout
    return replace(run, rollout=replace(run.rollout, tp=layout.tp, pp=layout.pp, ep=layout.ep))


def _kind(run: PlannedRun) -> tuple:
    """Of its engines: all but their share of memory and where the trainer is meanwhile."""
    plan = run.rollout
    return (run.placement, plan.gpus, plan.tp, plan.pp, plan.ep)


def _device_bytes(run: PlannedRun) -> float:
    """On a generating GPU, whatever trains beside."""
    return rollout_weight_bytes(run) + rollout_kv_cache_bytes(run)


def rollouts(base: PlannedRun, space: SearchSpace) -> Iterator[PlannedRun]:
    """`base` with every placement and layout of its rollout engines that the model and the GPUs divide over.

    Engines that generate with the trainer's weights (weight_sync alias, local_copy) have its degrees, so the layout of
    training follows them.
    """
    node_gpus = device_named(base.device).gpus_per_node
    for placement in space.placements:
        if placement == "colocated":
            # Only GPUs of their own can generate ahead; beside them, those that take turns are ranked as they are.
            ahead = 0 if "split" in space.placements else base.rollout.steps_ahead
            for offload in space.offload_training or ((True,) if base.rollout.offload_training else (True, False)):
                plan = replace(base.rollout, offload_training=offload, steps_ahead=ahead)
                yield from _engines(replace(base, placement=placement, rollout=plan), space)
            continue
        unit = node_gpus if base.gpus > node_gpus else 1
        counts = {round(base.gpus * share / unit) * unit for share in space.split_shares}
        for gpus in sorted(count for count in counts if 0 < count < base.gpus):
            plan = replace(base.rollout, gpus=gpus, offload_training=False)
            yield from _engines(replace(base, placement=placement, rollout=plan), space)


def _engines(run: PlannedRun, space: SearchSpace) -> Iterator[PlannedRun]:
    shape, plan, gpus = run.shape, run.rollout, run.rollout_gpus
    most = min(gpus, LARGEST_ROLLOUT_ENGINE_GPUS)
    pps = divisors(gpus, shape.num_layers) if plan.shares_weights else [plan.pp]
    experts = [1] if shape.moe is None else divisors(shape.moe.num_experts, most)
    for tp, ep, pp in product(space.rollout_tp or divisors(gpus, most), space.rollout_ep or experts, pps):
        one = replace(run, rollout=replace(plan, tp=tp, ep=ep, pp=pp))
        if plan.shares_weights:
            layout = Layout(tp=tp, sp=tp > 1, pp=pp, ep=ep, etp=tp if ep == 1 and shape.moe else 1, dp=gpus // (tp * pp))
            one = replace(one, layout=layout)
        if gpus % one.rollout.engine_gpus or any(rollout_problems(one)):
            continue
        for fraction in sorted(space.memory_fractions, reverse=True) or _memory_fractions(run):
            yield replace(one, rollout=replace(one.rollout, memory_fraction=fraction))


def _memory_fractions(run: PlannedRun) -> list[float]:
    most = run.rollout.memory_fraction
    if run.placement == "split":
        return [most]
    steps = int((most - LEAST_MEMORY_FRACTION) / MEMORY_FRACTION_STEP + 1e-9)
    return [round(most - step * MEMORY_FRACTION_STEP, 4) for step in range(max(0, steps) + 1)]
