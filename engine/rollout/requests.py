"""What the engine is asked for and what it has of it so far: a prompt, and the responses in the making."""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..batch import Prompt, Sample, Span
from ..protocols import Sampling
from .kv_cache import Context
from .stopping import StopStrings


@dataclass(eq=False)
class Response:
    """One response in the making."""

    request: "Request"
    sample_id: int
    context: Context
    """The prompt's tokens, then the response's."""
    stop_strings: StopStrings | None = None
    """None when there are no stop strings: then nothing is decoded until the end."""
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    keep_masks: list[Tensor] = field(default_factory=list)
    """bool [V] each, one a token where truncation is active, else empty."""
    version_starts: list[tuple[int, int]] = field(default_factory=list)
    """(weight version, index of the first token it drew), a new entry whenever the version changed."""

    @property
    def tokens(self) -> list[int]:
        """Of the response, without the prompt."""
        return self.context.tokens[len(self.request.context.tokens) :]

    @property
    def num_tokens(self) -> int:
        return len(self.logprobs)

    def append(self, token: int, logprob: float, raw_logprob: float, version: int) -> None:
        """A token that the weights of `version` drew."""
        if not self.version_starts or self.version_starts[-1][0] != version:
            self.version_starts.append((version, self.num_tokens))
        self.context.tokens.append(token)
        self.logprobs.append(logprob)
        self.raw_logprobs.append(raw_logprob)

    def spans(self) -> tuple[Span, ...]:
        """One for each weight version that drew tokens. A greedy response's log-probs are those of temperature 1, and so is
        the temperature it records: a trainer that recomputes them there gets the same."""
        tokens, starts = self.tokens, self.version_starts
        ends = [start for _, start in starts[1:]] + [len(tokens)]
        return tuple(
            Span(
                tokens=torch.tensor(tokens[start:end]),
                trainable=True,
                weight_version=version,
                logprobs=torch.tensor(self.logprobs[start:end]),
                raw_logprobs=torch.tensor(self.raw_logprobs[start:end]),
                temperature=self.request.sampling.temperature or 1.0,
                keep_mask=torch.stack(self.keep_masks[start:end]) if self.keep_masks else None,
            )
            for (version, start), end in zip(starts, ends, strict=True)
        )


@dataclass(eq=False)
class Request:
    """A prompt and its responses, of which the engine's scheduler moves some from `waiting` into the batch."""

    id: int
    """The id of its first sample; its samples are id, id + 1, ..."""
    prompt: Prompt
    sampling: Sampling
    max_tokens: int
    """Responses have at most this many tokens: the smaller of max_new_tokens and what the model's context leaves."""
    context: Context
    """The prompt's tokens; holds their blocks while responses wait to enter the batch."""
    waiting: deque[Response] = field(default_factory=deque)
    """Responses that are not in the batch, in order."""
    samples: dict[int, Sample] = field(default_factory=dict)
    """Finished responses by sample id."""
