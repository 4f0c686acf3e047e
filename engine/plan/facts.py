"""What follows from a model's dimensions alone: parameters by kind, floating-point operations and KV-cache bytes a token.

Parameters are exact: the sizes of the tensors in the families' Hugging Face checkpoints. Operations are those of matrix
products, a multiply and an add counting as two; norms, activations, rotations and softmax are left out, as in every published
FLOPS number (what they cost is the traffic they cause, not their operations).
"""

from functools import lru_cache

from .shape import ModelShape

LAYER_KINDS = ("attention", "dense_mlp", "experts", "shared_experts", "router", "norms")
"""Kinds of a transformer layer's parameters. attention: projections with their biases, and sinks; shared_experts and router:
with gate and biases; norms: the layer's and those inside its attention."""
MODEL_KINDS = ("embedding", *LAYER_KINDS, "head", "mtp")
"""Kinds of a whole model's parameters; mtp: all that multi-token-prediction modules add."""
TRAIN_PER_FORWARD = 3
"""Operations of a forward and a backward pass over those of the forward pass: a product's backward pass is two products, one
for the gradient of its input and one for that of its weights."""


def parameters(shape: ModelShape) -> dict[str, int]:
    """Number of parameters by kind (MODEL_KINDS).

    A tied head counts 0. MTP modules count with projection, norms and layer; embedding and head they share with the model
    (DeepSeek-V3's checkpoint stores them twice).
    """
    return dict(_parameters(shape))


@lru_cache(maxsize=16)  # a search asks for the same model's thousands of times
def _parameters(shape: ModelShape) -> dict[str, int]:
    counts = dict.fromkeys(MODEL_KINDS, 0)
    for layer in range(shape.num_layers):
        for kind, count in layer_parameters(shape, layer).items():
            counts[kind] += count
    mtp_layers = range(shape.num_layers, shape.num_layers + shape.num_mtp_layers)
    counts["mtp"] = sum(sum(layer_parameters(shape, layer).values()) for layer in mtp_layers)
    counts["norms"] += shape.hidden_size  # the last one, before the head
    counts["embedding"] = shape.vocab_size * shape.hidden_size
    counts["head"] = 0 if shape.tie_embeddings else counts["embedding"]
    return counts


def total_parameters(shape: ModelShape, mtp: bool = False) -> int:
    """All parameters of the model as its card counts them, without its MTP modules unless asked."""
    counts = parameters(shape)
    return sum(counts.values()) - (0 if mtp else counts["mtp"])


def active_parameters(shape: ModelShape, embedding: bool = True) -> int:
    """Parameters that one token meets: of the routed experts, top_k; no MTP modules.

    Model cards disagree on the input embedding, of which a token reads one row. Qwen3 counts it (30B-A3B: 3.3B); DeepSeek-V3
    (36.6B) and gpt-oss (3.6B, 5.1B) don't: embedding=False. A tied matrix is used by the head too and always counts.
    """
    idle = 0
    if shape.moe is not None:
        idle_share = (shape.moe.num_experts - shape.moe.top_k) / shape.moe.num_experts
        idle = round(parameters(shape)["experts"] * idle_share)  # exact: experts are equal
    unused_embedding = 0 if embedding or shape.tie_embeddings else shape.vocab_size * shape.hidden_size
    return total_parameters(shape) - idle - unused_embedding


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, int]:
    """Parameters of one layer by kind (LAYER_KINDS); with layer >= num_layers, of an MTP module.

    A module (DeepSeek-V3, arXiv 2412.19437, section 2.2) is a layer of the last one's kind and, as kind mtp, the projection
    of two concatenated hidden states to one; it has three norms more: of both inputs and of its output.
    """
    hidden, moe = shape.hidden_size, shape.moe if shape.kind(layer) == "moe" else None
    matrices = layer_matrix_parameters(shape, layer)
    counts = dict.fromkeys(LAYER_KINDS, 0) | matrices
    counts["attention"] += _attention_vectors(shape)
    counts["norms"] = 2 * hidden + _attention_norms(shape)
    if moe is not None:
        counts["router"] += moe.num_experts if moe.router_bias else 0
        counts["experts"] += moe.num_experts * (2 * moe.expert_intermediate_size + hidden) if moe.expert_bias else 0
    if layer >= shape.num_layers:
        counts["norms"] += 3 * hidden
    return counts


