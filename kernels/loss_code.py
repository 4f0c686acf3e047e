"""`LossSpec` as flat numbers: what op schemas can carry and what the compiled kernels read."""

import math
from typing import NamedTuple, get_args

from .specs import Correction, KlEstimator, KlGradient, LossSpec, Policy

POLICIES = get_args(Policy)
KL_ESTIMATORS = get_args(KlEstimator)
KL_GRADIENTS = get_args(KlGradient)
CORRECTIONS = get_args(Correction)


class LossCode(NamedTuple):
    """Choices by their position in the Literal of `specs.py`, then numbers; strop_loss_code in csrc/include/strop.h."""

    policy: int
    divide_by_length: int
    """1 for the aggregation sequence-mean; the others differ in nothing but the denominator."""
    kl_estimator: int
    kl_gradient: int
    correction: int
    has_opsm: int
    ratio_low: float
    ratio_high: float
    """Of `LossSpec.ratio_bounds`; 0 and inf where the policy has none."""
    ratio_cap: float
    """dual_clip or delta, which cut the same tokens to the same value; inf without either."""
    sapo_tau_positive: float
    sapo_tau_negative: float
    vespo_k_positive: float
    vespo_lambda_positive: float
    vespo_k_negative: float
    vespo_lambda_negative: float
    kl_coef: float
    entropy_coef: float
    correction_low: float
    correction_high: float
    opsm_delta: float
    log_ratio_limit: float
    """inf without one."""

    @property
    def choices(self) -> tuple[int, ...]:
        return self[:NUM_CHOICES]

    @property
    def numbers(self) -> tuple[float, ...]:
        return self[NUM_CHOICES:]


NUM_CHOICES = LossCode._fields.index("ratio_low")


def encode(spec: LossSpec) -> LossCode:
    ratio_low, ratio_high = spec.ratio_bounds
    correction_low, correction_high = spec.correction_bounds
    cap = spec.dual_clip if spec.dual_clip is not None else spec.delta
    return LossCode(
        policy=POLICIES.index(spec.policy),
        divide_by_length=int(spec.aggregation == "sequence-mean"),
        kl_estimator=KL_ESTIMATORS.index(spec.kl_estimator),
        kl_gradient=KL_GRADIENTS.index(spec.kl_gradient),
        correction=CORRECTIONS.index(spec.correction),
        has_opsm=int(spec.opsm_delta is not None),
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        ratio_cap=math.inf if cap is None else cap,
        sapo_tau_positive=spec.sapo_tau_positive,
        sapo_tau_negative=spec.sapo_tau_negative,
        vespo_k_positive=spec.vespo_positive[0],
        vespo_lambda_positive=spec.vespo_positive[1],
        vespo_k_negative=spec.vespo_negative[0],
        vespo_lambda_negative=spec.vespo_negative[1],
        kl_coef=spec.kl_coef,
        entropy_coef=spec.entropy_coef,
        correction_low=correction_low,
        correction_high=correction_high,
        opsm_delta=0.0 if spec.opsm_delta is None else spec.opsm_delta,
        log_ratio_limit=math.inf if spec.log_ratio_limit is None else spec.log_ratio_limit,
    )
