"""Parameters, operations and cache bytes: against published numbers, the engine's own models, and each other."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig

from strop.engine.model.config import ModelConfig
from strop.engine.model.transformer import Transformer
from strop.engine.plan.facts import (
    LAYER_KINDS,
    MODEL_KINDS,
    active_parameters,
    attention_core_flops_per_token,
    forward_flops_per_token,
    kv_bytes_per_token,
    layer_matrix_parameters,
    layer_parameters,
    parameters,
    total_parameters,
    train_flops_per_token,
)
from strop.engine.plan.models import SHAPES
from strop.engine.plan.shape import MlaShape, ModelShape, MoeShape


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3.1-405b", 405_853_388_800),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen3-235b-a22b", 235_093_634_560),
        ("mixtral-8x7b", 46_702_792_704),
        ("mixtral-8x22b", 140_620_634_112),
        ("deepseek-v3", 671_026_419_200),
        ("smollm2", 134_515_008),
    ],
)
def test_published_totals(name: str, count: int) -> None:
    """Elements of the tensors in the published checkpoints."""
    assert total_parameters(SHAPES[name]) == count


@pytest.mark.parametrize(
    ("name", "billions", "embedding"),
    [
        ("deepseek-v3", 36.6, False),  # README_WEIGHTS.md: "36.6B (including 0.9B for the output Head)"
        ("qwen3-30b-a3b", 3.3, True),  # model card; 235B-A22B: 22B
        ("qwen3-235b-a22b", 22, True),
        ("mixtral-8x7b", 12.9, True),  # arXiv 2401.04088: "13B"; the announcement: 12.9B
        ("gpt-oss-20b", 3.61, False),  # arXiv 2508.10925, table 1, which leaves the embedding out
        ("gpt-oss-120b", 5.13, False),
        ("qwen2-57b-a14b", 14, True),  # the name
    ],
)
def test_published_active_parameters(name: str, billions: float, embedding: bool) -> None:
    assert active_parameters(SHAPES[name], embedding) / 1e9 == pytest.approx(billions, rel=0.02)


def test_dense_models_are_active_whole() -> None:
    for name in ("llama3-8b", "qwen3-0.6b"):
        assert active_parameters(SHAPES[name]) == total_parameters(SHAPES[name])
    untied, tied = SHAPES["qwen3-8b"], SHAPES["qwen3-0.6b"]
    assert active_parameters(untied) - active_parameters(untied, embedding=False) == parameters(untied)["embedding"]
    assert active_parameters(tied, embedding=False) == total_parameters(tied)


@pytest.mark.parametrize(
    ("name", "tokens", "gflops", "mtp"),
    [
        ("llama3-8b", 8192, 51.5, False),
        ("qwen3-30b-a3b", 4096, 23.0, False),
        ("qwen3-235b-a22b", 4096, 147.9, False),
        ("deepseek-v3", 4096, 249.6, False),
        ("deepseek-v3", 4096, 260.6, True),
    ],
)
def test_published_operations(name: str, tokens: int, gflops: float, mtp: bool) -> None:
    """Published TFLOPS over published tokens per second, both a GPU (the sources of benchmarks/planner_rows.py)."""
    assert train_flops_per_token(SHAPES[name], tokens, mtp=mtp) / 1e9 == pytest.approx(gflops, rel=0.01)


def test_published_operations_that_count_masked_products() -> None:
    """arXiv 2505.09343, table 4: 432 TFLOPS "non-causal" over 385 causal, with the same step time."""
    shape = SHAPES["deepseek-v3"]
    ratio = train_flops_per_token(shape, 4096, causal=False) / train_flops_per_token(shape, 4096)
    assert ratio == pytest.approx(432 / 385, rel=0.01)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("deepseek-v3", 70_272),
        ("qwen3-30b-a3b", 98_304),
        ("qwen3-235b-a22b", 192_512),
        ("llama3-8b", 131_072),
        ("qwen2.5-7b", 57_344),
        ("qwen2.5-32b", 262_144),
    ],
)
def test_cache_bytes(name: str, size: int) -> None:
    assert kv_bytes_per_token(SHAPES[name]) == size
    assert kv_bytes_per_token(SHAPES[name], dtype_bytes=1) == size / 2


ENGINE_CONFIG = ModelConfig(
    family="llama", vocab_size=97, hidden_size=48, intermediate_size=80, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8,
    max_positions=256,
)  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("family", "features"),
    [("llama", {}), ("qwen2", {"qkv_bias": True}), ("qwen3", {"qk_norm": True, "head_dim": 16})],
)
def test_the_engines_models_have_as_many_parameters(family: str, features: dict, tied: bool) -> None:
    config = replace(ENGINE_CONFIG, family=family, tie_embeddings=tied, **features)
    model = Transformer(config, dtype=torch.float32, device="meta")
    shape = ModelShape.from_model_config(config, "model")
    assert total_parameters(shape) == sum(parameter.numel() for parameter in model.parameters())
    assert ModelShape.from_hf(config.to_hf(), "model/config.json") == shape
    layers = Transformer(config, dtype=torch.float32, device="meta", layers=range(1, 2))
    assert sum(layer_parameters(shape, 1).values()) == sum(parameter.numel() for parameter in layers.parameters())


MOE_CONFIG = Qwen3MoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, num_experts=4, num_experts_per_tok=4, moe_intermediate_size=24, experts_implementation="eager",
)  # fmt: skip
MLA_CONFIG = DeepseekV3Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=8,
    qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=12, first_k_dense_replace=1, experts_implementation="eager",
)  # fmt: skip


@pytest.mark.parametrize("config", [MOE_CONFIG, MLA_CONFIG], ids=["grouped-query attention", "latent attention"])
def test_operations_are_those_that_torch_counts(config) -> None:
    """Every expert chosen and attention without a mask, so that a counter of products sees all that is counted here."""
    tokens = 10
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
    rotary_angles = 2 * (config.head_dim // 2) * tokens  # positions times frequencies, which transformers computes as a product
    shape = ModelShape.from_hf(config.to_dict(), "config.json")
    assert counter.get_total_flops() - rotary_angles == tokens * forward_flops_per_token(shape, tokens, causal=False)


def test_a_sliding_window_counts_the_keys_inside() -> None:
    shape = SHAPES["gpt-oss-20b"]
    tokens, window = 1000, 128
    full = attention_core_flops_per_token(shape, 1, tokens)
    windowed = attention_core_flops_per_token(shape, 0, tokens)
    keys = [min(position, window) for position in range(1, tokens + 1)]
    assert full == pytest.approx(4 * 64 * 64 * (tokens + 1) / 2)
    assert windowed == pytest.approx(4 * 64 * 64 * sum(keys) / tokens)
    assert attention_core_flops_per_token(shape, 0, tokens, causal=False) == 4 * 64 * 64 * window
    assert attention_core_flops_per_token(shape, 0, window) == attention_core_flops_per_token(shape, 1, window)


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    def size(most: int) -> int:
        return draw(st.integers(1, most))

    layers, kv_heads, flag = size(6), size(4), st.booleans()
    experts = size(8)
    moe = MoeShape(experts, draw(st.integers(1, experts)), size(40), draw(st.integers(0, 40)), draw(flag),
                   draw(st.integers(0, layers - 1)), draw(flag), draw(flag)) if draw(flag) else None  # fmt: skip
    mla = MlaShape(draw(st.integers(0, 9)), size(9), size(9), size(9), size(9)) if draw(flag) else None
    return ModelShape(
        "any", size(100), size(64), layers, kv_heads * size(4), kv_heads, size(16), size(80), tie_embeddings=draw(flag),
        qkv_bias=draw(flag), output_bias=draw(flag), qk_norm=draw(flag), attention_sinks=draw(flag),
        sliding_window_tokens=draw(st.integers(0, 40)), mla=mla, moe=moe, num_mtp_layers=draw(st.integers(0, 2)),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), tokens=st.integers(1, 200))
def test_parts_make_up_the_whole(shape: ModelShape, tokens: int) -> None:
    counts = parameters(shape)
    assert tuple(counts) == MODEL_KINDS
    assert sum(counts.values()) == total_parameters(shape, mtp=True) == total_parameters(shape) + counts["mtp"]
    layers = [layer_parameters(shape, layer) for layer in range(shape.num_layers + shape.num_mtp_layers)]
    for kind in LAYER_KINDS:
        last_norm = shape.hidden_size if kind == "norms" else 0
        assert counts[kind] == sum(layer[kind] for layer in layers[: shape.num_layers]) + last_norm
    assert counts["mtp"] == sum(sum(layer.values()) for layer in layers[shape.num_layers :])
    for index, layer in enumerate(layers):
        assert all(0 <= count <= layer[kind] for kind, count in layer_matrix_parameters(shape, index).items())
    assert 0 < active_parameters(shape, embedding=False) <= active_parameters(shape) <= total_parameters(shape)
    if shape.moe is None or shape.moe.top_k == shape.moe.num_experts:
        assert active_parameters(shape) == total_parameters(shape)

    forward = forward_flops_per_token(shape, tokens)
    assert train_flops_per_token(shape, tokens) == 3 * forward
    assert forward <= forward_flops_per_token(shape, tokens, causal=False)
    assert forward <= forward_flops_per_token(shape, tokens + 1)
    assert (forward < forward_flops_per_token(shape, tokens, mtp=True)) == (shape.num_mtp_layers > 0)
    assert forward <= 2 * active_parameters(shape, embedding=False) + shape.num_layers * max(
        attention_core_flops_per_token(shape, layer, tokens) for layer in range(shape.num_layers)
    )
