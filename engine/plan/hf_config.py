"""Hugging Face's config.json -> ModelShape, for every family that the planner knows.

Keys that change no parameter, operation or byte are ignored (unlike in `engine.model.config`, which runs the model). Whatever
does change them and isn't modelled is an InputError: a plan of another model would look as good as the right one. Where only a
part of the model is planned, or its checkpoint is narrower than the plan's weights, the shape's notes say so.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..model.config import ConfigEntries
from .shape import MlaShape, ModelShape, MoeShape

DENSE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PLANNABLE_FAMILIES = (*DENSE_FAMILIES, "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss")
"""Values of model_type that can be planned."""
SAME_AS = {
    "kimi_k2": "deepseek_v3", "qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}  # fmt: skip
"""Other values of model_type, and the family whose parameters, operations and keys they have."""
MOST_LAYERS = 1000
"""Eight times those of the deepest published models; a mistyped number would keep the planner busy for minutes."""


def read_shape(entries: Mapping[str, Any], where: str) -> ModelShape:
    """The shape of the model that a config.json describes; `where` (its path) appears in error messages. Of a model that sees
    or hears, its text_config's.

    Raises InputError for an unknown family, a missing or ill-typed entry, dimensions that contradict each other, and features
    that would change the counts but are not modelled.
    """
    text = entries.get("text_config")
    if not isinstance(text, Mapping) or family_of(entries) is not None:
        return _ShapeReader(entries, where).read()
    if family_of(text) is None:
        ConfigEntries(text, where).fail(
            f"neither model_type {entries.get('model_type')!r} nor that of its text_config, {text.get('model_type')!r}, can be "
            f"planned: use one of {', '.join(PLANNABLE_FAMILIES)}"
        )
    # The head is the whole model's, so its own entry decides; what transformers writes into the part may be a default.
    shared = {key: entries[key] for key in ("tie_word_embeddings", "quantization_config") if entries.get(key) is not None}
    shape = _ShapeReader({**text, **shared}, f"{where}, text_config").read()
    return replace(shape, notes=(f"Planned is the text model of this {entries.get('model_type')} alone.", *shape.notes))


def family_of(entries: Mapping[str, Any]) -> str | None:
    """The plannable family of a config.json, if it names one."""
    kind = entries.get("model_type")
    family = SAME_AS.get(kind, kind) if isinstance(kind, str) else None
    return family if family in PLANNABLE_FAMILIES else None


class _ShapeReader(ConfigEntries):
    def read(self) -> ModelShape:
        family = self._family()
        self._refuse_what_is_not_modelled(family)
        layers, hidden, heads = self._layers(), self.count("hidden_size"), self.count("num_attention_heads")
        mla = self._mla() if family.startswith("deepseek") else None
        moe = self._moe(family, layers)
        has_dense_layers = moe is None or moe.num_dense_layers > 0
        return ModelShape(
            name=Path(self.where).parent.name or family,
            vocab_size=self.count("vocab_size"),
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=self._kv_heads(family, heads),
            head_dim=mla.nope_dim + mla.rope_dim if mla is not None else self._head_dim(family, hidden, heads),
            dense_intermediate_size=self.count("intermediate_size") if has_dense_layers else 0,
            tie_embeddings=self.boolean("tie_word_embeddings", default=False),
            qkv_bias=self.boolean("qkv_bias", default=True) if family == "qwen2_moe" else family in ("qwen2", "gpt_oss"),
            output_bias=family == "gpt_oss",
            qk_norm=family in ("qwen3", "qwen3_moe"),
            attention_sinks=family == "gpt_oss",
            sliding_window_tokens=self._sliding_window(family, layers),
            mla=mla,
            moe=moe,
            num_mtp_layers=self._mtp_layers() if family == "deepseek_v3" else 0,
            notes=self._notes(),
        )

    def _family(self) -> str:
        family = family_of(self.left)
        if family is None:
            known = ", ".join(PLANNABLE_FAMILIES)
            self.fail(f"model_type {self.left.get('model_type')!r} can't be planned: use one of {known}")
        architectures = self.left.pop("architectures", None) or []
        if not isinstance(architectures, list):
            self.fail(f"'architectures' is {architectures!r}: it must be a list")
        for architecture in architectures:
            if not str(architecture).endswith("ForCausalLM"):
                self.fail(f"architectures {architecture!r}: only language models (...ForCausalLM) can be planned")
        return family

    def _layers(self) -> int:
        layers = self.count("num_hidden_layers")
        if layers > MOST_LAYERS:
            self.fail(f"num_hidden_layers {layers}: at most {MOST_LAYERS} can be planned")
        return layers

    def _notes(self) -> tuple[str, ...]:
        quantization = self.left.get("quantization_config")
        if not quantization:
            return ()
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        return (
            f"The checkpoint is quantized{f' ({method})' if method else ''}, its plan is not: weights are as wide as "
            "--training.weights-dtype-bytes and --rollout.weights-dtype-bytes say.",
        )

    def _refuse_what_is_not_modelled(self, family: str) -> None:
        """Features that would change the parameters or operations, one message each."""
        has_attention_bias = family == "gpt_oss"
        if self.boolean("attention_bias", default=has_attention_bias) != has_attention_bias:
            self.fail(f"attention_bias {not has_attention_bias} is not planned for {family}: only {has_attention_bias} is")
        if self.boolean("mlp_bias", default=False):
            self.fail("mlp_bias True is not planned: only MLPs without biases are")
        for key in ("decoder_sparse_step", "moe_layer_freq"):
            if (every := self.count(key, default=1)) != 1:
                self.fail(f"{key} {every} is not planned: only 1 is, experts in every layer after the leading dense ones")

    def _kv_heads(self, family: str, heads: int) -> int:
        # Required where transformers' default is some checkpoint's number instead of a rule.
        latent = family.startswith("deepseek")
        kv_heads = self.count("num_key_value_heads", default=heads if latent or family == "llama" else None)
        if heads % kv_heads or (latent and kv_heads != heads):
            relation = "latent attention has one key a head" if latent else "it must be a multiple"
            self.fail(f"num_attention_heads {heads} with num_key_value_heads {kv_heads}: {relation}")
        return kv_heads

    def _head_dim(self, family: str, hidden: int, heads: int) -> int:
        if self.left.get("head_dim") is None and family not in ("qwen3", "gpt_oss") and hidden % heads:
            self.fail(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}: give 'head_dim'")
        return self.count("head_dim", default=None if family in ("qwen3", "gpt_oss") else hidden // heads)

    def _mla(self) -> MlaShape:
        if "q_lora_rank" not in self.left:
            self.fail("'q_lora_rank' is missing: it must be a positive integer, or null for queries without compression")
        return MlaShape(
            q_rank=self.count("q_lora_rank", default=0, minimum=0),
            kv_rank=self.count("kv_lora_rank"),
            nope_dim=self.count("qk_nope_head_dim"),
            rope_dim=self.count("qk_rope_head_dim"),
            value_dim=self.count("v_head_dim"),
        )

    def _moe(self, family: str, layers: int) -> MoeShape | None:
        if family in DENSE_FAMILIES:
            return None
        latent = family.startswith("deepseek")
        experts = self._experts("n_routed_experts" if latent else "num_local_experts", "num_experts")
        top_k = self.count("num_experts_per_tok")
        if top_k > experts:
            self.fail(f"num_experts_per_tok {top_k} is above the number of experts, {experts}")
        num_groups, top_groups = self._groups(experts, top_k) if latent else (1, 1)
        # Mixtral and gpt-oss have no dense MLP, and name the expert's width after it.
        width = self.count("intermediate_size" if family in ("mixtral", "gpt_oss") else "moe_intermediate_size")
        shared_width = width * self.count("n_shared_experts", minimum=0) if latent else 0
        if family == "qwen2_moe":
            shared_width = self.count("shared_expert_intermediate_size")
        return MoeShape(
            num_experts=experts,
            top_k=top_k,
            expert_intermediate_size=width,
            shared_intermediate_size=shared_width,
            shared_gate=family == "qwen2_moe",
            num_dense_layers=self._dense_layers(latent, layers),
            router_bias=family in ("deepseek_v3", "gpt_oss"),
            expert_bias=family == "gpt_oss",
            num_groups=num_groups,
            top_groups=top_groups,
        )

    def _experts(self, *keys: str) -> int:
        """The number of experts, which transformers 4 and 5 write under different keys."""
        given = {key: self.count(key) for key in keys if self.left.get(key) is not None}
        if not given:
            self.fail(f"{keys[0]!r} is missing: it must be a positive integer")
        if len(set(given.values())) > 1:
            self.fail(f"{given} contradict each other: keep one of them")
        return next(iter(given.values()))

    def _groups(self, experts: int, top_k: int) -> tuple[int, int]:
        groups, top_groups = self.count("n_group", default=1), self.count("topk_group", default=1)
        if self.left.pop("topk_method", None) == "greedy":  # DeepSeek-V2-Lite: groups are not looked at
            return 1, 1
        if experts % groups or top_groups > groups or top_groups * (experts // groups) < top_k:
            self.fail(
                f"n_group {groups} with topk_group {top_groups}: {experts} experts must divide into the groups, of which "
                f"topk_group must hold the {top_k} experts of a token"
            )
        return groups, top_groups

    def _dense_layers(self, latent: bool, layers: int) -> int:
        if latent:
            dense = self.count("first_k_dense_replace", minimum=0)
            if dense >= layers:
                self.fail(f"first_k_dense_replace {dense} leaves none of num_hidden_layers {layers} with experts")
            return dense
        only = self.left.pop("mlp_only_layers", None) or []
        if only != list(range(len(only))) or len(only) >= layers:
            self.fail(f"mlp_only_layers {only} is not planned: dense layers must come first, and one layer have experts")
        return len(only)

    def _sliding_window(self, family: str, layers: int) -> int:
        kinds = self.left.pop("layer_types", None)
        if family == "gpt_oss":
            alternating = [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]
            if kinds not in (None, alternating):
                self.fail(f"layer_types {kinds} is not planned: only sliding_attention and full_attention in turn are")
            return self.count("sliding_window")
        if kinds not in (None, ["full_attention"] * layers):
            self.fail(f"layer_types {sorted(set(kinds))} x {len(kinds)} is not planned: full_attention x {layers} is")
        if self.boolean("use_sliding_window", default=False):
            self.fail("use_sliding_window True is not planned: only full attention is")
        if family == "mistral" and "sliding_window" not in self.left:
            self.fail("'sliding_window' is missing, which means 4096: only full attention (null) is planned")
        if family in ("llama", "mistral", "mixtral") and self.left.get("sliding_window") is not None:
            self.fail(f"sliding_window {self.left['sliding_window']} is not planned: only full attention (null) is")
        return 0

    def _mtp_layers(self) -> int:
        key = "num_mtp_layers" if self.left.get("num_nextn_predict_layers") is None else "num_nextn_predict_layers"
        layers = self.count(key, default=0, minimum=0)
        if layers > MOST_LAYERS:
            self.fail(f"{key} {layers}: at most {MOST_LAYERS} can be planned")
        return layers
