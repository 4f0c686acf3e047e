"""What `policy_loss` reports beside the loss: one fixed-length fp32 tensor that never leaves the device until asked.

Every slot has a reduction, so micro-batches, ranks and steps combine slot by slot; means are formed at the very end from
sums and counts, so they are means over tokens however the batch was split.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .checks import STATISTICS, check_tensor

Reduction = Literal["sum", "min", "max"]

SUMS = (
    "tokens",  # trainable tokens
    "sequences",  # sequences with at least one of them, whole ones where sequence_stats is given; 0 without boundaries
    "nonfinite",  # trainable tokens with a NaN or inf among the inputs
    "loss",  # this batch's share of the step's loss (the denominator is the step's): shares add up
    "policy_loss",  # its three parts, with their coefficients
    "kl_loss",
    "entropy_loss",
    "clip_low",  # tokens whose ratio, or cispo weight, the lower bound cut
    "clip_high",
    "clip_dual",  # tokens that dual_clip or delta cut
    "ratio_sum",  # of the ratio the policy term uses: a token's r, or its sequence's
    "old_k1_sum",  # KL(old || current) estimated from samples of old: -D, and r - 1 - D
    "old_k3_sum",
    "log_ratio_abs_sum",  # |D|, before any clamp
    "log_ratio_limited",  # tokens that log_ratio_limit clamped
    "ref_tokens",  # trainable tokens that came with a reference log-prob
    "ref_kl_sum",  # spec.kl_estimator of KL(current || ref)
    "entropy_tokens",  # trainable tokens that came with an entropy
    "entropy_sum",
    "rollout_tokens",  # trainable tokens that came with a rollout log-prob
    "rollout_gap_abs_sum",  # |old - rollout|
    "weight_sum",  # the correction's weight, e^(old - rollout) where the correction is "none"; without opsm_delta
    "weight_square_sum",
    "weight_truncated",  # tokens whose weight a bound of tis or sequence-truncate changed
    "weight_masked",  # tokens whose weight the correction set to 0
    "opsm_masked",  # tokens dropped by opsm_delta
)
MINIMA = ("ratio_min", "weight_min")
MAXIMA = ("ratio_max", "weight_max", "log_ratio_abs_max", "rollout_gap_abs_max")
METRIC_FIELDS: tuple[tuple[str, Reduction], ...] = (
    *((name, "sum") for name in SUMS), *((name, "min") for name in MINIMA), *((name, "max") for name in MAXIMA),
)  # fmt: skip
"""(name, reduction) of every slot, in the order of the tensor."""

FIRST_MINIMUM, FIRST_MAXIMUM = len(SUMS), len(SUMS) + len(MINIMA)

MEANS = {
    "clip_low": "tokens", "clip_high": "tokens", "clip_dual": "tokens", "ratio_sum": "tokens", "old_k1_sum": "tokens",
    "old_k3_sum": "tokens", "log_ratio_abs_sum": "tokens", "log_ratio_limited": "tokens", "ref_kl_sum": "ref_tokens",
    "entropy_sum": "entropy_tokens", "rollout_gap_abs_sum": "rollout_tokens", "weight_sum": "rollout_tokens",
    "weight_truncated": "rollout_tokens", "weight_masked": "rollout_tokens", "opsm_masked": "rollout_tokens",
}  # fmt: skip


def check_metrics(name: str, metrics: Tensor) -> None:
    instead = "pass metrics of policy_loss, or their combine_metrics"
    check_tensor(name, metrics, STATISTICS, (len(METRIC_FIELDS),), instead=instead)


def combine_metrics(metrics: Sequence[Tensor]) -> Tensor:
    """Metrics of several micro-batches or ranks as one, slot by slot with each slot's reduction. No host sync.

    metrics: tensors fp32 [len(METRIC_FIELDS)] on one device. Returns the same shape. Raises ValueError for an empty list
    or a wrong shape, TypeError for anything but a sequence of tensors.

    Of context-parallel ranks, which share sequences, each reports the count of whole `sequences` (`policy_loss` was given
    sequence_stats): among c of them the sum is c times the count. All other slots are those of one call.
    """
    if isinstance(metrics, Tensor):
        raise TypeError("metrics is a Tensor: pass a list, [metrics] for one")
    if len(metrics) == 0:
        raise ValueError("combine_metrics got no tensor: pass the metrics of at least one policy_loss call")
    for index, tensor in enumerate(metrics):
        check_metrics(f"metrics[{index}]", tensor)
    stacked = torch.stack(list(metrics))
    return torch.cat([
        stacked[:, :FIRST_MINIMUM].double().sum(0).to(stacked.dtype),
        stacked[:, FIRST_MINIMUM:FIRST_MAXIMUM].amin(0),
        stacked[:, FIRST_MAXIMUM:].amax(0),
    ])


def summarize_metrics(metrics: Tensor) -> dict[str, float]:
    """The slots as named numbers: sums of tokens become means (`ratio_sum` -> `ratio_mean`), counts of tokens fractions
    (`clip_low` -> `clip_low_fraction`). This is the only place where the host waits for the device.

    Names whose tokens are 0 (no reference given, nothing trainable) are left out. `weight_ess` is the effective sample
    size (sum w)^2 / sum w^2 as a fraction of the tokens. Raises ValueError or TypeError for another shape or type.
    """
    check_metrics("metrics", metrics)
    values = dict(zip((name for name, _ in METRIC_FIELDS), metrics.double().tolist(), strict=True))
    summary = {name: values[name] for name in SUMS[: SUMS.index("clip_low")]}
    for name, count in MEANS.items():
        if values[count]:
            mean_name = name.removesuffix("_sum") + ("_mean" if name.endswith("_sum") else "_fraction")
            summary[mean_name] = values[name] / values[count]
    for name, count in (("ratio", "tokens"), ("weight", "rollout_tokens")):
        if values[count]:
            summary |= {f"{name}_{end}": values[f"{name}_{end}"] for end in ("min", "max")}
    if values["tokens"]:
        summary["log_ratio_abs_max"] = values["log_ratio_abs_max"]
    if values["rollout_tokens"]:
        summary["rollout_gap_abs_max"] = values["rollout_gap_abs_max"]
        squares = values["weight_square_sum"]
        summary["weight_ess"] = values["weight_sum"] ** 2 / (squares * values["rollout_tokens"]) if squares else 0.0
    return summary
