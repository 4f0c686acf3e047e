"""How exact the row kernels of every form are from the logits to their gradient, against fp64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from strop.kernels.cpu import logit_rows as cpu
from strop.kernels.cuda import logit_rows as cuda
from strop.kernels.reference import logit_rows as reference

PLAIN = {"inverse_temperature": 1.0, "softcap": None, "bias_V": None, "keep_mask_NV": None}


class Form:
    """Both kernels of a form, the gradient in place; `call` (an `Interpreter`) runs them in another process."""

    def __init__(self, module, call: Callable | None = None, rounds_z: bool = False):
        self.module, self.call = module, call
        self.rounds_z = rounds_z
        """Whether z = logit / T is rounded before differences are taken, as logits / T is in eager torch."""

    def statistics(self, logits_NV: Tensor, targets_N: Tensor, **options) -> Tensor:
        function, keywords = self.module.logit_statistics, PLAIN | options | {"partial": False}
        if self.call is not None:
            return self.call(function, logits_NV, targets_N, **keywords)[0]
        return function(logits_NV, targets_N, **keywords)

    def gradient(self, logits_NV: Tensor, targets_N: Tensor, statistics_3N: Tensor, g_N=None, h_N=None, k_N=None, **options):
        arguments = logits_NV, targets_N, statistics_3N, g_N, h_N, k_N
        keywords = PLAIN | options | {"out_NV": logits_NV}  # in place: the target's logit is overwritten as well
        if self.call is not None:
            return self.call(self.module.logit_gradient, *arguments, **keywords)[0][-1]
        self.module.logit_gradient(*arguments, **keywords)
        return logits_NV


def exact(logits_NV: Tensor, targets_N: Tensor, upstream: list[Tensor | None], **options) -> tuple[Tensor, Tensor]:
    """(statistics, gradient) in fp64."""
    options = {name: value.double() if isinstance(value, Tensor) else value for name, value in (PLAIN | options).items()}
    wide_NV, out_NV = logits_NV.double(), torch.empty_like(logits_NV, dtype=torch.float64)
    statistics_3N = reference.logit_statistics(wide_NV, targets_N, **options, partial=False)
    wide_upstream = [None if gradient is None else gradient.double() for gradient in upstream]
    reference.logit_gradient(wide_NV, targets_N, statistics_3N, *wide_upstream, **options, out_NV=out_NV)
    return statistics_3N, out_NV


def certain_tokens(form: Form) -> None:
    """1 - p of 2e-3 and 4e-6: 5e-7 of the log-prob, of every entry and of their sum, which is 0.

    Each exponential that is added to the target's 1 may round by 6e-8, in chains whose length is up to the form.
    """
    for shift in (0.0, 1e4, -1e4):
        for gap in (10.0, 16.0):
            logits_NV, targets_N, g_N = torch.full((1, 40), shift), torch.tensor([17]), torch.ones(1)
            logits_NV[0, 17] += gap
            wanted_3N, wanted_NV = exact(logits_NV, targets_N, [g_N, None, None])
            statistics_3N = form.statistics(logits_NV, targets_N)
            torch.testing.assert_close(statistics_3N[0].double(), wanted_3N[0], rtol=0, atol=5e-7)
            found_NV = form.gradient(logits_NV, targets_N, statistics_3N, g_N).double()
            torch.testing.assert_close(found_NV, wanted_NV, rtol=0, atol=5e-7)
            assert abs(found_NV.sum().item()) < 5e-7


def digits_of_the_log_prob(form: Form) -> None:
    """A log-prob of -e^-20 gives 1 - p = e^-20, where fp32's p - 1 is 0."""
    for vocab in (40, 2100):
        logits_NV, targets_N = torch.zeros(1, vocab), torch.tensor([17])
        logits_NV[0, 17] = 20.0
        statistics_3N = torch.tensor([[-math.exp(-20)], [0.0], [20.0]])
        found_NV = form.gradient(logits_NV, targets_N, statistics_3N, torch.ones(1))
        assert found_NV[0, 17].item() == pytest.approx(math.exp(-20), rel=1e-5)


def large_logits(form: Form) -> None:
    """randn + 1e4: 1e-6 of the largest entry, as from randn. fp32 numbers near 1e4, logsumexp among them, lie 1e-3 apart."""
    temperatures = [1.0] if form.rounds_z else [1.0, 1 / 0.7, torch.rand(6) + 0.5]
    for vocab in (300, 2100):
        for shift in (0.0, 1e4, -1e4):
            for inverse_temperature in temperatures:
                logits_NV, targets_N = torch.randn(6, vocab) + shift, torch.randint(vocab, (6,))
                g_N, h_N, k_N = 3 * torch.ones(6), torch.randn(6), torch.randn(6)
                options = {"inverse_temperature": inverse_temperature}
                _, wanted_NV = exact(logits_NV, targets_N, [g_N, h_N, k_N], **options)
                statistics_3N = form.statistics(logits_NV, targets_N, **options)
                found_NV = form.gradient(logits_NV, targets_N, statistics_3N, g_N, h_N, k_N, **options)
                assert (found_NV - wanted_NV).abs().amax() <= 1e-6 * wanted_NV.abs().amax()


def one_token(form: Form) -> None:
    """p = 1 exactly: no entropy at all, from a vocabulary of one as from a mask that keeps one."""
    for vocab in (1, 5, 2100):
        keep_NV = torch.zeros(1, vocab, dtype=torch.bool)
        keep_NV[0, vocab // 2] = True
        found_3N = form.statistics(torch.full((1, vocab), 3.0), torch.tensor([vocab // 2]), keep_mask_NV=keep_NV)
        assert found_3N[:, 0].tolist() == [0.0, 0.0, 3.0]
    assert form.statistics(torch.full((1, 1), 3.0), torch.tensor([0]))[:, 0].tolist() == [0.0, 0.0, 3.0]


def entropy_without_a_gradient(form: Form) -> None:
    """What a row's entropy holds is no matter where its upstream gradient is 0."""
    logits_NV, targets_N, g_N = torch.randn(2, 50), torch.tensor([3, 4]), torch.ones(2)
    statistics_3N = form.statistics(logits_NV, targets_N)
    wanted_NV = form.gradient(logits_NV.clone(), targets_N, statistics_3N, g_N, torch.zeros(2))
    statistics_3N[1] = torch.tensor([math.inf, math.nan])
    assert torch.equal(form.gradient(logits_NV, targets_N, statistics_3N, g_N, torch.zeros(2)), wanted_NV)


CHECKS = [certain_tokens, digits_of_the_log_prob, large_logits, one_token, entropy_without_a_gradient]
every_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


@every_check
def test_reference(check):
    check(Form(reference, rounds_z=True))


@every_check
def test_cpu(cpu_level, check):
    check(Form(cpu))


@every_check
def test_cuda(emulated_cuda, check):
    check(Form(cuda))


@every_check
def test_triton(interpreted, check):
    from strop.kernels.triton import logit_rows as triton

    check(Form(triton, interpreted))
