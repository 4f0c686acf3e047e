"""The fastest layouts of a model on a number of GPUs, and why the others fail.

Layouts are looked at in the order of the time they take at the least (`bounds`): whether they have problems, whether they fit
into memory and with how little recomputation, last how long a step takes. What can't be faster than the layouts found by a
thousandth is left out, so that no layout of the space is that much faster than the first one, unless time runs out before.
"""

import heapq
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

from ..config import InputError
from .bounds import Bounds
from .candidates import SearchSpace, held_fixed, layouts, least_work, memory_settings, recompute_choices
from .devices import device_named
from .engine_choices import Engines, beside, engine_groups, likely_seconds, with_own_engines
from .grpo import GrpoStep, optimizer_step_run
from .host_memory import fullest_node
from .layout_fit import microbatch_rule
from .memory import colocated_rollout_memory, memory_per_rank, training_memory, worst_stage
from .nearest import predict
from .run import PlannedRun, RolloutPlan, TrainingPlan
from .search_clock import LIMIT_SECONDS, Clock, Progress
from .search_layout import OfLayout
from .search_result import HOST_MEMORY, MEMORY, Rejection, SearchResult
from .shape import ModelShape
from .training import StepTime
from .validation import problems, settings_problems

RANKED = 10
LEFT_OUT_SHARE = 1e-3
"""Of the last ranked step: what isn't faster by more at the least is left out. Where generation takes most of a step, thousands
of the trainer's layouts differ by less, which is far below what a prediction is worth."""
MEMORY_RESERVE = 0.03
"""Of a GPU's memory, left free by default: predictions of peaks are this far off in the median of all rows
(benchmarks/results/planner.md), half as much again in that of the rows held out, and some are much farther."""


@dataclass(frozen=True)
class _Layout:
    """Of which nothing is tried yet."""

    engines: list[Engines]
    run: PlannedRun


@dataclass(frozen=True)
class _Settings:
    """The recomputations of a layout that were not tried yet, everything else being settled."""

    of_layout: OfLayout
    left: Iterator[TrainingPlan]
    run: PlannedRun
    """With the recomputation that is the next."""
    engines: list[Engines]


def search(
    shape: ModelShape,
    gpus: int,
    device: str = "h100",
    training: TrainingPlan | None = None,
    rollout: RolloutPlan | None = None,
    space: SearchSpace | None = None,
    memory_bytes: float | None = None,
    ranked: int = RANKED,
    host_memory_gib: float = 0.0,
    limit_seconds: float = LIMIT_SECONDS,
    progress: Progress | None = None,
) -> SearchResult:
    """Rank layouts by predicted step time: with equal work, by tokens a second.

    `memory_bytes`: budget of a GPU; None: all that the device has but MEMORY_RESERVE. `ranked`: how many layouts to find.
    `host_memory_gib`: of a node, as in PlannedRun. With a rollout, each layout of the trainer is ranked with its fastest
    engines. Where nothing fits with a placement and the space leaves offload_optimizer open, the same is tried with the
    optimizer on the host.
    After `limit_seconds` the search ends, and its result says what was left open. `progress` is called once in a second with
    the numbers of steps predicted and of layouts that wait.
    Raises InputError for an unknown device, and for settings or values of the space that no layout could make right.
    """
    base = PlannedRun(
        shape, gpus, device, host_memory_gib=host_memory_gib, training=training or TrainingPlan(), rollout=rollout
    )
    space = space or SearchSpace()
    budget_bytes = memory_bytes or (1 - MEMORY_RESERVE) * device_named(device).hbm_bytes
    _require_possible(base, space)
    clock = Clock(limit_seconds, progress)
    return _Search(base, space, budget_bytes, ranked, clock).result()


def _require_possible(base: PlannedRun, space: SearchSpace) -> None:
    """Raises InputError where the settings are wrong with every placement, or the space's values are."""
    mistakes: list[str] = []
    placed = [base] if base.rollout is None else [_placed(base, placement, space) for placement in space.placements]
    precisions = space.precisions or (base.training.precision,)
    placed = [replace(run, training=replace(run.training, precision=one)) for run in placed for one in precisions]
    for run in placed:
        found = settings_problems(run)
        if not found:
            break
        mistakes += [str(problem) for problem in found]
    else:
        raise InputError("\n".join(dict.fromkeys(mistakes)))
    space.require_effect(base)


