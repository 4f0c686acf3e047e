"""The fastest layouts of a model on a number of GPUs, and why the others fail.

Layouts are looked at in the order of the time they take at the least (`bounds`): whether they have problems, whether they fit
into memory and with how little recomputation, last how long a step takes. Only what can't be faster than the layouts found is
left out, so the first one is the fastest of its space.
"""

import heapq
import time
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count

from ..config import InputError
from .bounds import Bounds
from .candidates import SearchSpace, layouts, least_work, memory_settings, recompute_choices, rollouts
from .check import check, needs, predict
from .devices import device_named
from .grpo import SAMPLE_SECONDS, SWITCH_SECONDS, GrpoStep, host_copy_seconds, offloaded_states, optimizer_step_run
from .layout_fit import microbatch_rule
from .memory import colocated_rollout_memory, memory_per_rank, training_memory, worst_stage
from .rollout import rollout_time
from .run import PlannedRun, RolloutPlan, TrainingPlan
from .shape import ModelShape
from .training import StepTime
from .validation import problems
from .weight_sync import weight_sync_time

__all__ = ["Rejection", "SearchResult", "SearchSpace", "check", "search"]

RANKED = 10


@dataclass(frozen=True)
class Rejection:
    """A run that doesn't work and why."""

    run: PlannedRun
    cause: str
    """What rejections for the same reason share, whatever their numbers; "memory" where that is the reason."""
    problem: str = ""
    """What is wrong with its settings; "" where memory is the reason."""
    at_least_bytes: float = 0.0
    """Where memory is the reason: a bound on what the fullest rank needs."""
    budget_bytes: float = 0.0

    @cached_property
    def reason(self) -> str:
        """Why it fails, with the wrong numbers."""
        return self.problem or needs(worst_stage(memory_per_rank(self.run)), self.budget_bytes)

    @cached_property
    def need_bytes(self) -> float:
        """Where memory is the reason: what the fullest rank needs; else 0."""
        return 0.0 if self.problem else worst_stage(memory_per_rank(self.run)).total_bytes

    def __iter__(self) -> Iterator:
        return iter((self.run, self.reason))


@dataclass(frozen=True)
class SearchResult:
    ranked: tuple[tuple[PlannedRun, StepTime | GrpoStep], ...]
    """Fastest first; of equally fast ones the one with fewer ranks a replica."""
    rejected: tuple[Rejection, ...]
    """For lack of memory: a layout with those of the allowed settings that need least."""
    seconds: float
    """That the search took."""
    evaluated_count: int
    """Steps predicted."""
    outpaced_count: int
    """Layouts left out since they can't be faster than the last ranked one."""

    def reasons(self) -> list[tuple[str, int]]:
        """(reason, how many layouts fail for it), most frequent first; for memory that of the layout nearest to fitting."""
        groups: dict[str, list[Rejection]] = {}
        for rejection in self.rejected:
            groups.setdefault(rejection.cause, []).append(rejection)
        return sorted(((_nearest(group).reason, len(group)) for group in groups.values()), key=lambda reason: -reason[1])

    @property
    def smallest_need_bytes(self) -> float:
        """The least memory that any of the layouts rejected for it needs a GPU; 0 if there is none."""
        too_large = [one for one in self.rejected if not one.problem]
        return _nearest(too_large).need_bytes if too_large else 0.0


def _nearest(rejections: list[Rejection]) -> Rejection:
    """The one that needs least memory; its exact need is asked only of those whose bound is below the least found."""
    nearest: Rejection | None = None
    for one in sorted(rejections, key=lambda one: one.at_least_bytes):
        if nearest is not None and one.at_least_bytes >= nearest.need_bytes:
            break
        if nearest is None or one.need_bytes < nearest.need_bytes:
            nearest = one
    return nearest


@dataclass(frozen=True)
class _Engines:
    """Rollout engines of one kind on their GPUs; for training alone, none."""

    run: PlannedRun
    """With the rollout part decided, everything else open."""
    seconds: float
    """Of a GRPO step, for generation, scoring and weight sync; they don't depend on the trainer's layout."""


@dataclass
class _OfLayout:
    """What is known of one layout and micro-batch."""

    open: int
    """Of its `_Settings`, how many have some left."""
    fitting: list[TrainingPlan] = field(default_factory=list)
    least: tuple[float, PlannedRun] | None = None
    """Of what doesn't fit, the (bound on the) least need."""

    def note(self, need_bytes: float, run: PlannedRun) -> None:
        if self.least is None or need_bytes < self.least[0]:
            self.least = need_bytes, run


@dataclass(frozen=True)
class _Settings:
    """The recomputations of a layout that were not tried yet, everything else being settled."""

    of_layout: _OfLayout
    left: Iterator[TrainingPlan]
    run: PlannedRun


