"""The nouns a GRPO step is told in: Prompt -> Sample -> Score -> Group -> PackedBatch.

Shape suffixes used in the engine: T packed tokens of a micro-batch, S sequences, H hidden, V vocabulary, B rows of a
decode step, D head dimension, N heads, K key/value heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

Message = Mapping[str, str]
"""One chat turn, {"role": ..., "content": ...}, as Hugging Face chat templates read it."""

FinishReason = Literal["stop", "length", "abort"]

IGNORE_INDEX = -100
"""Target of a position that predicts nothing (padding, the last token of a sequence)."""


@dataclass(frozen=True)
class Prompt:
    """One question. Exactly one of `text` (completed as it stands) and `messages` (through the chat template) is set."""

    id: str
    """Unique within its data source; stable across runs (it is derived from the question, not from the position)."""
    source: str
    """The data source, which selects the reward and groups the metrics."""
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    answer: str | None = None
    """The verified answer; None where the source's scorer doesn't need one."""
    meta: Mapping[str, object] = field(default_factory=dict)
    """What the scorer needs beyond the answer (for reasoning-gym: the whole item)."""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise ValueError(f"prompt {self.id!r} needs exactly one of text and messages")


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one origin: sampled by one weight version, or given by the environment (not trainable)."""

    tokens: Tensor
    """int64 [L], on the CPU."""
    trainable: bool
    weight_version: int
    """Version of the weights that sampled the tokens (the number given to `sync_weights`)."""
    logprobs: Tensor
    """fp32 [L], of the distribution sampled from (after temperature, top-k, top-p, min-p), natural log."""
    raw_logprobs: Tensor
    """fp32 [L], of the model's own distribution (temperature 1, full vocabulary), natural log."""
    temperature: float
    routed_experts: Tensor | None = None
    """int16 [L, MoE layers, top-k]: the experts each token took, for replay in training. None for dense models."""
    keep_mask: Tensor | None = None
    """bool [L, V]: the tokens that top-k / top-p / min-p left. None where sampling used the full vocabulary."""


@dataclass(frozen=True)
class Sample:
    """One response. Today one span; a tool result or a partial rollout is one more span."""

    id: int
    """Unique within the run, over epochs and resumes; keys the sampler's random numbers."""
    spans: tuple[Span, ...]
    finish_reason: FinishReason
    """stop: an end token or stop string; length: the token limit or the context; abort: cut by the caller."""
    text: str
    """The decoded response, without the end token and without special tokens."""

    @property
    def tokens(self) -> Tensor:
        """All response tokens in order, int64 [L]."""
        return torch.cat([span.tokens for span in self.spans])

    def __len__(self) -> int:
        return sum(len(span.tokens) for span in self.spans)


@dataclass(frozen=True)
class Score:
    """What a response earned: `value` trains, `parts` are logged one by one, `why` is for a reader of samples.jsonl."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Group:
    """All responses to one prompt. Scores and advantages are empty until the reward and advantage phases fill them."""

    prompt: Prompt
    prompt_tokens: Tensor
    """int64 [P]: the prompt as the model read it."""
    samples: tuple[Sample, ...]
    scores: tuple[Score, ...] = ()
    advantages: tuple[float, ...] = ()


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: S sequences end to end without padding between them, then padding up to a fixed T.

    T (the token budget) and S_max are the same for every micro-batch of a run, because pipelines, CUDA graphs and
    compilation need one shape. Padding tokens lie beyond `cu_seqlens[-1]`; sequences never split over micro-batches.
    Position t predicts `targets[t]` = tokens[t + 1]; every per-token field below refers to that prediction.
    """

    tokens: Tensor
    """int64 [T]; 0 in the padding."""
    positions: Tensor
    """int64 [T], counted from 0 inside each sequence; 0 in the padding."""
    cu_seqlens: Tensor
    """int32 [S_max + 1]: sequence s holds tokens cu_seqlens[s] : cu_seqlens[s + 1]; unused slots repeat the last end."""
    targets: Tensor
    """int64 [T]: the next token; IGNORE_INDEX in the prompt (but for its last token), at sequence ends and in the padding."""
    mask: Tensor
    """bool [T]: True where the prediction is a trainable response token."""
    advantages: Tensor
    """fp32 [T]: the advantage of the token's sample; 0 outside the mask."""
    rollout_logprob: Tensor
    """fp32 [T]: log-prob under the distribution that sampled the token; 0 outside the mask."""
    temperature: Tensor
    """fp32 [T]: the sampling temperature; 1 outside the mask."""
    seq_index: Tensor
    """int64 [T]: index of the token's sequence in this micro-batch; S_max in the padding."""
    old_logprob: Tensor | None = None
    """fp32 [T]: log-prob by the trainer before the first update on this rollout; None = use the current one, detached."""
    ref_logprob: Tensor | None = None
    """fp32 [T]: log-prob under the reference policy; None without a KL term."""
    routed_experts: Tensor | None = None
    """int16 [T, MoE layers, top-k], for router replay."""

    @property
    def max_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with every tensor on `device`."""
        return PackedBatch(**{
            f.name: value.to(device, non_blocking=True) if (value := getattr(self, f.name)) is not None else None
            for f in fields(self)
        })