def _placed(base: PlannedRun, placement: str, space: SearchSpace) -> PlannedRun:
    """With a placement's own settings as a search would choose them."""
    plan = base.rollout
    if placement == "split":
        plan = replace(plan, gpus=max(1, base.gpus // 2), offload_training=False)
    elif "split" in space.placements:
        plan = replace(plan, steps_ahead=0)
    return replace(base, placement=placement, rollout=plan)


class _Search:
    def __init__(self, base: PlannedRun, space: SearchSpace, budget_bytes: float, ranked: int, clock: Clock) -> None:
        self.base, self.space, self.budget_bytes, self.wanted, self.clock = base, space, budget_bytes, ranked, clock
        self.tick = count()
        self.queue: list[tuple[float, int, _Layout | _Settings]] = []
        """With the seconds that it takes at the least; of equals in the order in which they came."""
        self.bounds = Bounds(base.shape)
        self.batches: dict[tuple, TrainingPlan] = {}
        self.rejected: list[Rejection] = []
        self.ranked: list[tuple[float, tuple, PlannedRun, StepTime | GrpoStep]] = []
        self.fitting: set[str] = set()
        """Placements with which something fits."""
        self.evaluated = 0

    def result(self) -> SearchResult:
        groups, failed = engine_groups(self.base, self.space)
        self.rejected += [Rejection(run, "rollout.tp", reason) for run, reason in failed]
        self.unopened = sorted(groups, key=likely_seconds)  # engines beside which no layout was looked at
        self._search_layouts()
        if not self.space.offload_optimizer and not self.base.training.offload_optimizer:
            self._offload([engines for engines in groups if engines[0].run.placement not in self.fitting])
        if not (self.ranked or self.rejected or self.queue or self.unopened):
            gpus, model = self.base.gpus, self.base.shape.name
            raise InputError(f"no layout of --space.* divides {gpus} GPUs and {model}: allow more degrees")
        undecided = {id(node.of_layout) for _, _, node in self.queue if _is_undecided(node)}
        left = sum(isinstance(node, _Layout) for _, _, node in self.queue) + len(undecided) + len(self.unopened)
        at_least = [seconds for seconds, _, _ in self.queue[:1]] + [engines[0].seconds for engines in self.unopened]
        ended = any(not self._is_outpaced(seconds) for seconds in at_least)
        return SearchResult(
            ranked=tuple((run, predicted) for _, _, run, predicted in self.ranked),
            rejected=tuple(self.rejected),
            seconds=self.clock.seconds(),
            evaluated_count=self.evaluated,
            outpaced_count=0 if ended else left,
            open_count=left if ended else 0,
            open_at_least_seconds=min(at_least) if ended else 0.0,
            budget_bytes=self.budget_bytes,
            reserve_bytes=device_named(self.base.device).hbm_bytes - self.budget_bytes,
            held=held_fixed(self.base, self.space),
        )

    def _offload(self, groups: list[list[Engines]]) -> None:
        """Try engines again, beside which nothing fits with their placement, with the optimizer on the host."""
        if not groups or self.clock.is_over():
            return
        allowed, rejected, fitted = self.space, self.rejected, set(self.fitting)
        self.rejected = [one for one in rejected if one.run.placement in fitted]
        self.space, self.unopened = replace(allowed, offload_optimizer=(True,)), sorted(groups, key=likely_seconds)
        self._search_layouts()
        self.space = allowed
        if self.fitting == fitted:
            self.rejected = rejected

    def _push(self, at_least_seconds: float, node: "_Layout | _Settings") -> None:
        heapq.heappush(self.queue, (at_least_seconds, next(self.tick), node))

    def _is_outpaced(self, at_least_seconds: float) -> bool:
        """By all that are ranked."""
        return len(self.ranked) == self.wanted and at_least_seconds >= (1 - LEFT_OUT_SHARE) * self.ranked[-1][0]

    def _search_layouts(self) -> None:
        """Best first: of all layouts and settings, always the one that takes least at the least. Engines are opened, the
        likely fastest first, when the layouts beside those before them are decided."""
        while not self.clock.is_over():
            self.clock.report(self.evaluated, len(self.queue))
            if not self.queue or self._is_outpaced(self.queue[0][0]):
                following = next((one for one in self.unopened if not self._is_outpaced(one[0].seconds)), None)
                if following is None:
                    return
                self.unopened.remove(following)
                self._open_engines(following)
                continue
            _, _, node = heapq.heappop(self.queue)
            if isinstance(node, _Settings):
                self._try(node)
                self._push_next(node)
            elif found := problems(node.run):
                self.rejected.append(Rejection(node.run, found[0].setting, str(found[0])))
            else:
                for settings in self._settings(node):
                    self._push_next(settings)

    def _open_engines(self, engines: list[Engines]) -> None:
        mildest = replace(engines[0].run, training=least_work(self.base.training, self.space))
        for run in layouts(mildest, self.space):
            if run.rollout is not None:
                run = self._with_batch(with_own_engines(run))
            self._push(self._at_least_seconds(run, engines[0].seconds), _Layout(engines, run))

    def _push_next(self, settings: _Settings) -> None:
        """The settings with the next recomputation that may fit and may be faster than what fits, if there is one."""
        run = self._next(settings)
        if run is not None:
            at_least_seconds = self._at_least_seconds(run, settings.engines[0].seconds, settled=True)
            self._push(at_least_seconds, replace(settings, run=run))

    def _settings(self, layout: _Layout) -> list[_Settings]:
        """The settings allowed for a layout, least recomputation first, apart for all that isn't recomputation."""
        run = layout.run
        allowed = memory_settings(run.training, self.space, run.layout.pp)
        of_layout = OfLayout(len(allowed))
        choices = recompute_choices(run.shape, self.space)
        return [
            _Settings(of_layout, iter([replace(training, recompute=parts) for parts in choices]), run, layout.engines)
            for training in allowed
        ]

    def _next(self, settings: _Settings) -> PlannedRun | None:
        """The run with the next of the settings that may fit and may be faster than what fits; None where there is none."""
        of_layout = settings.of_layout
        for training in settings.left:
            run = replace(settings.run, training=training)
            if of_layout.outdoes(training):
                continue
            need_bytes = self.bounds.at_least_bytes(run)
            if need_bytes <= self.budget_bytes:
                return run
            of_layout.note(need_bytes, run)
        of_layout.open -= 1
        if of_layout.open or of_layout.fitting:
            return None
        if of_layout.least_host is not None:
            shortage_bytes, run = of_layout.least_host
            one = Rejection(run, HOST_MEMORY, host_shortage_bytes=shortage_bytes, budget_bytes=self.budget_bytes)
        else:
            need_bytes, run = of_layout.least
            one = Rejection(run, MEMORY, at_least_bytes=need_bytes, budget_bytes=self.budget_bytes)
        self.rejected.append(one)
        return None

    def _try(self, settings: _Settings) -> None:
        """Predict a run if it fits and nothing that fits does less."""
        run, of_layout, engines = settings.run, settings.of_layout, settings.engines
        if of_layout.outdoes(run.training):
            return
        training = training_memory(run)
        need_bytes = worst_stage(training).total_bytes
        if need_bytes > self.budget_bytes or (full := beside(run, engines, self.budget_bytes)) is None:
            of_layout.note(max(need_bytes, worst_stage(memory_per_rank(run)).total_bytes), run)
            return
        leaves = full.rollout is not None and full.rollout.offload_training
        # The host has most to hold while engines generate.
        shortage_bytes = fullest_node(full, [colocated_rollout_memory(full) if leaves else training]).shortage_bytes
        if shortage_bytes:
            of_layout.note_host(shortage_bytes, full)
            return
        self.fitting.add(run.placement)
        of_layout.fitting.append((run.training, full.rollout == engines[0].run.rollout))
        self._predict(full)

    def _at_least_seconds(self, run: PlannedRun, engine_seconds: float, settled: bool = False) -> float:
        """Of a step of the run; settled: nothing about its memory is open, so that its update and offload can be counted."""
        step_run = self._step_run(run)
        if run.rollout is not None:
            return self.bounds.grpo_at_least_seconds(run, step_run, engine_seconds, settled)
        return self.bounds.at_least_seconds(step_run) + (self.bounds.update_at_least_seconds(step_run) if settled else 0.0)

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
        for other in self.ranked:
            if _family(other[2]) == _family(run):
                if other[:2] <= entry[:2]:
                    return
                self.ranked.remove(other)
                break
        insort(self.ranked, entry, key=lambda one: one[:2])
        del self.ranked[self.wanted :]


def _is_undecided(node: _Layout | _Settings) -> bool:
    """A layout whose settings were tried in part, and nothing of it fits so far."""
    return isinstance(node, _Settings) and not node.of_layout.fitting


def _family(run: PlannedRun) -> tuple:
    """What a layout is to people who choose one; the rest are its settings."""
    layout = run.layout
    return (run.training_gpus, layout.tp, layout.cp, layout.pp, layout.ep, layout.etp)


def _simplicity(run: PlannedRun) -> tuple:
    """Orders equally fast runs: fewer ranks a replica first, then anything that is always the same."""
    layout, training = run.layout, run.training
    degrees = (layout.tp * layout.cp * layout.pp, layout.pp, layout.vpp, layout.tp, layout.ep, layout.etp)
    settings = (training.micro_batch_sequences, training.precision, layout.cp_kind, layout.schedule, run.stage_layers)
    return (*degrees, *settings, training.recompute)
