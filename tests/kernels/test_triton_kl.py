"""The Triton form of the KL estimators, interpreted and (marked gpu) compiled, against the reference in fp64."""

import pytest
import torch
from torch import Tensor

from strop.kernels import kl
from strop.kernels.reference import kl as reference

pytest.importorskip("triton")
from strop.kernels.triton import kl as form

CHOICES = [("k1", "naive"), ("k2", "naive"), ("k3", "naive"), ("k1", "straight-through"), ("k3", "straight-through"),
           ("k3", "unbiased")]  # fmt: skip


def check(run, size: int, estimator: str, gradient: str, device: str = "cpu") -> None:
    """Distances from 1e-6, where e^d - d - 1 needs its series, to 3."""
    logprob_T = torch.randn(size, device=device) - 2
    ref_T = logprob_T + torch.randn(size, device=device) * torch.logspace(-6, 0.5, size, device=device)
    log_ratio_T = torch.randn(size, device=device) * 0.3 if gradient == "unbiased" else None
    lp, ratio = (None if t is None else t.double().requires_grad_() for t in (logprob_T, log_ratio_T))
    exact = reference.kl(lp, ref_T.double(), estimator, gradient, ratio)
    slopes = torch.autograd.grad(exact.sum(), [t for t in (lp, ratio) if t is not None])
    found = run(form.kl, logprob_T, ref_T, log_ratio_T, estimator, gradient)
    wanted = (exact.detach(), *slopes, *([None] if ratio is None else []))
    for value, precise in zip(found, wanted, strict=True):
        if precise is None:
            assert value is None
        else:
            # a GPU's exp is right to 3e-7, which is 3e-6 of e^d - 1 - d at d = 0.5, where the series ends
            torch.testing.assert_close(value.double(), precise, rtol=5e-6, atol=1e-30)


@pytest.mark.parametrize(("estimator", "gradient"), CHOICES)
def test_against_the_reference(interpreted, estimator: str, gradient: str):
    for size in (0, 1, 1500):
        check(lambda *arguments: interpreted(*arguments)[0], size, estimator, gradient)


def test_through_the_public_function(interpreted):
    logprob, ref, old = (torch.randn(30, 5) for _ in range(3))
    upstream = torch.randn(30, 5)
    for gradient in ("naive", "unbiased"):
        interpreted.check(kl, logprob.requires_grad_(), ref, gradient=gradient, old_logprob=old, upstream=[upstream])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("estimator", "gradient"), CHOICES)
def test_on_a_device(estimator: str, gradient: str):
    def run(function, *arguments) -> tuple[Tensor, ...]:
        return function(*arguments)

    check(run, 100_003, estimator, gradient, device="cuda")
