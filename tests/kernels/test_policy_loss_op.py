"""`policy_loss` and `kl` as ops over their kernels: dtypes, shapes, padding, torch.compile, what a backward may ask."""

import importlib
import math

import pytest
import torch

from strop.kernels import LossSpec, kl, native, policy_loss, sequence_stats, summarize_metrics

FULL = LossSpec(correction="tis", kl_coef=0.1, entropy_coef=0.2)
ENDS = torch.tensor([0, 4, 4, 9])
kernel = pytest.mark.skipif(native.library("cpu") is None, reason=f"runs plain torch here: {native.why_missing('cpu')}")


def inputs(shape=(12,), dtype=torch.float32, **dtypes) -> dict[str, torch.Tensor]:
    tensors = {"logprob": torch.randn(shape, dtype=dtype) - 2, "entropy": torch.rand(shape, dtype=dtype)}
    for name in ("old_logprob", "ref_logprob", "rollout_logprob"):
        tensors[name] = tensors["logprob"] + 0.3 * torch.randn(shape, dtype=dtype)
    tensors["advantages"] = torch.randn(shape, dtype=dtype)
    tensors = {name: tensor.to(dtypes.get(name, dtype)) for name, tensor in tensors.items()}
    for name in ("logprob", "entropy"):
        tensors[name].requires_grad_()
    return tensors | {"mask": torch.rand(shape) > 0.3}


def run(tensors, spec=FULL, cu_seqlens=ENDS, denominator=3.0, upstream=1.0):
    """(loss, metrics, gradient of logprob, gradient of entropy)"""
    loss, metrics = policy_loss(**tensors, spec=spec, cu_seqlens=cu_seqlens, denominator=denominator)
    return loss, metrics, *torch.autograd.grad(loss * upstream, (tensors["logprob"], tensors["entropy"]))


