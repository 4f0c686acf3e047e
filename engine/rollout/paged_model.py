"""The model over its paged cache: runs what the scheduler planned and draws the next tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.config import ModelConfig
from ..model.context import ForwardContext, Paged
from ..model.transformer import Transformer
from .kv_cache import BlockAllocator, Context, KVCache
from .requests import Response
from .rows import DecodeRows, sampling_rows
from .sampling import Drawn, SamplingRows, sample
from .scheduler import Step

Piece = tuple[Context, int]
"""A context and how many of its pending tokens to feed."""


class PagedModel:
    """Owns the model (on "meta" until its parameters are bound), the cache tensors and the running rows' tensors."""

    def __init__(
        self, config: ModelConfig, allocator: BlockAllocator, max_rows: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model = Transformer(config, dtype=dtype, device="meta").eval()
        self.rows = DecodeRows(max_rows, allocator.blocks_for(config.max_positions), device)
        self.tokens_forwarded = 0
        self._config = config
        self._allocator = allocator
        self._max_rows = max_rows
        self._device = device
        self._dtype = dtype
        self._cache: KVCache | None = None
        self._logits: Tensor | None = None
        self._weights: Tensor | None = None

    def free_memory(self) -> None:
        """Let go of the cache and the logits' buffers; the next pass allocates them anew. No context may be cached."""
        assert self._allocator.num_free == self._allocator.num_blocks, "cached contexts would lose their keys"
        self._cache = self._logits = self._weights = None

    @torch.inference_mode()
    def run(self, step: Step) -> tuple[list[Response], Drawn | None]:
        """One forward pass. Returns the responses that a token was drawn for, running ones first, and the tokens; None
        when the pass only took in parts of prompts."""
        cache = self._allocated_cache()
        cache.copy_blocks(step.copies)
        self.rows.follow(step.running)
        pieces = [(chunk.owner.context, chunk.count) for chunk in step.chunks]
        num_running = len(step.running)
        if num_running and pieces and self._device.type != "cpu":
            # There all rows of a pass share one rectangle, as wide as the longest chunk: decoding rows get their own pass.
            hidden_TH = torch.cat([self._feed(cache, [], self.rows), self._feed(cache, pieces)])
        else:
            hidden_TH = self._feed(cache, pieces, self.rows)
        responses, places, end = list(step.running), list(range(num_running)), num_running
        for chunk in step.chunks:
            end += chunk.count
            responses += chunk.drawing
            places += [end - 1] * len(chunk.drawing)
        if not responses:
            return [], None
        if len(responses) == num_running:
            drawn = self._draw(self._head(hidden_TH[:num_running]), self.rows.sampling, self.rows.num_drawn)
        else:
            # The samples of a new prompt draw from one row of logits.
            distinct, row_of_B = torch.tensor(places, device=self._device).unique(return_inverse=True)
            logits_BV = self._head(hidden_TH[distinct])[row_of_B]
            num_drawn_B = torch.tensor([response.num_tokens for response in responses], device=self._device)
            drawn = self._draw(logits_BV, sampling_rows(responses, self._device), num_drawn_B)
        self.rows.advance(drawn.tokens[:num_running])
        return responses, drawn

    @torch.inference_mode()
    def token_logprobs(self, tokens: list[int]) -> Tensor:
        """fp32 [L - 1]: log-probs of tokens 1 .. L - 1 given those before, computed as a response's are: over the paged
        cache, the last two tokens fed one by one."""
        assert len(tokens) > 2, f"the last two of {len(tokens)} tokens are fed alone, after at least one other"
        cache, context = self._allocated_cache(), Context(list(tokens))
        self._allocator.extend(context, len(tokens))
        hidden = []
        for count in (len(tokens) - 2, 1, 1):
            hidden.append(self._feed(cache, [(context, count)]))
            context.num_cached += count
        self._allocator.drop(context)
        logits = F.linear(torch.cat(hidden)[:-1], self.model.lm_head_weight).float()
        targets = torch.tensor(tokens[1:], device=self._device)
        return logits.log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)

    def _feed(self, cache: KVCache, pieces: Sequence[Piece], rows: DecodeRows | None = None) -> Tensor:
        """Hidden states [T, H] of the rows' newest tokens, then of the pieces' pending ones, whose blocks are in place."""
        tokens, positions, lengths, tables = [], [], [], []
        counts = [1] * (len(rows) if rows else 0)
        if counts:
            tokens, positions, lengths, tables = [rows.tokens], [rows.positions], [rows.positions + 1], [rows.block_tables]
        for context, count in pieces:
            end = context.num_cached + count
            tokens.append(torch.tensor(context.tokens[context.num_cached : end], device=self._device))
            positions.append(torch.arange(context.num_cached, end, device=self._device))
            lengths.append(torch.tensor([end], device=self._device))
            tables.append(torch.tensor([context.blocks], device=self._device))
            counts.append(count)
        width = max(table.shape[1] for table in tables)
        tables = [F.pad(table, (0, width - table.shape[1])) for table in tables]
        ends = torch.tensor([0, *counts], dtype=torch.int32, device=self._device).cumsum(0, dtype=torch.int32)
        attention = Paged(
            key_cache=cache.keys,
            value_cache=cache.values,
            block_tables=torch.cat(tables),
            lengths=torch.cat(lengths),
            cu_seqlens_q=ends,
            max_seqlen_q=max(counts),
            block_size=self._allocator.block_size,
        )
        self.tokens_forwarded += sum(counts)
        return self.model(torch.cat(tokens), ForwardContext(torch.cat(positions), attention))

    def _head(self, hidden_NH: Tensor) -> Tensor:
        """fp32 logits [N, V], in the engine's own buffer if they fit."""
        if len(hidden_NH) > len(self._logits):
            return F.linear(hidden_NH, self.model.lm_head_weight).float()
        logits_NV = self._logits[: len(hidden_NH)]
        if self._dtype == torch.float32:
            return torch.mm(hidden_NH, self.model.lm_head_weight.T, out=logits_NV)
        return logits_NV.copy_(F.linear(hidden_NH, self.model.lm_head_weight))

    def _draw(self, logits_BV: Tensor, how: SamplingRows, num_drawn_B: Tensor) -> Drawn:
        scratch = self._weights[: len(logits_BV)] if len(logits_BV) <= len(self._weights) else None
        return sample(logits_BV, how, num_drawn_B, scratch)

    def _allocated_cache(self) -> KVCache:
        """The cache; allocated, with the buffers for logits, at the first use after construction or `free_memory`."""
        if self._cache is None:
            with torch.inference_mode(False):  # ordinary tensors, which may be written in and out of inference mode
                self._cache = KVCache(
                    self._config, self._allocator.num_blocks, self._allocator.block_size, self._dtype, self._device
                )
                self._logits = torch.empty(self._max_rows, self._config.vocab_size, device=self._device)
                self._weights = torch.empty_like(self._logits)
        return self._cache
