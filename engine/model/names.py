"""The only map between our parameter names and Hugging Face's.

Ours are canonical: the same on every pipeline stage and in every layout, and the key of optimizer state in checkpoints.
"""

_OUTSIDE_LAYERS = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_INSIDE_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}

LM_HEAD = _OUTSIDE_LAYERS["lm_head.weight"]
EMBEDDING = _OUTSIDE_LAYERS["embedding.weight"]


def to_hf(name: str) -> str:
    """Hugging Face's name of a canonical one: "layers.3.mlp_norm.weight" -> "model.layers.3.post_attention_layernorm.weight".

    Raises KeyError for a name that is not canonical.
    """
    if name in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[name]
    layers, index, inner = name.split(".", 2) if name.count(".") >= 3 else (name, "", "")
    module, _, kind = inner.rpartition(".")
    if layers != "layers" or not index.isdecimal() or module not in _INSIDE_LAYER or kind not in ("weight", "bias"):
        raise KeyError(name)
    return f"model.layers.{index}.{_INSIDE_LAYER[module]}.{kind}"


def from_hf(name: str) -> str:
    """The inverse of `to_hf`. Raises KeyError for a name no family here has."""
    if name in _FROM_HF_OUTSIDE:
        return _FROM_HF_OUTSIDE[name]
    model, layers, index, inner = name.split(".", 3) if name.count(".") >= 4 else (name, "", "", "")
    module, _, kind = inner.rpartition(".")
    known = model == "model" and layers == "layers" and index.isdecimal() and module in _FROM_HF_INSIDE
    if not known or kind not in ("weight", "bias"):
        raise KeyError(name)
    return f"layers.{index}.{_FROM_HF_INSIDE[module]}.{kind}"


_FROM_HF_OUTSIDE = {theirs: ours for ours, theirs in _OUTSIDE_LAYERS.items()}
_FROM_HF_INSIDE = {theirs: ours for ours, theirs in _INSIDE_LAYER.items()}
