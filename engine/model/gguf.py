"""A GGUF file (llama.cpp's format) as a Hugging Face folder: `convert_gguf`.

Only what the packaged SmolLM2 needs: architecture `llama`, tokenizer `gpt2` with pre-tokenizer `smollm`. Anything else in
the metadata that could change the computation is refused. Tensors are dequantised to fp32 by the `gguf` package.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ..config import InputError
from .checkpoint import write_model
from .config import ModelConfig
from .transformer import Transformer

_OUTSIDE_LAYERS = {
    "token_embd.weight": "embedding.weight",
    "output_norm.weight": "final_norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE_LAYER = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.q_proj",
    "attn_k": "attention.k_proj",
    "attn_v": "attention.v_proj",
    "attn_output": "attention.o_proj",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3
"""GGUF token type of special tokens."""


def convert_gguf(file: Path, folder: Path) -> None:
    """Write weights (fp32), config and tokenizer of `file` into the existing `folder`.

    Raises InputError for a file that is no GGUF or holds something this conversion doesn't know.
    """
    try:
        reader = GGUFReader(file)
    except (ValueError, OSError, IndexError) as error:
        raise InputError(f"{file} can't be read as GGUF ({error}): install the package it comes from again") from error
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, tied="output.weight" not in tensors, where=str(file))
    model = Transformer(config, dtype=torch.float32, device="cpu")
    parameters = dict(model.named_parameters())
    names = {name: _canonical(name) for name in tensors}
    if set(names.values()) != parameters.keys():
        different = sorted(str(name) for name in set(names.values()) ^ parameters.keys())
        raise InputError(
            f"{file}: its tensors are not those of a {config.num_layers}-layer llama; {different[0]} is one of them"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            # GGUF stores the fastest axis first; `data` comes as numpy has it, quantised rows last.
            values = dequantize(tensor.data, tensor.tensor_type).reshape(tuple(tensor.shape)[::-1])
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                values = _halves_of_pairs(values, config.head_dim)
            parameters[names[name]].copy_(torch.tensor(values))
    write_model(model, folder)
    _write_tokenizer(metadata, config, folder, str(file))


def _canonical(name: str) -> str | None:
    if name in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[name]
    block, _, inner = name.partition(".")
    index, _, inner = inner.partition(".")
    module = inner.removesuffix(".weight")
    return f"layers.{index}.{_INSIDE_LAYER[module]}.weight" if block == "blk" and module in _INSIDE_LAYER else None


def _halves_of_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """llama.cpp rotates neighbours (2i, 2i + 1) and stores q and k rows in that order; we rotate (i, i + D/2)."""
    rows, columns = weight.shape
    return weight.reshape(rows // head_dim, head_dim // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(metadata: Mapping[str, Any], tied: bool, where: str) -> ModelConfig:
    if metadata.get("general.architecture") != "llama":
        raise InputError(f"{where}: architecture {metadata.get('general.architecture')!r} can't be converted, only 'llama'")
    llama = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    try:
        hidden, heads = llama.pop("embedding_length"), llama.pop("attention.head_count")
        config = ModelConfig(
            family="llama",
            vocab_size=llama.pop("vocab_size"),
            hidden_size=hidden,
            intermediate_size=llama.pop("feed_forward_length"),
            num_layers=llama.pop("block_count"),
            num_heads=heads,
            num_kv_heads=llama.pop("attention.head_count_kv"),
            head_dim=hidden // heads,
            max_positions=llama.pop("context_length"),
            rope_theta=_shortest(llama.pop("rope.freq_base")),
            norm_eps=_shortest(llama.pop("attention.layer_norm_rms_epsilon")),
            tie_embeddings=tied,
            eos_ids=(metadata["tokenizer.ggml.eos_token_id"],),
            bos_id=metadata["tokenizer.ggml.bos_token_id"],
            pad_id=metadata["tokenizer.ggml.padding_token_id"],
        )
    except KeyError as error:
        raise InputError(f"{where}: metadata {error} is missing") from None
    if llama.pop("rope.dimension_count", config.head_dim) != config.head_dim or llama:
        raise InputError(f"{where}: metadata llama.{min(llama, default='rope.dimension_count')} is not implemented")
    return config


def _shortest(value: float) -> float:
    """The decimal number that was meant by an fp32 one: 9.99999975e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _write_tokenizer(metadata: Mapping[str, Any], config: ModelConfig, folder: Path, where: str) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE in which every digit is a word of its own."""
    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise InputError(f"{where}: tokenizer {kind} can't be converted, only ('gpt2', 'smollm')")
    if metadata.get("tokenizer.ggml.add_bos_token") or metadata.get("tokenizer.ggml.add_space_prefix"):
        raise InputError(f"{where}: a tokenizer that adds a BOS token or a leading space can't be converted")
    pieces: list[str] = metadata["tokenizer.ggml.tokens"]
    special = [p for p, t in zip(pieces, metadata["tokenizer.ggml.token_type"], strict=True) if t == _CONTROL_TOKEN]
    unknown = pieces[metadata["tokenizer.ggml.unknown_token_id"]]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(
        folder,
        bos_token=pieces[config.bos_id],
        eos_token=pieces[config.eos_ids[0]],
        pad_token=pieces[config.pad_id],
        unk_token=unknown,
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=config.max_positions,
    )


def write_tokenizer_config(folder: Path, **entries: Any) -> None:
    """tokenizer_config.json for a tokenizer.json that is complete in itself.

    The class is PreTrainedTokenizerFast, the one name under which transformers 4 and 5 both take tokenizer.json as it is
    (under GPT2Tokenizer, transformers 5 rebuilds the pre-tokenizer and loses the digit split).
    """
    entries |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(entries, indent=2) + "\n")
