"""strop.kernels: log-prob, entropy, policy loss, KL and advantages for reinforcement learning of language models.

Importable alone: needs torch and numpy, nothing else of strop. Every op has a plain-torch reference (`reference/`, any
device, fp64-capable); `native.py` says when compiled code runs instead.
"""

from .advantages import ADVANTAGE_COUNTS, GroupAdvantage, group_advantage
from .logprobs import LogprobResult, linear_logprob, logprob
from .metrics import METRIC_FIELDS, combine_metrics, summarize_metrics
from .policy import SEQUENCE_FIELDS, LinearPolicyLoss, PolicyLoss, kl, linear_policy_loss, policy_loss, sequence_stats
from .specs import AdvantageSpec, LossSpec, denominator_kind

__all__ = [
    "ADVANTAGE_COUNTS",
    "METRIC_FIELDS",
    "SEQUENCE_FIELDS",
    "AdvantageSpec",
    "GroupAdvantage",
    "LinearPolicyLoss",
    "LogprobResult",
    "LossSpec",
    "PolicyLoss",
    "combine_metrics",
    "denominator_kind",
    "group_advantage",
    "kl",
    "linear_logprob",
    "linear_policy_loss",
    "logprob",
    "policy_loss",
    "sequence_stats",
    "summarize_metrics",
]
