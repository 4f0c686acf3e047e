"""config.json -> ModelShape: the published ones, against the models that transformers builds of them; and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_layers import MtpModel

from strop.engine.config import InputError
from strop.engine.model.config import ModelConfig
from strop.engine.plan.facts import active_parameters, parameters, total_parameters
from strop.engine.plan.hf_config import PLANNABLE_FAMILIES
from strop.engine.plan.models import SHAPES
from strop.engine.plan.shape import ModelShape

LLAMA3: dict[str, Any] = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "mlp_bias": False}
QWEN2 = {"model_type": "qwen2", "vocab_size": 152064, "use_sliding_window": False, "sliding_window": 131072}
QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "attention_bias": False}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe", "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 32000, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "sliding_window": None,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "num_experts_per_tok": 4, "experts_per_token": 4,
    "sliding_window": 128, "attention_bias": True,
}  # fmt: skip
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_nextn_predict_layers": 1,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "moe_layer_freq": 1,
    "first_k_dense_replace": 3, "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
    "n_shared_experts": 2, "n_routed_experts": 64, "q_lora_rank": None, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 6, "moe_layer_freq": 1, "first_k_dense_replace": 1,
}  # fmt: skip
KIMI_K2 = DEEPSEEK_V3 | {
    "model_type": "kimi_k2", "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64, "n_group": 1,
    "topk_group": 1, "n_routed_experts": 384, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
    "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
QWEN2_57B = {
    "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "num_experts": 64, "num_experts_per_tok": 8,
    "moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480, "decoder_sparse_step": 1,
}  # fmt: skip


def sized(base: dict[str, Any], hidden: int, layers: int, heads: int, intermediate: int, **others: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return base | sizes | {"intermediate_size": intermediate} | others


PUBLISHED: dict[str, dict[str, Any]] = {
    "llama3-8b": sized(LLAMA3, 4096, 32, 32, 14336),
    "llama3-70b": sized(LLAMA3, 8192, 80, 64, 28672),
    "llama3.1-405b": sized(LLAMA3, 16384, 126, 128, 53248),
    "smollm2": sized(LLAMA3, 576, 30, 9, 1536, vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True),
    "qwen2.5-1.5b": sized(QWEN2, 1536, 28, 12, 8960, vocab_size=151936, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2.5-7b": sized(QWEN2, 3584, 28, 28, 18944, num_key_value_heads=4),
    "qwen2.5-14b": sized(QWEN2, 5120, 48, 40, 13824, num_key_value_heads=8),
    "qwen2.5-32b": sized(QWEN2, 5120, 64, 40, 27648, num_key_value_heads=8),
    "qwen2.5-72b": sized(QWEN2, 8192, 80, 64, 29568, num_key_value_heads=8),
    "qwen3-0.6b": sized(QWEN3, 1024, 28, 16, 3072, tie_word_embeddings=True),
    "qwen3-1.7b": sized(QWEN3, 2048, 28, 16, 6144, tie_word_embeddings=True),
    "qwen3-4b": sized(QWEN3, 2560, 36, 32, 9728, tie_word_embeddings=True),
    "qwen3-8b": sized(QWEN3, 4096, 36, 32, 12288),
    "qwen3-14b": sized(QWEN3, 5120, 40, 40, 17408),
    "qwen3-32b": sized(QWEN3, 5120, 64, 64, 25600),
    "qwen3-30b-a3b": sized(QWEN3_MOE, 2048, 48, 32, 6144, moe_intermediate_size=768),
    "qwen3-235b-a22b": sized(QWEN3_MOE, 4096, 94, 64, 12288, moe_intermediate_size=1536),
    "mixtral-8x7b": sized(MIXTRAL, 4096, 32, 32, 14336),
    "mixtral-8x22b": sized(MIXTRAL, 6144, 56, 48, 16384),
    "gpt-oss-20b": GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "gpt-oss-120b": GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
    "qwen2-57b-a14b": QWEN2_57B,
    "deepseek-v3": DEEPSEEK_V3,
}
"""The entries of the published config.json that say something about sizes."""


def read(entries: dict[str, Any], name: str = "model") -> ModelShape:
    return ModelShape.from_hf(entries, f"/models/{name}/config.json")


def built(entries: dict[str, Any]) -> PreTrainedModel:
    """transformers' model of these entries, without storage."""
    entries = dict(entries)
    config = AutoConfig.for_model(entries.pop("model_type"), **entries)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def built_parameters(model: torch.nn.Module) -> int:
    """Elements of all parameters, shared ones once, and of DeepSeek-V3's balancing biases, which are buffers."""
    biases = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))
    return sum(parameter.numel() for parameter in model.parameters()) + biases


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes(name: str) -> None:
    assert read(PUBLISHED[name], name) == SHAPES[name]
    assert total_parameters(SHAPES[name]) == built_parameters(built(PUBLISHED[name]))


