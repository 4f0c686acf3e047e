"""From the examples of each mini-batch to micro-batches on the model's device, equally many on every rank."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..batch import PackedBatch
from ..parallel.collectives import all_reduce
from ..parallel.mesh import Mesh
from .packing import Example, divide, fill, without_padding


class MicroBatch(NamedTuple):
    batch: PackedBatch
    """On the model's device; without its padding on a CPU, where no fixed shape is needed."""
    max_seqlen: int
    """No sequence is longer; the same in all micro-batches of a rollout, a multiple of 128 unless the token budget is less."""
    sample_ids: tuple[int, ...]
    has_gradient: bool
    """False where no token has a gradient: a forward pass is enough for the statistics."""


def microbatches(
    minibatches: Sequence[Sequence[Example]],
    mesh: Mesh,
    num_tokens: int,
    max_sequences: int,
    longest: int,
    only_advantage_pulls: bool,
) -> list[list[MicroBatch]]:
    """The micro-batches of this rank's part of each mini-batch. Collective over the mesh.

    A rank with fewer than the others gets micro-batches of padding only. longest: tokens of the longest sequence on any rank,
    at most num_tokens, the size of a micro-batch. only_advantage_pulls: the loss has no other term,
    so examples of advantage 0 (their whole group earned the same) have no gradient and are kept apart.
    """
    if not minibatches:
        return []
    parts: list[tuple[list[list[Example]], list[list[Example]]]] = []
    for examples in minibatches:
        resting = [example for example in examples if only_advantage_pulls and example.advantage == 0]
        pulled = [example for example in examples if not (only_advantage_pulls and example.advantage == 0)]
        parts.append((divide(pulled, num_tokens, max_sequences), divide(resting, num_tokens, max_sequences)))
    counts = torch.tensor([[len(pulled), len(resting)] for pulled, resting in parts])
    all_reduce(counts, mesh.world, "max")

    max_seqlen = min(-(-longest // 128) * 128, num_tokens)

    def place(examples: Sequence[Example], has_gradient: bool) -> MicroBatch:
        batch = fill(examples, num_tokens, max_sequences)
        batch = without_padding(batch) if mesh.device.type == "cpu" else batch.to(mesh.device)
        return MicroBatch(batch, max_seqlen, tuple(example.sample.id for example in examples), has_gradient)

    return [
        [place(examples, True) for examples in _fill_up(pulled, count_pulled)]
        + [place(examples, False) for examples in _fill_up(resting, count_resting)]
        for (pulled, resting), (count_pulled, count_resting) in zip(parts, counts.tolist(), strict=True)
    ]


def _fill_up(parts: list[list[Example]], count: int) -> list[list[Example]]:
    return parts + [[] for _ in range(count - len(parts))]
