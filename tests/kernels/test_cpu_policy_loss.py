"""csrc/cpu's policy loss against the fp64 reference, on each level of vector instructions that this CPU has."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels import METRIC_FIELDS, LossSpec, native, policy_loss, sequence_stats
from strop.kernels.cpu import policy_loss as cpu
from strop.kernels.loss_code import encode

POLICIES = [
    {},
    {"clip_high": 0.28, "dual_clip": 1.5},
    {"clip_low": 0.05, "clip_high": 0.05, "delta": 1.2},
    {"policy": "gspo", "clip_low": 0.02, "clip_high": 0.02},
    {"policy": "gspo", "clip_low": 0.02, "clip_high": 0.02, "dual_clip": 1.05},
    {"policy": "gspo-token", "clip_low": 0.02, "clip_high": 0.02},
    {"policy": "gmpo", "clip_low": 0.2, "clip_high": 0.1},
    {"policy": "cispo", "clip_low": 0.2, "clip_high": 0.3},
    {"policy": "cispo", "cispo_bound": "ratio", "clip_high": 1.2},
    {"policy": "sapo"},
    {"policy": "vespo"},
    {"policy": "reinforce"},
]
CORRECTIONS = [
    {},
    {"correction": "tis", "correction_high": 1.1},
    {"correction": "icepop", "correction_low": 0.8, "correction_high": 1.2},
    {"correction": "mean-mask", "correction_low": 0.95, "correction_high": 1.05},
    {"correction": "sequence-truncate", "correction_high": 1.1},
    {"correction": "sequence-mask", "correction_low": 0.5, "correction_high": 1.5},
    {"opsm_delta": 0.02},
    {"opsm_delta": 0.02, "correction": "tis"},
]
TERMS = [
    {},
    {"kl_coef": 0.1},
    {"kl_coef": 0.1, "kl_estimator": "k2"},
    {"kl_coef": 0.1, "kl_estimator": "k1", "kl_gradient": "straight-through"},
    {"kl_coef": 0.1, "kl_gradient": "straight-through", "entropy_coef": 0.2},
    {"kl_coef": 0.1, "kl_gradient": "unbiased"},
]
AGGREGATIONS = ["sequence-mean", "token-mean", "sequence-sum", "constant"]
TOKENS, NONFINITE = ([name for name, _ in METRIC_FIELDS].index(name) for name in ("tokens", "nonfinite"))
NAMES = [name for name, _ in METRIC_FIELDS]
COUNTS = [i for i, name in enumerate(NAMES) if name.endswith(("tokens", "sequences", "nonfinite", "masked", "truncated",
                                                              "limited")) or name.startswith("clip")]  # fmt: skip


@st.composite
def specs(draw):
    spec = draw(st.sampled_from(POLICIES)) | draw(st.sampled_from(TERMS)) | {"aggregation": draw(st.sampled_from(AGGREGATIONS))}
    usable = CORRECTIONS[:3] if spec.get("policy") == "vespo" else CORRECTIONS
    spec |= draw(st.sampled_from(usable))
    if spec.get("policy") not in ("vespo", "reinforce") and draw(st.booleans()):
        spec["log_ratio_limit"] = 0.3
    return LossSpec(**spec)


class Batch:
    """fp32 tokens; NaN wherever nothing may be read: outside the mask and behind the last sequence."""

    def __init__(self, lengths: list[int], padding: int = 0, seed: int = 0, trainable: float = 0.8):
        generator = torch.Generator().manual_seed(seed)
        size = sum(lengths) + padding
        self.cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
        self.mask = torch.rand(size, generator=generator) < trainable
        outside = ~self.mask | (torch.arange(size) >= self.cu_seqlens[-1])
        self.denominator = torch.tensor(float(max(size - int(outside.sum()), 1)))

        def tokens(values: torch.Tensor) -> torch.Tensor:
            return torch.where(outside, torch.nan, values)

        def normal() -> torch.Tensor:
            return torch.randn(size, generator=generator)

        logprob = -normal().abs() - 0.1
        near = [logprob + 0.2 * normal() for _ in range(3)]
        self.logprob, self.old, self.ref, self.rollout = (tokens(values) for values in (logprob, *near))
        self.entropy = tokens(normal().abs())
        sign = torch.randn(len(lengths), generator=generator).sign().repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        advantages = torch.nn.functional.pad(sign, (0, padding)) * normal().abs()
        self.advantages = tokens(torch.where(torch.rand(size, generator=generator) < 0.1, 0.0, advantages))

    def by_kernel(self, spec: LossSpec, statistics: torch.Tensor | None = None):
        return cpu.policy_loss(
            encode(spec), self.logprob, self.old, self.advantages, self.mask, self.ref, self.rollout, self.entropy,
            self.cu_seqlens, statistics, self.denominator,
        )  # fmt: skip

    def by_reference(self, spec: LossSpec, statistics: torch.Tensor | None = None):
        """The same in fp64, by autograd."""
        wide = {name: None if tensor is None else tensor.double() for name, tensor in vars(self).items()}
        leaves = [wide["logprob"].requires_grad_()]
        if wide["entropy"] is not None:
            leaves.append(wide["entropy"].requires_grad_())
        loss, metrics = policy_loss(
            wide["logprob"], wide["old"], wide["advantages"], self.mask, spec, ref_logprob=wide["ref"],
            rollout_logprob=wide["rollout"], entropy=wide["entropy"], cu_seqlens=self.cu_seqlens,
            sequence_stats=None if statistics is None else statistics.double(), denominator=wide["denominator"],
        )  # fmt: skip
        d_logprob, *d_entropy = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return loss.detach(), metrics, d_logprob, d_entropy[0] if spec.entropy_coef else None


def assert_equal(got, expected) -> None:
    """1e-5 a number (sums of D inside exponents, in fp32), and for sums, which may cancel, 2e-6 of a token's share."""
    loss, metrics, *gradients = got
    wanted_loss, wanted_metrics, *wanted_gradients = expected
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=1e-5, atol=2e-6)
    assert torch.equal(metrics[COUNTS], wanted_metrics[COUNTS])
    tokens = max(metrics[TOKENS].item(), 1.0)
    torch.testing.assert_close(metrics / tokens, wanted_metrics / tokens, rtol=1e-5, atol=2e-6)
    for values, wanted in zip(gradients, wanted_gradients, strict=True):
        assert (values is None) == (wanted is None)
        if values is not None:
            torch.testing.assert_close(tokens * values.double(), tokens * wanted, rtol=1e-5, atol=1e-6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(spec=specs(), lengths=st.lists(st.sampled_from([0, 1, 3, 16, 17, 40, 700]), max_size=6), padding=st.integers(0, 20),
       seed=st.integers(0, 10**6), missing=st.sets(st.sampled_from(["old", "ref", "rollout", "entropy"])),
       without_sequences=st.booleans())  # fmt: skip
def test_any_spec_equals_the_reference(cpu_level, spec, lengths, padding, seed, missing, without_sequences):
    without_sequences &= not spec.needs_sequences
    batch = Batch(lengths, 0 if without_sequences else padding, seed)
    needed = {"ref": spec.kl_coef, "entropy": spec.entropy_coef, "rollout": spec.needs_rollout_logprob}
    for name in missing:
        if not needed.get(name):
            setattr(batch, name, None)
    if without_sequences:
        batch.cu_seqlens = None
    assert_equal(batch.by_kernel(spec), batch.by_reference(spec))


def test_statistics_of_whole_sequences_can_be_given(cpu_level):
    """As under context parallelism; of the last sequence this rank has no token."""
    for settings_of_policy, rest in itertools.product(POLICIES, (CORRECTIONS[5], CORRECTIONS[7])):
        if settings_of_policy.get("policy") == "vespo" and rest.get("correction") == "sequence-mask":
            continue
        spec, batch = LossSpec(**settings_of_policy, **rest), Batch([30, 600, 0], padding=3)
        tokens = (batch.logprob, batch.old, batch.advantages, batch.mask)
        statistics = sequence_stats(*tokens, spec, rollout_logprob=batch.rollout, cu_seqlens=batch.cu_seqlens)
        statistics = 1.1 * statistics + torch.tensor([2.0, 0, 0, 0, 0, 0])
        assert_equal(batch.by_kernel(spec, statistics), batch.by_reference(spec, statistics))


def test_many_tokens(cpu_level):
    """Several chunks, sequences across their bounds, and hundreds of sequences in one."""
    for lengths in ([5000, 1, 3000], [9] * 700):
        for spec in (LossSpec(), LossSpec(policy="gspo", clip_low=0.02, clip_high=0.02, correction="tis")):
            batch = Batch(lengths, padding=77)
            assert_equal(batch.by_kernel(spec), batch.by_reference(spec))


def test_nothing_trainable(cpu_level):
    for spec in (LossSpec(), LossSpec(policy="gspo", entropy_coef=0.1, opsm_delta=0.1)):
        for lengths in ([], [0], [4, 0, 9]):
            batch = Batch(lengths, padding=5, trainable=0.0)
            batch.mask[sum(lengths) :] = True  # the padding counts for nothing, whatever its mask
            loss, metrics, *gradients = batch.by_kernel(spec)
            assert_equal((loss, metrics, *gradients), batch.by_reference(spec))
            assert loss == 0 and not any(values.any() for values in gradients if values is not None)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy.get("policy") != "vespo"], ids=str)
