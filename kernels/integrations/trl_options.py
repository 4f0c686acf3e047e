"""Which options of TRL's GRPOConfig the adapter serves, how they read as a `LossSpec`, and which it refuses.

Everything in GRPOConfig that isn't named here (data, generation, rewards, logging, optimizer) stays TRL's own.
Two options act outside the LossSpec: top_entropy_quantile and entropy_coef, because TRL's entropy bonus is a mean over tokens
whatever the loss type. Facts are from TRL 1.16, trainer/grpo_config.py and grpo_trainer.py.
"""

import sys
from typing import TYPE_CHECKING, Any

from ..specs import Aggregation, Correction, LossSpec
from .peer_spec import peer_spec

if TYPE_CHECKING:
    from trl import GRPOConfig, GRPOTrainer

AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": "sequence-mean", "sapo": "sequence-mean", "luspo": "sequence-sum", "bnpo": "token-mean", "dapo": "token-mean",
    "cispo": "token-mean", "vespo": "token-mean", "dr_grpo": "constant",
}  # fmt: skip
CLIPPING = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
CORRECTIONS: dict[str, Correction] = {
    "token_truncate": "tis", "token_mask": "icepop", "sequence_truncate": "sequence-truncate", "sequence_mask": "sequence-mask",
}  # fmt: skip
SMALLEST_LAMBDA = 1e-4
"""TRL raises a smaller lambda of vespo to this."""
TRLS_NAME = {
    "clip_low": "epsilon", "clip_high": "epsilon_high", "kl_coef": "beta", "opsm_delta": "off_policy_mask_threshold",
    "sapo_tau_positive": "sapo_temperature_pos", "sapo_tau_negative": "sapo_temperature_neg",
    "correction_low": "vllm_importance_sampling_clip_min", "correction_high": "vllm_importance_sampling_clip_max",
}  # fmt: skip
LOGIT_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


def loss_spec(args: "GRPOConfig") -> LossSpec:
    """The loss that `args` asks for. ValueError naming the option, its value and the alternative where it can't be served."""
    sequence_level = args.importance_sampling_level == "sequence"
    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    mode = args.vllm_importance_sampling_mode
    check_option(args, "loss_type", args.loss_type in AGGREGATIONS, f"choose from {', '.join(AGGREGATIONS)}")
    check_option(args, "importance_sampling_level", args.importance_sampling_level in ("token", "sequence"),
                 "choose 'token' or 'sequence'")  # fmt: skip
    check_option(args, "importance_sampling_level", not (sequence_level and args.loss_type in ("cispo", "sapo")),
                 f"loss_type {args.loss_type!r} weighs tokens here: take 'token', or loss_type 'dapo'")  # fmt: skip
    check_option(args, "use_bias_correction_kl", not (args.beta and args.use_bias_correction_kl and sequence_level),
                 "a KL times the sequence's ratio isn't the unbiased one: set it to False, or beta to 0, or take "
                 "importance_sampling_level 'token'")  # fmt: skip
    check_option(args, "delta", args.delta is None or args.loss_type in CLIPPING,
                 f"it has no effect with loss_type {args.loss_type!r}: leave it at None")  # fmt: skip
    check_option(args, "vllm_importance_sampling_mode", not corrected or mode in CORRECTIONS,
                 f"choose from {', '.join(CORRECTIONS)}")  # fmt: skip
    check_option(args, "vllm_importance_sampling_mode",
                 not (corrected and args.loss_type == "vespo" and mode.startswith("sequence")),
                 "loss_type 'vespo' weighs each token: take 'token_truncate' or 'token_mask'")  # fmt: skip
    check_option(args, "use_adaptive_entropy", not args.use_adaptive_entropy,
                 "its controller lives inside TRL's own loss: take a fixed entropy_coef")  # fmt: skip
    check_option(args, "use_liger_kernel", not args.use_liger_kernel,
                 "two kernel libraries would replace the same forward: set it to False")  # fmt: skip

    settings: dict[str, Any] = {"aggregation": AGGREGATIONS[args.loss_type], "kl_coef": args.beta}
    if args.beta and args.use_bias_correction_kl:
        settings["kl_gradient"] = "unbiased"
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    match args.loss_type:
        case "cispo":
            settings |= {"policy": "cispo", "cispo_bound": "ratio", "clip_high": high}
        case "sapo":
            settings |= {"policy": "sapo", "sapo_tau_positive": args.sapo_temperature_pos,
                         "sapo_tau_negative": args.sapo_temperature_neg}  # fmt: skip
        case "vespo":
            settings |= {"policy": "vespo",
                         "vespo_positive": (args.vespo_k_pos, max(args.vespo_lambda_pos, SMALLEST_LAMBDA)),
                         "vespo_negative": (args.vespo_k_neg, max(args.vespo_lambda_neg, SMALLEST_LAMBDA))}  # fmt: skip
        case _:
            settings |= {"policy": "gspo" if sequence_level else "clip", "clip_low": args.epsilon, "clip_high": high,
                         "delta": args.delta}  # fmt: skip
    if corrected:
        low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        settings |= {"correction": CORRECTIONS[mode], "correction_low": 0.0 if low is None else low,
                     "correction_high": sys.float_info.max if high is None else high}  # fmt: skip
    if args.off_policy_mask_threshold is not None:
        settings["opsm_delta"] = args.off_policy_mask_threshold
    return peer_spec(settings, "GRPOConfig", TRLS_NAME)


