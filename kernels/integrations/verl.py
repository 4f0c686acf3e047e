"""Functions with the names, shapes and conventions of verl's actor worker, on strop's kernels.

- `fused_linear_for_ppo` and `compute_log_prob`: log-probs and entropies from hidden states and the LM head, for verl's padded
  [B, P + R] and its unpadded [1, N] layout.
- `policy_loss_fn(mode)`: a policy loss as verl calls one; `register()` makes all of them known to verl, so that
  `actor.policy_loss.loss_mode=strop_vanilla` selects it. verl's processes each have a registry of their own, so let verl do it
  where its workers start: `actor_rollout_ref.model.external_lib=strop.kernels.integrations.verl_external_lib`.

verl's worker adds entropy and KL itself, so a policy loss here holds neither. The arguments and formulas are those of verl at
commit b178a3cd56f5 (January 2026: verl/trainer/ppo/core_algos.py, workers/actor/dp_actor.py, workers/utils/losses.py).
Differences, all outside ordinary training:
- verl's own gspo and sapo always aggregate by seq-mean-token-mean; here loss_agg_mode decides, so set it to that.
- gspo's ratio is not cut at e^10, and a batch without any trainable token has loss 0 instead of NaN.
- cispo's pg_clipfrac leaves out tokens whose advantage is 0, and `ppo_kl` isn't cut at 20.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import LossSpec, linear_logprob, policy_loss, summarize_metrics
from ..checks import FLOATING, check_tensor
from ..specs import Aggregation
from .peer_spec import peer_spec

AGGREGATIONS: dict[str, Aggregation] = {
    "token-mean": "token-mean", "seq-mean-token-sum": "sequence-sum", "seq-mean-token-mean": "sequence-mean",
    "seq-mean-token-sum-norm": "constant",
}  # fmt: skip
MODES = ("vanilla", "gspo", "sapo", "cispo", "gpg")
LOG_RATIO_LIMIT = 20.0
"""verl clamps log ratios to +-20 before the exponential in these losses."""
PREFIX = "strop_"
VERLS_NAME = {
    "clip_low": "clip_ratio_low", "clip_high": "clip_ratio_high", "dual_clip": "clip_ratio_c", "sapo_tau_positive": "tau_pos",
    "sapo_tau_negative": "tau_neg",
}  # fmt: skip


def fused_linear_for_ppo(
    hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(log_probs, entropy) of input_ids' shape in fp32, both differentiable; verl's FusedLinearForPPO as a function.

    hidden_states: [..., H]. vocab_weights: [V, H], the LM head. input_ids: int64 [...], already rolled: each is the token after
    its hidden state; -100 gives 0 and no gradient.
    """
    result = linear_logprob(hidden_states, vocab_weights, input_ids, temperature=temperature)
    return result.logprob, result.entropy


def compute_log_prob(
    hidden_states: Tensor,
    vocab_weights: Tensor,
    micro_batch: Mapping[str, Tensor],
    temperature: float,
    calculate_entropy: bool = False,
) -> dict[str, Tensor]:
    """{"log_probs": [B, R], "entropys": [B, R] if calculate_entropy}, fp32, of a padded micro-batch's responses.

    hidden_states: [B, P + R, H]. micro_batch: "responses" int64 [B, R] and "attention_mask" [B, P + R], as verl's
    `_forward_micro_batch` gets them. Padding gives 0 and costs no product on a CPU. ValueError for other shapes.
    """
    responses, attention_mask = micro_batch["responses"], micro_batch["attention_mask"]
    length = responses.shape[1]
    if hidden_states.shape[:-1] != attention_mask.shape or attention_mask.shape[1] <= length:
        shapes = (tuple(tensor.shape) for tensor in (hidden_states, attention_mask, responses))
        raise ValueError("hidden_states {}, attention_mask {} and responses {} don't fit: pass [B, P + R, H], [B, P + R] and "
                         "[B, R] with P >= 1".format(*shapes))  # fmt: skip
    targets = responses.masked_fill(attention_mask[:, -length:] == 0, -100)
    log_probs, entropy = fused_linear_for_ppo(hidden_states[:, -length - 1 : -1], vocab_weights, targets, temperature)
    return {"log_probs": log_probs, "entropys": entropy} if calculate_entropy else {"log_probs": log_probs}


def policy_loss_fn(mode: str = "vanilla") -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """`compute_policy_loss` of verl's loss_mode `mode`. ValueError names the modes for another one."""
    if mode not in MODES:
        raise ValueError(f"loss_mode {mode!r} isn't served: choose from {', '.join(MODES)}, or take verl's own")
    return partial(compute_policy_loss, mode)