def test_a_ratio_that_overflows_harms_only_where_it_is_selected(cpu_level, policy):
    """lp - old = 400: e^400 is infinite in fp32 and 5e173 in fp64, so only what the reference keeps small must agree."""
    batch, spec = Batch([4, 4], trainable=1.0), LossSpec(**policy)
    batch.logprob, batch.old = torch.full((8,), -0.5), torch.full((8,), -400.5)
    batch.advantages = torch.tensor([1.0, 2, 0.5, 0, 0, 0, 0, 0])
    loss, _, slopes, _ = batch.by_kernel(spec)
    wanted, _, wanted_slopes, _ = batch.by_reference(spec)
    representable = wanted_slopes.abs() < 1e30
    torch.testing.assert_close(slopes[representable].double(), wanted_slopes[representable], rtol=1e-5, atol=1e-7)
    assert math.isfinite(loss) == (wanted.abs() < 1e30)
    assert not slopes.isnan().any()


def test_nonfinite_inputs_are_counted_and_not_hidden(cpu_level):
    for policy in POLICIES:
        spec = LossSpec(**policy)
        for name in ("logprob", "old", "advantages"):
            batch = Batch([3, 9], padding=2, trainable=1.0)
            batch.advantages[:12] = 1.0
            getattr(batch, name)[2] = math.nan
            loss, metrics, *_ = batch.by_kernel(spec)
            unread = name == "old" and spec.policy == "reinforce"
            assert math.isnan(loss) == (not unread), (spec, name)
            assert metrics[NONFINITE] == 1
            batch.mask[2] = False
            loss, metrics, *_ = batch.by_kernel(spec)
            assert math.isfinite(loss) and metrics[NONFINITE] == 0


