"""Overflow, empty input, metrics, host synchronisation and the contradictions that a `LossSpec` refuses."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from strop.kernels import METRIC_FIELDS, LossSpec, combine_metrics, policy_loss, summarize_metrics

ENDS = torch.tensor([0, 2, 4])
ONES = torch.ones(4, dtype=torch.bool)


def run(logprob, old, advantages, spec=None, mask=ONES, cu_seqlens=ENDS, denominator=2.0, **extra):
    """(loss, slopes, metrics) of fp32 lists."""
    lp = torch.tensor(logprob, requires_grad=True)
    old = None if old is None else torch.tensor(old)
    spec = LossSpec() if spec is None else spec
    loss, metrics = policy_loss(
        lp, old, torch.tensor(advantages), mask, spec, cu_seqlens=cu_seqlens, denominator=denominator, **extra
    )
    return loss.item(), torch.autograd.grad(loss, lp)[0], metrics


@pytest.mark.parametrize(
    "spec",
    [
        LossSpec(),
        LossSpec(dual_clip=3.0),
        LossSpec(policy="cispo", clip_high=0.2),
        LossSpec(policy="sapo"),
        LossSpec(correction="icepop"),
    ],
    ids=lambda spec: f"{spec.policy}-{spec.correction}",
)
def test_an_overflowing_ratio_that_is_not_selected_leaves_no_nan(spec):
    """lp - old = 400, e^400 = inf in fp32: clipped where A > 0, weightless where A = 0."""
    extra = {"rollout_logprob": torch.tensor([-400.0, -1, -800, -1])} if spec.correction != "none" else {}
    loss, slopes, _ = run([-0.5, -1, -0.5, -1], [-400.5, -1, -400.5, -1], [2.0, 1, 0, -1], spec, **extra)
    assert math.isfinite(loss) and slopes.isfinite().all()
    assert slopes[2] == 0
    if spec.policy != "cispo":
        assert slopes[0] == 0


@pytest.mark.parametrize("policy", ["gspo", "gspo-token", "gmpo"])
def test_an_overflowing_sequence_ratio_leaves_no_nan(policy):
    spec = LossSpec(policy=policy)
    loss, slopes, _ = run([-0.5, -0.5, -0.5, -0.5], [-400.0] * 4, [1.0, 2, 0, 0], spec)
    assert math.isfinite(loss) and slopes.isfinite().all()


def test_dropped_sequences_send_no_nan():
    """A rollout weight of 0 meets a ratio of inf."""
    spec = LossSpec(correction="sequence-mask", correction_high=2.0)
    rollout = torch.tensor([-900.0, -900, -0.5, -0.5])
    loss, slopes, _ = run([-0.5] * 4, [-400.0, -400, -0.5, -0.5], [-1.0, -1, 1, 1], spec, rollout_logprob=rollout)
    assert math.isfinite(loss) and slopes.isfinite().all() and (slopes[:2] == 0).all() and (slopes[2:] != 0).all()


def test_log_ratio_limit_keeps_a_real_overflow_finite_and_counts_it():
    blown, _, metrics = run([-0.5] * 4, [-400.5, -0.5, -0.5, -0.5], [-1.0] * 4)
    assert blown == math.inf and summarize_metrics(metrics)["loss"] == math.inf
    loss, slopes, metrics = run([-0.5] * 4, [-400.5, -0.5, -0.5, -0.5], [-1.0] * 4, LossSpec(log_ratio_limit=20.0))
    assert loss == pytest.approx((math.exp(20) + 3) / 4, rel=1e-6)
    assert slopes[0] == 0
    summary = summarize_metrics(metrics)
    assert summary["log_ratio_limited_fraction"] == 0.25 and summary["log_ratio_abs_max"] == 400


def test_nonfinite_inputs_inside_the_mask_are_counted_and_not_hidden():
    loss, _, metrics = run([-0.5, math.nan, -0.5, -0.5], [-0.5, -0.5, -math.inf, -0.5], [1.0] * 4)
    assert not math.isfinite(loss)
    assert summarize_metrics(metrics)["nonfinite"] == 2
    outside = torch.tensor([True, False, False, True])
    loss, slopes, metrics = run([-0.5, math.nan, -0.5, -0.5], [-0.5, -0.5, -math.inf, -0.5], [1.0] * 4, mask=outside)
    assert loss == -1 and slopes.tolist() == [-0.5, 0, 0, -0.5]
    assert summarize_metrics(metrics)["nonfinite"] == 0


@pytest.mark.parametrize("policy", ["clip", "gspo", "vespo", "reinforce"])
def test_nothing_trainable_gives_zero(policy):
    spec = LossSpec(policy=policy, correction="tis", kl_coef=0.1, entropy_coef=0.1)
    for size, ends in ((4, ENDS), (0, torch.tensor([0])), (0, torch.tensor([0, 0, 0]))):
        given = [torch.full((size,), math.nan, requires_grad=True) for _ in range(6)]
        loss, metrics = policy_loss(
            *given[:3], torch.zeros(size, dtype=torch.bool), spec, ref_logprob=given[3], rollout_logprob=given[4],
            entropy=given[5], cu_seqlens=ends, denominator=7,
        )  # fmt: skip
        assert loss.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, (given[0], given[5])))
        summary = summarize_metrics(metrics)
        assert (summary["tokens"], summary["sequences"], summary["loss"]) == (0, 0, 0) and "ratio_mean" not in summary


@pytest.mark.parametrize("spec", [LossSpec(), LossSpec(aggregation="token-mean", kl_coef=0.1, entropy_coef=0.1),
                                  LossSpec(policy="gspo", correction="tis", entropy_coef=0.1)], ids=lambda spec: spec.policy)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_trainable_may_be_counted_by_the_denominator(spec, dtype):
    """mask.sum() of a micro-batch that was filtered out: 0 / 0 must not reach loss, gradients or metrics."""
    given = [torch.full((4,), math.nan, dtype=dtype, requires_grad=True) for _ in range(6)]
    mask, ends = torch.tensor([False, False, False, True]), torch.tensor([0, 1, 3])  # the last is padding
    loss, metrics = policy_loss(
        *given[:3], mask, spec, ref_logprob=given[3], rollout_logprob=given[4], entropy=given[5], cu_seqlens=ends,
        denominator=mask[:3].sum(),
    )  # fmt: skip
    gradients = torch.autograd.grad(loss, (given[0], given[5]), allow_unused=True, materialize_grads=True)
    assert loss == 0 and not any(gradient.any() for gradient in gradients)
    summary = summarize_metrics(metrics)
    assert summary["loss"] == summary["policy_loss"] == summary["kl_loss"] == summary["entropy_loss"] == 0


def test_on_policy_first_minibatch_needs_no_old_logprob():
    loss, slopes, metrics = run([-0.5, -1, -2, -3], None, [1.0, 1, -2, -2])
    assert loss == pytest.approx(0.5)  # -(1 - 2) / 2: every ratio is 1
    assert slopes.tolist() == [-0.25, -0.25, 0.5, 0.5]
    summary = summarize_metrics(metrics)
    assert summary["ratio_min"] == summary["ratio_max"] == 1 and summary["old_k3_mean"] == 0


def test_metric_values():
    """Two sequences, ratios (2, 1/2, 1, 1), rollout weights (4, 1, 1/4, 1), one token outside the mask."""
    log = math.log
    old = [-1 - log(2), -1 + log(2), -1.0, -1.0]
    rollout = torch.tensor([old[0] - log(4), old[1], -1 + log(4), -1.0])
    mask = torch.tensor([True, True, True, False])
    spec = LossSpec(correction="tis", kl_coef=0.1, entropy_coef=0.5)
    entropy, ref = torch.tensor([0.1, 0.2, 0.3, 9.0]), torch.tensor([-1.0, -1, -1 + log(2), 0])
    _, _, metrics = run(
        [-1.0] * 4, old, [1.0, -1, -1, 5], spec, mask, rollout_logprob=rollout, ref_logprob=ref, entropy=entropy
    )
    expected = {
        "tokens": 3, "sequences": 2, "nonfinite": 0, "clip_high_fraction": 1 / 3, "clip_low_fraction": 1 / 3,
        "clip_dual_fraction": 0, "ratio_mean": 3.5 / 3, "ratio_min": 0.5, "ratio_max": 2, "old_k1_mean": 0,
        "old_k3_mean": 0.5 / 3, "log_ratio_abs_mean": 2 * log(2) / 3, "log_ratio_abs_max": log(2), "entropy_mean": 0.2,
        "ref_kl_mean": (1 - log(2)) / 3, "rollout_gap_abs_mean": 2 * log(4) / 3, "rollout_gap_abs_max": log(4),
        "weight_mean": (2 + 1 + 0.25) / 3, "weight_min": 0.25, "weight_max": 2, "weight_truncated_fraction": 1 / 3,
        "weight_masked_fraction": 0, "weight_ess": 3.25**2 / (4 + 1 + 1 / 16) / 3,
        # sequence 1: (-2 * 1.2 + 0.8) / 2; sequence 2: 1/4; then / 2
        "policy_loss": (-1.6 / 2 + 0.25) / 2, "kl_loss": 0.1 * (1 - log(2)) / 2, "entropy_loss": -0.5 * (0.15 + 0.3) / 2,
    }  # fmt: skip
    summary = summarize_metrics(metrics)
    assert {name: summary[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert summary["loss"] == pytest.approx(sum(expected[f"{part}_loss"] for part in ("policy", "kl", "entropy")))


def test_combining_metrics_uses_each_slots_reduction():
    slots = torch.arange(float(len(METRIC_FIELDS)))
    combined = combine_metrics([slots, -slots, slots])
    expected = {"sum": slots, "min": -slots, "max": slots}
    for slot, (name, reduction) in enumerate(METRIC_FIELDS):
        assert combined[slot] == expected[reduction][slot], name


class NoHostSync(TorchDispatchMode):
    """Fails on operations whose result, or its shape, only the device's values can tell."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(func.__name__.startswith(name) for name in self.FORBIDDEN), func
        if func.__name__.startswith("index."):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "boolean index"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["clip", "gspo", "gmpo", "vespo"])