def compute_policy_loss(
    mode: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """(loss, verl's metrics) of a micro-batch, every tensor [B, R]; the loss is differentiable in log_prob.

    config: verl's ActorConfig, or what has its fields clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c, tau_pos,
        tau_neg and global_batch_info (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor; what is missing or None
        is counted in this micro-batch).
    rollout_is_weights: >= 0, multiply the policy term and carry no gradient.

    Reading the metrics waits for the device once, as verl's own losses do three times. ValueError names what isn't served.
    """
    if config is None:
        raise ValueError("config is None: pass the actor's config, it holds the clip range")
    if loss_agg_mode not in AGGREGATIONS:
        raise ValueError(f"loss_agg_mode {loss_agg_mode!r}: choose from {', '.join(AGGREGATIONS)}")
    mask = response_mask.bool()
    log_prob = log_prob if log_prob.dtype == torch.float64 else log_prob.float()  # bf16 under verl's autocast
    for name, tensor in (("advantages", advantages), ("rollout_is_weights", rollout_is_weights)):
        if tensor is not None:
            check_tensor(name, tensor, FLOATING, tuple(log_prob.shape))
    weighted = advantages if rollout_is_weights is None else advantages * rollout_is_weights.detach()
    loss, metrics = policy_loss(
        log_prob, old_log_prob, weighted, mask, loss_spec(mode, loss_agg_mode, config),
        denominator=denominator(mask, loss_agg_mode, **(config.global_batch_info or {})),
    )  # fmt: skip
    if mode == "gpg":  # verl reports nothing for it, and its old_log_prob means nothing
        return loss, {}
    summary = summarize_metrics(metrics)
    clipped = summary.get("clip_low_fraction", 0.0) + summary.get("clip_high_fraction", 0.0)
    return loss, {
        "actor/pg_clipfrac": clipped,
        "actor/ppo_kl": summary.get("old_k1_mean", 0.0),
        "actor/pg_clipfrac_lower": summary.get("clip_dual_fraction", 0.0),
    }


def loss_spec(mode: str, loss_agg_mode: str, config: Any) -> LossSpec:
    """verl's settings as a LossSpec."""
    clip = {
        "clip_low": config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low,
        "clip_high": config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high,
    }
    match mode:
        case "vanilla":
            settings = {"policy": "clip", **clip, "dual_clip": config.clip_ratio_c, "log_ratio_limit": LOG_RATIO_LIMIT}
        case "gspo":
            settings = {"policy": "gspo-token", **clip}
        case "sapo":
            settings = {"policy": "sapo", "sapo_tau_positive": config.tau_pos, "sapo_tau_negative": config.tau_neg,
                        "log_ratio_limit": LOG_RATIO_LIMIT}  # fmt: skip
        case "cispo":
            settings = {"policy": "cispo", **clip, "log_ratio_limit": LOG_RATIO_LIMIT}
        case "gpg":
            settings = {"policy": "reinforce"}
    return peer_spec({"aggregation": AGGREGATIONS[loss_agg_mode], **settings}, "actor config", VERLS_NAME)


def denominator(
    mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | Tensor | None = None,
    global_batch_size: int | Tensor | None = None,
    loss_scale_factor: int | None = None,
) -> float | Tensor:
    """What verl's agg_loss divides this rank's sum by. Counts of the global batch come with dp_size, because data-parallel
    ranks average their gradients."""
    match loss_agg_mode:
        case "token-mean":
            return (mask.sum().clamp(min=1) if batch_num_tokens is None else batch_num_tokens) / dp_size
        case "seq-mean-token-sum" | "seq-mean-token-mean":
            return (mask.any(1).sum().clamp(min=1) if global_batch_size is None else global_batch_size) / dp_size
    return mask.shape[1] if loss_scale_factor is None else loss_scale_factor


def register(*modes: str) -> list[str]:
    """Register the losses of `modes` (all of MODES without any) in verl as strop_<mode>, in this process; returns the names.

    verl's own losses stay as they are. ModuleNotFoundError says how to install verl; ValueError names an unknown mode.
    """
    functions = {PREFIX + mode: policy_loss_fn(mode) for mode in modes or MODES}
    try:
        from verl.trainer.ppo.core_algos import register_policy_loss
    except ModuleNotFoundError as error:
        message = f"registering strop's losses needs verl: pip install verl ({error})"
        raise ModuleNotFoundError(message, name=error.name) from error
    for name, function in functions.items():
        register_policy_loss(name)(function)
    return list(functions)
