"""Every loss that TRL computes, as an outside oracle: `GRPOTrainer._compute_loss` in eval mode, on random fp64 batches.

The trainer's own code runs unchanged; it is only built without __init__ (which loads a model and a data set), on a model
whose logits are a parameter. Its outputs are compared with ours, and the gradients with respect to the logits.
Documented differences of definition, not of value: TRL's `cispo` bound is the largest weight itself (cispo_bound "ratio"),
its entropy bonus is a mean over tokens whatever the loss type (so compared under token-mean), and it computes the rollout
weights while it generates (so they are given to it here, by its own formulas). TRL's masks are ours at its bounds, and its
mask of high-entropy tokens is an advantage of 0 elsewhere.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from strop.kernels import LossSpec, denominator_kind, logprob, policy_loss

pytest.importorskip("trl", reason="needs trl (pip install strop[test])")

SEQUENCES, PROMPT, LENGTH, VOCAB = 5, 2, 7, 11
AGGREGATIONS = {
    "grpo": "sequence-mean", "sapo": "sequence-mean", "luspo": "sequence-sum", "bnpo": "token-mean", "dapo": "token-mean",
    "cispo": "token-mean", "vespo": "token-mean", "dr_grpo": "constant",
}  # fmt: skip
GSPO = {"policy": "gspo", "clip_low": 0.05, "clip_high": 0.06}
SEQUENCE_LEVEL = {"importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.06}
CASES = {  # name: (TRL's settings, ours); mode, min and max are its vllm_importance_sampling_*
    "grpo": ({}, {}),
    "grpo kl": ({"beta": 0.04}, {"kl_coef": 0.04}),
    "unbiased kl": ({"beta": 0.04, "use_bias_correction_kl": True}, {"kl_coef": 0.04, "kl_gradient": "unbiased"}),
    "clip-higher": ({"epsilon_high": 0.28}, {"clip_high": 0.28}),
    "two-sided clip": ({"delta": 1.3}, {"delta": 1.3}),
    "bnpo": ({"loss_type": "bnpo"}, {}),
    "dapo": ({"loss_type": "dapo", "beta": 0.04}, {"kl_coef": 0.04}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {}),
    "gspo": ({**SEQUENCE_LEVEL, "beta": 0.04}, {**GSPO, "kl_coef": 0.04}),
    "gspo two-sided": ({**SEQUENCE_LEVEL, "delta": 1.1}, {**GSPO, "delta": 1.1}),
    "luspo": ({**SEQUENCE_LEVEL, "loss_type": "luspo"}, GSPO),
    "luspo on tokens": ({"loss_type": "luspo"}, {}),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.1}, {"policy": "cispo", "cispo_bound": "ratio", "clip_high": 1.1}
    ),
    "sapo": ({"loss_type": "sapo", "sapo_temperature_neg": 1.25}, {"policy": "sapo", "sapo_tau_negative": 1.25}),
    "vespo": ({"loss_type": "vespo"}, {"policy": "vespo"}),
    "vespo tis": (
        {"loss_type": "vespo", "mode": "token_truncate", "max": 1.2},
        {"policy": "vespo", "correction": "tis", "correction_high": 1.2},
    ),
    "vespo token mask": (
        {"loss_type": "vespo", "mode": "token_mask", "min": 0.8, "max": 1.3},
        {"policy": "vespo", "correction": "icepop", "correction_low": 0.8, "correction_high": 1.3},
    ),
    "sapo unbiased kl": (
        {"loss_type": "sapo", "beta": 0.04, "use_bias_correction_kl": True, "sapo_temperature_neg": 1.25},
        {"policy": "sapo", "kl_coef": 0.04, "kl_gradient": "unbiased", "sapo_tau_negative": 1.25},  # TRL rounds 1.05 to fp32
    ),
    "gspo opsm": ({**SEQUENCE_LEVEL, "off_policy_mask_threshold": 0.05}, {**GSPO, "opsm_delta": 0.05}),
    "opsm": ({"off_policy_mask_threshold": 0.05, "beta": 0.04}, {"opsm_delta": 0.05, "kl_coef": 0.04}),
    "tis": (
        {"mode": "token_truncate", "max": 1.2, "beta": 0.04},
        {"correction": "tis", "correction_high": 1.2, "kl_coef": 0.04},
    ),
    "tis from below": (
        {"mode": "token_truncate", "min": 0.8, "max": 1.2}, {"correction": "tis", "correction_low": 0.8, "correction_high": 1.2}
    ),
    "token mask": (
        {"mode": "token_mask", "min": 0.8, "max": 1.3},
        {"correction": "icepop", "correction_low": 0.8, "correction_high": 1.3},
    ),
    "sequence truncate": (
        {"mode": "sequence_truncate", "max": 1.1}, {"correction": "sequence-truncate", "correction_high": 1.1}
    ),
    "sequence mask": ({"mode": "sequence_mask", "max": 1.1}, {"correction": "sequence-mask", "correction_high": 1.1}),
    "gspo sequence truncate": (
        {**SEQUENCE_LEVEL, "mode": "sequence_truncate", "max": 1.1},
        {**GSPO, "correction": "sequence-truncate", "correction_high": 1.1},
    ),
    "gspo token truncate": (
        {**SEQUENCE_LEVEL, "mode": "token_truncate", "max": 1.1}, {**GSPO, "correction": "tis", "correction_high": 1.1}
    ),
    "top entropy": ({"top_entropy_quantile": 0.4, "beta": 0.04}, {"kl_coef": 0.04}),
    "top entropy gspo": ({**SEQUENCE_LEVEL, "top_entropy_quantile": 0.4}, GSPO),
    "entropy bonus": ({"loss_type": "dapo", "entropy_coef": 0.1}, {"entropy_coef": 0.1}),
}  # fmt: skip


class Scorer(torch.nn.Module):
    """A language model whose logits [B, prompt + L, V] are its parameter; log-probs and entropies as TRL asks for them."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids, attention_mask, labels, fused_lm_head):
        log_p = self.logits.log_softmax(-1)
        chosen = log_p.gather(-1, input_ids[..., None]).squeeze(-1)
        return SimpleNamespace(log_probs=chosen, entropy=-(log_p.exp() * log_p).sum(-1))


