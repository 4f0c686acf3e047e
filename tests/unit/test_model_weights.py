"""The model as a WeightSource, and the order-independent bit sum that proves which weights a rollout uses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strop.engine.model.config import ModelConfig
from strop.engine.model.transformer import Transformer
from strop.engine.model.weights import ModelWeights, bit_sum


def model(tied: bool) -> Transformer:
    config = ModelConfig("llama", 50, 16, 24, 2, 4, 2, 4, 64, tie_embeddings=tied)
    model = Transformer(config, dtype=torch.bfloat16, device="cpu")
    model.init_weights(seed=0)
    return model


def test_bit_sum_by_hand():
    assert bit_sum(torch.tensor([1, 2, 3], dtype=torch.int32)) == 6
    assert bit_sum(torch.tensor([1.0])) == 0x3F800000
    assert bit_sum(torch.tensor([-0.0])) == (-(2**31)) % 2**64
    assert bit_sum(torch.tensor([1.0, 1.0], dtype=torch.bfloat16)) == 2 * 0x3F80
    assert bit_sum(torch.tensor([1.0, -1.0, 2.0**-1074], dtype=torch.float64)) == (2 * 0x3FF0000000000000 + 2**63 + 1) % 2**64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_bit_sum_is_independent_of_order_and_adds_up_over_shards(dtype):
    tensor = torch.randn(33, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = bit_sum(tensor)
    assert bit_sum(tensor.view(torch.uint8).view(dtype)[torch.randperm(33)]) == whole
    assert bit_sum(tensor.T) == whole
    assert (bit_sum(tensor[:7]) + bit_sum(tensor[7:, :3]) + bit_sum(tensor[7:, 3:])) % 2**64 == whole


@given(st.integers(0, 659), st.integers(0, 15))
def test_one_flipped_bit_changes_the_sum(element, bit):
    tensor = torch.randn(660, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = bit_sum(tensor)
    bits = tensor.view(torch.int16)
    bits[element] ^= torch.tensor(1 << bit).to(torch.int16)
    assert bit_sum(tensor) != before


@pytest.mark.parametrize("tied", [True, False])
def test_metadata_lists_the_head_and_shards_are_the_storage(tied):
    source = model(tied)
    weights = ModelWeights(source)
    metadata, shards = weights.metadata(), weights.local_shards()
    assert [meta.name for meta in metadata] == list(shards)
    head = metadata[-1]
    assert (head.name, head.shape, head.dtype, head.shard) == ("lm_head.weight", (50, 16), "bfloat16", None)
    assert head.tied_to == ("model.embed_tokens.weight" if tied else None)
    assert (shards["lm_head.weight"].data_ptr() == shards["model.embed_tokens.weight"].data_ptr()) == tied
    assert all(meta.tied_to is None for meta in metadata[:-1])
    with torch.no_grad():
        source.embedding.weight[3, 2] = 7.0
    assert shards["model.embed_tokens.weight"][3, 2] == 7.0


@pytest.mark.parametrize("bucket_bytes", [1, 1000, 10**9])
def test_buckets_hold_everything_in_order(bucket_bytes):
    weights = ModelWeights(model(tied=True))
    buckets = list(weights.iter_full(bucket_bytes))
    assert [name for bucket in buckets for name, _ in bucket] == [meta.name for meta in weights.metadata()]
    for bucket in buckets:
        assert len(bucket) == 1 or sum(tensor.nbytes for _, tensor in bucket) <= bucket_bytes
    assert (len(buckets) == 1) == (bucket_bytes == 10**9)
