"""Seconds of a step's generation: sequences start where slots are free, end as their lengths say; a step pays for the rest."""

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .decode import GenerationEngine
from .lengths import ResponseLengths
from .rollout_memory import rollout_kv_cache_bytes, sequence_cache_bytes
from .run import PlannedRun, RolloutPlan

CURVE_POINTS = 400
"""Of the curve of active sequences; each stands for an equal number of decoding steps."""
BATCH_POINTS = 24
"""Batch sizes at which a step is computed; between them it is interpolated."""
TAIL_FRACTION = 0.1
"""The tail starts when this fraction of the most active sequences is left."""


@dataclass(frozen=True)
class RolloutTime:
    """Generation of one GRPO step's samples; prefill + decode + tail = total."""

    prefill_seconds: float
    decode_seconds: float
    tail_seconds: float
    """Of decoding, while at most a tenth of the most active sequences are left. 0 with continuous generation."""
    total_seconds: float
    curve: tuple[tuple[float, float], ...]
    """(seconds since decoding began, sequences active in all engines)."""
    tokens_per_second_per_gpu: float
    """Response tokens over the generating GPUs."""
    step_seconds: tuple[float, float]
    """Of a decoding step with the most sequences active, and with one, in the middle of their responses."""
    sequences_per_engine: float
    """Most sequences that an engine decodes at once."""
    waves: float
    """Sequences of an engine over those it can hold; above 1 they wait."""


