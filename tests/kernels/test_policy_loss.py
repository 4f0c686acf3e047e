"""`policy_loss` against the printed formulas, R1's equation worked by hand, and finite differences."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels import (
    METRIC_FIELDS,
    AdvantageSpec,
    LossSpec,
    combine_metrics,
    denominator_kind,
    group_advantage,
    kl,
    native,
    policy_loss,
    sequence_stats,
    summarize_metrics,
)

POLICIES = [
    LossSpec(),
    LossSpec(clip_low=0.2, clip_high=0.28),
    LossSpec(dual_clip=3.0),
    LossSpec(delta=1.5),
    LossSpec(clip_high=10.0, dual_clip=2.0),
    LossSpec(policy="gspo", clip_low=0.05, clip_high=0.05),
    LossSpec(policy="gspo", clip_low=0.05, clip_high=0.05, delta=1.2),
    LossSpec(policy="gspo-token", clip_low=0.05, clip_high=0.05),
    LossSpec(policy="gmpo"),
    LossSpec(policy="cispo", clip_low=0.2, clip_high=0.3),
    LossSpec(policy="cispo", cispo_bound="ratio", clip_high=1.2),
    LossSpec(policy="sapo"),
    LossSpec(policy="vespo"),
    LossSpec(policy="reinforce"),
    LossSpec(log_ratio_limit=0.3),
]
CORRECTIONS = [
    {},
    {"correction": "tis", "correction_high": 1.1},
    {"correction": "icepop", "correction_low": 0.8, "correction_high": 1.2},
    {"correction": "mean-mask", "correction_low": 0.9, "correction_high": 1.1},
    {"correction": "sequence-truncate", "correction_high": 1.1},
    {"correction": "sequence-mask", "correction_low": 0.5, "correction_high": 1.5},
    {"opsm_delta": 0.1},
    {"opsm_delta": 0.1, "correction": "tis"},
]
TERMS = [
    {},
    {"kl_coef": 0.1},
    {"kl_coef": 0.1, "kl_estimator": "k2"},
    {"kl_coef": 0.1, "kl_estimator": "k1", "kl_gradient": "straight-through"},
    {"kl_coef": 0.1, "kl_gradient": "straight-through"},
    {"kl_coef": 0.1, "kl_gradient": "unbiased"},
    {"entropy_coef": 0.2},
]
AGGREGATIONS = ["sequence-mean", "token-mean", "sequence-sum", "constant"]


class Batch:
    """Random packed sequences, some empty or fully masked, with padding at the end full of NaN."""

    def __init__(
        self, lengths: list[int], padding: int, seed: int, spread: float = 0.3, dtype: torch.dtype = torch.float64
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def normal(scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(total, generator=generator, dtype=torch.float64)).to(dtype)

        total = sum(lengths) + padding
        self.boundaries = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        self.cu_seqlens = torch.tensor(self.boundaries, dtype=torch.int32)
        self.mask = torch.rand(total, generator=generator) > 0.3
        self.mask[self.boundaries[-1] :] = False
        self.logprob = normal() - 2
        self.old, self.rollout, self.ref = (self.logprob + normal(spread) for _ in range(3))
        self.entropy = normal().abs()
        self.advantages = normal()
        for tensor in (self.logprob, self.old, self.rollout, self.ref, self.entropy, self.advantages):
            tensor[~self.mask] = math.nan
        self.logprob.requires_grad_()
        self.entropy.requires_grad_()

    def to(self, dtype: torch.dtype) -> None:
        """The same numbers in another precision."""
        for name in ("logprob", "old", "rollout", "ref", "entropy", "advantages"):
            tensor = getattr(self, name)
            setattr(self, name, tensor.detach().to(dtype).requires_grad_(tensor.requires_grad))

    def run(self, spec: LossSpec, denominator: float = 3.0, old: bool = True):
        given = {"rollout_logprob": self.rollout, "ref_logprob": self.ref, "entropy": self.entropy}
        return policy_loss(
            self.logprob, self.old if old else None, self.advantages, self.mask, spec,
            cu_seqlens=self.cu_seqlens, denominator=denominator, **given,
        )  # fmt: skip

    def gradients(self, loss: torch.Tensor) -> torch.Tensor:
        grads = torch.autograd.grad(loss, (self.logprob, self.entropy), allow_unused=True, materialize_grads=True)
        return torch.stack(grads)


specs = st.builds(
    lambda policy, correction, terms, aggregation: {**vars(policy), **correction, **terms, "aggregation": aggregation},
    st.sampled_from(POLICIES), st.sampled_from(CORRECTIONS), st.sampled_from(TERMS), st.sampled_from(AGGREGATIONS),
).filter(lambda s: s["policy"] != "vespo" or s.get("correction", "none") in ("none", "tis", "icepop")).map(
    lambda s: LossSpec(**s)
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(spec=specs, lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), padding=st.integers(0, 4),
       seed=st.integers(0, 10**6), old=st.booleans())  # fmt: skip
def test_any_spec_equals_the_printed_formulas(book_loss, spec, lengths, padding, seed, old):
    batch = Batch(lengths, padding, seed)
    loss, metrics = batch.run(spec, old=old)
    expected = book_loss(
        spec, batch.logprob, batch.old if old else None, batch.advantages, batch.mask, batch.boundaries, 3.0,
        rollout=batch.rollout, ref=batch.ref, entropy=batch.entropy,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    wanted = batch.gradients(expected) if expected.requires_grad else torch.zeros(2, len(batch.mask), dtype=torch.float64)
    torch.testing.assert_close(batch.gradients(loss), wanted, rtol=1e-12, atol=1e-13)
    assert summarize_metrics(metrics)["tokens"] == batch.mask.sum()


@pytest.mark.skipif(native.library("cpu") is None, reason=f"fp32 runs plain torch here: {native.why_missing('cpu')}")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(spec=specs, lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5), padding=st.integers(0, 4),
       seed=st.integers(0, 10**6), old=st.booleans())  # fmt: skip
def test_the_kernel_equals_the_printed_formulas(book_loss, spec, lengths, padding, seed, old):
    """fp32 on a CPU is C++: against the formulas in fp64 on the same numbers, and the metrics of the reference in fp64."""
    batch = Batch(lengths, padding, seed, dtype=torch.float32)
    loss, metrics = batch.run(spec, old=old)
    slopes = batch.gradients(loss)
    batch.to(torch.float64)
    expected = book_loss(
        spec, batch.logprob, batch.old if old else None, batch.advantages, batch.mask, batch.boundaries, 3.0,
        rollout=batch.rollout, ref=batch.ref, entropy=batch.entropy,
    )  # fmt: skip
    # Sums of up to 200 fp32 terms of order 1; a sequence's ratio multiplies the rounding of 40 log-ratios.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = batch.gradients(expected) if expected.requires_grad else torch.zeros(2, len(batch.mask), dtype=torch.float64)
    torch.testing.assert_close(slopes.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics, batch.run(spec, old=old).metrics, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("spec", POLICIES, ids=lambda spec: spec.policy)
def test_random_batches_reach_every_bound(spec):
    """Guards the test above against data that never meets a clip."""
    summary = summarize_metrics(Batch([9] * 20, 2, seed=3, spread=0.4).run(spec).metrics)
    low, high = spec.ratio_bounds
    assert (summary["clip_low_fraction"] > 0) == (low > 0)
    assert (summary["clip_high_fraction"] > 0) == (high < 10)
    if spec.delta or spec.dual_clip == 2.0:
        assert summary["clip_dual_fraction"] > 0
    if spec.log_ratio_limit:
        assert summary["log_ratio_limited_fraction"] > 0


def test_r1_equation_by_hand():
    """R1 eq. 1-3 in the token form, 2 outputs of 2 tokens, eps 0.2, beta 0.04, all numbers worked on paper.

    Rewards (1, 0): mean 1/2, std 1/2, so A = (+1, -1).
    Ratios: output 1 (1.5, 0.5), output 2 (0.5, 1.5).
        A = +1: min(1.5, 1.2) = 1.2 (clipped), min(0.5, 0.8) = 0.5;     mean 0.85
        A = -1: min(-0.5, -0.8) = -0.8 (clipped), min(-1.5, -1.2) = -1.5; mean -1.15
        J = (0.85 - 1.15) / 2 = -0.15, so the policy part of the loss is +0.15.
    ref / current: output 1 (2, 1), output 2 (1/2, 1); k3 = x - ln x - 1:
        (1 - ln 2, 0), (ln 2 - 1/2, 0); sum 1/2; the loss adds 0.04 * (1/2) / 4 = 0.005.
    Slopes, with 1 / (2 outputs * 2 tokens) = 1/4 each: policy -r A / 4 where not clipped, KL 0.04 (1 - x) / 4.
        token 1: 0 - 0.01;  token 2: -0.125 + 0;  token 3: 0 + 0.005;  token 4: +0.375 + 0.
    """
    rewards, groups = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    advantages, _ = group_advantage(rewards, groups, AdvantageSpec())
    assert advantages.tolist() == [1, -1]
    logprob = torch.tensor([-1.0, -2.0, -3.0, -0.5], dtype=torch.float64, requires_grad=True)
    old = logprob.detach() - torch.tensor([1.5, 0.5, 0.5, 1.5], dtype=torch.float64).log()
    ref = logprob.detach() + torch.tensor([2.0, 1.0, 0.5, 1.0], dtype=torch.float64).log()
    loss, metrics = policy_loss(
        logprob, old, advantages.repeat_interleave(2), torch.ones(4, dtype=torch.bool), LossSpec(kl_coef=0.04),
        ref_logprob=ref, cu_seqlens=torch.tensor([0, 2, 4]), denominator=2,
    )  # fmt: skip
    assert loss.item() == pytest.approx(0.155, rel=1e-14)
    (slopes,) = torch.autograd.grad(loss, logprob)
    assert slopes.tolist() == pytest.approx([-0.01, -0.125, 0.005, 0.375], rel=1e-13)
    summary = summarize_metrics(metrics)
    assert summary["policy_loss"] == pytest.approx(0.15, rel=1e-6)
    assert summary["kl_loss"] == pytest.approx(0.005, rel=1e-6)
    assert summary["clip_high_fraction"] == summary["clip_low_fraction"] == 0.25
    assert (summary["ratio_min"], summary["ratio_max"], summary["ratio_mean"]) == pytest.approx((0.5, 1.5, 1.0))
    assert summary["ref_kl_mean"] == pytest.approx(0.125, rel=1e-6)


@pytest.mark.parametrize(
    "spec",
    [s for s in POLICIES if s.policy in ("clip", "gspo", "gmpo", "sapo")]
    + [LossSpec(kl_coef=0.5, entropy_coef=0.1), LossSpec(kl_coef=0.5, kl_estimator="k2")],
    ids=str,
)
def test_gradcheck(spec):
    """Where nothing is detached, slopes are the derivative of the value (fp64 finite differences)."""
    batch = Batch([5, 0, 4], 1, seed=11)
    spread = torch.where(batch.mask, batch.logprob, 0.0).detach().requires_grad_()

    def loss(logprob, entropy):
        return policy_loss(
            logprob, batch.old, batch.advantages, batch.mask, spec, ref_logprob=batch.ref, entropy=entropy,
            cu_seqlens=batch.cu_seqlens, denominator=2.0,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (spread, torch.where(batch.mask, batch.entropy, 0.0).detach().requires_grad_()))


def test_kl_estimators_and_their_slopes():
    logprob = torch.tensor([-1.0, -2.5, -0.3], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.4, -1.5, -0.3], dtype=torch.float64)
    old = torch.tensor([-1.2, -2.0, -0.9], dtype=torch.float64)
    d, r = (ref - logprob).detach(), (logprob - old).exp().detach()
    k3 = d.exp() - d - 1
    cases = {
        ("k1", "naive"): (-d, torch.ones(3)),
        ("k2", "naive"): (d**2 / 2, -d),
        ("k3", "naive"): (k3, 1 - d.exp()),
        ("k1", "straight-through"): (-d, -d),
        ("k3", "straight-through"): (k3, -d),
        ("k3", "unbiased"): (r * k3, -r * d),
    }
    for (estimator, gradient), (value, slope) in cases.items():
        got = kl(logprob, ref, estimator=estimator, gradient=gradient, old_logprob=old)
        torch.testing.assert_close(got.detach(), value, rtol=1e-13, atol=1e-16)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), logprob)[0], slope.double(), rtol=1e-13, atol=1e-16)
    on_policy = kl(logprob, ref, gradient="unbiased")
    torch.testing.assert_close(torch.autograd.grad(on_policy.sum(), logprob)[0], -d, rtol=1e-13, atol=1e-16)
    tiny = kl(torch.tensor([0.0]), torch.tensor([1e-4]))
    assert tiny.item() == pytest.approx(5e-9, rel=1e-3), "e^d - d - 1 must not cancel to 0 in fp32"
    with pytest.raises(ValueError, match="unbiased"):
        kl(logprob, ref, estimator="k1", gradient="unbiased")
    with pytest.raises(ValueError, match="k4"):
        kl(logprob, ref, estimator="k4")


@pytest.mark.parametrize("correction", [CORRECTIONS[4], CORRECTIONS[7]], ids=["sequence-truncate", "opsm-tis"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda spec: spec.policy)
def test_split_into_microbatches_or_context_ranks_changes_nothing(policy, correction):
    """Shares of the loss add up: sequence by sequence, as one dense batch, and with each sequence cut in two."""
    if policy.policy == "vespo" and correction["correction"] == "sequence-truncate":
        correction = {"correction": "icepop"}
    spec = replace(policy, **correction, kl_coef=0.1)
    batch = Batch([6, 6, 6], 0, seed=5)
    whole, metrics = batch.run(spec)
    wanted = batch.gradients(whole)
    inputs = {
        "logprob": batch.logprob, "old_logprob": batch.old, "advantages": batch.advantages, "mask": batch.mask,
        "ref_logprob": batch.ref, "rollout_logprob": batch.rollout, "entropy": batch.entropy,
    }  # fmt: skip

    pieces = [
        policy_loss(**{k: v[i : i + 6] for k, v in inputs.items()}, spec=spec, cu_seqlens=torch.tensor([0, 6]), denominator=3.0)
        for i in (0, 6, 12)
    ]
    dense = policy_loss(**{name: tensor.view(3, 6) for name, tensor in inputs.items()}, spec=spec, denominator=3.0)

    halves = [torch.tensor([0, 1, 2, 6, 7, 8, 12, 13, 14]), torch.tensor([3, 4, 5, 9, 10, 11, 15, 16, 17])]
    ends = torch.tensor([0, 3, 6, 9])
    needed = ("logprob", "old_logprob", "advantages", "mask", "rollout_logprob")
    stats = sum(sequence_stats(**{k: inputs[k][half] for k in needed}, spec=spec, cu_seqlens=ends) for half in halves)
    ranks = [
        policy_loss(
            **{k: v[half] for k, v in inputs.items()}, spec=spec, cu_seqlens=ends, sequence_stats=stats, denominator=3.0
        )
        for half in halves
    ]
    for parts in (pieces, [dense], ranks):
        loss = sum(part.loss for part in parts)
        torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(batch.gradients(loss), wanted, rtol=1e-12, atol=1e-13)
    expected = summarize_metrics(metrics)
    for parts, times in ((pieces, 1), (ranks, 2)):  # each context rank counts the whole sequences
        joined = summarize_metrics(combine_metrics([part.metrics for part in parts]))
        assert joined == pytest.approx(expected | {"sequences": times * expected["sequences"]}, rel=1e-5, abs=1e-6)


def test_denominator_kinds():
    assert [denominator_kind(LossSpec(aggregation=a)) for a in AGGREGATIONS] == ["sequences", "tokens", "sequences", "constant"]
    assert len({name for name, _ in METRIC_FIELDS}) == len(METRIC_FIELDS)
