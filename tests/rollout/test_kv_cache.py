"""Cache blocks: sharing by reference count, and copy-on-write of a partly filled block."""

import random

import pytest
import torch

from strop.engine.model.config import ModelConfig
from strop.engine.rollout.kv_cache import BlockAllocator, Context, KVCache

CONFIG = ModelConfig(
    family="llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=4,
    max_positions=64,
)  # fmt: skip


def filled(allocator: BlockAllocator, length: int) -> Context:
    context = Context(list(range(length)))
    assert allocator.extend(context, length) == []
    context.num_cached = length
    return context


def fork(allocator: BlockAllocator, parent: Context) -> Context:
    child = Context([*parent.tokens, 99])
    allocator.fork(parent, child)
    return child


def test_full_blocks_are_shared_and_the_partial_one_is_copied_by_all_but_the_last():
    allocator = BlockAllocator(num_blocks=10, block_size=4)
    parent = filled(allocator, 10)  # 2 full blocks and half of a third
    children = [fork(allocator, parent) for _ in range(3)]
    assert allocator.num_free == 7 and all(child.blocks == parent.blocks for child in children)
    third = parent.blocks[2]
    allocator.drop(parent)
    for child in children[:2]:
        assert allocator.num_to_extend(child, 11) == 1
        assert allocator.extend(child, 11) == [(third, child.blocks[2])] and child.blocks[2] != third
    assert allocator.num_to_extend(children[2], 11) == 0 and allocator.extend(children[2], 11) == []
    assert children[2].blocks[2] == third
    assert len({child.blocks[2] for child in children}) == 3 and allocator.num_free == 5
    for child in children:
        allocator.drop(child)
    assert allocator.num_free == 10


def test_a_prompt_of_whole_blocks_needs_no_copy():
    allocator = BlockAllocator(num_blocks=4, block_size=4)
    parent = filled(allocator, 8)
    child = fork(allocator, parent)
    assert allocator.extend(child, 9) == [] and child.blocks[:2] == parent.blocks and allocator.num_free == 1
    with pytest.raises(AssertionError, match="all 4 cache blocks are in use"):
        allocator.extend(child, 20)


def test_copies_read_everything_before_they_write():
    """A block may be the source of one copy and the target of another, freed in between."""
    cache = KVCache(CONFIG, num_blocks=4, block_size=2, dtype=torch.float32, device=torch.device("cpu"))
    assert cache.keys.shape == cache.values.shape == (3, 4, 2, 2, 4)
    assert KVCache.block_bytes(CONFIG, 2, torch.float32) == (cache.keys.nbytes + cache.values.nbytes) // 4
    for block in range(4):
        cache.keys[:, block], cache.values[:, block] = block, 10 + block
    cache.copy_blocks([(0, 1), (1, 2)])
    assert cache.keys[:, :, 0, 0, 0].tolist() == [[0, 0, 1, 3]] * 3
    assert cache.values[:, :, 1, 1, 3].tolist() == [[10, 10, 11, 13]] * 3


def test_random_forks_never_write_into_a_shared_block():
    """A model of the cache in which each slot remembers its token: every context always reads back its own tokens."""
    choose = random.Random(1)
    allocator = BlockAllocator(num_blocks=60, block_size=3)
    slots: dict[tuple[int, int], int] = {}
    contexts: list[Context] = []
    for _ in range(3000):
        action = choose.random()
        if action < 0.1 or not contexts:
            contexts.append(Context([choose.randrange(1000) for _ in range(choose.randint(1, 12))]))
        elif action < 0.3:
            parent = choose.choice(contexts)
            contexts.append(Context([*parent.tokens[: parent.num_cached], choose.randrange(1000)]))
            allocator.fork(parent, contexts[-1])
        elif action < 0.5:
            allocator.drop(contexts.pop(choose.randrange(len(contexts))))
        else:
            context = choose.choice(contexts)
            context.tokens.append(choose.randrange(1000))
            end = len(context.tokens)
            if allocator.num_to_extend(context, end) > allocator.num_free:
                allocator.drop(contexts.pop(contexts.index(context)))
                continue
            free = allocator.num_free - allocator.num_to_extend(context, end)
            for source, target in allocator.extend(context, end):
                slots |= {(target, offset): slots[source, offset] for offset in range(3) if (source, offset) in slots}
            assert allocator.num_free == free
            for position in range(context.num_cached, end):
                slots[context.blocks[position // 3], position % 3] = context.tokens[position]
            context.num_cached = end
        for context in contexts:
            cached = range(context.num_cached)
            assert [slots[context.blocks[p // 3], p % 3] for p in cached] == context.tokens[: context.num_cached]
