"""The running batch as tensors: what a decode step feeds for each row, kept on the device and updated in place.

A step that only decodes touches a row in Python once, to see whether it got a new block; everything else is a handful of
tensor operations over all rows. Rows that finish are compacted away, so no slot is ever idle.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .requests import Response
from .sampling import SamplingRows


class DecodeRows:
    """B running responses in the order of the scheduler's list."""

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device) -> None:
        self._device = device
        self._responses: list[Response] = []
        self._num_blocks: list[int] = []
        self._tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._cached = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._num_drawn = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._tables = torch.zeros(max_rows, max_blocks, dtype=torch.int64, device=device)
        self._sampling: SamplingRows | None = None

    def __len__(self) -> int:
        return len(self._responses)

    @property
    def tokens(self) -> Tensor:
        """int64 [B]: each row's newest token, the one to feed."""
        return self._tokens[: len(self)]

    @property
    def positions(self) -> Tensor:
        """int64 [B]: where it goes; also the number of tokens cached before it."""
        return self._cached[: len(self)]

    @property
    def num_drawn(self) -> Tensor:
        """int64 [B]: how many tokens the response has: the index of the next one, for the random key."""
        return self._num_drawn[: len(self)]

    @property
    def block_tables(self) -> Tensor:
        """int64 [B, most blocks of a row]; unused entries hold any valid block."""
        return self._tables[: len(self), : max(self._num_blocks, default=1)]

    @property
    def sampling(self) -> SamplingRows:
        if self._sampling is None:
            self._sampling = sampling_rows(self._responses, self._device)
        return self._sampling

    def clear(self) -> None:
        """Forget all rows: their responses may come back with other blocks."""
        self._responses, self._num_blocks, self._sampling = [], [], None

    def follow(self, running: Sequence[Response]) -> None:
        """Take the scheduler's list: drop the rows that left, append those that entered, add new blocks to the tables."""
        if self._responses != running:
            staying = set(running)
            self._keep([row for row, response in enumerate(self._responses) if response in staying])
            for response in running[len(self._responses) :]:
                self._append(response)
            self._sampling = None
        assert self._responses == running, "rows enter at the end and keep their order"
        grown = [row for row, response in enumerate(running) if len(response.context.blocks) > self._num_blocks[row]]
        if grown:
            new = [running[row].context.blocks[self._num_blocks[row] :] for row in grown]
            assert all(len(blocks) == 1 for blocks in new), "a decode step needs at most one more block a row"
            columns = [self._num_blocks[row] for row in grown]
            self._tables[grown, columns] = torch.tensor([blocks[0] for blocks in new], device=self._device)
            for row in grown:
                self._num_blocks[row] += 1

    def advance(self, tokens_B: Tensor) -> None:
        """The fed tokens are cached; these are the next ones."""
        self.tokens.copy_(tokens_B)
        self.positions.add_(1)
        self.num_drawn.add_(1)

    def _keep(self, rows: list[int]) -> None:
        if len(rows) < len(self._responses):
            index = torch.tensor(rows, dtype=torch.int64, device=self._device)
            for column in (self._tokens, self._cached, self._num_drawn, self._tables):
                column[: len(rows)] = column[index]
            self._responses = [self._responses[row] for row in rows]
            self._num_blocks = [self._num_blocks[row] for row in rows]

    def _append(self, response: Response) -> None:
        row, context = len(self), response.context
        self._tokens[row] = context.tokens[-1]
        self._cached[row] = context.num_cached
        self._num_drawn[row] = response.num_tokens
        self._tables[row, : len(context.blocks)] = torch.tensor(context.blocks, device=self._device)
        self._responses.append(response)
        self._num_blocks.append(len(context.blocks))


def sampling_rows(responses: Sequence[Response], device: torch.device) -> SamplingRows:
    """How the next token of each response is drawn."""
    return SamplingRows.of([r.request.sampling for r in responses], [r.sample_id for r in responses], device)