def test_deepseek_v2_lite() -> None:
    shape = read(DEEPSEEK_V2_LITE)
    assert total_parameters(shape) == built_parameters(built(DEEPSEEK_V2_LITE)) == 15_706_484_224
    assert shape.mla.q_rank == 0 and not shape.moe.router_bias and shape.moe.num_groups == 1


def test_mistral() -> None:
    shape = read(MISTRAL_7B)
    assert total_parameters(shape) == built_parameters(built(MISTRAL_7B)) == 7_248_023_552  # of version 0.3's checkpoint
    assert replace(shape, name="", vocab_size=128256) == replace(SHAPES["llama3-8b"], name="")


def test_kimi_k2_is_of_deepseek_v3s_architecture() -> None:
    """Its files' own code is a copy of it. The card: 1T parameters, 32B of them activated."""
    shape = read(KIMI_K2)
    assert total_parameters(shape) == built_parameters(built(KIMI_K2 | {"model_type": "deepseek_v3"}))
    assert 1.02e12 < total_parameters(shape) < 1.03e12 and 31e9 < active_parameters(shape, embedding=False) < 33e9
    [note] = shape.notes
    assert "quantized (fp8)" in note and "--rollout.weights-dtype-bytes" in note
    assert not read(KIMI_K2 | {"quantization_config": None}).notes


def test_the_text_model_of_one_that_sees() -> None:
    text = PUBLISHED["qwen3-30b-a3b"] | {"model_type": "qwen3_vl_moe_text", "num_hidden_layers": 4}
    vision = {"hidden_size": 64, "num_heads": 4, "depth": 2, "intermediate_size": 64, "out_hidden_size": 2048}
    entries = {
        "model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"], "text_config": text,
        "vision_config": vision, "tie_word_embeddings": False,
    }  # fmt: skip
    config = AutoConfig.for_model(**entries)
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config)
    shape = read(entries)
    assert total_parameters(shape) == built_parameters(whole) - built_parameters(whole.model.visual)
    assert replace(shape, name="") == replace(SHAPES["qwen3-30b-a3b"], name="", num_layers=4)
    assert shape.notes == ("Planned is the text model of this qwen3_vl_moe alone.",)
    assert read(entries | {"tie_word_embeddings": True}).tie_embeddings
    with pytest.raises(InputError, match="text_config: 'hidden_size' is missing"):
        read(entries | {"text_config": text | {"hidden_size": None}})
    with pytest.raises(InputError, match="nor that of its text_config, 'gemma3_text', can be planned"):
        read({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})


def test_mtp_module() -> None:
    model = built(DEEPSEEK_V3 | {"num_hidden_layers": 4})
    with torch.device("meta"):
        modules = MtpModel(model, 1)
    shared = {id(parameter) for parameter in model.parameters()}
    own = sum(parameter.numel() for parameter in modules.parameters() if id(parameter) not in shared)
    balancing_biases = 256
    assert parameters(SHAPES["deepseek-v3"])["mtp"] == own + balancing_biases


@pytest.mark.parametrize("family", PLANNABLE_FAMILIES)
def test_what_transformers_writes_is_read(family: str) -> None:
    """A config.json of today's transformers, whose keys differ from the published ones (num_local_experts, rope_parameters)."""
    entries = {entry["model_type"]: entry for entry in (*PUBLISHED.values(), DEEPSEEK_V2_LITE, MISTRAL_7B)}[family]
    small = entries | {"num_hidden_layers": 4}
    model = built(small)
    written = model.config.to_dict()
    assert total_parameters(read(written)) == built_parameters(model)
    assert replace(read(written), name="") == replace(read(small), name="")


def test_leading_dense_layers_of_qwen_moe() -> None:
    entries = PUBLISHED["qwen3-30b-a3b"] | {"mlp_only_layers": [0, 1], "num_hidden_layers": 5}
    shape = read(entries)
    assert shape.moe.num_dense_layers == 2 and [shape.kind(layer) for layer in range(3)] == ["dense", "dense", "moe"]
    assert total_parameters(shape) == built_parameters(built(entries))