def layer_matrix_parameters(shape: ModelShape, layer: int) -> dict[str, int]:
    """Of `layer_parameters`, those in matrices that multiply activations; kinds without any are absent."""
    hidden = shape.hidden_size
    counts = {"attention": _attention_matrices(shape)}
    if shape.kind(layer) == "dense":
        counts["dense_mlp"] = 3 * hidden * shape.dense_intermediate_size
    else:
        moe = shape.moe
        counts["experts"] = moe.num_experts * 3 * hidden * moe.expert_intermediate_size
        counts["shared_experts"] = 3 * hidden * moe.shared_intermediate_size + (hidden if moe.shared_gate else 0)
        counts["router"] = hidden * moe.num_experts
    if layer >= shape.num_layers:
        counts["mtp"] = 2 * hidden * hidden
    return counts


def forward_flops_per_token(shape: ModelShape, sequence_length_tokens: int, causal: bool = True, mtp: bool = False) -> float:
    """Operations of a forward pass over a sequence of that many tokens, a token; with the MTP modules' if asked.

    Each module runs the head once more. `causal` as in `attention_core_flops_per_token`.
    """
    layers = range(shape.num_layers + (shape.num_mtp_layers if mtp else 0))
    heads = 1 + (shape.num_mtp_layers if mtp else 0)
    head_flops = 2 * shape.vocab_size * shape.hidden_size * heads
    return head_flops + sum(layer_forward_flops_per_token(shape, i, sequence_length_tokens, causal) for i in layers)


def train_flops_per_token(shape: ModelShape, sequence_length_tokens: int, causal: bool = True, mtp: bool = False) -> float:
    """Operations of a forward and a backward pass, a token: model FLOPs, without what is computed twice (recomputation)."""
    return TRAIN_PER_FORWARD * forward_flops_per_token(shape, sequence_length_tokens, causal, mtp)


def layer_forward_flops_per_token(shape: ModelShape, layer: int, sequence_length_tokens: int, causal: bool = True) -> float:
    """Operations of one layer's forward pass (layer >= num_layers: an MTP module, without its head), a token."""
    used = layer_matrix_parameters(shape, layer)
    if "experts" in used:
        used["experts"] = used["experts"] // shape.moe.num_experts * shape.moe.top_k
    return 2 * sum(used.values()) + attention_core_flops_per_token(shape, layer, sequence_length_tokens, causal)


def attention_core_flops_per_token(shape: ModelShape, layer: int, sequence_length_tokens: int, causal: bool = True) -> float:
    """Operations of one layer's QK^T and PV products in a forward pass, a token: the mean over the sequence.

    causal: keys that a token may see, (s + 1) / 2 on average and fewer in a sliding window; else all s keys of the sequence,
    or as many as the window has, for comparison with numbers that count masked products (DeepSeek-V3's "non-causal").
    MLA in its training form: keys of nope_dim + rope_dim, values of value_dim.
    """
    mla = shape.mla
    head_widths = mla.nope_dim + mla.rope_dim + mla.value_dim if mla is not None else 2 * shape.head_dim
    window = min(shape.window_tokens(layer) or sequence_length_tokens, sequence_length_tokens)
    keys = window - window * (window - 1) / (2 * sequence_length_tokens) if causal else window
    return 2 * shape.num_heads * head_widths * keys


def kv_bytes_per_token(shape: ModelShape, dtype_bytes: float = 2) -> float:
    """Bytes that one token adds to the KV cache, all layers; MLA stores the compressed vector and the shared rotated key.

    Where layers have a sliding window, a token's entries there are dropped when the window has passed.
    """
    mla = shape.mla
    elements = mla.kv_rank + mla.rope_dim if mla is not None else 2 * shape.num_kv_heads * shape.head_dim
    return shape.num_layers * elements * dtype_bytes


def _attention_matrices(shape: ModelShape) -> int:
    hidden, heads, mla = shape.hidden_size, shape.num_heads, shape.mla
    if mla is None:
        return hidden * shape.head_dim * (2 * heads + 2 * shape.num_kv_heads)
    query_width = heads * (mla.nope_dim + mla.rope_dim)
    query = mla.q_rank * (hidden + query_width) if mla.q_rank else hidden * query_width
    key_value = hidden * (mla.kv_rank + mla.rope_dim) + mla.kv_rank * heads * (mla.nope_dim + mla.value_dim)
    return query + key_value + heads * mla.value_dim * hidden


def _attention_vectors(shape: ModelShape) -> int:
    qkv_bias = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim if shape.qkv_bias else 0
    output_bias = shape.hidden_size if shape.output_bias else 0
    sinks = shape.num_heads if shape.attention_sinks else 0
    return qkv_bias + output_bias + sinks


def _attention_norms(shape: ModelShape) -> int:
    if shape.mla is not None:
        return shape.mla.q_rank + shape.mla.kv_rank
    return 2 * shape.head_dim if shape.qk_norm else 0