@pytest.fixture(scope="module")
def trl_loss():
    """(settings, model, batch) -> TRL's loss."""
    from accelerate import Accelerator
    from trl import GRPOConfig, GRPOTrainer

    def compute(settings: dict, model: Scorer, batch: dict) -> torch.Tensor:
        given = {"beta": 0.0, "loss_type": "grpo", "use_bias_correction_kl": False} | settings
        importance = {name: given.pop(name) for name in ("mode", "min", "max") if name in given}
        config = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to=[], **given)
        trainer = GRPOTrainer.__new__(GRPOTrainer)
        trainer.__dict__.update(
            args=config,
            model=model.eval(),
            accelerator=Accelerator(cpu=True),  # after the config, which resets its state
            loss_type=config.loss_type,
            beta=config.beta,
            epsilon_low=config.epsilon,
            epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
            importance_sampling_level=config.importance_sampling_level,
            top_entropy_quantile=config.top_entropy_quantile,
            off_policy_mask_threshold=config.off_policy_mask_threshold,
            use_vllm=bool(importance),
            vllm_importance_sampling_correction=True,
            max_completion_length=LENGTH,
            aux_loss_enabled=False,
            use_adaptive_entropy=False,
            entropy_coef=config.entropy_coef,
            _entropy_bonus_enabled=config.entropy_coef != 0,
            _metrics={"eval": defaultdict(list)},
        )
        if importance:
            batch = batch | {"importance_sampling_ratio": trl_importance_ratio(batch, **importance)}
        return trainer._compute_loss(model, batch)

    return compute


def trl_importance_ratio(batch: dict, mode: str, max: float, min: float | None = None) -> torch.Tensor:
    """vllm_importance_sampling_ratio of TRL's `_generate_and_score_completions`."""
    gap = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * batch["completion_mask"]
    ratio = (gap.sum(-1, keepdim=True) if mode.startswith("sequence") else gap).exp()
    if mode.endswith("truncate"):
        return ratio.clamp(min=min, max=max)
    return ratio.masked_fill((ratio < (min or 0)) | (ratio > max), 0.0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradients_equal_trls(trl_loss, case, seed):
    settings, spec_settings = CASES[case]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    model = Scorer(normal(SEQUENCES, PROMPT + LENGTH, VOCAB))
    ids = torch.randint(0, VOCAB, (SEQUENCES, PROMPT + LENGTH), generator=generator)
    lengths = torch.tensor([LENGTH, 1, 4, 6, 3])
    mask = torch.arange(LENGTH) < lengths[:, None]
    logits = model.logits.detach()[:, PROMPT:].clone().requires_grad_()
    current = logprob(logits, ids[:, PROMPT:])
    old, ref, rollout = (current.logprob.detach() + 0.3 * normal(SEQUENCES, LENGTH) for _ in range(3))
    rollout = old + 0.3 * (rollout - old)
    advantages = torch.tensor([1.5, -0.7, 0.0, -1.1, 0.4], dtype=torch.float64)
    batch = {
        "prompt_ids": ids[:, :PROMPT], "prompt_mask": torch.ones(SEQUENCES, PROMPT, dtype=torch.int64),
        "completion_ids": ids[:, PROMPT:], "completion_mask": mask.long(), "advantages": advantages,
        "old_per_token_logps": old, "ref_per_token_logps": ref, "sampling_per_token_logps": rollout,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    expected = trl_loss(settings, model, batch)
    (wanted,) = torch.autograd.grad(expected, model.logits)

    token_advantages = advantages[:, None].expand_as(mask)
    if "top_entropy_quantile" in settings:  # tokens of low entropy keep their KL and their place in the counts
        threshold = current.entropy[mask].float().quantile(1 - settings["top_entropy_quantile"])
        token_advantages = torch.where(current.entropy >= threshold, token_advantages, 0)
    spec = LossSpec(aggregation=AGGREGATIONS[settings.get("loss_type", "grpo")], **spec_settings)
    denominators = {"sequences": SEQUENCES, "tokens": mask.sum(), "constant": SEQUENCES * LENGTH}
    loss, _ = policy_loss(
        current.logprob, old, token_advantages, mask, spec, ref_logprob=ref, rollout_logprob=rollout,
        entropy=current.entropy, denominator=denominators[denominator_kind(spec)],
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logits)
    difference = (gradient - wanted[:, PROMPT:]).norm() / wanted.norm()
    print(f"{case}: loss {loss.item():.6f}, TRL {expected.item():.6f}; gradients differ by {difference:.1e} of their norm")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert difference <= 1e-6
    assert wanted[:, :PROMPT].count_nonzero() == 0