def exact(tensors):
    """The same numbers in fp64."""
    twins = {name: tensor.detach().double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return twins | {name: twins[name].requires_grad_() for name in ("logprob", "entropy")}


@pytest.mark.parametrize("dtypes", [{}, dict.fromkeys(("entropy", "advantages"), torch.bfloat16), {"entropy": torch.float64}],
                         ids=["fp32", "bf16", "fp64"])  # fmt: skip
@pytest.mark.parametrize("dense", [False, True])
def test_gradients_reach_logprob_and_entropy_in_every_shape_and_dtype(dtypes, dense):
    tensors, ends = inputs((3, 4), **dtypes) if dense else inputs(**dtypes), None if dense else ENDS
    got, want = run(tensors, cu_seqlens=ends, upstream=-2.0), run(exact(tensors), cu_seqlens=ends, upstream=-2.0)
    assert [t.dtype for t in got] == [torch.float32] * 3 + [dtypes.get("entropy", torch.float32)]
    for a, b in zip(got, want, strict=True):
        rounding = 2**-8 if a.dtype == torch.bfloat16 else 2e-6  # fp32: sums of 12 terms of order 1
        torch.testing.assert_close(a.double(), b.double(), rtol=rounding, atol=1e-6)


def test_strides_do_not_matter():
    tensors = inputs((4, 6))
    mixed = {name: tensor.detach().t().contiguous().t() for name, tensor in tensors.items()}
    for name in ("logprob", "entropy"):
        mixed[name].requires_grad_()
    torch.testing.assert_close(run(mixed, cu_seqlens=None), run(tensors, cu_seqlens=None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", [FULL, LossSpec(policy="gspo"), LossSpec(aggregation="token-mean"), LossSpec(policy="vespo")],
                         ids=lambda spec: spec.policy)  # fmt: skip
def test_padding_has_no_effect_even_where_the_mask_is_true(spec, dtype):
    tensors = inputs((12,), dtype)
    cut = {name: tensor.detach()[:9].clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        tensor.detach()[9:] = True if name == "mask" else math.nan
    for name in ("logprob", "entropy"):
        cut[name].requires_grad_()
    loss, metrics = policy_loss(**tensors, spec=spec, cu_seqlens=ENDS, denominator=3.0)
    wanted = policy_loss(**cut, spec=spec, cu_seqlens=ENDS, denominator=3.0)
    torch.testing.assert_close((loss, metrics), tuple(wanted))
    (slopes,) = torch.autograd.grad(loss, tensors["logprob"])
    torch.testing.assert_close(slopes[:9], torch.autograd.grad(wanted.loss, cut["logprob"])[0])
    assert (slopes[9:] == 0).all()
    needed = ("logprob", "old_logprob", "advantages", "mask", "rollout_logprob")
    stats = [sequence_stats(**{n: given[n] for n in needed}, spec=spec, cu_seqlens=ENDS) for given in (tensors, cut)]
    torch.testing.assert_close(*stats)


@pytest.mark.parametrize("denominator", [torch.tensor(3), torch.tensor(3.0), torch.tensor(3.0, dtype=torch.float64), 3])
def test_denominator_is_a_number_or_a_tensor(denominator):
    tensors = inputs()
    torch.testing.assert_close(run(tensors, denominator=denominator), run(tensors, denominator=3.0))


@kernel
def test_without_a_coefficient_entropy_is_measured_and_gets_no_gradient():
    tensors = inputs()
    loss, metrics = policy_loss(**tensors, spec=LossSpec(), cu_seqlens=ENDS, denominator=3.0)
    assert torch.autograd.grad(loss, tensors["entropy"], allow_unused=True)[0] is None
    inside = tensors["entropy"][:9][tensors["mask"][:9]]
    assert summarize_metrics(metrics)["entropy_mean"] == pytest.approx(inside.mean().item())


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(monkeypatch, backend, choice):
    """The choice between kernel and plain torch is made while tracing."""
    monkeypatch.setenv("STROP_KERNELS", choice)
    torch._dynamo.reset()  # a graph traced under the other choice would serve
    tensors = inputs()

    def both(logprob, entropy):
        loss, metrics = policy_loss(**tensors | {"logprob": logprob, "entropy": entropy}, spec=FULL, cu_seqlens=ENDS,
                                    denominator=3.0)  # fmt: skip
        distance = kl(logprob, tensors["ref_logprob"], gradient="unbiased", old_logprob=tensors["old_logprob"])
        return loss + distance.sum(), metrics

    compiled = torch.compile(both, fullgraph=True, backend=backend)
    leaves = tensors["logprob"], tensors["entropy"]
    (loss, metrics), (wanted, wanted_metrics) = compiled(*leaves), both(*leaves)
    torch.testing.assert_close((loss, metrics), (wanted, wanted_metrics))
    torch.testing.assert_close(torch.autograd.grad(loss * 2, leaves), torch.autograd.grad(wanted * 2, leaves))


@kernel
def test_passes_opcheck(monkeypatch):
    calls, op = [], policy_loss.__globals__["_policy_loss"]
    monkeypatch.setitem(policy_loss.__globals__, "_policy_loss", lambda *arguments: calls.append(arguments) or op(*arguments))
    run(inputs())
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, calls[0], test_utils=tests)


@kernel
def test_double_backward_is_refused_by_the_kernels_alone(monkeypatch):
    tensors = inputs()
    with pytest.raises(RuntimeError, match=r"policy_loss: a double backward isn't supported.*STROP_KERNELS=reference"):
        torch.autograd.grad(policy_loss(**tensors, spec=FULL, cu_seqlens=ENDS, denominator=3.0).loss, tensors["logprob"],
                            create_graph=True)  # fmt: skip
    monkeypatch.setenv("STROP_KERNELS", "reference")
    loss = policy_loss(**tensors, spec=FULL, cu_seqlens=ENDS, denominator=3.0).loss
    (slopes,) = torch.autograd.grad(loss, tensors["logprob"], create_graph=True)
    assert torch.autograd.grad(slopes.square().sum(), tensors["logprob"])[0].any()


class KlKernel:
    """Stands in for kernels/<device>/kl.py: values and derivatives by the formulas."""

    @staticmethod
    def kl(logprob_T, ref_T, log_ratio_T, estimator, gradient):
        assert all(t.dim() == 1 and t.is_contiguous() and t.dtype == torch.float32 for t in (logprob_T, ref_T))
        d = ref_T - logprob_T
        value, slope = {"k1": (-d, torch.ones_like(d)), "k2": (d**2 / 2, -d), "k3": (d.expm1() - d, -d.expm1())}[estimator]
        if gradient == "straight-through":
            slope = -d
        if log_ratio_T is None:
            return value, slope, None
        ratio = log_ratio_T.exp()
        return ratio * value, ratio * slope, ratio * value


@pytest.fixture
def kl_kernel(monkeypatch):
    module = importlib.import_module("strop.kernels.kl")
    monkeypatch.setattr(module, "choose", lambda op, tensor, available: "reference" if tensor.dtype == torch.float64 else "cpu")
    monkeypatch.setattr(module, "load", lambda implementation, op: KlKernel)


@pytest.mark.parametrize(
    "estimator, gradient",
    [("k1", "naive"), ("k2", "naive"), ("k3", "naive"), ("k1", "straight-through"), ("k3", "unbiased")],
)
@pytest.mark.parametrize("with_old", [True, False])
def test_kl_over_a_kernel_equals_the_reference(kl_kernel, estimator, gradient, with_old):
    logprob = torch.randn(3, 50, requires_grad=True)
    ref, old, upstream = (torch.randn(50, 3).t() for _ in range(3))
    twins = [tensor.detach().double() for tensor in (logprob, ref, old)]
    results = []
    for lp, r, o in ((logprob, ref, old), (twins[0].requires_grad_(), *twins[1:])):
        value = kl(lp, r, estimator=estimator, gradient=gradient, old_logprob=o if with_old else None)
        results.append((value, *torch.autograd.grad(value, lp, upstream.to(value.dtype))))
    for got, want in zip(*results, strict=True):
        assert got.dtype == torch.float32 and got.shape == logprob.shape
        torch.testing.assert_close(got.double(), want, rtol=5e-6, atol=1e-6)  # e^d - d - 1 loses two digits to d


def test_kl_over_a_kernel_refuses_a_double_backward_and_compiles(kl_kernel):
    logprob, ref = torch.randn(7, requires_grad=True), torch.randn(7)
    with pytest.raises(RuntimeError, match="kl: a double backward isn't supported"):
        torch.autograd.grad(kl(logprob, ref).sum(), logprob, create_graph=True)
    op = importlib.import_module("strop.kernels.kl")._kl
    torch.library.opcheck(op, (logprob, ref, None, "k3", "naive", "cpu"))
    torch.library.opcheck(op, (logprob, ref, ref.clone().requires_grad_(), "k3", "unbiased", "cpu"))
