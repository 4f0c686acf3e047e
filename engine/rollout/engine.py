"""The in-process rollout engine: batched generation over a paged cache, with the trainer's own weights."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..batch import FinishReason, Group, Prompt, Sample
from ..config import InputError, Layout
from ..model.config import ModelConfig
from ..protocols import Sampling, SyncPlan, SyncStats, WeightSource
from .kv_cache import BlockAllocator, Context, KVCache
from .paged_model import PagedModel
from .requests import Request, Response
from .sampling import Drawn
from .scheduler import Scheduler
from .stopping import StopStrings, decode, end_token_ids
from .weights import (
    MAX_PROBE_DIFFERENCE,
    StaleWeightsError,
    bind_aliases,
    checksums,
    probe_tokens,
    prove_aliases,
    prove_logprobs,
)

Resource = Literal["weights", "kv_cache", "all"]


@dataclass(frozen=True)
class EngineConfig:
    """What the engine may use."""

    max_batch: int = 64
    """Responses that run at once on a rank. A decode step of 64 costs little more than one of 16: the weights are read once."""
    block_size: int = 16
    """Tokens in a block of the key/value cache."""
    kv_cache_gib: float = 1.0
    """Largest size of the key/value cache of a rank, in GiB; less is taken where max_batch full contexts need less."""
    fill_tokens: int = 2048
    """Prompt tokens a forward pass takes at most, besides one token for each running response; longer prompts go in chunks."""
    layout: Layout | None = None
    """How the rollout model is spread over the ranks; the default is the training layout."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "block_size", "fill_tokens"):
            require_positive(name, getattr(self, name))
        if not self.kv_cache_gib > 0:
            raise InputError(f"--rollout.kv-cache-gib {self.kv_cache_gib}: must be above 0")
        if self.layout is not None and replace(self.layout, dp=0) != Layout():
            raise InputError(
                f"--rollout.layout {self.layout}: a layout of its own needs weights resharded (T2), which isn't "
                "implemented yet: leave --rollout.layout out"
            )


@dataclass(frozen=True)
class RolloutConfig(EngineConfig):
    """What a training step generates, and how."""

    group_size: int = 8
    """Responses to each prompt: GRPO compares them with each other."""
    prompts_per_step: int = 8
    """Prompts a training step, over all ranks."""
    max_new_tokens: int = 64
    """A response is cut after this many tokens."""
    temperature: float = 1.0
    """1 samples from the model's own distribution, which is the one the loss trains; 0 is greedy."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together have this mass; 1 keeps all."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less probable than this part of the most probable one's probability; 0 keeps all."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, besides the model's end tokens. They are cut from the text that is scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("group_size", "prompts_per_step"):
            require_positive(name, getattr(self, name))
        self.sampling(seed=0)

    def sampling(self, seed: int) -> Sampling:
        """The training step's sampling settings."""
        return Sampling(
            n=self.group_size,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            seed=seed,
        )


def require_positive(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"--rollout.{name.replace('_', '-')} {value}: must be at least 1")


