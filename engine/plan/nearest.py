"""The settings nearest to a run's that would fit into memory: as few changed as it takes, fastest first."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from ..config import GIB, InputError
from .bounds import Bounds
from .candidates import RECOMPUTE_CHOICES, SHORTEST_CONTEXT_TOKENS, SearchSpace, divisors, recompute_choices
from .devices import device_named
from .grpo import GrpoStep, grpo_step, optimizer_step_run
from .host_memory import fullest_node
from .memory import fits, generating_gpu_bytes, memory_per_rank, memory_phases, worst_stage
from .packing import with_batch
from .rollout_memory import rollout_kv_cache_bytes, rollout_weight_bytes, sequence_cache_bytes
from .run import PlannedRun
from .stages import even_split
from .text import flag_text, seconds_text
from .training import StepTime, train_step
from .validation import problems

NEAREST = 4
"""Ways that are named, fastest first."""
WIDTH = (1000, 12, 6)
"""Of what doesn't fit yet with one, two, three settings changed: how many get another change, those nearest to fitting first.
After one change that is everything that helps, so that no pair is missed."""
MOST_PREDICTED = 100
"""Steps, of what fits; those that take least at the least first."""
SMALLEST_CHANGE_BYTES = 1e6
"""Of what a rank needs: what changes less doesn't help."""
MEMORY_FRACTIONS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Of rollout.memory_fraction that are tried, beside the least that works."""
Change = tuple[str, str, PlannedRun]
"""The path of a setting, the flags to type, and the run with them."""


@dataclass(frozen=True)
class Working:
    """A changed run that fits."""

    flags: tuple[str, ...]
    run: PlannedRun
    need_bytes: float
    """Of the fullest rank."""
    seconds: float
    """Of a step."""

    def __str__(self) -> str:
        return f"{' '.join(self.flags)} ({self.need_bytes / GIB:.1f} GiB, {seconds_text(self.seconds)} a step)"


@dataclass(frozen=True)
class _Attempt:
    settings: frozenset[str]
    """What was changed."""
    flags: tuple[str, ...]
    run: PlannedRun
    shortage_bytes: float


def predict(run: PlannedRun) -> StepTime | GrpoStep:
    """A step of the run: of training, or with a rollout of GRPO."""
    return train_step(run) if run.rollout is None else grpo_step(run)


def nearest_that_fit(run: PlannedRun, budget_bytes: float) -> list[Working]:
    """Ways to make the run work with the fewest settings changed, fastest first, one for each set of settings; [] where
    len(WIDTH) + 1 of them aren't enough. The work of a step stays the same."""
    attempts = [_Attempt(frozenset(), (), run, _shortage_bytes(run, budget_bytes))]
    for width in (1, *WIDTH):
        following: dict[frozenset[str], _Attempt] = {}
        for attempt in sorted(attempts, key=lambda one: one.shortage_bytes)[:width]:
            for setting, flag, changed in changes(attempt.run):
                flags = (*attempt.flags, flag)
                if setting not in attempt.settings and frozenset(flags) not in following:
                    shortage = _shortage_bytes(changed, budget_bytes)
                    following[frozenset(flags)] = _Attempt(attempt.settings | {setting}, flags, changed, shortage)
        fitting = [one for one in following.values() if fits(one.run, budget_bytes)]
        if fitting:
            return _fastest(fitting)
        most = attempts[0].shortage_bytes if len(attempts) == 1 else max(one.shortage_bytes for one in attempts)
        attempts = [one for one in following.values() if one.shortage_bytes < most - SMALLEST_CHANGE_BYTES]
        if not attempts:
            break
    return []


def _fastest(fitting: list[_Attempt]) -> list[Working]:
    """The fastest for each set of settings, as many as are named. Prediction stops where nothing faster can come, or after
    MOST_PREDICTED."""
    bounds = Bounds(fitting[0].run.shape)
    best: dict[frozenset[str], Working] = {}
    queue = sorted(((_at_least_seconds(bounds, one.run), place, one) for place, one in enumerate(fitting)))
    for at_least_seconds, _, one in islice(queue, MOST_PREDICTED):
        if len(best) >= NEAREST and at_least_seconds >= sorted(way.seconds for way in best.values())[NEAREST - 1]:
            break
        seconds = predict(one.run).step_seconds
        if one.settings not in best or seconds < best[one.settings].seconds:
            need_bytes = worst_stage(memory_per_rank(one.run)).total_bytes
            best[one.settings] = Working(one.flags, one.run, need_bytes, seconds)
    return sorted(best.values(), key=lambda way: way.seconds)[:NEAREST]


def _at_least_seconds(bounds: Bounds, run: PlannedRun) -> float:
    if run.rollout is None:
        return bounds.at_least_seconds(run)
    return bounds.grpo_at_least_seconds(run, optimizer_step_run(run), engine_seconds=0.0, settled=False)


