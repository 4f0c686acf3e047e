"""csrc/cuda/policy_loss.cu through the emulation, and on a GPU where there is one, against the fp64 reference."""

import itertools
import math
from copy import copy

import pytest
import torch

from strop.kernels import METRIC_FIELDS, LossSpec, policy_loss, sequence_stats
from strop.kernels.cuda import policy_loss as cuda
from strop.kernels.loss_code import LossCode, encode

POLICIES = [
    LossSpec(),
    LossSpec(dual_clip=3.0, clip_high=0.28),
    LossSpec(delta=1.5),
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
# Bounds of weights that fp32 holds exactly: vespo adds up the logarithm of one for every truncated token.
REST = [
    {"correction": "tis", "correction_high": 1.125, "kl_coef": 0.1},
    {"correction": "icepop", "correction_low": 0.75, "correction_high": 1.25, "kl_coef": 0.1, "kl_estimator": "k2"},
    {"correction": "mean-mask", "correction_low": 0.97, "correction_high": 1.03, "aggregation": "token-mean"},
    {"correction": "sequence-truncate", "correction_high": 1.125, "aggregation": "sequence-sum", "entropy_coef": 0.2},
    {"correction": "sequence-mask", "correction_low": 0.5, "correction_high": 1.5, "kl_coef": 0.1, "kl_gradient": "unbiased"},
    {"opsm_delta": 0.0, "kl_coef": 0.1, "kl_estimator": "k1", "kl_gradient": "straight-through"},
    {"opsm_delta": 0.0, "correction": "tis", "kl_coef": 0.1, "kl_gradient": "straight-through", "aggregation": "constant"},
]
SEQUENCE_CORRECTIONS = ("mean-mask", "sequence-truncate", "sequence-mask")
SPECS = POLICIES + [
    LossSpec(**{**vars(policy), **rest})
    for index, policy in enumerate(POLICIES)
    for rest in (REST[index % len(REST)], REST[(index + 3) % len(REST)])
    if policy.policy != "vespo" or rest.get("correction") not in SEQUENCE_CORRECTIONS
]


def settings(spec: LossSpec) -> str:
    """What differs from the default, as a test's name."""
    return "-".join(str(value) for name, value in vars(spec).items() if value != getattr(LossSpec(), name)) or "default"


class Batch:
    """fp32 tokens; NaN wherever nothing may be read: outside the mask and behind the last sequence."""

    def __init__(self, lengths: list[int], padding: int, spread: float = 0.3, trainable: float = 0.8):
        self.cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
        size = sum(lengths) + padding
        self.mask = torch.rand(size) < trainable
        self.denominator = torch.tensor(3.0)

        def tokens(values: torch.Tensor) -> torch.Tensor:
            """Multiples of 1/64: no ratio of two is so near a bound of SPECS that rounding would decide."""
            outside = ~self.mask | (torch.arange(size) >= self.cu_seqlens[-1])
            return torch.where(outside, torch.nan, (values * 64).round() / 64)

        logprob = -torch.rand(size) * 3
        near = [logprob + spread * torch.randn(size) for _ in range(3)]
        self.logprob, self.old, self.ref, self.rollout = (tokens(values) for values in (logprob, *near))
        # One sign a sequence, as a group's advantages have; some tokens of weight 0.
        sign = torch.randn(len(lengths)).sign().repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        advantages = torch.nn.functional.pad(sign, (0, padding)) * torch.rand(size)
        self.advantages = tokens(torch.where(torch.rand(size) < 0.1, 0.0, advantages))
        self.entropy = tokens(torch.rand(size))

    def by_kernel(self, spec: LossSpec, statistics: torch.Tensor | None = None):
        """(loss, metrics, d_logprob, d_entropy) of the CUDA kernel."""
        return self.call(encode(spec), statistics)

    def call(self, code: LossCode, statistics: torch.Tensor | None = None):
        return cuda.policy_loss(
            code, self.logprob, self.old, self.advantages, self.mask, self.ref, self.rollout, self.entropy, self.cu_seqlens,
            statistics, self.denominator,
        )  # fmt: skip

    def cuda(self) -> "Batch":
        """The same batch on the GPU."""
        other = copy(self)
        vars(other).update({name: None if tensor is None else tensor.cuda() for name, tensor in vars(self).items()})
        return other

    def by_reference(self, spec: LossSpec, statistics: torch.Tensor | None = None):
        """The same in fp64, by autograd."""
        wide = {name: None if tensor is None else tensor.double() for name, tensor in vars(self).items()}
        logprob, entropy = wide["logprob"].requires_grad_(), wide["entropy"]
        if entropy is not None:
            entropy.requires_grad_()
        loss, metrics = policy_loss(
            logprob, wide["old"], wide["advantages"], self.mask, spec, ref_logprob=wide["ref"],
            rollout_logprob=wide["rollout"], entropy=entropy, cu_seqlens=self.cu_seqlens,
            sequence_stats=None if statistics is None else statistics.double(), denominator=wide["denominator"],
        )  # fmt: skip
        leaves = [leaf for leaf in (logprob, entropy) if leaf is not None]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return loss.detach(), metrics, gradients[0], gradients[1] if spec.entropy_coef else None


def assert_equal(got, expected, tolerance: float = 1e-5) -> None:
    """1e-5 a number: exponents of sums of hundreds of floats (4e-6 was the largest error seen)."""
    for name, values, wanted in zip(("loss", "metrics", "d_logprob", "d_entropy"), got, expected, strict=True):
        assert (values is None) == (wanted is None)
        if values is not None:
            difference = (values.double() - wanted.double()).abs()
            wrong = ~(difference <= tolerance * wanted.abs() + 1e-8) & (values != wanted) & ~(values.isnan() & wanted.isnan())
            assert not wrong.any(), f"{name}: {values[wrong]} instead of {wanted[wrong]}"


@pytest.mark.parametrize("spec", SPECS, ids=settings)
def test_equals_the_reference(emulated_cuda, spec):
    """Sequences that are empty, shorter and longer than a block's stretch, and padding."""
    batch = Batch([5, 0, 700, 64, 0], padding=40)
    assert_equal(batch.by_kernel(spec), batch.by_reference(spec))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.needs_sequences][::5], ids=settings)
