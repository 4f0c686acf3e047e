"""What of a launch file's run doesn't fit into memory, told with the flags that this launch file has: its engines generate with
the trainer's weights in the trainer's layout, beside a KV cache of a size given in GiB.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from strop.engine.config import GIB, InputError, Layout
from strop.engine.plan.candidates import divisors
from strop.engine.plan.check import trainer_memory_problems
from strop.engine.plan.devices import device_named
from strop.engine.plan.grpo import grpo_step
from strop.engine.plan.memory import fits, memory_per_rank, worst_stage
from strop.engine.plan.nearest import GPU_FACTORS
from strop.engine.plan.packing import with_batch
from strop.engine.plan.problem import Problem
from strop.engine.plan.rollout import rollout_time
from strop.engine.plan.rollout_memory import generating_weight_bytes, holds_a_sequence, sequence_cache_bytes
from strop.engine.plan.run import PlannedRun
from strop.engine.plan.shape import ModelShape
from strop.engine.plan.text import flag_text, gib_text, seconds_text
from strop.engine.plan.validation import problems

NAMED_WAYS = 2


@dataclass(frozen=True)
class LaunchedRun:
    """A launch file's run, and the same with other settings."""

    run: PlannedRun
    """As asked for; `validation.problems` finds none, and its layout is resolved."""
    kv_cache_gib: float
    of: Callable[[Layout, int, float], PlannedRun]
    """(layout, GPUs, GiB of KV cache) -> the run. Raises InputError where no GPU holds its cache."""
    trains: bool
    """Else it generates only."""

    def problems(self) -> list[Problem]:
        """Of memory; the last one with the nearest settings that fit."""
        run, budget_bytes = self.run, device_named(self.run.device).hbm_bytes
        if self._fits(run):
            return []
        engine = [self._engine_problem()] if not holds_a_sequence(run) else []
        found = [*engine, *(trainer_memory_problems(run, budget_bytes) if self.trains else ())]
        if found[-1].nearest:
            return found
        return [*found[:-1], replace(found[-1], nearest=self._ways(), planned=True)]

    def _engine_problem(self) -> Problem:
        """Of a cache that is too small for a sequence, or of weights that leave no room for a larger one."""
        run, budget_bytes = self.run, device_named(self.run.device).hbm_bytes
        weight_bytes, least_gib = generating_weight_bytes(run), least_cache_gib(run)
        reason = f"a sequence of {run.rollout.longest_sample_tokens:,} tokens takes {least_gib:g} GiB"
        if weight_bytes + least_gib * GIB <= budget_bytes:
            return Problem("rollout.kv_cache_gib", f"{self.kv_cache_gib:g}", reason, (f"{least_gib:g}",))
        reason = f"weights of {gib_text(weight_bytes)} GiB leave a GPU of {gib_text(budget_bytes)} no KV cache: {reason}"
        return Problem("layout.tp", run.layout.tp, reason)

    def _fits(self, run: PlannedRun) -> bool:
        return fits(run) if self.trains else holds_a_sequence(run)

    def _ways(self) -> tuple[str, ...]:
        """Layouts that fit, on as few GPUs as there are any for, those with the fewest degrees changed, fastest first."""
        for factor in (1, *GPU_FACTORS):
            found = sorted(self._ways_on(self.run.gpus * factor))
            if found:
                return tuple(text for *_, text in found[:NAMED_WAYS])
        return ()

    def _ways_on(self, gpus: int) -> Iterator[tuple[int, float, str]]:
        """(degrees changed, seconds of a step, flags) of what fits on that many GPUs."""
        asked, shape = replace(self.run.layout, dp=0), self.run.shape
        for layout in layouts(asked, shape, gpus, device_named(self.run.device).gpus_per_node):
            run, cache_flag = self._with_enough_cache(layout, gpus)
            if run is None or not self._fits(run):
                continue
            changed = [name for name in ("tp", "sp", "pp", "ep") if getattr(layout, name) != getattr(asked, name)]
            flags = [flag_text("plan", f"{run.device}x{gpus}")] if gpus != self.run.gpus else []
            flags += [flag_text(f"layout.{name}", getattr(layout, name)) for name in changed] + cache_flag
            seconds = grpo_step(run).step_seconds if self.trains else rollout_time(run).total_seconds
            taken = [f"{seconds_text(seconds)}{' a step' if self.trains else ''}", *_not_yet(layout)]
            if self.trains:
                taken.insert(0, f"{gib_text(worst_stage(memory_per_rank(run)).total_bytes)} GiB")
            yield len({*changed} - {"sp"}), seconds, f"{' '.join(flags)} ({', '.join(taken)})"

    def _with_enough_cache(self, layout: Layout, gpus: int) -> tuple[PlannedRun | None, list[str]]:
        """(the run with this layout, the flag of a larger cache where its own doesn't hold a sequence). None where it has other
        problems."""
        try:
            run, flags = self.of(layout, gpus, self.kv_cache_gib), list[str]()
            if not problems(run) and not holds_a_sequence(run):
                flags = [flag_text("rollout.kv_cache_gib", f"{least_cache_gib(run):g}")]
                run = self.of(layout, gpus, least_cache_gib(run))
        except InputError:
            return None, []
        if self.trains and not problems(run):
            run = with_batch(run)
        return (None, []) if problems(run) else (run, flags)


def least_cache_gib(run: PlannedRun) -> float:
    """Of one sequence, the longest there may be, on one GPU, as it is typed: three digits, rounded up."""
    return math.ceil(float(sequence_cache_bytes(run, run.rollout.longest_sample_tokens)) / GIB * 1000) / 1000


def layouts(asked: Layout, shape: ModelShape, gpus: int, node: int) -> Iterator[Layout]:
    """The layout with other tensor, pipeline and expert degrees."""
    ep = divisors(gpus, gpus) if shape.moe is not None else [1]
    for tp, pp, experts in product(divisors(gpus, node), divisors(gpus, min(gpus, shape.num_layers)), ep):
        yield replace(asked, tp=tp, sp=tp > 1, pp=pp, ep=experts)


def _not_yet(layout: Layout) -> list[str]:
    try:
        layout.require_implemented()
    except InputError:
        return ["not implemented yet"]
    return []
