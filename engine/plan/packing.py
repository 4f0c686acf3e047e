"""The optimizer steps of a GRPO step: its samples packed into sequences, and these dealt to replicas and micro-batches."""

import math
from bisect import bisect_left, insort
from dataclasses import replace
from typing import TYPE_CHECKING

from .layout_fit import microbatch_rule

if TYPE_CHECKING:
    from .run import PlannedRun, TrainingPlan

BIN_SAMPLES = 512
"""Lengths that stand for a step's samples when they are packed."""


def packed_training(run: "PlannedRun") -> "TrainingPlan":
    """The training plan of one optimizer step of a run with a rollout: its batch, and the length of its sequences.

    Samples of a mini-batch are packed best-fit, longest first, into sequences of training.sequence_length_tokens and dealt to
    the data-parallel replicas; where a schedule needs more micro-batches than that fills, empty ones are computed too. The
    layout must be resolved, and the longest sample fit into a sequence (`validation.problems`).
    """
    plan, training, layout = run.rollout, run.training, run.layout
    samples, lengths, limit = plan.samples, plan.lengths, training.sequence_length_tokens
    stand_ins = min(samples, BIN_SAMPLES)
    bins = packed_sequences([plan.prompt_tokens + tokens for tokens in lengths.quantiles(stand_ins)], limit)
    replica_sequences = bins * samples / stand_ins / plan.optimizer_steps / layout.dp
    unit, fewest = microbatch_rule(layout)
    microbatches = max(fewest, math.ceil(replica_sequences / training.micro_batch_sequences / unit) * unit)
    tokens = samples * (plan.prompt_tokens + lengths.mean_tokens) / plan.optimizer_steps / layout.dp
    if not plan.pad_packed:
        limit = math.ceil(tokens / (microbatches * training.micro_batch_sequences))
    batch = microbatches * layout.dp * training.micro_batch_sequences
    packed = math.ceil(lengths.token_weighted_sample_tokens(plan.prompt_tokens))
    return replace(
        training, global_batch_sequences=batch, sequence_length_tokens=limit, packed_length_tokens=min(packed, limit)
    )


def with_batch(run: "PlannedRun") -> "PlannedRun":
    """With a rollout, the run whose batch is what its samples are packed into. `packed_training` says what must hold before."""
    if run.rollout is None:
        return run
    batch = packed_training(run).global_batch_sequences
    return replace(run, training=replace(run.training, global_batch_sequences=batch))


def packed_sequences(lengths_tokens: list[float], limit_tokens: int) -> int:
    """Sequences of at most `limit_tokens` that hold samples of these lengths, best fit, longest first."""
    room: list[float] = []
    for length in sorted(lengths_tokens, reverse=True):
        place = bisect_left(room, length)
        left = room.pop(place) if place < len(room) else limit_tokens
        insort(room, left - length)
    return len(room)
