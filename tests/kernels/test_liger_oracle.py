"""Liger's chunked GRPO loss as an outside oracle: values and the gradients of hidden states, LM head and bias, in fp32.

It runs on a CPU in plain torch (`compiled=False`), a sequence at a time. Differences of definition, not of value: its `cispo`
bound is the largest weight itself (cispo_bound "ratio"); its KL is added after the rollout weights, as ours; on tokens, its
`luspo` also adds up what lies outside the mask, so it is compared on the sequence's ratio, where it doesn't; it has no entropy
bonus and no off-policy mask, and takes the rollout weights ready made (they are formed here by TRL's formulas). Every count is
that of this one batch: gradient accumulation is its caller's.
"""

import pytest
import torch

from strop.kernels import LossSpec, denominator_kind, linear_policy_loss

grpo_loss = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="needs liger-kernel (pip install strop[test])")

SEQUENCES, LENGTH, HIDDEN, VOCAB = 5, 7, 16, 33
AGGREGATIONS = {
    "grpo": "sequence-mean", "sapo": "sequence-mean", "luspo": "sequence-sum", "bnpo": "token-mean", "dapo": "token-mean",
    "cispo": "token-mean", "vespo": "token-mean", "dr_grpo": "constant",
}  # fmt: skip
SEQUENCE_LEVEL = {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.06}
GSPO = {"policy": "gspo", "clip_low": 0.05, "clip_high": 0.06}
CASES = {  # name: (Liger's settings, ours)
    "grpo": ({"loss_type": "grpo"}, {}),
    "grpo kl": ({"loss_type": "grpo", "beta": 0.04}, {"kl_coef": 0.04}),
    "bnpo": ({"loss_type": "bnpo"}, {}),
    "dapo": ({"loss_type": "dapo"}, {}),
    "dapo clip-higher": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"clip_high": 0.28}),
    "dapo two-sided": ({"loss_type": "dapo", "delta": 1.3}, {"delta": 1.3}),
    "dapo unbiased kl": (
        {"loss_type": "dapo", "beta": 0.04, "use_bias_correction_kl": True}, {"kl_coef": 0.04, "kl_gradient": "unbiased"}
    ),
    "dr_grpo": ({"loss_type": "dr_grpo", "max_completion_length": LENGTH}, {}),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.1}, {"policy": "cispo", "cispo_bound": "ratio", "clip_high": 1.1}),
    "sapo": ({"loss_type": "sapo", "sapo_temperature_neg": 1.25}, {"policy": "sapo", "sapo_tau_negative": 1.25}),
    "vespo": ({"loss_type": "vespo"}, {"policy": "vespo"}),
    "gspo": ({"loss_type": "grpo", **SEQUENCE_LEVEL, "beta": 0.04}, {**GSPO, "kl_coef": 0.04}),
    "luspo": ({"loss_type": "luspo", **SEQUENCE_LEVEL}, GSPO),
    "tis": (
        {"loss_type": "grpo", "beta": 0.04, "mode": "token"}, {"correction": "tis", "correction_high": 1.2, "kl_coef": 0.04}
    ),
    "sequence truncate": (
        {"loss_type": "dapo", "mode": "sequence"}, {"correction": "sequence-truncate", "correction_high": 1.2}
    ),
    "vespo tis": ({"loss_type": "vespo", "mode": "token"}, {"policy": "vespo", "correction": "tis", "correction_high": 1.2}),
    "temperature": ({"loss_type": "grpo", "temperature": 0.7}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradients_equal_ligers(case, seed):
    given, spec_settings = CASES[case]
    settings = {"beta": 0.0, "temperature": 1.0} | given
    mode = settings.pop("mode", None)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight, bias = normal(SEQUENCES, LENGTH, HIDDEN), normal(VOCAB, HIDDEN) / 4, normal(VOCAB)
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    targets = torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 1, 4, 6, 3])[:, None]
    advantages = torch.tensor([1.5, -0.7, 0.0, -1.1, 0.4])
    logits = (hidden.detach() @ weight.detach().T + bias.detach()) / settings["temperature"]
    current = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    old, ref = (current + 0.3 * normal(SEQUENCES, LENGTH) for _ in range(2))
    rollout = old + 0.1 * normal(SEQUENCES, LENGTH)
    gap = (old - rollout) * mask
    ratios = {None: None, "token": gap.exp().clamp(max=1.2), "sequence": gap.sum(1, keepdim=True).exp().clamp(max=1.2)}

    liger = grpo_loss.LigerFusedLinearGRPOLoss(compiled=False, use_ref_model=settings["beta"] > 0, **settings)
    expected, _ = liger(
        hidden, weight, targets, mask.float(), advantages, bias=bias, ref_per_token_logps=ref, old_per_token_logps=old,
        vllm_is_ratio=ratios[mode],
    )  # fmt: skip
    wanted = torch.autograd.grad(expected, inputs)

    spec = LossSpec(aggregation=AGGREGATIONS[settings["loss_type"]], **spec_settings)
    denominators = {"sequences": SEQUENCES, "tokens": mask.sum(), "constant": SEQUENCES * LENGTH}
    loss, _, _ = linear_policy_loss(
        hidden, weight, targets, old, advantages[:, None].expand(SEQUENCES, LENGTH), mask, spec, bias=bias,
        temperature=settings["temperature"], ref_logprob=ref, rollout_logprob=rollout,
        denominator=denominators[denominator_kind(spec)],
    )  # fmt: skip
    gradients = torch.autograd.grad(loss, inputs)
    differences = [((one - other).norm() / other.norm()).item() for one, other in zip(gradients, wanted, strict=True)]
    print(f"{case}: loss {loss.item():.7f}, Liger {expected.item():.7f}; gradients differ by {max(differences):.1e}")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert max(differences) <= 1e-5
    assert wanted[0][~mask].count_nonzero() == gradients[0][~mask].count_nonzero() == 0