def test_of_the_engines_own_config() -> None:
    entries = PUBLISHED["qwen3-0.6b"] | {"max_position_embeddings": 40960, "rms_norm_eps": 1e-6}
    assert ModelShape.from_model_config(ModelConfig.from_hf(entries, ""), "model") == read(entries)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("llama3-8b", {"model_type": "gemma3"}, "model_type 'gemma3' can't be planned: use one of llama, mistral, qwen2"),
        ("llama3-8b", {"model_type": None}, "model_type None can't be planned"),
        ("llama3-8b", {"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification': only language"),
        ("llama3-8b", {"hidden_size": None}, "'hidden_size' is missing: it must be a positive integer"),
        ("llama3-8b", {"hidden_size": "4096"}, "'hidden_size' is '4096': it must be a positive integer"),
        ("llama3-8b", {"num_hidden_layers": 0}, "'num_hidden_layers' is 0"),
        ("llama3-8b", {"num_hidden_layers": 100_000}, "num_hidden_layers 100000: at most 1000 can be planned"),
        ("deepseek-v3", {"num_nextn_predict_layers": 5000}, "num_nextn_predict_layers 5000: at most 1000"),
        ("llama3-8b", {"architectures": "LlamaForCausalLM"}, "'architectures' is 'LlamaForCausalLM': it must be a list"),
        ("llama3-8b", {"num_key_value_heads": 5}, "num_attention_heads 32 with num_key_value_heads 5: it must be a multiple"),
        ("llama3-8b", {"num_attention_heads": 24}, "is not a multiple of num_attention_heads 24: give 'head_dim'"),
        ("llama3-8b", {"attention_bias": True}, "attention_bias True is not planned for llama: only False"),
        ("llama3-8b", {"mlp_bias": True}, "mlp_bias True"),
        ("llama3-8b", {"sliding_window": 4096}, "sliding_window 4096 is not planned"),
        ("llama3-8b", {"tie_word_embeddings": "no"}, "'tie_word_embeddings' is 'no': it must be true or false"),
        ("qwen2.5-7b", {"num_key_value_heads": None}, "'num_key_value_heads' is missing"),
        ("qwen2.5-7b", {"use_sliding_window": True}, "use_sliding_window True"),
        ("qwen2.5-7b", {"layer_types": ["sliding_attention"] * 28}, r"layer_types \['sliding_attention'\] x 28 is not planned"),
        ("qwen3-8b", {"head_dim": None}, "'head_dim' is missing"),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not planned: only 1 is"),
        ("qwen3-30b-a3b", {"mlp_only_layers": [3]}, r"mlp_only_layers \[3\] is not planned: dense layers must come first"),
        ("qwen3-30b-a3b", {"num_experts": None}, "'num_local_experts' is missing"),
        ("qwen3-30b-a3b", {"num_local_experts": 64}, "'num_experts': 128} contradict each other"),
        ("qwen3-30b-a3b", {"num_experts_per_tok": 129}, "num_experts_per_tok 129 is above the number of experts, 128"),
        ("qwen2-57b-a14b", {"shared_expert_intermediate_size": None}, "'shared_expert_intermediate_size' is missing"),
        ("mixtral-8x7b", {"sliding_window": 4096}, "sliding_window 4096"),
        ("gpt-oss-20b", {"attention_bias": False}, "attention_bias False is not planned for gpt_oss: only True"),
        ("gpt-oss-20b", {"sliding_window": None}, "'sliding_window' is missing"),
        ("gpt-oss-20b", {"layer_types": ["full_attention"] * 24}, "only sliding_attention and full_attention in turn"),
        ("deepseek-v3", {"num_key_value_heads": 8}, "latent attention has one key a head"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq 2 is not planned"),
        ("deepseek-v3", {"first_k_dense_replace": 61}, "first_k_dense_replace 61 leaves none"),
        ("deepseek-v3", {"first_k_dense_replace": -1}, "'first_k_dense_replace' is -1: it must be an integer of at least 0"),
        ("deepseek-v3", {"n_group": 7}, "n_group 7 with topk_group 4: 256 experts must divide"),
        ("deepseek-v3", {"n_group": 128, "topk_group": 3}, "topk_group must hold the 8 experts"),
    ],
)  # fmt: skip
def test_refused(name: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(PUBLISHED[name] | changed)
    assert str(caught.value).startswith("/models/model/config.json: ")


def test_a_window_that_mistral_has_without_a_word() -> None:
    """In transformers its default is 4096 tokens; version 0.1 has it, later ones say null."""
    entries = dict(MISTRAL_7B)
    del entries["sliding_window"]
    for windowed in (entries, entries | {"sliding_window": 4096}):
        with pytest.raises(InputError, match=r"sliding_window.* 4096.* only full attention"):
            read(windowed)


def test_a_missing_query_rank_is_not_taken_for_none() -> None:
    entries = dict(DEEPSEEK_V3)
    del entries["q_lora_rank"]
    with pytest.raises(InputError, match="'q_lora_rank' is missing: it must be a positive integer, or null"):
        read(entries)
