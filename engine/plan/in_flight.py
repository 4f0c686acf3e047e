"""Micro-batches in flight: what their activations take of a pipeline rank at most, from the schedule's own order of work."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..config import PipelineSchedule
from .run import PlannedRun
from .schedules import rank_orders
from .timeline import Slot

SETTLED_ROUNDS = 3
"""Of pp micro-batches each: every schedule has warmed up and repeats itself by then."""


def most_held_bytes(run: PlannedRun, chunk_bytes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each pipeline rank, where a micro-batch leaves chunk_bytes [pp, chunks of a rank] for its backward pass."""
    layout = run.layout
    # A micro-batch more or less changes nothing once the order repeats itself.
    microbatches = min(run.microbatches, SETTLED_ROUNDS * layout.pp)
    held = held_chunks(layout.schedule, layout.pp, chunk_bytes.shape[1], microbatches, run.pairs_passes)
    return (held * chunk_bytes[:, np.newaxis, :]).sum(axis=2).max(axis=1)


@lru_cache(maxsize=512)
def held_chunks(schedule: PipelineSchedule, pp: int, per_rank: int, microbatches: int, paired: bool) -> NDArray[np.float64]:
    """How many micro-batches of each of its chunks a rank holds, at all moments at which it may hold most: [pp, moment, chunk].

    1F1B: pp - rank of them; 2 (pp - 1 - rank) + 1 where each forward pass runs beside a backward pass, for which it warms up so
    much longer. Interleaved: 2 (pp - 1 - rank) + (vpp - 1) pp + 1 chunks; while it runs, forward passes of the first chunks
    and backward passes of the last ones alternate, so that the first, where they are larger, add up. Zero bubble (ZB-H1, arXiv
    2401.10241): pp on every rank, since weight gradients wait. DualPipe: pp + 1 stages, DualPipeV: 2 pp + 1 half-sized ones
    (arXiv 2412.19437, Table 2, and the DualPipe repository).
    """
    if pp == 1:
        return np.ones((1, 1, 1))
    # Layer by layer, the forward pass of a pair takes what the backward pass frees; DualPipe's tables count it as a whole.
    in_step = paired and schedule not in ("dualpipe", "dualpipev")
    moments = [_fullest(_moments(order, in_step)) for order in rank_orders(schedule, pp, per_rank, microbatches, paired)]
    held = np.zeros((pp, max(map(len, moments)), per_rank))
    for rank, of_rank in enumerate(moments):
        held[rank, : len(of_rank)] = of_rank
    return held


def _moments(order: list[Slot], in_step: bool) -> NDArray[np.int64]:
    """What a rank holds of each chunk whenever it is about to free something; in_step: beside a forward pass."""
    stages = sorted({one.stage for slot in order for one in slot})
    held = dict.fromkeys(stages, 0)
    moments = {}
    for slot in order:
        made = [one.stage for one in slot if one.work == "forward"]
        freed = [one.stage for one in slot if one.work in ("backward", "backward_weight")]
        if freed and in_step:
            moments[tuple(held.values())] = None
        for stage in made:
            held[stage] += 1
        if freed and not in_step:
            moments[tuple(held.values())] = None
        for stage in freed:
            held[stage] -= 1
    return np.array(list(moments))


def _fullest(moments: NDArray[np.int64]) -> NDArray[np.int64]:
    """Without those at which no chunk is held more often than at some other one."""
    more = (moments[np.newaxis] >= moments[:, np.newaxis]).all(axis=2)
    np.fill_diagonal(more, False)
    return moments[~more.any(axis=1)]