def test_no_host_sync(policy, monkeypatch):
    monkeypatch.setattr("strop.kernels.policy.values_may_be_read", lambda device: False)  # as on a GPU
    spec = LossSpec(policy=policy, correction="tis", opsm_delta=0.1, kl_coef=0.1, entropy_coef=0.1)
    tensors = [torch.randn(6, requires_grad=True) for _ in range(6)]
    mask, ends, count = torch.rand(6) > 0.5, torch.tensor([0, 2, 5]), torch.tensor(3)
    with NoHostSync():
        loss, metrics = policy_loss(
            *tensors[:3], mask, spec, ref_logprob=tensors[3], rollout_logprob=tensors[4], entropy=tensors[5],
            cu_seqlens=ends, denominator=count,
        )  # fmt: skip
        loss.backward()
        combine_metrics([metrics, metrics])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "ppo"}, "policy 'ppo': choose from clip, gspo"),
        ({"aggregation": "mean"}, "aggregation 'mean'"),
        ({"policy": "sapo", "clip_high": 0.2}, "clip_high 0.2 has no effect with policy 'sapo'.*take policy 'clip'"),
        ({"policy": "cispo"}, "cispo' needs clip_high"),
        ({"policy": "cispo", "cispo_bound": "ratio", "clip_high": 5.0, "clip_low": 0.1}, "clip_low 0.1 has no effect"),
        ({"cispo_bound": "ratio"}, "cispo_bound 'ratio' has no effect"),
        ({"dual_clip": 3.0, "delta": 3.0}, "dual_clip 3.0 and delta 3.0"),
        ({"dual_clip": 1.0}, "dual_clip 1.0 must be above 1"),
        ({"delta": 1.2}, "delta 1.2 must be above 1 \\+ clip_high = 1.2"),
        ({"policy": "gmpo", "delta": 4.0}, "delta 4.0 has no effect"),
        ({"kl_gradient": "unbiased"}, "kl_gradient 'unbiased' has no effect.*kl_coef above 0"),
        ({"kl_coef": 0.1, "kl_estimator": "k1"}, "kl_estimator 'k1' with kl_gradient 'naive'"),
        ({"kl_coef": 0.1, "kl_estimator": "k2", "kl_gradient": "unbiased"}, "take 'k3'"),
        ({"kl_coef": -0.1}, "kl_coef -0.1: must be finite and at least 0"),
        ({"entropy_coef": math.nan}, "entropy_coef nan"),
        ({"log_ratio_limit": 0.0}, "log_ratio_limit 0.0: must be finite and above 0"),
        ({"policy": "reinforce", "log_ratio_limit": 20.0}, "log_ratio_limit 20.0 has no effect"),
        ({"sapo_tau_positive": 2.0}, "sapo_tau_positive 2.0 has no effect"),
        ({"vespo_positive": (1.0, 1.0)}, "vespo_positive"),
        ({"correction_high": 2.0}, "correction_high 2.0 has no effect"),
        ({"correction": "mean-mask"}, "needs correction_low and correction_high"),
        ({"correction": "icepop", "correction_low": 6.0}, "correction_low 6.0 is above correction_high 5.0"),
        ({"policy": "vespo", "correction": "sequence-mask"}, "'vespo' weighs each token"),
    ],
)
def test_contradictory_specs_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LossSpec(**settings)
