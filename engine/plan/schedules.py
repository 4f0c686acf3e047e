"""How long a pipeline takes for an optimizer step's micro-batches, whatever the schedule and however uneven its stages.

The order of work of a schedule (`timeline`) is compiled once into a list of slots, each with what it waits for; a prediction
is then one pass over that list. Long runs are extended by the steady pace, so that the cost doesn't grow with the batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..config import InputError, PipelineSchedule
from .collectives import BESIDE_COMPUTE_FRACTION
from .timeline import Slot, dualpipe, dualpipev, interleaved, one_forward_one_backward, zero_bubble

SETTLED_ERROR = 1e-3
"""Of a step: by so much may a pace differ from the one it is compared with and count as settled."""
LEAST_FORWARDS = 256
"""Of all ranks together: so few are run in no time, so the pace is never taken from fewer."""

Finish = tuple[float, tuple[float, ...]]
"""Seconds until the last rank is done, and busy seconds of each rank."""


@dataclass(frozen=True)
class StageSeconds:
    """One micro-batch through one virtual stage on its rank."""

    forward: float
    """Seconds of computation, and of exchanges that nothing can hide."""
    backward_input: float
    backward_weight: float
    forward_exchange: float = 0.0
    """Seconds of expert dispatch and combine; a paired backward pass can hide them."""
    backward_exchange: float = 0.0

    @property
    def backward(self) -> float:
        return self.backward_input + self.backward_weight


@dataclass(frozen=True)
class PipelineTime:
    """Of one optimizer step. The seconds a rank is busy and its bubble add up to `total_seconds`, less hops."""

    total_seconds: float
    bottleneck: int
    """The rank with the most to do."""
    busy_seconds: tuple[float, ...]
    """Of each rank."""
    hop_seconds: float
    """What the transfers between stages add to the step, beside the work that they can hide behind."""

    @property
    def bubble_seconds(self) -> float:
        """Time for which the busiest rank waits for the others."""
        return max(0.0, self.total_seconds - self.hop_seconds - self.busy_seconds[self.bottleneck])


def pair_seconds(forward: StageSeconds, backward: StageSeconds, contention: float) -> float:
    """A forward and a backward pass beside each other: exchanges of one run while the other computes.

    Both slow down: exchanges to BESIDE_COMPUTE_FRACTION of their bandwidth, computation by the share `contention`, since the
    exchanges' kernels hold multiprocessors. What is left of either when the other is done runs at full speed.
    """
    compute = forward.forward + backward.backward
    exchange = forward.forward_exchange + backward.backward_exchange
    slowed_compute, slowed_exchange = compute * (1 + contention), exchange / BESIDE_COMPUTE_FRACTION
    if slowed_exchange > slowed_compute:
        return slowed_compute + exchange - BESIDE_COMPUTE_FRACTION * slowed_compute
    return slowed_exchange + compute - slowed_exchange / (1 + contention)


def pipeline_time(
    schedule: PipelineSchedule,
    stages: Sequence[StageSeconds],
    pp: int,
    microbatches: int,
    hop_seconds: float = 0.0,
    paired: bool = False,
    contention: float = 0.0,
) -> PipelineTime:
    """Seconds of all micro-batches' passes. `stages`: pp x vpp virtual stages (dualpipev: 2 pp) in the model's order.

    paired: a forward and a backward pass of different micro-batches run beside each other (`pair_seconds`) wherever the
    schedule has both. Raises InputError for a schedule that can't, or that has too few micro-batches.
    """
    made = (schedule, tuple(stages), pp, len(stages) // pp)

    def after(count: int, hop: float) -> Finish:
        return _run(*made, count, hop, paired, contention)

    total, busy = _extended(lambda count: after(count, hop_seconds), pp, made[3], microbatches)
    without_hops = _extended(lambda count: after(count, 0.0), pp, made[3], microbatches)[0] if hop_seconds else total
    bottleneck = max(range(pp), key=busy.__getitem__)
    return PipelineTime(total, bottleneck, busy, total - without_hops)


def forward_only_seconds(
    schedule: PipelineSchedule, stages: Sequence[StageSeconds], pp: int, microbatches: int, hop_seconds: float = 0.0
) -> float:
    """Seconds of all micro-batches' forward passes alone, each rank's in the order that the schedule has them in (forward-only
    steps of Megatron and DualPipe): nothing waits for a backward pass, and the pipeline fills and drains once."""
    made = (schedule, tuple(stages), pp, len(stages) // pp)
    return _extended(lambda count: _run(*made, count, hop_seconds, False, 0.0, forward_only=True), pp, made[3], microbatches)[0]


def _extended(run: Callable[[int], Finish], pp: int, per_rank: int, microbatches: int) -> Finish:
    """What `run` says of this many micro-batches, asked only for so many as it takes until every further pp of them take the
    same time.

    In the end the pace is that of the busiest rank, or of a longer circle of waiting with hops in it. Until then that rank's
    work may fill gaps, or the circle may not have closed, so that the pace is taken where it is the busiest rank's or the same
    as with half as many micro-batches. A pace can look settled before it is: nearly even interleaved stages came out up to 1.8%
    too slow, and hops as long as a forward pass 1.2% off.
    """
    some, paces = max(3, math.ceil(LEAST_FORWARDS / (pp * pp * per_rank))) * pp, []
    while microbatches > some + 2 * pp:
        settled = some + microbatches % pp
        first, second = run(settled), run(settled + pp)
        more = [b - a for a, b in zip(first[1], second[1], strict=True)]
        pace, rounds = max(second[0] - first[0], *more), (microbatches - settled) / pp
        total = first[0] + rounds * pace
        paces += [second[0] - first[0]]
        if rounds * min(abs(paces[-1] - other) for other in (max(more), *paces[:-1][-1:])) <= SETTLED_ERROR * total:
            return total, tuple(a + rounds * b for a, b in zip(first[1], more, strict=True))
        some *= 2
    return run(microbatches)


@lru_cache(maxsize=256)
def _program(schedule: PipelineSchedule, pp: int, per_rank: int, microbatches: int, paired: bool, forward_only: bool):
    """The slots of all ranks in an order in which each comes after what it needs.

    A list of (rank, needed slot or -1, needed slot or -1, duration's index) and the durations' keys: (work, stage[, stage]).
    """
    orders = rank_orders(schedule, pp, per_rank, microbatches, paired)
    if forward_only:
        orders = [[(one,) for slot in order for one in slot if one.work == "forward"] for order in orders]
    return _compile(orders)


def rank_orders(
    schedule: PipelineSchedule, pp: int, per_rank: int, microbatches: int, paired: bool = False
) -> list[list[Slot]]:
    """What each rank does, in order; `per_rank`: its virtual stages. Raises InputError where the schedule can't."""
    if schedule in ("dualpipe", "dualpipev"):
        if microbatches < 2 * pp:
            raise InputError(
                f"schedule {schedule} with pp {pp} needs at least {2 * pp} micro-batches a step, not {microbatches}"
            )
        if schedule == "dualpipe" and microbatches % 2:
            raise InputError(f"schedule dualpipe needs an even number of micro-batches a step, not {microbatches}")
        return (dualpipe if schedule == "dualpipe" else dualpipev)(pp, microbatches)
    if schedule == "zero-bubble":
        if paired:
            raise InputError("overlap_expert doesn't go with schedule zero-bubble: use interleaved or dualpipev")
        return zero_bubble(pp, microbatches)
    if per_rank > 1:
        if microbatches % pp:
            raise InputError(f"schedule interleaved with pp {pp} needs a multiple of {pp} micro-batches, not {microbatches}")
        return interleaved(pp, per_rank, microbatches, paired)
    return one_forward_one_backward(pp, microbatches, paired)


def _compile(orders: Sequence[Sequence[Slot]]):
    last = max(one.stage for order in orders for slot in order for one in slot)
    made: dict[tuple[str, int, int], int] = {}
    keys: dict[tuple, int] = {}
    program: list[tuple[int, int, int, int]] = []
    places = [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while places[rank] < len(order):
                slot = order[places[rank]]
                needs = [one.needs(last) for one in slot]
                if not all(need is None or need in made for need in needs):
                    break
                # What its own rank made is there when the rank is free.
                indices = [
                    -1 if need is None or one.is_local(last) else made[need] for one, need in zip(slot, needs, strict=True)
                ]
                key = (tuple(one.work for one in slot), tuple(one.stage for one in slot))
                for one in slot:
                    made[one.makes] = len(program)
                program.append((rank, indices[0], indices[-1], keys.setdefault(key, len(keys))))
                places[rank] += 1
                moved = True
    assert all(place == len(order) for place, order in zip(places, orders, strict=True)), "the ranks wait for each other"
    return program, tuple(keys)


def _run(
    schedule: PipelineSchedule,
    stages: tuple[StageSeconds, ...],
    pp: int,
    per_rank: int,
    microbatches: int,
    hop_seconds: float,
    paired: bool,
    contention: float,
    forward_only: bool = False,
) -> Finish:
    """Of exactly this many micro-batches."""
    program, keys = _program(schedule, pp, per_rank, microbatches, paired, forward_only)
    durations = [slot_seconds(stages, works, at, contention if paired else None) for works, at in keys]
    ends: list[float] = []
    free = [0.0] * pp
    busy = [0.0] * pp
    for rank, first, second, key in program:
        start = free[rank]
        if first >= 0 and ends[first] + hop_seconds > start:
            start = ends[first] + hop_seconds
        if second >= 0 and ends[second] + hop_seconds > start:
            start = ends[second] + hop_seconds
        seconds = durations[key]
        busy[rank] += seconds
        free[rank] = start + seconds
        ends.append(start + seconds)
    return max(free), tuple(busy)


def slot_seconds(stages: Sequence[StageSeconds], works: Sequence[str], at: Sequence[int], contention: float | None) -> float:
    """Seconds of passes in one slot, by their work and virtual stage; contention None: they follow each other."""
    if len(works) == 2 and contention is not None:
        return pair_seconds(stages[at[0]], stages[at[1]], contention)
    seconds = 0.0
    for work, stage in zip(works, at, strict=True):
        one = stages[stage]
        seconds += {
            "forward": one.forward + one.forward_exchange,
            "backward": one.backward + one.backward_exchange,
            "backward_input": one.backward_input + one.backward_exchange,
            "backward_weight": one.backward_weight,
        }[work]
    return seconds