@dataclass(frozen=True)
class _Schedule:
    """When each sequence of one replica starts and ends, in decoding steps."""

    starts: NDArray[np.float64]
    ends: NDArray[np.float64]

    def active(self, steps: NDArray[np.float64]) -> NDArray[np.float64]:
        return (np.searchsorted(np.sort(self.starts), steps, "right") - self._ended(steps)).astype(float)

    def ages(self, steps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Steps that the active sequences have decoded, summed over them."""
        begun = np.concatenate([[0.0], np.cumsum(np.sort(self.starts))])
        done = np.concatenate([[0.0], np.cumsum(self.starts[np.argsort(self.ends)])])
        started = np.searchsorted(np.sort(self.starts), steps, "right")
        return steps * self.active(steps) - (begun[started] - done[self._ended(steps)])

    def _ended(self, steps: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.searchsorted(np.sort(self.ends), steps, "right")


def rollout_time(run: PlannedRun) -> RolloutTime:
    """Predict generation of one step's samples.

    Samples are dealt evenly to the engines. The engine followed is the one with the longest response of all: its others are
    the quantiles of the lengths, in an order that mixes them. A prompt is computed and held once for its samples on a replica.
    Raises InputError as `GenerationEngine.of` and `ResponseLengths.of` do.
    """
    plan, engine = run.rollout, GenerationEngine.of(run)
    lengths, samples = plan.lengths, plan.samples
    replicas = engine.count * engine.replicas
    share = samples / replicas
    prompts = max(1.0, share) / samples_of_a_prompt(engine)
    prefill = engine.prefill_seconds(prompts * plan.prompt_tokens, plan.prompt_tokens)
    slots = most_active(engine)
    if _never_drains(plan):
        age = lengths.token_weighted_mean_tokens / 2
        seconds = share * lengths.mean_tokens / plan.speculative_tokens / slots
        seconds *= engine.step_seconds(slots, plan.prompt_tokens + age)
        decode, tail, curve = float(seconds), 0.0, ((0.0, slots * replicas), (float(seconds), slots * replicas))
    else:
        decode, tail, curve = _drained(engine, lengths, samples, -(-samples // replicas), slots, replicas)
    total = prefill + decode + tail
    context = plan.prompt_tokens + lengths.mean_tokens / 2
    return RolloutTime(
        prefill_seconds=prefill,
        decode_seconds=decode,
        tail_seconds=tail,
        total_seconds=total,
        curve=curve,
        tokens_per_second_per_gpu=samples * lengths.mean_tokens / total / run.rollout_gpus,
        step_seconds=(engine.step_seconds(slots, context), engine.step_seconds(1, context)),
        sequences_per_engine=slots * engine.replicas,
        waves=share / slots,
    )


def most_active(engine: GenerationEngine) -> float:
    """Sequences that one replica decodes at once: all there are, max_sequences, or what its cache holds.

    The cache must hold the larger of two: sequences that started together at their fullest moment, and the mean of sequences
    of all ages (a random one is at half of a token-weighted length). A prompt's keys and values are held once for its samples
    on the replica, until the last of these ends; half of a group, on average, starts while the others still wait.
    """
    run, plan, group = engine.run, engine.plan, samples_of_a_prompt(engine)
    lengths, samples = plan.lengths, plan.samples * (plan.steps_ahead if _never_drains(plan) else 1)
    sequences = -(-samples // (engine.count * engine.replicas))
    tokens = np.linspace(0, lengths.max_tokens, 200)
    alive = lengths.survival(tokens)
    stay = lengths.expected_max_tokens(group) / lengths.mean_tokens  # of a prompt, over that of a sequence
    # Of every age of those that started together, and last of the mixed ages:
    ages = np.append(tokens, lengths.token_weighted_mean_tokens / 2)
    prompts = np.append(np.ones_like(tokens), stay) / group  # held for each sequence ...
    own_bytes = np.append(alive, 1.0) * sequence_cache_bytes(run, ages)
    prompt_bytes = sequence_cache_bytes(run, plan.prompt_tokens + ages) - sequence_cache_bytes(run, ages)
    prompt_bytes *= np.append(1 - (1 - alive) ** group, 1.0)  # ... while one of its samples decodes
    cache_bytes, waiting = rollout_kv_cache_bytes(run), (1 - 1 / group) / 2
    with np.errstate(divide="ignore", invalid="ignore"):  # where nothing is left that needs memory
        beside_prompts = (cache_bytes - waiting * prompt_bytes) / (own_bytes + prompts * prompt_bytes)
        beside_one, beside_all = ((cache_bytes - count * prompt_bytes) / own_bytes for count in (1, sequences / group))
    held = float(np.min(np.fmax(np.fmin(beside_prompts, beside_one), beside_all)))
    return min(float(sequences), plan.max_sequences / engine.replicas, max(1.0, held))


def samples_of_a_prompt(engine: GenerationEngine) -> float:
    """Samples of a group on one replica: all of them, unless a step has fewer prompts than there are replicas."""
    share = engine.plan.samples / (engine.count * engine.replicas)
    return min(float(engine.plan.group_size), max(1.0, share))


def _never_drains(plan: RolloutPlan) -> bool:
    return plan.steps_ahead > 1 and plan.continuous


def _drained(
    engine: GenerationEngine, lengths: ResponseLengths, samples: int, sequences: int, slots: float, replicas: int
) -> tuple[float, float, tuple[tuple[float, float], ...]]:
    """(decode seconds, tail seconds, curve) of a rollout that ends with its last sequence."""
    plan = engine.plan
    tokens = lengths.quantiles(sequences)
    tokens[-1] = max(tokens[-1], lengths.expected_max_tokens(samples))
    schedule = _schedule(tokens / plan.speculative_tokens, int(slots))
    last = float(schedule.ends.max())
    steps = (np.arange(CURVE_POINTS) + 0.5) * last / CURVE_POINTS
    active = schedule.active(steps)
    context = active * plan.prompt_tokens + schedule.ages(steps) * plan.speculative_tokens
    sizes = np.unique(np.geomspace(1, max(active.max(), 2), BATCH_POINTS))
    rows = np.interp(active, sizes, [engine.rows_seconds(size) for size in sizes])
    seconds = (rows + engine.cache_seconds(active, context)) * last / CURVE_POINTS
    tail = active <= TAIL_FRACTION * active.max()
    curve = zip(np.cumsum(seconds).tolist(), (active * replicas).tolist(), strict=True)
    return float(seconds[~tail].sum()), float(seconds[tail].sum()), tuple(curve)


def _schedule(steps: NDArray[np.float64], slots: int) -> _Schedule:
    """Each sequence starts in the slot that is free first, in an order in which long and short ones alternate."""
    order = np.argsort((np.arange(len(steps)) * 0.6180339887498949) % 1.0)  # multiples of the golden ratio spread evenly
    lengths = steps[order]
    if len(lengths) <= slots:
        return _Schedule(np.zeros(len(lengths)), lengths)
    free = [0.0] * slots
    starts, ends = np.empty(len(lengths)), np.empty(len(lengths))
    for index, length in enumerate(lengths):
        starts[index] = heapq.heappop(free)
        ends[index] = starts[index] + length
        heapq.heappush(free, float(ends[index]))
    return _Schedule(starts, ends)