def refuse_unserved(trainer: "GRPOTrainer") -> None:
    """ValueError for what a trainer, built by TRL, has and the adapter can't serve, naming it and the alternative."""
    deepspeed = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    own = "or use TRL's own GRPOTrainer"
    refusals = {
        f"a {type(trainer.processing_class).__name__} (images)": (trainer._is_vlm, f"pass a tokenizer, {own}"),
        f"router_aux_loss_coef={trainer.router_aux_loss_coef} of a mixture of experts": (
            trainer.aux_loss_enabled, f"set it to 0, {own}"
        ),
        "FSDP, which shards the LM head": (trainer.is_fsdp_enabled, f"use plain data parallelism, {own}"),
        "DeepSpeed ZeRO-3, which shards the LM head": (
            deepspeed is not None and deepspeed.zero_stage == 3, f"use stage 1 or 2, {own}"
        ),
    }  # fmt: skip
    for what, (present, instead) in refusals.items():
        if present:
            raise ValueError(f"strop's GRPOTrainer doesn't serve {what}: {instead}")


def logit_transform(config: Any, temperature: float) -> tuple[float, float | None]:
    """(temperature, softcap) of `linear_logprob` for a Hugging Face text config whose forward scales or caps its logits.

    TRL scales, caps, then divides by the temperature; without a cap, scale and temperature are one division.
    """
    softcap = getattr(config, "final_logit_softcapping", None)
    given = ((name, getattr(config, name, None)) for name in LOGIT_MULTIPLIERS)
    name, scale = next(((name, value) for name, value in given if value is not None), ("logits_scaling", None))
    if scale is None:
        divisor = getattr(config, "logits_scaling", None)  # HyperCLOVA X multiplies by it, Granite and MiniCPM3 divide
        scale = 1.0 if divisor is None else divisor if config.model_type == "hyperclovax" else 1 / divisor
    if not scale > 0 or (softcap is not None and scale != 1):
        raise ValueError(f"strop's GRPOTrainer doesn't serve {name} {scale} with final_logit_softcapping {softcap}: it takes a "
                         "factor above 0 or a softcap, not both; use TRL's own GRPOTrainer")  # fmt: skip
    return temperature / scale, softcap


def check_option(args: "GRPOConfig", name: str, served: bool, instead: str) -> None:
    if not served:
        raise ValueError(f"strop's GRPOTrainer doesn't serve {name}={getattr(args, name)!r}: {instead}")