class InProcessEngine:
    """A RolloutEngine (protocols.py) inside the training process, whose weights are the trainer's storages (T0).

    Order of use: construct, `bind_weights`, then `sync_weights` before the first generation and after every optimizer step.

    encode: a prompt's token ids as the model is to read it (template included).
    probe: the trainer's log-probs of one sequence, int64 [L] -> fp32 [L - 1], of tokens 1 .. L - 1 given those before.
    beat: called after each forward pass of `generate`, a sign of life during a long generation.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        tokenizer: PreTrainedTokenizerBase,
        encode: Callable[[Prompt], list[int]],
        config: EngineConfig,
        device: torch.device | str,
        dtype: torch.dtype,
        probe: Callable[[Tensor], Tensor],
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        if dtype not in MAX_PROBE_DIFFERENCE:
            raise ValueError(f"rollouts in {dtype}: {' and '.join(map(str, MAX_PROBE_DIFFERENCE))} are implemented")
        self.config = config
        self.version = -1
        """Of the weights in use, as given to `sync_weights`; -1 before the first sync."""
        self.probe_difference = math.nan
        """Largest log-prob difference between engine and trainer at the last sync, in nats."""
        self._model_config = model_config
        self._tokenizer = tokenizer
        self._encode = encode
        self._device = torch.device(device)
        self._dtype = dtype
        self._probe = probe
        self._beat = beat
        self._end_ids = end_token_ids(model_config, tokenizer)
        self._source: WeightSource | None = None
        self._asleep: set[str] = set()
        self._next_id = 0
        self._unclaimed: list[Sample] = []
        allocator = BlockAllocator(_num_blocks(model_config, config, dtype), config.block_size)
        self._scheduler = Scheduler(allocator, config.max_batch, config.fill_tokens)
        self._paged = PagedModel(model_config, allocator, config.max_batch, self._device, dtype)

    @property
    def tokens_forwarded(self) -> int:
        """Tokens fed to the model since construction; a group's prompt counts once."""
        return self._paged.tokens_forwarded

    @property
    def num_preemptions(self) -> int:
        """Responses sent back to waiting since construction because cache blocks ran out; many: raise kv_cache_gib."""
        return self._scheduler.num_preemptions

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, ids: Sequence[int] | None = None) -> list[Group]:
        """`sampling.n` samples for each prompt, in the order of the prompts; see RolloutEngine.generate for `ids`.

        Everything is checked before anything is generated: raises InputError for an empty prompt, one that leaves no room
        for a response in the context or the cache, and token ids that the model doesn't have; ValueError for ids that are in
        use. Raises FloatingPointError when the model's logits are not finite.
        """
        if ids is None:
            ids = range(self._next_id, self._next_id + len(prompts) * sampling.n, sampling.n)
        requests = [self._request(prompt, sampling, first) for prompt, first in zip(prompts, ids, strict=True)]
        self._queue(requests)
        ours, missing = set(requests), len(requests) * sampling.n
        try:
            while missing:
                for request, sample in self._advance():
                    if request in ours:
                        missing -= 1
                    else:
                        self._unclaimed.append(sample)
                self._beat()
        except BaseException:
            for request in ours & set(self._scheduler.requests.values()):
                self._scheduler.remove(request)
            raise
        return [
            Group(r.prompt, torch.tensor(r.context.tokens), tuple(r.samples[r.id + i] for i in range(sampling.n)))
            for r in requests
        ]

    def check(self, prompts: Iterable[Prompt], sampling: Sampling) -> int:
        """Raise the InputError that `generate` would raise for one of the prompts, before a run depends on it.

        Returns the most tokens that a prompt and a response to it can have together.
        """
        requests = (self._request(prompt, sampling, first_id=0) for prompt in prompts)
        return max((len(request.context.tokens) + request.max_tokens for request in requests), default=0)

    def submit(self, prompt: Prompt, sampling: Sampling) -> int:
        """Queue one prompt. Returns the id of its first sample, which `abort` takes; the others count on from it.

        Raises InputError as `generate` does.
        """
        request = self._request(prompt, sampling, self._next_id)
        self._queue([request])
        return request.id

    def step(self) -> list[Sample]:
        """One forward pass over what is queued. Returns the samples it finished, and those of submissions that finished
        during a call of `generate`; an empty list when nothing is queued."""
        finished, self._unclaimed = self._unclaimed, []
        return finished + [sample for _, sample in self._advance()]

    def abort(self, ids: Iterable[int] | None = None) -> None:
        """Drop the submissions of the given ids, all when None, with the samples they haven't returned. Ids of finished
        submissions are ignored; one that was never given out is a ValueError."""
        for request_id in list(self._scheduler.requests) if ids is None else ids:
            if not 0 <= request_id < self._next_id:
                raise ValueError(f"abort({request_id}): no such submission")
            if request_id in self._scheduler.requests:
                self._scheduler.remove(self._scheduler.requests[request_id])

    def bind_weights(self, source: WeightSource) -> SyncPlan:
        """Take the source's storages as this engine's parameters. Raises InputError for a parameter that T0 can't serve."""
        plan = bind_aliases(self._paged.model, source, self._device)
        self._source = source
        return plan

    def sync_weights(self, version: int) -> SyncStats:
        """Use the source's newest weights and prove it. Responses in progress keep their tokens; what they draw from now on
        is a new span of the new version.

        Raises StaleWeightsError, after which nothing may be generated until a sync succeeds.
        """
        assert self._source is not None, "bind_weights comes before sync_weights"
        self._require_awake()
        start = time.perf_counter()
        self.version = -1
        self._flush()
        prove_aliases(self._paged.model, self._source, version)
        allocator = self._scheduler.allocator
        if allocator.num_free != allocator.num_blocks:
            raise StaleWeightsError(
                f"{allocator.num_blocks - allocator.num_free} cache blocks still hold keys of weights before version {version}"
            )
        tokens = probe_tokens(self._tokenizer)
        engine, trainer = self._paged.token_logprobs(tokens.tolist()), self._probe(tokens.to(self._device))
        self.probe_difference = prove_logprobs(engine, trainer.to(self._device), tokens, self._dtype, version)
        self.version = version
        return SyncStats(version, seconds=time.perf_counter() - start, bytes_moved=0)

    def sleep(self, what: Resource) -> None:
        """Give the cache's memory back; responses in progress will be recomputed. T0 weights are the trainer's, so there is
        nothing to give back, but generating without waking them is refused all the same."""
        self._asleep |= _parts(what)
        if "kv_cache" in self._asleep:
            self._flush()
            self._paged.free_memory()

    def wake(self, what: Resource) -> None:
        """Undo `sleep`."""
        self._asleep -= _parts(what)

    def checksum(self) -> dict[str, str]:
        """Of the weights it really uses: Hugging Face name -> order-independent integer sum of the tensor's bits, hex."""
        return checksums(self._paged.model)

    def _require_awake(self) -> None:
        if self._asleep:
            raise RuntimeError(f"the rollout engine's {' and '.join(sorted(self._asleep))} sleep: call wake() first")

    def _flush(self) -> None:
        self._scheduler.flush()
        self._paged.rows.clear()

    def _request(self, prompt: Prompt, sampling: Sampling, first_id: int) -> Request:
        """A checked request, its responses waiting."""
        tokens, config = list(self._encode(prompt)), self._model_config
        where, limit = f"prompt {prompt.id!r} (source {prompt.source!r})", config.max_positions
        if not tokens:
            raise InputError(f"{where} is empty: the model needs at least one token to start from; remove it from the data")
        if len(tokens) > limit - 1:
            raise InputError(
                f"{where} has {len(tokens)} tokens, the model's context is {limit}: at most {limit - 1} leave room for a "
                "response; shorten the prompt, remove it from the data or take a model with a longer context"
            )
        if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
            wrong = next(t for t in tokens if not 0 <= t < config.vocab_size)
            raise InputError(f"{where} has token id {wrong}, the model's are 0 to {config.vocab_size - 1}: wrong tokenizer")
        max_tokens = min(sampling.max_new_tokens, limit - len(tokens))
        allocator = self._scheduler.allocator
        # One more than the longest response needs: the prompt's last block exists twice while siblings wait to fork it.
        needed = allocator.blocks_for(len(tokens) + max_tokens) + 1
        if needed > allocator.num_blocks:
            gib = needed * KVCache.block_bytes(config, allocator.block_size, self._dtype) / 2**30
            raise InputError(
                f"{where} with {len(tokens)} tokens and {max_tokens} new ones needs {needed} cache blocks, there are "
                f"{allocator.num_blocks}: --rollout.kv-cache-gib {self.config.kv_cache_gib} must be at least {gib:.3g}"
            )
        request = Request(first_id, prompt, sampling, max_tokens, Context(tokens))
        for sample_id in range(first_id, first_id + sampling.n):
            search = StopStrings(self._tokenizer, sampling.stop) if sampling.stop else None
            request.waiting.append(Response(request, sample_id, Context(list(tokens)), search))
        return request

    def _queue(self, requests: list[Request]) -> None:
        """Accept requests, all or none."""
        taken: set[int] = set()
        for request in (*self._scheduler.requests.values(), *requests):
            sample_ids = range(request.id, request.id + request.sampling.n)
            if not 0 <= request.id < 2**63 - request.sampling.n or taken.intersection(sample_ids):
                raise ValueError(f"sample ids {sample_ids} are negative, beyond 64 bits or already in use")
            taken.update(sample_ids)
        for request in requests:
            self._scheduler.add(request)
            self._next_id = max(self._next_id, request.id + request.sampling.n)

    def _advance(self) -> list[tuple[Request, Sample]]:
        """One forward pass; the samples that it finished."""
        if not self._scheduler.requests:
            return []
        self._require_awake()
        if self.version < 0:
            raise RuntimeError("the rollout engine has no proven weights: call sync_weights() and let it succeed first")
        try:
            step = self._scheduler.schedule()
            responses, drawn = self._paged.run(step)
            self._scheduler.fed(step)
            finished = self._record(responses, drawn) if responses else []
            self._scheduler.finish([response for response, _, _ in finished])
        except BaseException:
            self._flush()  # a step cut short leaves keys that no longer match the tokens
            raise
        return [self._sample(*ending) for ending in finished]

    def _record(self, responses: list[Response], drawn: Drawn) -> list[tuple[Response, FinishReason, str | None]]:
        """Append the drawn tokens; for each response that ended, why, and its text where that was decoded on the way."""
        if not bool(drawn.logprobs.isfinite().all()):
            response = responses[int(drawn.logprobs.isfinite().int().argmin())]
            raise FloatingPointError(
                f"weights version {self.version} give logits that are not finite, for sample {response.sample_id} of prompt "
                f"{response.request.prompt.id!r} at response position {response.num_tokens}"
            )
        finished = []
        tokens, logprobs, raw_logprobs = drawn.tokens.tolist(), drawn.logprobs.tolist(), drawn.raw_logprobs.tolist()
        for response, token, logprob, raw_logprob in zip(responses, tokens, logprobs, raw_logprobs, strict=True):
            response.append(token, logprob, raw_logprob, self.version)
            text = response.stop_strings.find(token) if response.stop_strings else None
            if text is not None or token in self._end_ids or token in response.request.sampling.stop_ids:
                finished.append((response, "stop", text))
            elif response.num_tokens == response.request.max_tokens:
                finished.append((response, "length", None))
        if drawn.keep_mask is not None:
            for row, mask in zip(drawn.truncated_rows.tolist(), drawn.keep_mask.cpu(), strict=True):
                responses[row].keep_masks.append(mask)
        return finished

    def _sample(self, response: Response, reason: FinishReason, text: str | None) -> tuple[Request, Sample]:
        request = response.request
        if text is None:
            text = decode(self._tokenizer, response.tokens[:-1] if reason == "stop" else response.tokens)
        sample = Sample(response.sample_id, response.spans(), reason, text)
        request.samples[response.sample_id] = sample
        if len(request.samples) == request.sampling.n:
            self._scheduler.remove(request)
        return request, sample


def _num_blocks(model_config: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> int:
    """As many cache blocks as the configured size holds, but no more than max_batch full contexts could use."""
    block_bytes = KVCache.block_bytes(model_config, config.block_size, dtype)
    most_used = config.max_batch * (model_config.max_positions // config.block_size + 2)
    return max(1, min(int(config.kv_cache_gib * 2**30) // block_bytes, most_used))


def _parts(what: Resource) -> set[str]:
    if what not in ("weights", "kv_cache", "all"):
        raise ValueError(f"{what!r}: sleep and wake take 'weights', 'kv_cache' or 'all'")
    return {"weights", "kv_cache"} if what == "all" else {what}
