"""Published models by name. Each entry is the content of the config.json of the Hugging Face repository above it."""

from collections.abc import Mapping
from dataclasses import replace

from .shape import MlaShape, ModelShape, MoeShape


def _llama(name: str, hidden: int, layers: int, heads: int, intermediate: int) -> ModelShape:
    return ModelShape(name, 128256, hidden, layers, heads, 8, 128, intermediate)


def _qwen2(name: str, vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> ModelShape:
    return ModelShape(name, vocab, hidden, layers, heads, kv_heads, 128, intermediate, qkv_bias=True)


def _qwen3(name: str, hidden: int, layers: int, heads: int, intermediate: int, tied: bool) -> ModelShape:
    return ModelShape(name, 151936, hidden, layers, heads, 8, 128, intermediate, tie_embeddings=tied, qk_norm=True)


def _qwen3_moe(name: str, hidden: int, layers: int, heads: int, expert_intermediate: int) -> ModelShape:
    kv_heads = 4
    moe = MoeShape(num_experts=128, top_k=8, expert_intermediate_size=expert_intermediate)
    return ModelShape(name, 151936, hidden, layers, heads, kv_heads, 128, 0, qk_norm=True, moe=moe)


def _mixtral(name: str, vocab: int, hidden: int, layers: int, heads: int, expert_intermediate: int) -> ModelShape:
    moe = MoeShape(num_experts=8, top_k=2, expert_intermediate_size=expert_intermediate)
    return ModelShape(name, vocab, hidden, layers, heads, 8, 128, 0, moe=moe)


def _gpt_oss(name: str, layers: int, experts: int) -> ModelShape:
    return ModelShape(
        name, 201088, 2880, layers, num_heads=64, num_kv_heads=8, head_dim=64, dense_intermediate_size=0,
        qkv_bias=True, output_bias=True, attention_sinks=True, sliding_window_tokens=128,
        moe=MoeShape(experts, top_k=4, expert_intermediate_size=2880, router_bias=True, expert_bias=True),
    )  # fmt: skip


_PUBLISHED = (
    # deepseek-ai/DeepSeek-V3
    ModelShape(
        "deepseek-v3", 129280, 7168, 61, num_heads=128, num_kv_heads=128, head_dim=192, dense_intermediate_size=18432,
        mla=MlaShape(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
        moe=MoeShape(
            num_experts=256, top_k=8, expert_intermediate_size=2048, shared_intermediate_size=2048, num_dense_layers=3,
            router_bias=True, num_groups=8, top_groups=4,
        ),
        num_mtp_layers=1,
    ),
    _qwen3("qwen3-0.6b", 1024, 28, 16, 3072, tied=True),  # Qwen/Qwen3-0.6B, and so on
    _qwen3("qwen3-1.7b", 2048, 28, 16, 6144, tied=True),
    _qwen3("qwen3-4b", 2560, 36, 32, 9728, tied=True),
    _qwen3("qwen3-8b", 4096, 36, 32, 12288, tied=False),
    _qwen3("qwen3-14b", 5120, 40, 40, 17408, tied=False),
    _qwen3("qwen3-32b", 5120, 64, 64, 25600, tied=False),
    _qwen3_moe("qwen3-30b-a3b", 2048, 48, 32, 768),  # Qwen/Qwen3-30B-A3B
    _qwen3_moe("qwen3-235b-a22b", 4096, 94, 64, 1536),  # Qwen/Qwen3-235B-A22B
    _llama("llama3-8b", 4096, 32, 32, 14336),  # meta-llama/Meta-Llama-3-8B
    _llama("llama3-70b", 8192, 80, 64, 28672),  # meta-llama/Meta-Llama-3-70B
    _llama("llama3.1-405b", 16384, 126, 128, 53248),  # meta-llama/Llama-3.1-405B
    _mixtral("mixtral-8x7b", 32000, 4096, 32, 32, 14336),  # mistralai/Mixtral-8x7B-v0.1
    _mixtral("mixtral-8x22b", 32000, 6144, 56, 48, 16384),  # mistralai/Mixtral-8x22B-v0.1 (Instruct: 32768 tokens)
    replace(_qwen2("qwen2.5-1.5b", 151936, 1536, 28, 12, 2, 8960), tie_embeddings=True),  # Qwen/Qwen2.5-1.5B, and so on
    _qwen2("qwen2.5-7b", 152064, 3584, 28, 28, 4, 18944),
    _qwen2("qwen2.5-14b", 152064, 5120, 48, 40, 8, 13824),
    _qwen2("qwen2.5-32b", 152064, 5120, 64, 40, 8, 27648),
    _qwen2("qwen2.5-72b", 152064, 8192, 80, 64, 8, 29568),
    # Qwen/Qwen2-57B-A14B
    ModelShape(
        "qwen2-57b-a14b", 151936, 3584, 28, num_heads=28, num_kv_heads=4, head_dim=128, dense_intermediate_size=0,
        qkv_bias=True,
        moe=MoeShape(
            num_experts=64, top_k=8, expert_intermediate_size=2560, shared_intermediate_size=20480, shared_gate=True
        ),
    ),
    _gpt_oss("gpt-oss-20b", 24, 32),  # openai/gpt-oss-20b
    _gpt_oss("gpt-oss-120b", 36, 128),  # openai/gpt-oss-120b
    # HuggingFaceTB/SmolLM2-135M-Instruct
    ModelShape(
        "smollm2", 49152, 576, 30, num_heads=9, num_kv_heads=3, head_dim=64, dense_intermediate_size=1536, tie_embeddings=True
    ),
)  # fmt: skip

SHAPES: Mapping[str, ModelShape] = {shape.name: shape for shape in _PUBLISHED}
"""Name -> shape, without training hyper-parameters."""
