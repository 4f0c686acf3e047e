"""What a model is, apart from its weights: `ModelConfig`, read from and written as a Hugging Face config.json.

Reading is strict: every key of the file either has a meaning here, or must have the one value that this code computes,
or is on the list of keys that change nothing in the computation (`PASSIVE_KEYS`); any other key is an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from ..config import InputError

Family = Literal["llama", "qwen2", "qwen3"]
FAMILIES: Mapping[str, str] = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Hugging Face model_type -> architecture class, of the families that are implemented."""

PLANNED_FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3")
"""Refused with 'not implemented yet' instead of 'unknown'."""


@dataclass(frozen=True)
class RopeScaling:
    """Stretched rotary frequencies, as Hugging Face defines rope types `linear` and `llama3`."""

    kind: Literal["linear", "llama3"]
    factor: float
    """Frequencies are divided by this (llama3: only the low ones)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_positions / low_freq_factor are scaled in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_positions / high_freq_factor are left alone; between, interpolated."""
    original_max_positions: int = 0
    """llama3: the context length before stretching, in tokens."""


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder-only transformer: pre-norm, rotary positions, grouped-query attention, SwiGLU."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the SwiGLU MLP."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Not always hidden_size / num_heads (Qwen3)."""
    max_positions: int
    """Longest sequence the model was made for, in tokens."""
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    """The LM head is the embedding matrix."""
    qkv_bias: bool = False
    """q, k and v projections have a bias (Qwen2); the output projection never does."""
    qk_norm: bool = False
    """RMSNorm over each head of q and k before the rotation (Qwen3)."""
    eos_ids: tuple[int, ...] = ()
    """Token ids that end a text, as config.json lists them."""
    bos_id: int | None = None
    pad_id: int | None = None
    init_std: float = 0.02
    """Standard deviation of random initial matrices."""
    passive: Mapping[str, Any] = field(default_factory=dict)
    """Entries of config.json without effect on the computation, carried along so that an export has them too."""

    @staticmethod
    def from_hf(entries: Mapping[str, Any], where: str) -> "ModelConfig":
        """Read the content of a config.json; `where` (its path) appears in error messages.

        Raises InputError for a family, rope type or feature that is not implemented, a missing or ill-typed entry,
        dimensions that contradict each other, and any key this code doesn't know.
        """
        return _Reader(entries, where).read()

    def to_hf(self, dtype: str | None = None) -> dict[str, Any]:
        """The content of a config.json that transformers 4 and 5 both read; `dtype` as in "bfloat16".

        Rotary settings are written in the older form (rope_theta, rope_scaling): transformers 4 doesn't know
        `rope_parameters` and would fall back to theta 10000 without a word, transformers 5 reads both.
        """
        entries = dict(self.passive) | {
            "architectures": [FAMILIES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": _rope_scaling_to_hf(self.rope_scaling),
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.init_std,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None,
            "pad_token_id": self.pad_id,
        }
        if self.family == "qwen2" and self.head_dim * self.num_heads == self.hidden_size:
            del entries["head_dim"]  # Qwen2Config has no such field
        if dtype is not None:
            entries["torch_dtype"] = dtype
        return dict(sorted(entries.items()))


PASSIVE_KEYS = frozenset({
    "_name_or_path", "transformers_version", "use_cache", "is_llama_config", "transformers.js_config", "max_window_layers",
    "sliding_window", "return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type",
    "chunk_size_feed_forward", "torchscript", "use_bfloat16",
})  # fmt: skip
"""Keys that change nothing in the computation. sliding_window and max_window_layers are here because
use_sliding_window must be false for them to be read at all (`_Reader._refuse_other_computations`)."""

_REQUIRED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0, None),
    "mlp_bias": (False,),
    "pretraining_tp": (1, None),
    "use_sliding_window": (False, None),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, None),
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
"""Keys whose other values would change the computation in a way that is not implemented."""


class ConfigEntries:
    """Typed reads of a config.json. Each key is consumed by reading it; `left` has what nobody asked for.

    An entry that is null counts as missing. Every method raises InputError with the file, the key and its value.
    """

    def __init__(self, entries: Mapping[str, Any], where: str) -> None:
        self.left = dict(entries)
        self.where = where

    def fail(self, message: str) -> NoReturn:
        raise InputError(f"{self.where}: {message}")

    def count(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        kind = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
        value = self._typed(key, (int,), default, kind)
        if value < minimum:
            self.fail(f"{key!r} is {value}: it must be {kind}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self._typed(key, (int, float), default, "a positive number")
        if not value > 0:
            self.fail(f"{key!r} is {value}: it must be a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        return self._typed(key, (bool,), default, "true or false")

    def _typed(self, key: str, types: tuple[type, ...], default: Any, kind: str) -> Any:
        value = self.left.pop(key, None)
        if value is None:
            value = default
        if value is None:
            self.fail(f"{key!r} is missing: it must be {kind}")
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            self.fail(f"{key!r} is {value!r}: it must be {kind}")
        return value


class _Reader(ConfigEntries):
    """One pass over a config.json; every key is consumed exactly once, what remains at the end is an error."""

    def read(self) -> ModelConfig:
        family = self._family()
        passive = {key: self.left.pop(key) for key in PASSIVE_KEYS & self.left.keys()}
        hidden, heads = self.count("hidden_size"), self.count("num_attention_heads")
        # Missing entries have the defaults of the family's own config class in transformers, where that default is a rule
        # (llama: one kv head a query head); where it is some checkpoint's number (qwen: 32), the entry is required.
        kv_heads = self.count("num_key_value_heads", default=heads if family == "llama" else None)
        head_dim = self.count("head_dim", default=None if family == "qwen3" else hidden // heads)
        layers, max_positions = self.count("num_hidden_layers"), self.count("max_position_embeddings")
        if heads % kv_heads:
            self.fail(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if head_dim % 2:
            self.fail(f"head_dim {head_dim} is odd: rotary positions need pairs")
        theta, scaling = self._rope(max_positions)
        self._refuse_other_computations(family, layers, passive)
        config = ModelConfig(
            family=family,
            vocab_size=self.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.count("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=max_positions,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=self.positive("rms_norm_eps"),
            tie_embeddings=self.boolean("tie_word_embeddings", default=False),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            eos_ids=self._token_ids("eos_token_id"),
            bos_id=self._token_id("bos_token_id"),
            pad_id=self._token_id("pad_token_id"),
            init_std=self.positive("initializer_range", default=0.02),
            passive=passive,
        )
        if self.left:
            self.fail(
                f"unknown key {min(self.left)!r}: it may change the computation, and strop doesn't know it; "
                "remove it if it has no effect"
            )
        return config

    def _family(self) -> Family:
        family = self.left.pop("model_type", None)
        if family in PLANNED_FAMILIES:
            self.fail(f"model_type {family!r} is not implemented yet; today: {', '.join(FAMILIES)}")
        if family not in FAMILIES:
            self.fail(f"model_type {family!r} is not a family strop knows: {', '.join(FAMILIES)}")
        architectures = self.left.pop("architectures", None)
        if architectures is not None and architectures != [FAMILIES[family]]:
            self.fail(f"architectures {architectures} with model_type {family!r}: only ['{FAMILIES[family]}'] can be loaded")
        return family

    def _token_id(self, key: str) -> int | None:
        value = self.left.pop(key, None)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            self.fail(f"{key!r} is {value!r}: it must be one token id or null")
        return value

    def _token_ids(self, key: str) -> tuple[int, ...]:
        value = self.left.pop(key, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            self.fail(f"{key!r} is {value!r}: it must be a token id, a list of token ids or null")
        return tuple(ids)

    def _rope(self, max_positions: int) -> tuple[float, RopeScaling | None]:
        """Both spellings: rope_theta + rope_scaling (transformers 4) and rope_parameters (transformers 5)."""
        theta = self.left.pop("rope_theta", None)
        scaling = self.left.pop("rope_scaling", None)
        parameters = self.left.pop("rope_parameters", None)
        if scaling and parameters and scaling != parameters:
            self.fail(f"rope_scaling {scaling} and rope_parameters {parameters} contradict each other: keep one of them")
        rope = dict(scaling or parameters or {})
        in_rope = rope.pop("rope_theta", None)
        if theta is not None and in_rope is not None and theta != in_rope:
            self.fail(f"rope_theta {theta} and rope_parameters.rope_theta {in_rope} contradict each other: keep one of them")
        theta = in_rope if theta is None else theta
        theta = 10000.0 if theta is None else theta
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not theta > 0:
            self.fail(f"rope_theta is {theta!r}: it must be a positive number")
        legacy_kind, kind = rope.pop("type", None), rope.pop("rope_type", None)
        kind = kind or legacy_kind or "default"
        if rope.pop("partial_rotary_factor", 1.0) != 1.0:
            self.fail("rope partial_rotary_factor other than 1 is not implemented")
        fields = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
        if kind not in fields:
            self.fail(f"rope type {kind!r} is not implemented: use default, linear or llama3")
        original = rope.pop("original_max_position_embeddings", None) if kind == "llama3" else None
        values = {name: rope.pop(name, None) for name in fields[kind]}
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                self.fail(f"rope type {kind!r} needs {name!r}, a positive number; found {value!r}")
        if rope:
            self.fail(f"unknown entry {min(rope)!r} for rope type {kind!r}")
        if kind == "default":
            return float(theta), None
        if kind == "linear":
            return float(theta), RopeScaling("linear", float(values["factor"]))
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            self.fail(f"rope type 'llama3' needs high_freq_factor above low_freq_factor; found {values}")
        return float(theta), RopeScaling(
            "llama3", *(float(values[name]) for name in fields[kind]), original_max_positions=original or max_positions
        )

    def _refuse_other_computations(self, family: Family, layers: int, passive: Mapping[str, Any]) -> None:
        for dtype_key in ("torch_dtype", "dtype"):
            self.left.pop(dtype_key, None)  # what the files hold; `checkpoint` checks it against the tensors
        for key, allowed in _REQUIRED_VALUES.items():
            if key in self.left and (value := self.left.pop(key)) not in allowed:
                self.fail(f"{key} {value!r} is not implemented: only {allowed[0]!r} is")
        kinds = self.left.pop("layer_types", None)
        if kinds is not None and kinds != ["full_attention"] * layers:
            self.fail(f"layer_types {sorted(set(kinds))} x {len(kinds)} is not implemented: full_attention x {layers} is")
        if family == "llama" and passive.get("sliding_window") is not None:
            self.fail(f"sliding_window {passive['sliding_window']} is not implemented: remove it")


def _rope_scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
