"""What every rank must know of a step's samples, wherever they are: rewards, lengths, ids. Exchanged once a step.

Everything decided over the whole step is computed from it on each rank alone, from the same numbers in the same order
(samples sorted by id), so it is the same on every rank and for every number of ranks: advantages, mini-batches,
denominators, statistics.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from ...kernels import ADVANTAGE_COUNTS, AdvantageSpec, group_advantage
from ...kernels.specs import DenominatorKind
from ..batch import Group
from ..parallel.collectives import all_gather_objects
from ..parallel.mesh import Axis


class Record(NamedTuple):
    """One sample."""

    sample_id: int
    group_id: int
    """Id of the group's first sample."""
    source: str
    """The prompt's data source."""
    sequence_length: int
    """Tokens of prompt and response."""
    response_length: int
    trainable_tokens: int
    finished: bool
    """It ended by itself, not at a limit."""
    reward: float
    parts: Mapping[str, float]

    @property
    def is_trained_on(self) -> bool:
        return math.isfinite(self.reward) and self.trainable_tokens > 0


class Census:
    """The records of all samples of a step, sorted by id."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = sorted(records, key=lambda record: record.sample_id)
        ids = [record.sample_id for record in self.records]
        if len(set(ids)) < len(ids):
            repeated = sorted({one for one, other in pairwise(ids) if one == other})
            raise ValueError(f"sample ids {repeated[:5]} occur more than once in a step: ids must be unique within the run")

    @classmethod
    def take(cls, groups: Sequence[Group], axis: Axis) -> "Census":
        """Collective over `axis` (data parallel): each rank contributes its own scored groups, possibly none."""
        own = [record for group in groups for record in _records(group)]
        return cls([record for part in all_gather_objects(own, axis) for record in part])

    def advantages(self, spec: AdvantageSpec) -> tuple[dict[int, float], dict[str, float]]:
        """(sample id -> advantage, metrics of the rewards). A sample whose reward isn't finite has advantage 0."""
        if not self.records:
            return {}, {}
        groups = {group_id: index for index, group_id in enumerate(dict.fromkeys(r.group_id for r in self.records))}
        rewards = torch.tensor([record.reward for record in self.records], dtype=torch.float64)
        index = torch.tensor([groups[record.group_id] for record in self.records])
        values, counts = group_advantage(rewards, index, spec)
        count = dict(zip(ADVANTAGE_COUNTS, counts.tolist(), strict=True))
        metrics = {"reward/nonfinite": float(count["nonfinite_rewards"])}
        if count["rewards"]:
            finite = rewards[rewards.isfinite()]
            metrics["reward/mean"] = float(finite.mean())
            metrics["reward/std"] = float(finite.std(correction=0))
            metrics["groups/mixed"] = 1 - count["constant_groups"] / count["groups"]
        return {record.sample_id: float(value) for record, value in zip(self.records, values, strict=True)}, metrics

    def minibatches(self, count: int, seed: int, step: int) -> list[frozenset[int]]:
        """Sample ids of each of `count` mini-batches of equal size (to within one), from one permutation of all samples keyed
        by (seed, step). Samples that aren't trained on are left out; mini-batches left empty are dropped.
        """
        ids = np.array([record.sample_id for record in self.records if record.is_trained_on], dtype=np.int64)
        order = np.random.default_rng((seed, step)).permutation(len(ids))
        return [frozenset(ids[part].tolist()) for part in np.array_split(order, count) if len(part)]

    def denominator(self, sample_ids: frozenset[int], kind: DenominatorKind, constant_length: int) -> int:
        """What the loss of a mini-batch is divided by: its samples, its trainable tokens, or samples * constant_length."""
        match kind:
            case "sequences":
                return len(sample_ids)
            case "tokens":
                return sum(record.trainable_tokens for record in self.records if record.sample_id in sample_ids)
            case "constant":
                return len(sample_ids) * constant_length

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; 0 where there is none."""
        return max((record.sequence_length for record in self.records), default=0)

    def metrics(self) -> dict[str, float]:
        """Statistics of the responses, and the mean of each part of the reward over the samples that have it as reward/<part>.

        Where the step has more than one data source, also reward/<source>/mean and reward/<source>/<part>. Values that aren't
        finite are left out, and so is a mean over nothing.
        """
        if not self.records:
            return {}
        metrics = {
            "response/length": sum(record.response_length for record in self.records) / len(self.records),
            "response/finished": sum(record.finished for record in self.records) / len(self.records),
            "tokens/response": float(sum(record.response_length for record in self.records)),
        }
        metrics |= _means("reward", [record.parts for record in self.records])
        by_source: dict[str, list[Mapping[str, float]]] = {}
        for record in self.records:
            by_source.setdefault(record.source, []).append({"mean": record.reward, **record.parts})
        if len(by_source) > 1:
            for source, rows in sorted(by_source.items()):
                metrics |= _means(f"reward/{source}", rows)
        return metrics


def _means(prefix: str, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each column over the rows that have a finite value in it."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if math.isfinite(value):
                columns.setdefault(name, []).append(value)
    return {f"{prefix}/{name}": math.fsum(values) / len(values) for name, values in sorted(columns.items())}


def _records(group: Group) -> list[Record]:
    if len(group.scores) != len(group.samples):
        counts = f"{len(group.samples)} samples but {len(group.scores)} scores"
        raise ValueError(f"prompt {group.prompt.id} has {counts}: score every sample before training on it")
    return [
        Record(
            sample_id=sample.id,
            group_id=group.samples[0].id,
            source=group.prompt.source,
            sequence_length=len(group.prompt_tokens) + len(sample),
            response_length=len(sample),
            trainable_tokens=sum(len(span.tokens) for span in sample.spans if span.trainable),
            finished=sample.finish_reason == "stop",
            reward=float(score.value),
            parts=dict(score.parts),
        )
        for sample, score in zip(group.samples, group.scores, strict=True)
    ]
