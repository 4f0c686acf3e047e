"""The settings nearest to a run's that would fit into memory: as few changed as it takes, fastest first; else more GPUs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from ..config import GIB, ContextParallelKind, InputError, Layout
from .bounds import Bounds
from .candidates import RECOMPUTE_CHOICES, SHORTEST_CONTEXT_TOKENS, SearchSpace, divisors, recompute_choices
from .devices import device_named
from .grpo import GrpoStep, grpo_step, optimizer_step_run
from .host_memory import fullest_node
from .memory import fits, generating_gpu_bytes, memory_per_rank, memory_phases, worst_stage
from .packing import with_batch
from .rollout_memory import rollout_kv_cache_bytes, rollout_weight_bytes, sequence_cache_bytes
from .run import PlannedRun
from .stage_balance import balanced_stage_layers, stage_layers_within
from .stages import even_split
from .states import rank_state_bytes
from .text import flag_text, printed_seconds, seconds_text
from .training import StepTime, train_step
from .validation import problems

NEAREST = 4
"""Ways that are named."""
LOSSY = frozenset({"training.gradient_dtype_bytes", "training.moment_dtype_bytes"})
"""Settings that change what is computed, so that others come first."""
WIDTH = (1000, 12, 6)
"""Of what doesn't fit yet with one, two, three settings changed: how many get another change, those nearest to fitting first.
After one change that is everything that helps, so that no pair is missed."""
MOST_PREDICTED = 100
"""Steps, of what fits; those that take least at the least first."""
SMALLEST_CHANGE_BYTES = 1e6
"""Of what a rank needs: what changes less doesn't help."""
MEMORY_FRACTIONS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Of rollout.memory_fraction that are tried, beside the least that works."""
MOST_CHANGES = 1 + len(WIDTH)
"""Settings that are changed together."""
GPU_FACTORS = (2, 4, 8, 16, 32, 64)
"""Times the GPUs that are tried where that isn't enough."""
Values = dict[str, Any]
"""Of settings, by their paths."""
Change = tuple[str, Values, PlannedRun]
"""The path of a setting, the values to type (with what goes with it), and the run with them."""


@dataclass(frozen=True)
class Working:
    """A changed run that fits."""

    settings: frozenset[str]
    """What was changed, without what goes with it."""
    values: Values
    run: PlannedRun
    need_bytes: float
    """Of the fullest rank."""
    seconds: float
    """Of a step."""

    @property
    def flags(self) -> tuple[str, ...]:
        """To type."""
        return tuple(flag_text(setting, value) for setting, value in self.values.items())

    def __str__(self) -> str:
        return f"{' '.join(self.flags)} ({self.need_bytes / GIB:.1f} GiB, {seconds_text(self.seconds)} a step)"


@dataclass(frozen=True)
class _Attempt:
    settings: frozenset[str]
    values: Values
    run: PlannedRun
    shortage_bytes: float


def predict(run: PlannedRun) -> StepTime | GrpoStep:
    """A step of the run: of training, or with a rollout of GRPO."""
    return train_step(run) if run.rollout is None else grpo_step(run)


def ways_out(runs: Sequence[PlannedRun], budget_bytes: float) -> tuple[list[Working], str]:
    """(ways to make the first of these runs work that there are any for, or with more GPUs the last; what is to be said where
    no change was enough without, else "")."""
    for run in runs:
        found = nearest_that_fit(run, budget_bytes)
        if found:
            return found, ""
    found = nearest_with_more_gpus(run, budget_bytes)
    said = f"no change of up to {MOST_CHANGES} settings fits on {run.gpus:,} GPU{'s' if run.gpus > 1 else ''}"
    return found, said if found else f"{said}, nor on up to {GPU_FACTORS[-1] * run.gpus:,}"


def nearest_that_fit(run: PlannedRun, budget_bytes: float) -> list[Working]:
    """Ways to make the run work with the fewest settings changed, one for each set of settings; [] where MOST_CHANGES of them
    aren't enough. The work of a step stays the same. Fastest first, and of those that print the same seconds the one that
    needs least memory; those that change what is computed come last."""
    attempts = [_Attempt(frozenset(), {}, run, _shortage_bytes(run, budget_bytes))]
    for width in (1, *WIDTH):
        following: dict[frozenset, _Attempt] = {}
        for attempt in sorted(attempts, key=lambda one: one.shortage_bytes)[:width]:
            for setting, values, changed in changes(attempt.run, budget_bytes):
                values = attempt.values | values
                if setting not in attempt.settings and frozenset(values.items()) not in following:
                    shortage = _shortage_bytes(changed, budget_bytes)
                    following[frozenset(values.items())] = _Attempt(attempt.settings | {setting}, values, changed, shortage)
        fitting = [one for one in following.values() if not one.shortage_bytes and fits(one.run, budget_bytes)]
        if fitting:
            return _fastest(fitting)
        most = max(one.shortage_bytes for one in attempts)
        attempts = [one for one in following.values() if one.shortage_bytes < most - SMALLEST_CHANGE_BYTES]
        if not attempts:
            break
    return []