def test_broken_boundaries_read_nothing_outside(cpu_level):
    """Values that no caller should pass must at least stay inside the arrays (run under the address sanitizer as well)."""
    for boundaries in ([0, 50], [-7, 3, 10], [9, 2, 5], [0, 2**40]):
        batch = Batch([10], trainable=1.0)
        batch.cu_seqlens = torch.tensor(boundaries)
        *_, d_logprob, _ = batch.by_kernel(LossSpec(policy="gspo"))
        assert d_logprob.shape == (10,)


def test_bad_arguments_are_refused(cpu_level):
    refused = "strop_cpu_policy_loss failed with status 1"
    for name, spec in {
        "cu_seqlens": LossSpec(), "ref": LossSpec(kl_coef=0.1), "entropy": LossSpec(entropy_coef=0.1),
        "rollout": LossSpec(opsm_delta=0.1),
    }.items():  # fmt: skip
        batch = Batch([3, 2])
        setattr(batch, name, None)
        with pytest.raises(RuntimeError, match=refused):
            batch.by_kernel(spec)
    batch, code = Batch([3, 2]), encode(LossSpec())
    for choice, value in itertools.product(("policy", "kl_estimator", "kl_gradient", "correction"), (-1, 8)):
        with pytest.raises(RuntimeError, match=refused):
            cpu.policy_loss(
                code._replace(**{choice: value}), batch.logprob, None, batch.advantages, batch.mask, None, None, None,
                batch.cu_seqlens, None, batch.denominator,
            )  # fmt: skip


def test_it_is_the_default_on_a_cpu(monkeypatch):
    if native.library("cpu") is None:
        pytest.skip(native.why_missing("cpu"))
    monkeypatch.delenv("STROP_KERNELS", raising=False)
    called = []
    original = cpu.policy_loss
    monkeypatch.setattr(cpu, "policy_loss", lambda *arguments: called.append(1) or original(*arguments))
    batch = Batch([3, 2], trainable=1.0)
    arguments = batch.logprob, batch.old, batch.advantages, batch.mask, LossSpec()
    policy_loss(*arguments, cu_seqlens=batch.cu_seqlens, denominator=2.0)
    assert called
    monkeypatch.setenv("STROP_KERNELS", "reference")
    policy_loss(*arguments, cu_seqlens=batch.cu_seqlens, denominator=2.0)
    assert len(called) == 1