def _shortage_bytes(run: PlannedRun, budget_bytes: float) -> float:
    """What is missing on the fullest rank, over all phases, the engine's cache and its share of the host: less of it is nearer
    to fitting."""
    phases = memory_phases(run)
    needs = [worst_stage(phase).total_bytes for phase in phases]
    missing = fullest_node(run, phases).shortage_bytes / min(device_named(run.device).gpus_per_node, run.gpus)
    if run.rollout is not None:
        if run.placement == "split":
            needs.append(sum(generating_gpu_bytes(run).values()))
        share = least_memory_fraction(run) - run.rollout.memory_fraction
        missing += max(0.0, share) * device_named(run.device).hbm_bytes
    return missing + sum(max(0.0, need - budget_bytes) for need in needs)


def least_memory_fraction(run: PlannedRun) -> float:
    """RolloutPlan.memory_fraction that engines need for their weights and one of the longest sequences; it may be above 1."""
    hbm_bytes = device_named(run.device).hbm_bytes
    cache_bytes = rollout_kv_cache_bytes(replace(run, rollout=replace(run.rollout, memory_fraction=1.0)))
    weight_bytes = hbm_bytes - cache_bytes if cache_bytes else rollout_weight_bytes(run)
    return (weight_bytes + float(sequence_cache_bytes(run, run.rollout.longest_sample_tokens))) / hbm_bytes


def changes(run: PlannedRun) -> Iterator[Change]:
    """The run with one setting changed, in every way that leaves no other problem; the work of a step stays the same."""
    for setting, flags, changed in _changes(run):
        try:
            settled = with_batch(replace(changed, layout=replace(changed.layout, dp=0).resolve(changed.training_gpus)))
        except InputError:
            continue
        if not problems(settled):
            yield setting, flags, settled


def _changes(run: PlannedRun) -> Iterator[Change]:
    yield from _layout_changes(run)
    shape, training = run.shape, run.training
    options: dict[str, list] = {
        "micro_batch_sequences": divisors(training.micro_batch_sequences, training.micro_batch_sequences - 1),
        "recompute": list(recompute_choices(shape, SearchSpace(recompute=RECOMPUTE_CHOICES))),
        "gradient_dtype_bytes": [2],
        "moment_dtype_bytes": [2],
        "offload_optimizer": [True, False],
        "fsdp": [True],
    }
    for name, value in ((name, value) for name, values in options.items() for value in values):
        if value != getattr(training, name):
            setting = f"training.{name}"
            yield setting, flag_text(setting, value), replace(run, training=replace(training, **{name: value}))
    if run.rollout is not None:
        yield from _rollout_changes(run)


def _layout_changes(run: PlannedRun) -> Iterator[Change]:
    """What has no effect without tensor, context or pipeline parallelism goes with it, and the flags say so."""
    ranks, shape, layout = run.training_gpus, run.shape, run.layout
    most_cp = max(layout.cp, run.training.sequence_length_tokens // SHORTEST_CONTEXT_TOKENS)
    degrees = {name: divisors(ranks, device_named(run.device).gpus_per_node) for name in ("tp", "etp")}
    degrees |= {"cp": divisors(ranks, most_cp), "pp": divisors(ranks, shape.num_layers), "vpp": list(range(2, layout.vpp))}
    degrees["ep"] = [] if shape.moe is None else divisors(shape.moe.num_experts, ranks)
    for name, degree in ((name, degree) for name, values in degrees.items() for degree in values):
        if degree == getattr(layout, name):
            continue
        settings: dict[str, object] = {name: degree}
        if name == "tp" and layout.sp != (degree > 1):
            settings["sp"] = degree > 1
        if name == "cp" and degree == 1 and layout.cp_kind != "ring":
            settings["cp_kind"] = "ring"
        if name == "pp" and degree == 1:
            settings |= {"vpp": 1} if layout.vpp > 1 else {}
            settings |= {"schedule": "1f1b"} if layout.schedule != "1f1b" else {}
        flags = [flag_text(f"layout.{setting}", value) for setting, value in settings.items()]
        changed = replace(run, layout=replace(layout, **settings))
        if name == "pp" and run.stage_layers:  # the person's own division is for other ranks
            changed = replace(changed, stage_layers=even_split(shape.num_layers, degree))
            flags.append(flag_text("stage_layers", changed.stage_layers))
        yield f"layout.{name}", " ".join(flags), changed


def _rollout_changes(run: PlannedRun) -> Iterator[Change]:
    rollout = run.rollout
    least = least_memory_fraction(run)
    fractions = sorted({math.ceil(100 * least) / 100, *MEMORY_FRACTIONS}) if least <= 0.99 else []
    options: dict[str, list] = {"tp": divisors(run.rollout_gpus, run.rollout_gpus), "memory_fraction": list(fractions)}
    if run.shape.moe is not None:
        options["ep"] = divisors(run.shape.moe.num_experts, run.rollout_gpus)
    if run.placement == "colocated":
        options["offload_training"] = [True, False]
    for name, value in ((name, value) for name, values in options.items() for value in values):
        if value != getattr(rollout, name):
            setting = f"rollout.{name}"
            yield setting, flag_text(setting, value), replace(run, rollout=replace(rollout, **{name: value}))
