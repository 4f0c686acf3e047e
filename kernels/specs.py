"""What a loss and an advantage are: two frozen settings that name every choice and refuse contradictory ones.

The formulas are written once, in `reference/`.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

Policy = Literal["clip", "gspo", "gspo-token", "gmpo", "cispo", "sapo", "vespo", "reinforce"]
CispoBound = Literal["offset", "ratio"]
Aggregation = Literal["sequence-mean", "token-mean", "sequence-sum", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]
KlGradient = Literal["naive", "straight-through", "unbiased"]
Correction = Literal["none", "tis", "icepop", "mean-mask", "sequence-truncate", "sequence-mask"]
Baseline = Literal["mean", "leave-one-out"]
Scale = Literal["group", "batch", "none"]
DenominatorKind = Literal["sequences", "tokens", "constant"]

CLIPPED: tuple[Policy, ...] = ("clip", "gspo", "gspo-token", "gmpo", "cispo")
SEQUENCE_RATIO: tuple[Policy, ...] = ("gspo", "gspo-token", "gmpo", "vespo")
SEQUENCE_CORRECTION: tuple[Correction, ...] = ("mean-mask", "sequence-truncate", "sequence-mask")
SOURCE_CLIP: dict[Policy, tuple[float, float]] = {
    "clip": (0.2, 0.2), "gspo": (3e-4, 4e-4), "gspo-token": (3e-4, 4e-4), "gmpo": (0.4, 0.4),
}  # fmt: skip
SOURCE_CORRECTION: dict[Correction, tuple[float, float]] = {
    "tis": (0.0, 2.0), "icepop": (0.5, 5.0), "sequence-truncate": (0.0, 3.0), "sequence-mask": (0.0, 3.0),
}  # fmt: skip


def check_choices(spec: object) -> None:
    """ValueError where a field of a dataclass typed as a Literal holds something else."""
    for field in fields(spec):
        choices = get_args(field.type) if get_origin(field.type) is Literal else ()
        value = getattr(spec, field.name)
        if choices and value not in choices:
            raise ValueError(f"{field.name} {value!r}: choose from {', '.join(map(str, choices))}")


@dataclass(frozen=True)
class LossSpec:
    """The policy-gradient loss. The default is the GRPO of DeepSeek-R1 (arXiv 2501.12948 eq. 1, in the token form of
    DeepSeekMath, arXiv 2402.03300 eq. 3): clipped ratio, mean over outputs of each output's token mean, no KL.

    Below, lp, old, ref and rollout are log-probs of a token under the current policy, the one before the first update, the
    reference and the sampler; D = lp - old, r = e^D; A is the advantage, L_i the trainable tokens of sequence i, sg() stops
    the gradient. A setting that the others make meaningless is an error, never ignored.
    """

    policy: Policy = "clip"
    """The policy term l of one token.

    clip: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, GRPO).
    gspo: the same on the sequence's ratio s = exp(mean D) (arXiv 2507.18071).
    gspo-token: on sg[s] * exp(lp - sg lp), for advantages that differ inside a sequence (the same paper's token form).
    gmpo: -A exp(mean of the clipped D), a geometric mean (arXiv 2507.20673).
    cispo: -sg(clip(r)) A lp, every token keeps a gradient (MiniMax-M1, arXiv 2506.13585).
    sapo: -A (4 / tau) sigmoid(tau (r - 1)), a soft clip (arXiv 2511.20347).
    vespo: -sg(phi) A lp, phi = e^lambda w^k e^(-lambda w) on the sequence's weight w, the product of its r (arXiv 2602.10693).
    reinforce: -A lp.
    """
    clip_low: float | None = None
    """Lower clip: the ratio's bound is 1 - clip_low (gmpo: e^-clip_low). None is the source's value: clip 0.2, gspo 3e-4,
    gmpo 0.4, cispo no bound."""
    clip_high: float | None = None
    """Upper clip: the bound is 1 + clip_high (gmpo: e^clip_high). None is the source's value: clip 0.2, gspo 4e-4, gmpo 0.4;
    cispo needs one. DAPO's clip-higher is 0.28 (arXiv 2503.14476); R1's first RL stage used 10."""
    cispo_bound: CispoBound = "offset"
    """How cispo reads its clips. offset: 1 - clip_low .. 1 + clip_high (MiniMax-M1). ratio: clip_high is the largest weight
    itself and there is no lower bound (ScaleRL, arXiv 2510.13786, with 5)."""
    dual_clip: float | None = None
    """c > 1: where A < 0, l = min(l, -c A): a ratio above c gives no gradient (arXiv 1912.09729, c = 3). clip and gspo only."""
    delta: float | None = None
    """delta > 1 + clip_high: r becomes min(r, delta) in the unclipped term (INTELLECT-2, arXiv 2505.07291). clip, gspo only."""
    sapo_tau_positive: float = 1.0
    """tau of sapo where A > 0."""
    sapo_tau_negative: float = 1.05
    """tau of sapo where A <= 0; larger, so that negative gradients die sooner."""
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    """(k, lambda) of vespo's phi where A >= 0."""
    vespo_negative: tuple[float, float] = (3.0, 2.0)
    """(k, lambda) of vespo's phi where A < 0."""
    aggregation: Aggregation = "sequence-mean"
    """How token losses become one number. N is the denominator that the caller counts over the whole optimizer step.

    sequence-mean: sum over sequences of (sum of l / L_i) / N, N sequences (R1, DeepSeekMath).
    token-mean: sum of l / N, N tokens (DAPO).
    sequence-sum: sum of l / N, N sequences (with gspo: LUSPO, arXiv 2602.05261).
    constant: sum of l / N, N = sequences times a fixed length, e.g. the token limit (Dr. GRPO, arXiv 2503.20783).
    """
    kl_coef: float = 0.0
    """Weight of the KL to the reference in the loss; it is added after every importance weight. R1-Zero used 0.001."""
    kl_estimator: KlEstimator = "k3"
    """With d = ref - lp: k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1 (R1 eq. 2; joschu.net/blog/kl-approx.html)."""
    kl_gradient: KlGradient = "naive"
    """naive: the estimator's own derivative. straight-through: the estimator's value with k2's derivative -d.
    unbiased: r k3, whose derivative is exactly -r d (DeepSeek-V3.2, arXiv 2512.02556)."""
    entropy_coef: float = 0.0
    """c >= 0: adds -c H to each token's loss, H the entropy over the whole vocabulary, with its gradient."""
    correction: Correction = "none"
    """Weight of the policy term for a sampler that isn't the old policy, w = sg exp(old - rollout).

    tis: min(w, high), truncated importance sampling. icepop: w where low <= w <= high, else 0.
    mean-mask: w, but 0 for a sequence whose exp(mean(old - rollout)) leaves [low, high].
    sequence-truncate / sequence-mask: tis / icepop on the sequence's exp(sum(old - rollout)).
    """
    correction_low: float | None = None
    """Lower bound of the weight. None is the source's value: icepop 0.5, otherwise 0; mean-mask needs one."""
    correction_high: float | None = None
    """Upper bound of the weight. None is the source's value: tis 2, icepop 5, sequence-truncate and sequence-mask 3;
    mean-mask needs one."""
    opsm_delta: float | None = None
    """Off-policy sequence mask: the policy term of a sequence is dropped where A < 0 and mean(rollout - lp) > opsm_delta
    (DeepSeek-V3.2 eq. 9)."""
    log_ratio_limit: float | None = None
    """Clamp of D to +-this before the exponential, with no gradient beyond it; hits are counted. Two trainers use 20."""

    def __post_init__(self) -> None:
        check_choices(self)
        self._check_numbers()
        self._check_unused()
        if self.policy == "cispo" and self.clip_high is None:
            raise ValueError("policy 'cispo' needs clip_high: 5 with cispo_bound 'ratio' (ScaleRL), or your own with 'offset'")
        if self.dual_clip is not None and self.delta is not None:
            raise ValueError(f"dual_clip {self.dual_clip} and delta {self.delta} bound the same side: set only one of them")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip {self.dual_clip} must be above 1 (the paper uses 3), or tokens on the policy are cut")
        if self.delta is not None and self.delta <= self.ratio_bounds[1]:
            raise ValueError(f"delta {self.delta} must be above 1 + clip_high = {self.ratio_bounds[1]}: raise delta")
        if self.kl_coef and self.kl_estimator == "k1" and self.kl_gradient == "naive":
            raise ValueError(
                "kl_estimator 'k1' with kl_gradient 'naive' has derivative 1 at every token, which is 0 on average: "
                "take kl_gradient 'straight-through', kl_estimator 'k3', or put k1 into the reward with strop.kernels.kl"
            )
        if self.kl_gradient == "unbiased" and self.kl_estimator != "k3":
            raise ValueError(f"kl_gradient 'unbiased' is r * k3, got kl_estimator {self.kl_estimator!r}: take 'k3'")
        if self.policy == "vespo" and self.correction in SEQUENCE_CORRECTION:
            raise ValueError(f"policy 'vespo' weighs each token, got correction {self.correction!r}: take 'tis' or 'icepop'")
        if self.correction == "mean-mask" and (self.correction_low is None or self.correction_high is None):
            raise ValueError("correction 'mean-mask' needs correction_low and correction_high around 1, e.g. 0.99 and 1.01")
        if self.correction != "none" and self.correction_bounds[0] > self.correction_bounds[1]:
            low, high = self.correction_bounds
            raise ValueError(f"correction_low {low} is above correction_high {high}: swap them")

    def _check_numbers(self) -> None:
        """Every number is finite and on the right side of zero."""
        at_least_zero = ("clip_low", "clip_high", "kl_coef", "entropy_coef", "correction_low", "opsm_delta")
        above_zero = ("sapo_tau_positive", "sapo_tau_negative", "correction_high", "log_ratio_limit")
        for name in at_least_zero + above_zero:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and (value > 0 or (value == 0 and name in at_least_zero))):
                raise ValueError(f"{name} {value}: must be finite and {'at least' if name in at_least_zero else 'above'} 0")

    def _check_unused(self) -> None:
        """A setting that the other choices don't read must stay at its default."""
        clipped, bounded = self.policy in CLIPPED, self.policy in ("clip", "gspo", "gspo-token")
        corrected = self.correction != "none"
        read = {
            "clip_low": (clipped and not (self.policy == "cispo" and self.cispo_bound == "ratio"), "policy 'clip'"),
            "clip_high": (clipped, "policy 'clip'"),
            "cispo_bound": (self.policy == "cispo", "policy 'cispo'"),
            "dual_clip": (bounded, "policy 'clip'"),
            "delta": (bounded, "policy 'clip'"),
            "sapo_tau_positive": (self.policy == "sapo", "policy 'sapo'"),
            "sapo_tau_negative": (self.policy == "sapo", "policy 'sapo'"),
            "vespo_positive": (self.policy == "vespo", "policy 'vespo'"),
            "vespo_negative": (self.policy == "vespo", "policy 'vespo'"),
            "kl_gradient": (self.kl_coef > 0, "kl_coef above 0"),
            "correction_low": (corrected, "correction 'icepop'"),
            "correction_high": (corrected, "correction 'tis'"),
            "log_ratio_limit": (self.policy not in ("vespo", "reinforce"), "policy 'clip'"),
        }
        for field in fields(self):
            used, needs = read.get(field.name, (True, ""))
            value = getattr(self, field.name)
            if not used and value != field.default:
                raise ValueError(
                    f"{field.name} {value!r} has no effect with policy {self.policy!r}, correction {self.correction!r} and "
                    f"kl_coef {self.kl_coef}: leave it at {field.default!r} or take {needs}"
                )

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """(lowest, highest) ratio that still has a gradient; (0, inf) where the policy doesn't clip."""
        if self.policy not in CLIPPED:
            return 0.0, math.inf
        source = SOURCE_CLIP.get(self.policy, (math.inf, math.inf))
        low = source[0] if self.clip_low is None else self.clip_low
        high = source[1] if self.clip_high is None else self.clip_high
        if self.policy == "gmpo":
            return math.exp(-low), math.exp(high)
        if self.cispo_bound == "ratio":
            return 0.0, high
        return 1 - low, 1 + high

    @property
    def correction_bounds(self) -> tuple[float, float]:
        """(low, high) of the rollout correction's weight; (0, inf) without a correction."""
        low, high = SOURCE_CORRECTION.get(self.correction, (0.0, math.inf))
        return (
            low if self.correction_low is None else self.correction_low,
            high if self.correction_high is None else self.correction_high,
        )

    @property
    def needs_rollout_logprob(self) -> bool:
        return self.correction != "none" or self.opsm_delta is not None

    @property
    def needs_sequences(self) -> bool:
        """Whether the loss of a token depends on the rest of its sequence."""
        return self.aggregation == "sequence-mean" or self.needs_sequence_sums

    @property
    def needs_sequence_sums(self) -> bool:
        """Whether it depends on more of the rest than how many trainable tokens there are."""
        whole = self.policy in SEQUENCE_RATIO or self.correction in SEQUENCE_CORRECTION
        return whole or self.opsm_delta is not None


