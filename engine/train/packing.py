"""Samples of different lengths become micro-batches of one fixed shape: sort by length, best fit (as DeepSeek-R1 packs).

Deterministic, and independent of the order in which samples come.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..batch import IGNORE_INDEX, PackedBatch, Sample
from ..config import InputError


@dataclass(frozen=True)
class Example:
    """One response with the prompt it answers and what it earned: one sequence to train on."""

    prompt_tokens: Tensor
    """int64 [P], P >= 1, on the CPU."""
    sample: Sample
    advantage: float

    def __len__(self) -> int:
        return len(self.prompt_tokens) + len(self.sample)


def best_fit(lengths: Sequence[int], budget: int, max_sequences: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `budget` tokens and `max_sequences` sequences, longest sequence first.

    Each goes to the fullest bin that still has room for it (best-fit decreasing: at most 11/9 of the fewest bins, plus 4).
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        assert 0 < lengths[index] <= budget, f"sequence {index} has {lengths[index]} tokens, the budget is {budget}"
        fitting = [b for b in range(len(bins)) if room[b] >= lengths[index] and len(bins[b]) < max_sequences]
        if fitting:
            fullest = min(fitting, key=lambda b: room[b])
        else:
            fullest = len(bins)
            bins.append([])
            room.append(budget)
        bins[fullest].append(index)
        room[fullest] -= lengths[index]
    return bins


def require_fitting(lengths: Sequence[int], budget: int) -> None:
    """InputError where a sequence has more tokens than a micro-batch."""
    too_long = sorted((length for length in lengths if length > budget), reverse=True)
    if too_long:
        shown = ", ".join(map(str, too_long[:5])) + (", ..." if len(too_long) > 5 else "")
        raise InputError(
            f"--train.microbatch-tokens {budget} is too small for {len(too_long)} of {len(lengths)} sequences, of {shown} "
            f"tokens (prompt and response): raise it to {too_long[0]} at least, or lower --rollout.max-new-tokens"
        )


def divide(examples: Sequence[Example], tokens_per_microbatch: int, max_sequences: int) -> list[list[Example]]:
    """The examples of each micro-batch: as few micro-batches as best fit finds, the same whatever the order of `examples`.

    Raises InputError for a sequence longer than a micro-batch.
    """
    examples = sorted(examples, key=lambda example: example.sample.id)
    lengths = [len(example) for example in examples]
    require_fitting(lengths, tokens_per_microbatch)
    return [[examples[index] for index in members] for members in best_fit(lengths, tokens_per_microbatch, max_sequences)]


def pack(examples: Sequence[Example], tokens_per_microbatch: int, max_sequences: int) -> list[PackedBatch]:
    """Micro-batches of `tokens_per_microbatch` tokens and `max_sequences` slots that hold every example once."""
    parts = divide(examples, tokens_per_microbatch, max_sequences)
    return [fill(part, tokens_per_microbatch, max_sequences) for part in parts]


def fill(examples: Sequence[Example], num_tokens: int, max_sequences: int) -> PackedBatch:
    """One micro-batch of `num_tokens` tokens with the examples end to end; with none, it is all padding."""
    batch = PackedBatch(
        tokens=torch.zeros(num_tokens, dtype=torch.int64),
        positions=torch.zeros(num_tokens, dtype=torch.int64),
        cu_seqlens=torch.zeros(max_sequences + 1, dtype=torch.int32),
        targets=torch.full((num_tokens,), IGNORE_INDEX),
        mask=torch.zeros(num_tokens, dtype=torch.bool),
        advantages=torch.zeros(num_tokens),
        rollout_logprob=torch.zeros(num_tokens),
        temperature=torch.ones(num_tokens),
        seq_index=torch.full((num_tokens,), max_sequences),
    )
    end = 0
    for index, example in enumerate(examples):
        start, end = end, end + len(example)
        batch.tokens[start:end] = torch.cat([example.prompt_tokens, example.sample.tokens])
        batch.positions[start:end] = torch.arange(end - start)
        batch.seq_index[start:end] = index
        batch.cu_seqlens[index + 1 :] = end
        _fill_predictions(batch, example, first=start + len(example.prompt_tokens) - 1)
    return batch


def _fill_predictions(batch: PackedBatch, example: Example, first: int) -> None:
    """Write the fields of the positions that predict a trainable token; `first` predicts the response's first token."""
    assert len(example.prompt_tokens), f"sample {example.sample.id} has an empty prompt: nothing predicts its first token"
    for span in example.sample.spans:
        here = slice(first, first + len(span.tokens))
        first = here.stop
        if not span.trainable:
            continue
        if span.keep_mask is not None or span.routed_experts is not None:
            raise NotImplementedError("training on top-k / top-p / min-p masks or on routed experts is not implemented yet")
        batch.targets[here] = span.tokens
        batch.mask[here] = True
        batch.advantages[here] = example.advantage
        batch.rollout_logprob[here] = span.logprobs
        # A greedy sample's log-probs are those of temperature 1 (protocols.Sampling).
        batch.temperature[here] = span.temperature or 1.0


def without_padding(batch: PackedBatch) -> PackedBatch:
    """The same sequences without the padding tokens and the unused sequence slots, as views.

    For the CPU, where no fixed shape is needed and every padding token costs time. Reads `cu_seqlens` on the host.
    """
    num_tokens = int(batch.cu_seqlens[-1])
    num_sequences = int((batch.cu_seqlens < num_tokens).sum())

    def cut(per_token: Tensor | None) -> Tensor | None:
        return None if per_token is None else per_token[:num_tokens]

    return replace(
        batch,
        cu_seqlens=batch.cu_seqlens[: num_sequences + 1],
        **{name: cut(getattr(batch, name)) for name in PER_TOKEN_FIELDS},
    )


PER_TOKEN_FIELDS = (
    "tokens", "positions", "targets", "mask", "advantages", "rollout_logprob", "temperature", "seq_index",
    "old_logprob", "ref_logprob", "routed_experts",
)  # fmt: skip
