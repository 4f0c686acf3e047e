"""config.json, read strictly: what is accepted, what is refused by name, and what survives a round trip."""

from typing import Any

import pytest

from strop.engine.config import InputError
from strop.engine.model import names
from strop.engine.model.config import ModelConfig, RopeScaling

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
}
"""As published for a 1B Llama 3.2."""

QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
"""As published for a 0.5B Qwen 2.5."""


def test_a_published_llama_config():
    config = ModelConfig.from_hf(LLAMA, "config.json")
    assert config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert (config.rope_theta, config.eos_ids, config.bos_id) == (500000.0, (128001, 128008, 128009), 128000)
    assert (config.num_kv_heads, config.head_dim, config.tie_embeddings, config.qkv_bias) == (8, 64, True, False)


def test_a_published_qwen_config_keeps_its_inert_entries():
    config = ModelConfig.from_hf(QWEN2, "config.json")
    assert (config.head_dim, config.qkv_bias, config.qk_norm, config.eos_ids) == (64, True, False, (151645,))
    written = config.to_hf("bfloat16")
    assert written["max_window_layers"] == 21 and "head_dim" not in written
    assert ModelConfig.from_hf(written, "written") == config


def test_both_spellings_of_rope_mean_the_same():
    new = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**LLAMA["rope_scaling"], "rope_theta": 500000.0}
    assert ModelConfig.from_hf(new, "new") == ModelConfig.from_hf(LLAMA, "old")
    linear = ModelConfig.from_hf({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2}}, "very old")
    assert linear.rope_scaling == RopeScaling("linear", 2.0)
    assert ModelConfig.from_hf(linear.to_hf(), "written") == linear


REFUSED = {
    "mixtral": ({"model_type": "mixtral"}, "'mixtral' is not implemented yet"),
    "qwen3_moe": ({"model_type": "qwen3_moe"}, "'qwen3_moe' is not implemented yet"),
    "deepseek": ({"model_type": "deepseek_v3"}, "'deepseek_v3' is not implemented yet"),
    "other family": ({"model_type": "gemma2"}, "'gemma2' is not a family strop knows: llama, qwen2, qwen3"),
    "other head": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "missing": ({"hidden_size": None}, "'hidden_size' is missing"),
    "text": ({"hidden_size": "2048"}, "'hidden_size' is '2048': it must be a positive integer"),
    "zero": ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0"),
    "truth": ({"vocab_size": True}, "'vocab_size' is True"),
    "heads": ({"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of num_key_value_heads 5"),
    "odd head": ({"head_dim": 63}, "head_dim 63 is odd"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented"),
    "bias": ({"attention_bias": True}, "attention_bias True is not implemented"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias True"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "sliding window": ({"sliding_window": 4096}, "sliding_window 4096 is not implemented"),
    "interleaved": ({"rope_interleaved": True}, "rope_interleaved True"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not implemented"),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' needs 'factor'"),
    "rope key": ({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 1}}, "unknown entry 'beta_fast'"),
    "rope order": (
        {"rope_scaling": {**LLAMA["rope_scaling"], "high_freq_factor": 1.0}},
        "high_freq_factor above low_freq_factor",
    ),
    "two ropes": ({"rope_parameters": {"rope_type": "default"}}, "contradict each other"),
    "two thetas": ({"rope_scaling": None, "rope_parameters": {"rope_theta": 1e4}}, "contradict each other"),
    "eos": ({"eos_token_id": "</s>"}, "'eos_token_id' is '</s>'"),
    "unknown key": ({"embedding_multiplier": 12.0}, "unknown key 'embedding_multiplier'"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_nothing_is_silently_ignored(change, message):
    with pytest.raises(InputError) as error:
        ModelConfig.from_hf({**LLAMA, **change}, "models/x/config.json")
    assert str(error.value).startswith("models/x/config.json: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window True is not implemented"),
        ({"layer_types": ["full_attention"] * 23 + ["sliding_attention"]}, "layer_types"),
        ({"num_key_value_heads": None}, "'num_key_value_heads' is missing"),
    ],
)
def test_qwen_refusals(change, message):
    with pytest.raises(InputError, match=message):
        ModelConfig.from_hf({**QWEN2, **change}, "config.json")


def test_names_are_one_to_one_and_strangers_raise():
    ours = [
        "embedding.weight",
        "final_norm.weight",
        "lm_head.weight",
        "layers.12.attention.q_proj.bias",
        "layers.0.mlp_norm.weight",
    ]
    theirs = [names.to_hf(name) for name in ours]
    assert theirs[3:] == ["model.layers.12.self_attn.q_proj.bias", "model.layers.0.post_attention_layernorm.weight"]
    assert [names.from_hf(name) for name in theirs] == ours
    for stranger in ("model.layers.0.self_attn.rotary_emb.inv_freq", "layers.x.mlp_norm.weight", "", "layers.0.mlp_norm"):
        with pytest.raises(KeyError):
            names.to_hf(stranger)
        with pytest.raises(KeyError):
            names.from_hf(stranger)