def test_statistics_of_whole_sequences_can_be_given(emulated_cuda, spec):
    """As under context parallelism; of the last sequence this rank has no token."""
    batch = Batch([30, 600, 0], padding=3)
    tokens = (batch.logprob, batch.old, batch.advantages, batch.mask)
    statistics = sequence_stats(*tokens, spec, rollout_logprob=batch.rollout, cu_seqlens=batch.cu_seqlens)
    statistics = 1.5 * statistics + torch.tensor([2.0, 0, 0, 0, 0, 0])
    assert_equal(batch.by_kernel(spec, statistics), batch.by_reference(spec, statistics))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.needs_sequences]
                         + [LossSpec(policy="cispo", clip_high=0.3, aggregation="token-mean")], ids=settings)  # fmt: skip
@pytest.mark.parametrize("size", [0, 1, 1300])
def test_without_sequences(emulated_cuda, spec, size):
    batch = Batch([size], padding=0)
    batch.cu_seqlens = None
    assert_equal(batch.by_kernel(spec), batch.by_reference(spec))


@pytest.mark.parametrize("spec", POLICIES, ids=settings)
def test_inputs_that_nobody_gave_are_not_measured(emulated_cuda, spec):
    """The on-policy first mini-batch: old is the current log-prob, and nothing else is there."""
    batch = Batch([70, 3], padding=1)
    batch.old = batch.ref = batch.rollout = batch.entropy = None
    assert_equal(batch.by_kernel(spec), batch.by_reference(spec))