def search(
    shape: ModelShape,
    gpus: int,
    device: str = "h100",
    training: TrainingPlan | None = None,
    rollout: RolloutPlan | None = None,
    space: SearchSpace | None = None,
    memory_bytes: float | None = None,
    ranked: int = RANKED,
) -> SearchResult:
    """Rank layouts by predicted step time: with equal work, by tokens a second.

    `memory_bytes`: budget of a GPU; None: all that the device has. `ranked`: how many layouts to find. With a rollout, each
    layout of the trainer is ranked with its fastest engines. Raises InputError for an unknown device, or settings that no
    layout could make right.
    """
    base = PlannedRun(shape, gpus, device, training=training or TrainingPlan(), rollout=rollout)
    return _Search(base, space or SearchSpace(), memory_bytes or device_named(device).hbm_bytes, ranked).result()


class _Search:
    def __init__(self, base: PlannedRun, space: SearchSpace, budget_bytes: float, ranked: int) -> None:
        self.base, self.space, self.budget_bytes, self.wanted = base, space, budget_bytes, ranked
        self.bounds = Bounds(base.shape)
        self.batches: dict[tuple, TrainingPlan] = {}
        self.rejected: list[Rejection] = []
        self.ranked: list[tuple[float, tuple, PlannedRun, StepTime | GrpoStep]] = []
        self.evaluated = self.outpaced = 0

    def result(self) -> SearchResult:
        started = time.perf_counter()
        for engines in self._placements():
            self._search_layouts(engines)
        best = tuple((run, predicted) for _, _, run, predicted in self.ranked)
        seconds = time.perf_counter() - started
        return SearchResult(best, tuple(self.rejected), seconds, self.evaluated, self.outpaced)

    def _placements(self) -> list[list[_Engines]]:
        """For each number of training GPUs (and for each way to share memory with them) the engines, fastest first."""
        if self.base.rollout is None:
            return [[_Engines(self.base, 0.0)]]
        groups: dict[tuple, list[_Engines]] = {}
        for run in rollouts(self.base, self.space):
            try:
                seconds = rollout_time(run).total_seconds + run.rollout.reward_seconds + weight_sync_time(run).seconds
            except InputError as error:
                self.rejected.append(Rejection(run, "rollout", str(error)))
                continue
            key = (run.placement, run.rollout.gpus, run.rollout.offload_training)
            groups.setdefault(key, []).append(_Engines(run, seconds))
        return [sorted(group, key=lambda engines: engines.seconds) for group in groups.values()]

    def _search_layouts(self, engines: list[_Engines]) -> None:
        """Best first: of all layouts and settings, always the one that takes least at the least."""
        if len(self.ranked) == self.wanted and engines[0].seconds >= self.ranked[-1][0]:
            return
        mildest = replace(engines[0].run, training=least_work(self.base.training, self.space))
        tick = count()
        queue: list[tuple[float, int, PlannedRun, _Settings | None]] = []
        for run in layouts(mildest, self.space):
            if run.rollout is not None:
                run = self._with_batch(run)
            queue.append((self._at_least_seconds(run, engines[0].seconds), next(tick), run, None))
        heapq.heapify(queue)
        while queue:
            seconds, _, run, settings = heapq.heappop(queue)
            if len(self.ranked) == self.wanted and seconds >= self.ranked[-1][0]:
                undecided = {id(left.of_layout) for _, _, _, left in queue if left is not None and not left.of_layout.fitting}
                self.outpaced += 1 + sum(left is None for _, _, _, left in queue) + len(undecided)
                return
            if settings is None:
                found = problems(run)
                if found:
                    self.rejected.append(Rejection(run, f"{found[0].setting} {found[0].value}", str(found[0])))
                    continue
                opened = self._settings(run)
            else:
                self._try(run, settings.of_layout, engines)
                opened = [settings]
            for one in opened:
                following = self._next(one)
                if following is not None:
                    at_least = self._at_least_seconds(following, engines[0].seconds, settled=True)
                    heapq.heappush(queue, (at_least, next(tick), following, one))

    def _settings(self, run: PlannedRun) -> list[_Settings]:
        """The settings allowed for a layout, least recomputation first, apart for all that isn't recomputation."""
        allowed = memory_settings(run.training, self.space)
        of_layout = _OfLayout(len(allowed))
        return [
            _Settings(
                of_layout, iter([replace(training, recompute=parts) for parts in recompute_choices(run.shape, self.space)]), run
            )
            for training in allowed
        ]

    def _next(self, settings: _Settings) -> PlannedRun | None:
        """The run with the next of the settings that may fit and may be faster than what fits; None where there is none."""
        of_layout = settings.of_layout
        for training in settings.left:
            run = replace(settings.run, training=training)
            if any(_does_no_more(other, training) for other in of_layout.fitting):
                continue
            need_bytes = self.bounds.at_least_bytes(run)
            if need_bytes <= self.budget_bytes:
                return run
            of_layout.note(need_bytes, run)
        of_layout.open -= 1
        if not of_layout.open and not of_layout.fitting:
            need_bytes, run = of_layout.least
            self.rejected.append(Rejection(run, "memory", at_least_bytes=need_bytes, budget_bytes=self.budget_bytes))
        return None

    def _try(self, run: PlannedRun, of_layout: _OfLayout, engines: list[_Engines]) -> None:
        """Predict a run if it fits and nothing that fits does less."""
        if any(_does_no_more(other, run.training) for other in of_layout.fitting):
            return
        need_bytes = worst_stage(training_memory(run)).total_bytes
        full = self._beside(run, engines) if need_bytes <= self.budget_bytes else None
        if full is None:
            of_layout.note(max(need_bytes, worst_stage(memory_per_rank(run)).total_bytes), run)
            return
        of_layout.fitting.append(run.training)
        self._predict(full)

    def _beside(self, run: PlannedRun, engines: list[_Engines]) -> PlannedRun | None:
        """The run with the fastest engines that leave it enough memory."""
        for one in engines:
            full = replace(run, rollout=one.run.rollout)
            if full.rollout is None or full.placement == "split":
                return full
            if worst_stage(colocated_rollout_memory(full)).total_bytes <= self.budget_bytes:
                return full
        return None

    def _at_least_seconds(self, run: PlannedRun, engine_seconds: float, settled: bool = False) -> float:
        """Of a step of the run; settled: nothing about its memory is open, so that its update and offload can be counted."""
        step_run = self._step_run(run)
        step_seconds = self.bounds.at_least_seconds(step_run)
        if settled:
            step_seconds += self.bounds.update_at_least_seconds(step_run)
        plan = run.rollout
        if plan is None:
            return step_seconds
        forward_seconds = self.bounds.at_least_forward_seconds(step_run) * (plan.old_logprobs + plan.reference)
        learner_seconds = plan.optimizer_steps * (forward_seconds + plan.train_epochs * step_seconds)
        learner_seconds += plan.prompts_per_step * plan.group_size * SAMPLE_SECONDS
        if run.placement == "colocated" and plan.weight_sync != "alias":
            learner_seconds += SWITCH_SECONDS
        if settled and plan.offload_training:
            learner_seconds += host_copy_seconds(step_run, offloaded_states(plan))
            learner_seconds += host_copy_seconds(step_run, ("weights",)) if plan.reference else 0.0
        return max(engine_seconds, learner_seconds) if plan.steps_ahead else engine_seconds + learner_seconds

    def _step_run(self, run: PlannedRun) -> PlannedRun:
        """What the trainer sees of the run in one optimizer step."""
        if run.rollout is None:
            return run
        layout = run.layout
        key = (layout.dp, run.training.micro_batch_sequences, *microbatch_rule(layout))
        if key not in self.batches:
            self.batches[key] = optimizer_step_run(run).training
        batch = self.batches[key]
        training = replace(
            run.training,
            global_batch_sequences=batch.global_batch_sequences,
            sequence_length_tokens=batch.sequence_length_tokens,
            packed_length_tokens=batch.packed_length_tokens,
        )
        return replace(run, training=training, rollout=None, gpus=run.training_gpus, placement="colocated")

    def _with_batch(self, run: PlannedRun) -> PlannedRun:
        """The run whose global batch is what its samples are packed into, so that its memory and problems are those of its
        steps."""
        batch = self._step_run(run).training.global_batch_sequences
        return replace(run, training=replace(run.training, global_batch_sequences=batch))

    def _predict(self, run: PlannedRun) -> None:
        predicted = predict(run)
        self.evaluated += 1
        entry = (predicted.step_seconds, _simplicity(run), run, predicted)
        insort(self.ranked, entry, key=lambda one: one[:2])
        del self.ranked[self.wanted :]


def _does_no_more(one: TrainingPlan, other: TrainingPlan) -> bool:
    """Whether `one` is at least as fast for sure: less is recomputed and offloaded, else they are the same."""
    recomputes_less = "layer" in other.recompute or set(one.recompute) <= set(other.recompute)
    alike = replace(other, recompute=one.recompute, offload_optimizer=one.offload_optimizer)
    return recomputes_less and one.offload_optimizer <= other.offload_optimizer and one == alike


def _simplicity(run: PlannedRun) -> tuple:
    """Orders equally fast runs: fewer ranks a replica first, then anything that is always the same."""
    layout, training = run.layout, run.training
    degrees = (layout.tp * layout.cp * layout.pp, layout.pp, layout.vpp, layout.tp, layout.ep, layout.etp)
    return (*degrees, training.micro_batch_sequences, layout.cp_kind, layout.schedule, run.stage_layers, training.recompute)
