"""The paged key/value cache: the tensors, the blocks they are cut into, and who uses which block."""

from dataclasses import dataclass, field

import torch

from ..model.config import ModelConfig


class KVCache:
    """Keys and values of all layers. Zeros at first: hidden keys get weight 0, and 0 * NaN of old memory would show through."""

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (2, config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self._keys_and_values = torch.zeros(shape, dtype=dtype, device=device)
        self.keys, self.values = self._keys_and_values
        """Each [layers, num_blocks, block_size, K, D]."""

    def copy_blocks(self, copies: "list[BlockCopy]") -> None:
        """Copy whole blocks in all layers. All sources are read before a target is written."""
        if copies:
            sources, targets = zip(*copies, strict=True)
            self._keys_and_values[:, :, list(targets)] = self._keys_and_values[:, :, list(sources)]

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, keys and values."""
        return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


BlockCopy = tuple[int, int]
"""(source block, target block)."""


@dataclass(eq=False)
class Context:
    """Tokens, and how many of them have their keys and values in which blocks."""

    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    """Position p lies in blocks[p // block_size]."""
    num_cached: int = 0
    """The keys of tokens[:num_cached] are in the cache; the others have still to be fed to the model."""

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_cached


class BlockAllocator:
    """Hands out blocks to contexts and counts the users of each: samples of a group share the blocks of their prompt."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._users = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def fork(self, parent: Context, child: Context) -> None:
        """Let `child`, whose tokens begin with the parent's, use the parent's blocks instead of computing the same keys."""
        assert not child.blocks and child.tokens[: parent.num_cached] == parent.tokens[: parent.num_cached]
        for block in parent.blocks:
            self._users[block] += 1
        child.blocks = list(parent.blocks)
        child.num_cached = parent.num_cached

    def num_to_extend(self, context: Context, end: int) -> int:
        """How many free blocks `extend` would take."""
        return self.blocks_for(end) - len(context.blocks) + self._writes_into_shared(context)

    def extend(self, context: Context, end: int) -> list[BlockCopy]:
        """Make positions num_cached .. end - 1 writable: new blocks, and copy-on-write of a partly filled block that has
        other users. Returns the copies, to be made before the next forward pass."""
        copies = []
        if self._writes_into_shared(context):
            shared = context.blocks[-1]
            context.blocks[-1] = self._take()
            self._users[shared] -= 1
            copies.append((shared, context.blocks[-1]))
        while len(context.blocks) < self.blocks_for(end):
            context.blocks.append(self._take())
        return copies

    def drop(self, context: Context) -> None:
        """Forget the context's keys; blocks that nobody else uses are free again."""
        for block in context.blocks:
            self._users[block] -= 1
            assert self._users[block] >= 0, f"cache block {block} was released twice"
            if self._users[block] == 0:
                self._free.append(block)
        context.blocks = []
        context.num_cached = 0

    def _writes_into_shared(self, context: Context) -> bool:
        """Only the last block can be both shared and partly filled: full blocks are never written again."""
        block, filled = divmod(context.num_cached, self.block_size)
        return filled > 0 and self._users[context.blocks[block]] > 1

    def _take(self) -> int:
        assert self._free, f"all {self.num_blocks} cache blocks are in use"
        block = self._free.pop()
        self._users[block] = 1
        return block
