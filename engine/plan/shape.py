"""What the planner must know of a model: its dimensions. It plans more families than the engine runs yet."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..model.config import ModelConfig

LayerKind = Literal["dense", "moe"]


@dataclass(frozen=True)
class MlaShape:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1); widths in elements."""

    q_rank: int
    """Of the compressed query; 0 where queries are projected directly (DeepSeek-V2-Lite)."""
    kv_rank: int
    nope_dim: int
    """Of a head's query and key, the part without positions."""
    rope_dim: int
    """Of a head's query, and of the one key shared by all heads, the rotated part."""
    value_dim: int


@dataclass(frozen=True)
class MoeShape:
    """The mixture-of-experts layers of a model; experts are SwiGLU MLPs."""

    num_experts: int
    top_k: int
    """Routed experts a token."""
    expert_intermediate_size: int
    shared_intermediate_size: int = 0
    """Total width of the experts that every token visits; 0 for none."""
    shared_gate: bool = False
    """A sigmoid gate of hidden_size weights before the shared expert (Qwen2-MoE)."""
    num_dense_layers: int = 0
    """Leading layers with a dense MLP instead."""
    router_bias: bool = False
    """One bias an expert in the router (DeepSeek-V3's aux-loss-free balancing, gpt-oss)."""
    expert_bias: bool = False
    """Biases in the experts' projections (gpt-oss)."""
    num_groups: int = 1
    """Experts are routed in this many groups ..."""
    top_groups: int = 1
    """... of which a token's experts come from at most this many (DeepSeek-V3: 4 of 8, one group a node)."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer with SwiGLU MLPs, RMSNorm and grouped-query or latent attention."""

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    """Without multi-token-prediction modules."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Of queries, keys and values; ignored where `mla` says more."""
    dense_intermediate_size: int
    """Of the MLP of dense layers; 0 where every layer is MoE."""
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    """The attention's output projection has a bias (gpt-oss)."""
    qk_norm: bool = False
    """RMSNorm over each head of q and k, its weights shared by the heads (Qwen3)."""
    attention_sinks: bool = False
    """One learned logit a head (gpt-oss)."""
    sliding_window_tokens: int = 0
    """Every second layer, from the first on, attends to this many tokens only (gpt-oss); 0: all layers attend to all."""
    mla: MlaShape | None = None
    moe: MoeShape | None = None
    num_mtp_layers: int = 0
    """Multi-token-prediction modules (DeepSeek-V3, arXiv 2412.19437, section 2.2); each shares embedding and head."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What a plan of the model leaves out, for people."""

    def kind(self, layer: int) -> LayerKind:
        """Kind of the layer of this index, 0 <= layer < num_layers; MTP modules have the kind of the last layer."""
        return "dense" if self.moe is None or layer < self.moe.num_dense_layers else "moe"

    def window_tokens(self, layer: int) -> int:
        """Tokens that the layer of this index attends to at most, the token itself among them; 0: all."""
        return self.sliding_window_tokens if layer % 2 == 0 else 0

    @staticmethod
    def from_hf(entries: Mapping[str, Any], where: str) -> "ModelShape":
        """Read the content of a Hugging Face config.json; `where` (its path) appears in error messages.

        Raises InputError as `hf_config.read_shape` says.
        """
        from .hf_config import read_shape  # which makes shapes, so it needs this module first

        return read_shape(entries, where)

    @staticmethod
    def from_model_config(config: ModelConfig, name: str) -> "ModelShape":
        """The shape of a model that the engine runs."""
        return ModelShape(
            name=name,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dense_intermediate_size=config.intermediate_size,
            tie_embeddings=config.tie_embeddings,
            qkv_bias=config.qkv_bias,
            qk_norm=config.qk_norm,
        )
