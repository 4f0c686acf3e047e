"""The Triton form of the policy loss, interpreted on the CPU and (marked gpu) compiled, against the reference in fp64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from strop.kernels import METRIC_FIELDS, LossSpec, policy_loss
from strop.kernels.loss_code import encode
from strop.kernels.reference import policy_loss as reference

pytest.importorskip("triton")
from strop.kernels.triton import policy_loss as form

BOUNDS = {"correction_low": 0.9, "correction_high": 1.1}
SPECS = [
    LossSpec(),
    LossSpec(clip_high=0.28, dual_clip=2.0, kl_coef=0.1, entropy_coef=0.2),
    LossSpec(delta=1.3, log_ratio_limit=0.6, kl_coef=0.1, kl_gradient="unbiased", aggregation="token-mean"),
    LossSpec(correction="tis", correction_high=1.1, kl_coef=0.1, kl_estimator="k2", aggregation="constant"),
    LossSpec(correction="icepop", **BOUNDS, opsm_delta=0.02, kl_coef=0.1, kl_gradient="straight-through"),
    LossSpec(correction="sequence-mask", correction_low=0.5, correction_high=1.5, aggregation="sequence-sum"),
    LossSpec(policy="gspo", clip_low=0.03, clip_high=0.02, correction="sequence-truncate", correction_high=1.1,
             opsm_delta=0.02),
    LossSpec(policy="gspo", clip_low=0.001, clip_high=0.001, delta=1.02),
    LossSpec(policy="gspo-token", clip_low=0.03, clip_high=0.02, correction="mean-mask", **BOUNDS, entropy_coef=0.2),
    LossSpec(policy="gmpo", clip_low=0.2, clip_high=0.1, log_ratio_limit=0.5, correction="tis"),
    LossSpec(policy="cispo", clip_low=0.2, clip_high=0.3),
    LossSpec(policy="cispo", cispo_bound="ratio", clip_high=1.2, aggregation="token-mean"),
    LossSpec(policy="sapo", log_ratio_limit=0.5, opsm_delta=0.02),
    LossSpec(policy="vespo", correction="icepop", correction_low=0.8, correction_high=1.2, aggregation="token-mean"),
    LossSpec(policy="reinforce", kl_coef=0.1, kl_estimator="k1", kl_gradient="straight-through"),
]
LENGTHS = [5, 0, 600, 1, 300, 3, 2, 4, 9, 9]
"""More than a block, less, nothing; no sequence starts where a tile does."""


class Batch:
    """Random tokens; those outside the mask hold NaN, as does the padding, whose mask is on here and there."""

    def __init__(self, lengths: list[int], padding: int = 9, spread: float = 0.3, seed: int = 3, device: str = "cpu"):
        generator = torch.Generator().manual_seed(seed)

        def normal(scale: float = 1.0) -> Tensor:
            return scale * torch.randn(total, generator=generator)

        total = sum(lengths) + padding
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
        mask = torch.rand(total, generator=generator) > 0.3
        logprob = normal() - 2
        drift = torch.repeat_interleave(torch.randn(len(lengths) + 1, generator=generator), torch.tensor([*lengths, padding]))
        self.tokens = {
            "logprob": logprob, "old": logprob + normal(spread) + 0.05 * drift, "advantages": normal(), "mask": mask,
            "ref": logprob + normal(spread), "rollout": logprob + normal(spread) + 0.05 * drift, "entropy": normal().abs(),
        }  # fmt: skip
        dead = ~mask
        dead[sum(lengths) :] = True
        for name, tensor in self.tokens.items():
            if name != "mask":
                tensor[dead] = math.nan
        self.tokens = {name: tensor.to(device) for name, tensor in self.tokens.items()}
        self.cu_seqlens: Tensor | None = cu_seqlens.to(device)
        self.statistics: Tensor | None = None

    def without(self, *names: str) -> "Batch":
        for name in names:
            self.tokens[name] = None
        return self

    def arguments(self) -> tuple:
        return *self.tokens.values(), self.cu_seqlens, self.statistics


def double(tensor: Tensor | None) -> Tensor | None:
    return tensor.double() if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor


def expected(spec: LossSpec, batch: Batch, denominator: Tensor) -> tuple[Tensor, ...]:
    """What the form returns, by the reference and autograd."""
    logprob, *middle, entropy, cu_seqlens, statistics = map(double, batch.arguments())
    logprob.requires_grad_()
    entropy = None if entropy is None else entropy.requires_grad_()
    loss, metrics = reference.policy_loss(spec, logprob, *middle, entropy, cu_seqlens, statistics, denominator.double())
    inputs = (logprob,) if entropy is None else (logprob, entropy)
    slopes = [None] * len(inputs)
    if loss.requires_grad:
        slopes = torch.autograd.grad(loss, inputs, allow_unused=True)
    slopes = [torch.zeros_like(logprob) if slope is None else slope for slope in slopes]
    return loss.detach(), metrics, slopes[0], slopes[1] if spec.entropy_coef else None


def check(run, spec: LossSpec, batch: Batch, rtol: float = 1e-5, atol: float = 2e-6, sum_atol: float = 1e-5) -> Tensor:
    """run(function, ...) calls the form; sum_atol is for the metrics. Returns the metrics."""
    denominator = torch.tensor(3.0, device=batch.tokens["logprob"].device)
    wanted = expected(spec, batch, denominator)
    found = run(form.policy_loss, encode(spec), *batch.arguments(), denominator)
    for name, value, exact in zip(("loss", "metrics", "d_logprob", "d_entropy"), found, wanted, strict=True):
        if exact is None:
            assert value is None
        elif name == "metrics":
            for slot, (field, _) in enumerate(METRIC_FIELDS):
                text = f"{field}: {value[slot].item()}, expected {exact[slot].item()}"
                assert torch.isclose(value[slot], exact[slot], rtol=rtol, atol=sum_atol, equal_nan=True), text
        else:
            torch.testing.assert_close(value.double(), exact.double(), rtol=rtol, atol=atol, equal_nan=True)
    return found[1]


@pytest.fixture
def run(interpreted):
    return lambda *arguments, **keywords: interpreted(*arguments, **keywords)[0]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.policy}-{spec.correction}")
def test_any_spec(run, spec):
    metrics = check(run, spec, Batch(LENGTHS))
    reached = dict(zip((name for name, _ in METRIC_FIELDS), metrics.tolist(), strict=True))
    low, high = spec.ratio_bounds
    assert (reached["clip_low"] > 0) == (low > 0) and (reached["clip_high"] > 0) == (high < math.inf)
    assert (reached["weight_truncated"] + reached["weight_masked"] > 0) == (spec.correction != "none")
    assert (reached["opsm_masked"] > 0) == (spec.opsm_delta is not None)
    assert (reached["clip_dual"] > 0) == (spec.delta is not None or spec.dual_clip is not None)


@pytest.mark.parametrize(
    ("lengths", "padding"), [([0], 0), ([], 0), ([], 20), ([0, 0, 3], 0), ([16], 2100), ([2200], 0)], ids=str
)
def test_shapes(run, lengths, padding):
    """No tokens, no sequences, nothing but padding, more padding than a block, a sequence that several programs share."""
    check(run, LossSpec(policy="gspo", entropy_coef=0.1), Batch(lengths, padding))


@pytest.mark.slow
def test_programs_join_in_groups(run):
    """Two groups of programs, the second incomplete, which the last of all joins."""
    check(run, LossSpec(), Batch([1, 0] * 65, padding=3))


def test_given_less(run):
    """Old log-probs, reference, rollout, entropy and boundaries are each left out."""
    check(run, LossSpec(), Batch(LENGTHS).without("old", "ref", "rollout", "entropy"))
    batch = Batch([1100], padding=0).without("old", "rollout")
    batch.cu_seqlens = None
    check(run, LossSpec(aggregation="token-mean", kl_coef=0.1, entropy_coef=0.1), batch)


def test_nothing_trainable(run):
    batch = Batch(LENGTHS)
    batch.tokens["mask"][:] = False
    check(run, LossSpec(policy="vespo", correction="tis", kl_coef=0.1, entropy_coef=0.1), batch)


def test_a_denominator_may_count_nothing(run):
    """mask.sum() of a batch that was filtered out; tokens of another sequence must not feel it either."""
    batch = Batch(LENGTHS)
    batch.tokens["mask"][:] = False
    for spec in (SPECS[1], SPECS[6]):
        loss, metrics, *gradients = run(form.policy_loss, encode(spec), *batch.arguments(), torch.tensor(0.0))
        assert loss == 0 and not metrics.isnan().any()
        assert not any(gradient.any() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize(
    "boundaries", [[0, 700], [-900, 3, 610], [0, 610, 2, 5, 600], [9, 2, 5], [600, 0, -700, 1200]], ids=str
)
def test_broken_boundaries_touch_nothing_outside(run, boundaries):
    """What nobody checks on a GPU: inputs lie between NaN inside the mask."""
    guard, batch = 2000, Batch([610], padding=0)
    batch.tokens["mask"][:] = True
    for name, values in batch.tokens.items():
        whole = torch.full((len(values) + 2 * guard,), True if name == "mask" else math.nan, dtype=values.dtype)
        whole[guard:-guard] = values.nan_to_num(-1.0) if values.is_floating_point() else values
        batch.tokens[name] = whole[guard:-guard]
    batch.cu_seqlens = torch.tensor(boundaries)
    for spec in (LossSpec(policy="gspo", entropy_coef=0.1), LossSpec(aggregation="token-mean", entropy_coef=0.1)):
        loss, metrics, *_ = run(form.policy_loss, encode(spec), *batch.arguments(), torch.tensor(2.0))
        assert loss.isfinite() and metrics[[name for name, _ in METRIC_FIELDS].index("nonfinite")] == 0


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[6], SPECS[9]], ids=lambda spec: spec.policy)
def test_given_statistics(run, spec):
    """Of sequences of which this call holds parts."""
    batch = Batch(LENGTHS)
    lp, old, advantages, mask, _, rollout, *_ = map(double, batch.arguments())
    own = reference.sequence_stats(spec, lp, old, advantages, mask, rollout, batch.cu_seqlens)
    batch.statistics = (own + torch.rand(own.shape)).float()
    check(run, spec, batch)


@pytest.mark.parametrize("spec", [LossSpec(), LossSpec(dual_clip=3.0), LossSpec(policy="cispo", clip_high=0.2),
                                  LossSpec(policy="sapo"), LossSpec(policy="gspo"), LossSpec(policy="gspo-token"),
                                  LossSpec(policy="gmpo"), LossSpec(correction="icepop")],
                         ids=lambda spec: f"{spec.policy}-{spec.correction}")  # fmt: skip
def test_overflow_that_is_not_selected_leaves_no_nan(run, spec):
    """lp - old = 400, e^400 = inf in fp32: clipped where A > 0, weightless where A = 0."""
    batch = Batch([2, 2, 3], padding=1, spread=0.0)
    lp = torch.full((8,), -0.5)
    ratio_blown = lp - torch.tensor([400.0, 0, 400, 0, 0, 0, 0, 0])
    batch.tokens |= {"mask": torch.ones(8, dtype=torch.bool), "logprob": lp, "old": ratio_blown, "rollout": ratio_blown,
                     "advantages": torch.tensor([2.0, 1, 0, 0, 1, -1, 1, 1])}  # fmt: skip
    if spec.correction == "icepop":
        batch.tokens["rollout"] = ratio_blown - torch.tensor([0.0, 0, 400, 0, 0, 0, 0, 0])
    denominator = torch.tensor(2.0)
    loss, _, slopes, _ = run(form.policy_loss, encode(spec), *batch.arguments(), denominator)
    assert loss.isfinite() and slopes.isfinite().all()
    exact_loss, _, exact_slopes, _ = expected(spec, batch, denominator)  # e^400 fits into fp64
    torch.testing.assert_close(loss, exact_loss.float())
    torch.testing.assert_close(slopes, exact_slopes.float())


@pytest.mark.parametrize("policy", ["clip", "gspo", "vespo"])
def test_nonfinite_inputs_are_counted_and_not_hidden(run, policy):
    batch = Batch([5, 5], padding=0)
    batch.tokens["mask"][:] = True
    for name in ("logprob", "old", "advantages", "ref", "rollout", "entropy"):
        batch.tokens[name] = batch.tokens[name].nan_to_num(-1.0)
    batch.tokens["logprob"][1], batch.tokens["old"][7] = math.nan, -math.inf
    code = encode(LossSpec(policy=policy))
    loss, metrics, _, _ = run(form.policy_loss, code, *batch.arguments(), torch.tensor(2.0))
    _, exact, _, _ = expected(LossSpec(policy=policy), batch, torch.tensor(2.0))
    assert not loss.isfinite()
    torch.testing.assert_close(metrics, exact.float(), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert metrics[[name for name, _ in METRIC_FIELDS].index("nonfinite")] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.policy}-{spec.correction}")
def test_on_a_device(spec):
    """32k tokens in 66 sequences, one of them long; the same bits twice, and from a CUDA graph."""
    batch = Batch([12_000, 0, *[317] * 63, 1], padding=800, device="cuda")
    # Sums of 20,000 tokens cancel: what is left of sums of absolute values near 5000 is 1e-7 of those off.
    metrics = check(lambda function, *arguments: function(*arguments), spec, batch, rtol=1e-4, sum_atol=1e-3)
    arguments = (encode(spec), *batch.arguments(), torch.tensor(3.0, device="cuda"))
    once, twice = form.policy_loss(*arguments), form.policy_loss(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = form.policy_loss(*arguments)
    for _ in range(2):
        captured[1].zero_()
        graph.replay()
        for again in (twice, captured):
            assert all(a is None or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(once, again, strict=True))
    assert torch.equal(metrics.nan_to_num(), once[1].nan_to_num())


def test_through_the_public_function(interpreted):
    """Dense, with gradients; STROP_KERNELS=triton in the interpreting process."""
    spec = LossSpec(policy="gspo", kl_coef=0.1, entropy_coef=0.1, correction="tis")
    shape = (3, 40)
    tensors = {name: torch.randn(shape) * 0.3 - 2 for name in ("logprob", "old", "advantages", "ref", "rollout", "entropy")}
    logprob, entropy = tensors["logprob"].requires_grad_(), tensors["entropy"].requires_grad_()
    given = {"ref_logprob": tensors["ref"], "rollout_logprob": tensors["rollout"], "denominator": 3.0}
    mask = torch.rand(shape) > 0.3
    arguments = (logprob, tensors["old"], tensors["advantages"], mask, spec)
    interpreted.check(policy_loss, *arguments, upstream=[torch.tensor(0.7)], entropy=entropy.detach(), **given,
                      rtol=1e-5, atol=2e-6)  # fmt: skip