@dataclass(frozen=True)
class AdvantageSpec:
    """How the rewards of a group become advantages. The default is the paper's formula, (r - mean) / std (R1 eq. 3)."""

    baseline: Baseline = "mean"
    """mean: r - mean of the group. leave-one-out: r - mean of the others = G / (G - 1) (r - mean) (RLOO, arXiv 2402.14740)."""
    scale: Scale = "group"
    """What divides: the group's standard deviation, that of all rewards given in the call, or nothing (Dr. GRPO)."""
    ddof: Literal[0, 1] = 0
    """0: divide the squared deviations by G; 1: by G - 1 (verl, TRL)."""
    eps: float = 0.0
    """Added to the standard deviation (verl 1e-6, TRL and Megatron-RL 1e-4). Equal rewards give 0 whatever eps is."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps {self.eps}: must be finite and at least 0")
        if self.scale == "none" and (self.eps or self.ddof):
            raise ValueError(f"eps {self.eps} and ddof {self.ddof} have no effect with scale 'none': leave both at 0")


def denominator_kind(spec: LossSpec) -> DenominatorKind:
    """Which count over the whole optimizer step and all ranks `policy_loss` expects as `denominator`.

    sequences: all samples trained on; tokens: all trainable tokens; constant: samples times a fixed length (for Dr. GRPO
    the token limit), which only the caller knows.
    """
    kinds: dict[Aggregation, DenominatorKind] = {
        "sequence-mean": "sequences", "sequence-sum": "sequences", "token-mean": "tokens", "constant": "constant",
    }  # fmt: skip
    return kinds[spec.aggregation]