@pytest.mark.parametrize("lengths", [[0], [4, 0, 9], []], ids=str)
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[-3], LossSpec(policy="gspo", entropy_coef=0.1, opsm_delta=0.1)], ids=settings)
def test_nothing_trainable(emulated_cuda, spec, lengths):
    batch = Batch(lengths, padding=5, trainable=0.0)
    batch.mask[sum(lengths) :] = True  # the padding counts for nothing, whatever its mask
    loss, metrics, *gradients = batch.by_kernel(spec)
    assert_equal((loss, metrics, *gradients), batch.by_reference(spec))
    assert loss == 0 and not any(values.any() for values in gradients if values is not None)


def test_more_sequences_than_blocks(emulated_cuda):
    """Blocks go over several stretches; 520 sequences take two steps of the search."""
    spec = LossSpec(policy="gspo", clip_low=0.05, clip_high=0.05, correction="sequence-truncate")
    batch = Batch(torch.randint(0, 4, (520,)).tolist(), padding=2)
    assert_equal(batch.by_kernel(spec), batch.by_reference(spec))


@pytest.mark.parametrize("spec", [policy for policy in POLICIES if policy.policy != "vespo"], ids=settings)
def test_a_ratio_that_overflows_harms_only_where_it_is_selected(emulated_cuda, spec):
    """lp - old = 400: e^400 is infinite in fp32 and 5e173 in fp64, so only what the reference keeps small must agree."""
    batch = Batch([4, 4], padding=0, trainable=1.0)
    batch.logprob, batch.old = torch.full((8,), -0.5), torch.full((8,), -400.5)
    batch.advantages = torch.tensor([1.0, 2, 0.5, 0, 0, 0, 0, 0])
    loss, _, slopes, _ = batch.by_kernel(spec)
    wanted, _, wanted_slopes, _ = batch.by_reference(spec)
    representable = wanted_slopes.abs() < 1e30
    assert_equal((slopes[representable],) * 4, (wanted_slopes[representable],) * 4)
    assert math.isfinite(loss) == (wanted.abs() < 1e30)
    assert not slopes.isnan().any()


def test_nonfinite_inputs_are_counted_and_not_hidden(emulated_cuda):
    nonfinite = [name for name, _ in METRIC_FIELDS].index("nonfinite")
    for spec in POLICIES:
        for name in ("logprob", "old", "advantages"):
            batch = Batch([3, 9], padding=2, trainable=1.0)
            getattr(batch, name)[2] = math.nan
            loss, metrics, *_ = batch.by_kernel(spec)
            unread = name == "old" and spec.policy == "reinforce"
            assert math.isnan(loss) == (not unread), (spec, name)
            assert metrics[nonfinite] == 1
            batch.mask[2] = False
            loss, metrics, *_ = batch.by_kernel(spec)
            assert math.isfinite(loss) and metrics[nonfinite] == 0


@pytest.mark.parametrize(
    "boundaries", [[0, 700], [-900, 3, 610], [0, 610, 2, 5, 600], [9, 2, 5], [600, 0, -700, 1200], [0, 2**40]], ids=str
)
def test_broken_boundaries_touch_nothing_outside(emulated_cuda, boundaries, monkeypatch):
    """What nobody checks on a GPU: inputs lie between NaN inside the mask, outputs between sevens."""
    guard, made = 2000, []

    def between(values: torch.Tensor, around: float) -> torch.Tensor:
        whole = torch.full((len(values) + 2 * guard,), around, dtype=values.dtype)
        whole[guard:-guard] = values
        made.append(whole)
        return whole[guard:-guard]

    batch = Batch([610], padding=0, trainable=1.0)
    batch.cu_seqlens = torch.tensor(boundaries)
    for name in ("logprob", "old", "advantages", "ref", "rollout", "entropy", "mask"):
        setattr(batch, name, between(getattr(batch, name), True if name == "mask" else math.nan))
    made.clear()
    monkeypatch.setattr(torch, "empty_like", lambda tensor: between(torch.zeros(len(tensor)), 7.0))
    for spec in (LossSpec(policy="gspo", entropy_coef=0.1), LossSpec(aggregation="token-mean", entropy_coef=0.1)):
        loss, metrics, *_ = batch.by_kernel(spec)
        assert loss.isfinite() and metrics[[name for name, _ in METRIC_FIELDS].index("nonfinite")] == 0
    assert len(made) == 4 and all((whole[:guard] == 7).all() and (whole[-guard:] == 7).all() for whole in made)


