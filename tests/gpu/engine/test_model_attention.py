"""Attention as a GPU computes it: the variable-length flash kernel, and plans that never ask the device for a value."""

import itertools

import pytest
import torch
from torch import Tensor

from strop.engine.model.attention import flash_varlen, packed_attention
from strop.engine.model.config import ModelConfig
from strop.engine.model.context import ForwardContext, Packed, Paged
from strop.engine.model.transformer import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS, PADDING = [5, 300, 0, 1, 64, 129], 13


def cuda_batch() -> tuple[Tensor, Packed]:
    cu_seqlens = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).int()
    return cu_seqlens, Packed(cu_seqlens, max_seqlen=320)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["padded fp32", "varlen bf16"])
def test_packed_attention_and_its_gradients(dtype):
    if dtype == torch.bfloat16 and flash_varlen() is None:
        pytest.skip("torch.nn.attention.varlen with window_size and enable_gqa comes with torch 2.12")
    cu_seqlens, packed = cuda_batch()
    total = sum(LENGTHS) + PADDING
    generator = torch.Generator(device="cuda").manual_seed(0)
    inputs = [
        torch.randn(total, heads, 64, device="cuda", generator=generator).to(dtype).requires_grad_() for heads in (6, 2, 2)
    ]
    upstream = torch.randn(total, 6, 64, device="cuda", generator=generator).to(dtype)
    plan = ForwardContext(torch.zeros(total, dtype=torch.int64, device="cuda"), packed).packed_plan
    torch.full((64, 1024, 1024), torch.nan, device="cuda")  # freed memory full of NaN: what an unwritten row would show
    out = packed_attention(*inputs, packed, plan)
    gradients = torch.autograd.grad(out, inputs, upstream)
    assert all(bool((x[sum(LENGTHS) :] == 0).all()) for x in (out, *gradients)), "padding must stay out"
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        if start == end:
            continue
        q, k, v = (x[start:end].detach().double().requires_grad_() for x in inputs)
        heads = [x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))]
        expected = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1)
        torch.testing.assert_close(out[start:end].double(), expected, atol=tolerance, rtol=tolerance)
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, (q, k, v), upstream[start:end].double()), strict=True):
            torch.testing.assert_close(ours[start:end].double(), theirs, atol=2 * tolerance, rtol=tolerance)


@torch.no_grad()
def test_no_forward_waits_for_the_device():
    config = ModelConfig("qwen3", 61, 128, 256, 2, 6, 2, 64, 512, qk_norm=True, tie_embeddings=True)
    model = Transformer(config, dtype=torch.bfloat16, device="cuda")
    model.init_weights(seed=0)
    total = sum(LENGTHS) + PADDING
    ids, positions = torch.zeros(2, total, dtype=torch.int64, device="cuda")
    _, packed = cuda_batch()
    rows = torch.arange(5, device="cuda", dtype=torch.int32)
    caches = torch.zeros(2, 2, 10, 16, 2, 64, dtype=torch.bfloat16, device="cuda")
    decode = Paged(*caches, torch.stack([rows, rows + 5], 1), rows + 7, torch.arange(6, device="cuda").int(), 1, 16)
    contexts = [(ids, positions, packed), (ids[:5], (rows + 6).long(), decode)]
    for tokens, places, attention in contexts:
        model(tokens, ForwardContext(places, attention))  # warm up: frequencies go to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for tokens, places, attention in contexts:
            model(tokens, ForwardContext(places, attention))
    finally:
        torch.cuda.set_sync_debug_mode("default")