def nearest_with_more_gpus(run: PlannedRun, budget_bytes: float) -> list[Working]:
    """Like `nearest_that_fit`, with the fewest of GPU_FACTORS times the GPUs that are enough; [] where none is."""
    least = replace(run.training, gradient_dtype_bytes=2, moment_dtype_bytes=2, offload_optimizer=True)
    for factor in GPU_FACTORS:
        values: Values = {"gpus": factor * run.gpus}
        more = replace(run, gpus=factor * run.gpus, layout=replace(run.layout, dp=0))
        if run.placement == "split":
            values["rollout.gpus"] = factor * run.rollout.gpus
            more = replace(more, rollout=replace(run.rollout, gpus=values["rollout.gpus"]))
        if fewest_gpus(replace(run, training=least), budget_bytes) > more.training_gpus or problems(more):
            continue
        more = with_batch(replace(more, layout=more.layout.resolve(more.training_gpus)))
        if fits(more, budget_bytes):
            return [_working(frozenset(), values, more)]
        found = nearest_that_fit(more, budget_bytes)
        if found:
            return [replace(way, values=values | way.values) for way in found]
    return []


def fewest_gpus(run: PlannedRun, budget_bytes: float) -> int:
    """GPUs that hold the run's weights, gradients and optimizer states, each once, however they are laid out."""
    alone = replace(run, gpus=1, layout=Layout(dp=1), stage_layers=(), rollout=None, placement="colocated")
    return math.ceil(rank_state_bytes(alone, alone.stages()[0]).on_device / budget_bytes)


def _fastest(fitting: list[_Attempt]) -> list[Working]:
    """The fastest for each set of settings, as many as are named; one that changes what is computed only where it is the
    fastest of all, or places are left."""
    ways = _fastest_of([one for one in fitting if not one.settings & LOSSY], math.inf)
    faster_than = _order(ways[0])[0] if len(ways) == NEAREST else math.inf
    lossy = _fastest_of([one for one in fitting if one.settings & LOSSY], faster_than)
    return ways[: NEAREST - 1] + lossy[:1] if len(ways) == NEAREST and lossy else [*ways, *lossy][:NEAREST]


def _fastest_of(fitting: list[_Attempt], faster_than_seconds: float) -> list[Working]:
    """The fastest for each set of settings, of those that print fewer seconds than these. Prediction stops where nothing
    better can come, or after MOST_PREDICTED."""
    best: dict[frozenset[str], Working] = {}
    bounds = Bounds(fitting[0].run.shape) if fitting else None
    queue = sorted((_at_least_seconds(bounds, one.run), place, one) for place, one in enumerate(fitting))
    for at_least_seconds, _, one in islice(queue, MOST_PREDICTED):
        last = sorted(_order(way) for way in best.values())[NEAREST - 1][0] if len(best) >= NEAREST else faster_than_seconds
        if printed_seconds(at_least_seconds) > min(last, faster_than_seconds):
            break
        way = _working(one.settings, one.values, one.run)
        better = one.settings not in best or _order(way) < _order(best[one.settings])
        if better and _order(way)[0] < faster_than_seconds:
            best[one.settings] = way
    return sorted(best.values(), key=_order)[:NEAREST]


def _working(settings: frozenset[str], values: Values, run: PlannedRun) -> Working:
    return Working(settings, values, run, worst_stage(memory_per_rank(run)).total_bytes, predict(run).step_seconds)


def _order(way: Working) -> tuple[float, float]:
    return printed_seconds(way.seconds), way.need_bytes


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


def changes(run: PlannedRun, budget_bytes: float) -> Iterator[Change]:
    """The run with one setting changed, in every way that leaves no other problem; the work of a step stays the same."""
    for setting, values, changed in _changes(run, budget_bytes):
        try:
            settled = with_batch(replace(changed, layout=replace(changed.layout, dp=0).resolve(changed.training_gpus)))
        except InputError:
            continue
        if not problems(settled):
            yield setting, values, settled


def _changes(run: PlannedRun, budget_bytes: float) -> Iterator[Change]:
    yield from _layout_changes(run)
    yield from _division_changes(run, budget_bytes)
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
            yield setting, {setting: value}, replace(run, training=replace(training, **{name: value}))
    if run.rollout is not None:
        yield from _rollout_changes(run)


