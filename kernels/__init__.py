"""strop.kernels: log-prob, entropy, policy loss, KL, advantages and the layers' own ops, for reinforcement learning of
language models.

Importable alone: needs torch and numpy, nothing else of strop. Every op has a plain-torch reference (`reference/`, any
device, fp64-capable); `dispatch.py` says when another form runs instead.
"""

from .advantages import ADVANTAGE_COUNTS, GroupAdvantage, group_advantage
from .kl import kl
from .linear_policy_loss import LinearPolicyLoss, linear_policy_loss
from .logprobs import LogprobResult, linear_logprob, logprob
from .metrics import METRIC_FIELDS, combine_metrics, summarize_metrics
from .moe_permute import ExpertOrder, expert_order, moe_permute, moe_unpermute
from .multi_tensor_copy import multi_tensor_copy
from .policy import SEQUENCE_FIELDS, PolicyLoss, policy_loss, sequence_stats
from .quantize_fp8 import quantize_fp8
from .rms_norm import rms_norm
from .rope import rope
from .specs import AdvantageSpec, LossSpec, denominator_kind
from .swiglu import swiglu

__all__ = [
    "ADVANTAGE_COUNTS",
    "METRIC_FIELDS",
    "SEQUENCE_FIELDS",
    "AdvantageSpec",
    "ExpertOrder",
    "GroupAdvantage",
    "LinearPolicyLoss",
    "LogprobResult",
    "LossSpec",
    "PolicyLoss",
    "combine_metrics",
    "denominator_kind",
    "expert_order",
    "group_advantage",
    "kl",
    "linear_logprob",
    "linear_policy_loss",
    "logprob",
    "moe_permute",
    "moe_unpermute",
    "multi_tensor_copy",
    "policy_loss",
    "quantize_fp8",
    "rms_norm",
    "rope",
    "sequence_stats",
    "summarize_metrics",
    "swiglu",
]
