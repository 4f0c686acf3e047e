"""The seams of the engine: what a rollout engine, a source of weights and an environment must do.

Structural types only: nothing inherits from these, and each has more than one implementation to come (in-process, vLLM;
trainer, checkpoint; single-turn, tools).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from .batch import Group, Message, Prompt, Sample, Score
from .config import InputError

SwapTier = Literal["alias", "copy", "reshard", "stream"]
"""T0 alias, T1 local copy, T2 reshard, T3 stream: how one parameter reaches the rollout engine."""


@dataclass(frozen=True)
class Sampling:
    """One counter-based uniform a token, keyed (seed, sample id, position), inverts the CDF in vocabulary order."""

    n: int = 1
    """Samples a prompt; they share the prompt's key/value blocks."""
    temperature: float = 1.0
    """0 is greedy: the arg-max token, log-prob still that of the temperature-1 distribution."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    min_p: float = 0.0
    """Drops tokens below min_p times the largest probability."""
    max_new_tokens: int = 16
    stop: tuple[str, ...] = ()
    """Strings that end a response; kept in the tokens, cut from the text."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end a response, besides the tokenizer's end token; kept in the tokens."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"sampling n {self.n}: needs at least 1 sample a prompt")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"sampling temperature {self.temperature}: must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling top_p {self.top_p}: must lie in (0, 1]; 1 keeps the whole vocabulary")
        if self.top_k < 0:
            raise InputError(f"sampling top_k {self.top_k}: must be 0 (whole vocabulary) or above")
        if not 0 <= self.min_p < 1:
            raise InputError(f"sampling min_p {self.min_p}: must lie in [0, 1)")
        if self.max_new_tokens < 1:
            raise InputError(f"sampling max_new_tokens {self.max_new_tokens}: needs at least 1")


@dataclass(frozen=True)
class WeightMeta:
    """One parameter of a WeightSource, under its Hugging Face name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Global shape."""
    shard: tuple[slice, ...] | None = None
    """The rectangle of the global tensor this rank holds; None when it holds all of it."""
    tied_to: str | None = None
    """Name of the parameter whose storage this one shares (a tied `lm_head.weight`)."""


class WeightSource(Protocol):
    """Whoever holds the newest weights: the trainer, or a checkpoint."""

    def metadata(self) -> Sequence[WeightMeta]: ...

    def local_shards(self) -> Mapping[str, Tensor]:
        """Hugging Face name -> this rank's part, by reference (no copy: an in-place update shows through)."""
        ...

    def iter_full(self, bucket_bytes: int) -> Iterator[Sequence[tuple[str, Tensor]]]:
        """Buckets of full (gathered) tensors of at most `bucket_bytes` each (one tensor at least), in metadata order."""
        ...


@dataclass(frozen=True)
class SyncPlan:
    """The tier chosen for each parameter by `bind_weights`; cached for every later sync."""

    tiers: Mapping[str, SwapTier]


@dataclass(frozen=True)
class SyncStats:
    """What one weight sync cost."""

    version: int
    seconds: float
    bytes_moved: int


class RolloutEngine(Protocol):
    """Generates samples and swaps weights in place. `InProcessEngine` is the first implementation."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, ids: Sequence[int] | None = None) -> list[Group]:
        """`sampling.n` samples for each prompt, in the order of the prompts.

        ids[j] is the id of prompt j's first sample, ids[j] + i that of its i-th: given by a caller whose samples must not
        depend on how prompts are spread over ranks. None takes them from the engine's own counter.
        """
        ...

    def submit(self, prompt: Prompt, sampling: Sampling) -> int:
        """Queue one prompt; returns the id that `abort` takes. `step` then produces its samples."""
        ...

    def step(self) -> list[Sample]:
        """One forward pass over what is queued; returns the samples it finished."""
        ...

    def abort(self, ids: Iterable[int] | None = None) -> None:
        """Drop the given submissions, all when None."""
        ...

    def bind_weights(self, source: WeightSource) -> SyncPlan:
        """Once, collective over both meshes: choose a tier for every parameter."""
        ...

    def sync_weights(self, version: int) -> SyncStats:
        """Use the source's newest weights: swap, flush the prefix cache, set the version."""
        ...

    def sleep(self, what: Literal["weights", "kv_cache", "all"]) -> None:
        """Give memory back to training."""
        ...

    def wake(self, what: Literal["weights", "kv_cache", "all"]) -> None: ...

    def checksum(self) -> dict[str, str]:
        """Of the weights it really uses: Hugging Face name -> order-independent integer sum of the tensor's bits, hex."""
        ...


class Environment(Protocol):
    """What the policy talks to. Single-turn: `start` gives the question, `step` always None."""

    def start(self, prompt: Prompt) -> Sequence[Message]: ...

    def step(self, sample: Sample) -> Sequence[Message] | None:
        """The environment's next messages, or None when the episode is over."""
        ...

    def score(self, sample: Sample) -> Score: ...