def _layout_changes(run: PlannedRun) -> Iterator[Change]:
    """What has no effect without tensor, context or pipeline parallelism goes with it, and with engines that share the
    trainer's weights their degrees; the values say so."""
    for name, degree, kind in _degrees(run):
        layout, values = run.layout, {f"layout.{name}": degree}
        changed = replace(layout, **{name: degree}, cp_kind=kind)
        if name == "tp":
            changed = replace(changed, sp=degree > 1)
        if name == "pp" and degree == 1:
            changed = replace(changed, vpp=1, schedule="1f1b")
        rollout = run.rollout
        if rollout is not None and rollout.shares_weights:
            etp = changed.etp if run.shape.moe is None else changed.tp if changed.ep == 1 else 1
            changed = replace(changed, etp=etp)
            rollout = replace(rollout, tp=changed.tp, pp=changed.pp, ep=changed.ep)
            values |= {f"rollout.{axis}": getattr(rollout, axis) for axis in ("tp", "pp", "ep")
                       if getattr(rollout, axis) != getattr(run.rollout, axis)}  # fmt: skip
        values |= {f"layout.{other}": getattr(changed, other) for other in ("sp", "cp_kind", "vpp", "schedule", "etp")
                   if getattr(changed, other) != getattr(layout, other)}  # fmt: skip
        stage_layers = run.stage_layers
        if name == "pp" and stage_layers:  # the person's own division is for other ranks
            stage_layers = values["stage_layers"] = even_split(run.shape.num_layers, degree)
        yield f"layout.{name}", values, replace(run, layout=changed, rollout=rollout, stage_layers=stage_layers)


def _degrees(run: PlannedRun) -> Iterator[tuple[str, int, ContextParallelKind]]:
    """(name of a degree, another value of it, the kind of context parallelism with it)."""
    ranks, shape, layout = run.training_gpus, run.shape, run.layout
    most_cp = max(layout.cp, run.training.sequence_length_tokens // SHORTEST_CONTEXT_TOKENS)
    degrees = {name: divisors(ranks, device_named(run.device).gpus_per_node) for name in ("tp", "etp")}
    degrees |= {"pp": divisors(ranks, shape.num_layers), "vpp": list(range(2, layout.vpp))}
    degrees["ep"] = [] if shape.moe is None else divisors(shape.moe.num_experts, ranks)
    for name, values in degrees.items():
        yield from ((name, degree, layout.cp_kind) for degree in values if degree != getattr(layout, name))
    for cp in divisors(ranks, most_cp):
        for kind in SearchSpace().cp_kinds if cp > 1 else ("ring",):
            if (cp, kind) != (layout.cp, layout.cp_kind):
                yield "cp", cp, kind


def _division_changes(run: PlannedRun, budget_bytes: float) -> Iterator[Change]:
    """Other divisions of layers over the pipeline: as even in work as can be, and so far as memory allows."""
    shape, pp = run.shape, run.layout.pp
    if pp == 1:
        return
    balanced = balanced_stage_layers(shape, pp, run.training.sequence_length_tokens)
    held = run.stage_layers or even_split(shape.num_layers, pp)
    for division in dict.fromkeys((balanced, _division_that_fits(run, budget_bytes))):
        if division not in ((), held):
            yield "stage_layers", {"stage_layers": division}, replace(run, stage_layers=division)


def _division_that_fits(run: PlannedRun, budget_bytes: float) -> tuple[int, ...]:
    """Layers of each rank, as even in work as memory allows; () where there is none. Of ranks that need too much, others take
    layers, until all fit."""
    shape, pp = run.shape, run.layout.pp
    most = [shape.num_layers] * pp
    while division := stage_layers_within(shape, most, run.training.sequence_length_tokens):
        divided, needs_bytes = replace(run, stage_layers=division), [0.0] * pp
        if not all(divided.chunks()[1:-1]):
            return ()
        for phase in memory_phases(divided):
            needs_bytes = [max(need, one.total_bytes) for need, one in zip(needs_bytes, phase, strict=True)]
        full = [rank for rank in range(pp) if needs_bytes[rank] > budget_bytes and division[rank]]
        if not full:
            return division if max(needs_bytes) <= budget_bytes else ()
        for rank in full:
            if run.layout.schedule == "dualpipe" and division[rank] < division[pp - 1 - rank]:
                continue  # both ranks hold both stages, so one of them has less
            layers_bytes = needs_bytes[rank] / division[rank]  # at the most
            most[rank] = division[rank] - max(1, int((needs_bytes[rank] - budget_bytes) / layers_bytes))
    return ()


def _rollout_changes(run: PlannedRun) -> Iterator[Change]:
    rollout = run.rollout
    least = least_memory_fraction(run)
    fractions = sorted({math.ceil(100 * least) / 100, *MEMORY_FRACTIONS}) if least <= 0.99 else []
    options: dict[str, list] = {"tp": divisors(run.rollout_gpus, run.rollout_gpus), "memory_fraction": list(fractions)}
    if run.shape.moe is not None:
        options["ep"] = divisors(run.shape.moe.num_experts, run.rollout_gpus)
    if run.placement == "colocated":
        options["offload_training"] = [True, False]
    else:
        engines = {round(share * run.gpus / rollout.engine_gpus) for share in SearchSpace().split_shares}
        options["gpus"] = [count * rollout.engine_gpus for count in sorted(engines)]
    for name, value in ((name, value) for name, values in options.items() for value in values):
        if value != getattr(rollout, name):
            setting = f"rollout.{name}"
            yield setting, {setting: value}, replace(run, rollout=replace(rollout, **{name: value}))