def test_a_denominator_may_count_nothing(emulated_cuda):
    batch = Batch([4, 9], padding=5, trainable=0.0)
    batch.denominator = torch.tensor(0.0)
    for spec in (LossSpec(entropy_coef=0.1), LossSpec(policy="gspo", aggregation="token-mean", kl_coef=0.1)):
        assert_equal(batch.by_kernel(spec), batch.by_reference(spec))
        assert batch.by_kernel(spec)[0] == 0


def test_bad_arguments_are_refused(emulated_cuda):
    batch = Batch([3, 2], padding=0)
    refused = "strop_cuda_policy_loss failed with status 1"
    for name, spec in {
        "cu_seqlens": LossSpec(), "ref": LossSpec(kl_coef=0.1), "entropy": LossSpec(entropy_coef=0.1),
        "rollout": LossSpec(opsm_delta=0.1),
    }.items():  # fmt: skip
        without = Batch([3, 2], padding=0)
        setattr(without, name, None)
        with pytest.raises(RuntimeError, match=refused):
            without.by_kernel(spec)
    for choice in ("policy", "kl_estimator", "kl_gradient", "correction"):
        for value in (-1, 8):
            with pytest.raises(RuntimeError, match=refused):
                batch.call(encode(LossSpec())._replace(**{choice: value}))


LONG = [1, 0, 2048, 513, 700, 12_000, 3, 9000, 0, 8000]


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS, ids=settings)
def test_on_a_gpu(cuda_library, spec):
    """32k tokens, one sequence of 12,000, to the same bits in every run.

    Sums cancel: 1e-4. vespo: the logarithm of a bound is 4e-9 off, in 6000 tokens the same way, and phi's exponent has slopes
    of 20 in their sum: 1e-3.
    """
    batch = Batch(LONG, padding=503, spread=0.1)
    on_gpu = batch.cuda()
    got, again = on_gpu.by_kernel(spec), on_gpu.by_kernel(spec)
    tolerance = 1e-3 if spec.policy == "vespo" else 1e-4
    assert_equal([None if values is None else values.cpu() for values in got], batch.by_reference(spec), tolerance)
    for first, second in zip(got, again, strict=True):
        assert first is second is None or torch.equal(first.view(torch.int32), second.view(torch.int32))


@pytest.mark.gpu
def test_many_sequences_on_a_gpu(cuda_library):
    spec = LossSpec(policy="gspo", clip_low=0.05, clip_high=0.05, correction="sequence-truncate")
    batch = Batch(torch.randint(0, 4, (100_000,)).tolist(), padding=2)
    got = [None if values is None else values.cpu() for values in batch.cuda().by_kernel(spec)]
    assert_equal(got, batch.by_reference(spec), tolerance=1e-4)


@pytest.mark.gpu
def test_graph_capture(cuda_library):
    """A graph's replay reads what its inputs hold by then, and other calls in between don't disturb it."""
    spec = LossSpec(policy="gspo", clip_low=0.05, clip_high=0.05, kl_coef=0.1, entropy_coef=0.1)
    batches = [Batch(LONG, padding=503, spread=0.1).cuda() for _ in range(3)]
    static = Batch(LONG, padding=503, spread=0.1).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        static.by_kernel(spec)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = static.by_kernel(spec)
    for batch in batches:
        for name, tensor in vars(batch).items():
            getattr(static, name).copy_(tensor)
        wanted = batch.by_kernel(spec)
        graph.replay()
        for values, expected in zip(outputs, wanted, strict=True):
            assert torch.equal(values.view(torch.int32), expected.view(torch.int32))
