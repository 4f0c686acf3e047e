"""The Triton row kernels, interpreted on the CPU and (marked gpu) compiled on a device, against the reference in fp64."""

import pytest
import torch
from torch import Tensor

from strop.kernels import LossSpec, linear_logprob, linear_policy_loss, logprob
from strop.kernels.reference import logit_rows as reference
from strop.kernels.reference.softmax import IGNORED

pytest.importorskip("triton")
from strop.kernels.triton import logit_rows

PLAIN = {"inverse_temperature": 1.0, "softcap": None, "bias_V": None, "keep_mask_NV": None}
ELSEWHERE = 10**6
"""A target in another vocabulary shard."""


@pytest.fixture
def run(interpreted):
    """run(function, ...) -> what it returns in the interpreting process, or its arguments where it writes into them."""
    return lambda *arguments, **keywords: interpreted(*arguments, **keywords)[0]


def wide(options: dict) -> dict:
    return {name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in options.items()}  # fmt: skip


def rows_of(num_rows: int, vocab: int, dtype=torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits and targets; where there is room, one target in another shard and one ignored row full of NaN."""
    logits_NV = (torch.randn(num_rows, vocab) * scale).to(dtype)
    targets_N = torch.randint(vocab, (num_rows,))
    if num_rows > 3:
        targets_N[1], targets_N[2] = ELSEWHERE, IGNORED
        logits_NV[2] = torch.nan
    return logits_NV, targets_N


def upstream_of(num_rows: int) -> list[Tensor]:
    """Random g, h, k; one row in which all are 0."""
    gradients = [torch.randn(num_rows) for _ in range(3)]
    if num_rows > 3:
        for gradient in gradients:
            gradient[3] = 0
    return gradients


def check(run, logits_NV: Tensor, targets_N: Tensor, options: dict, upstream: list[Tensor | None], *, out_dtype=None,
          rtol: float = 1e-5, atol: float = 2e-6) -> None:  # fmt: skip
    """Both kernels against fp64; run(function, ...) calls a form's function, by default the gradient is written in place."""
    exact = wide(PLAIN | options)
    options = PLAIN | options
    for partial in (True, False):
        expected = reference.logit_statistics(logits_NV.double(), targets_N, **exact, partial=partial)
        found = run(logit_rows.logit_statistics, logits_NV, targets_N, **options, partial=partial)
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol, equal_nan=True)
    gradient_NV = torch.empty_like(logits_NV, dtype=torch.float64)
    wide_upstream = [None if gradient is None else gradient.double() for gradient in upstream]
    reference.logit_gradient(logits_NV.double(), targets_N, expected, *wide_upstream, **exact, out_NV=gradient_NV)
    out_NV = logits_NV if out_dtype is None else torch.empty_like(logits_NV, dtype=out_dtype)
    outputs = run(logit_rows.logit_gradient, logits_NV, targets_N, expected.float(), *upstream, **options, out_NV=out_NV)
    if outputs is not None:  # from another process
        out_NV = outputs[-1]
    if out_NV.dtype != torch.float32:  # rounded once, at the end
        rtol, atol = max(rtol, torch.finfo(out_NV.dtype).eps), max(atol, torch.finfo(out_NV.dtype).smallest_normal)
    torch.testing.assert_close(out_NV.double(), gradient_NV, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("num_rows", "vocab"), [(1, 1), (1, 7), (5, 7), (6, 700), (5, 9001), (2, 140_000), (0, 50)]
)
def test_shapes(run, num_rows, vocab, dtype):
    """Rows of one block, of one block for each program that shares them (9001), and of several (140,000)."""
    logits_NV, targets_N = rows_of(num_rows, vocab, dtype)
    check(run, logits_NV, targets_N, {}, upstream_of(num_rows))


@pytest.mark.parametrize(
    "names", [("inverse_temperature",), ("softcap",), ("bias_V",), ("keep_mask_NV",),
              ("inverse_temperature", "softcap", "bias_V", "keep_mask_NV")], ids="+".join,
)  # fmt: skip
def test_options(run, names):
    logits_NV, targets_N = rows_of(6, 4500, scale=8.0)
    keep_mask_NV = torch.rand(6, 9000)[:, :4500] < 0.5
    keep_mask_NV[3:, targets_N[3:]] = True
    keep_mask_NV[4, targets_N[4]] = False
    options = {
        "inverse_temperature": torch.rand(6) + 0.5, "softcap": 5.0, "bias_V": torch.randn(4500), "keep_mask_NV": keep_mask_NV,
    }  # fmt: skip
    # softcap: tanh is right to 1e-7 of the cap, and a slope of 1 - tanh^2 near 0 inherits that
    check(run, logits_NV, targets_N, {name: options[name] for name in names}, upstream_of(6), atol=5e-6)


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 1)], ids=["g", "h", "k", "g+h"])
def test_missing_upstream_gradients_and_another_dtype_out(run, given):
    logits_NV, targets_N = rows_of(5, 600)
    upstream = [gradient if i in given else None for i, gradient in enumerate(upstream_of(5))]
    check(run, logits_NV, targets_N, {"inverse_temperature": 0.7}, upstream, out_dtype=torch.float16)


def test_strides(run):
    """Columns of a wider matrix, and statistics and targets that are columns of something else."""
    logits_NV, targets_N = rows_of(5, 601)
    strided_NV = torch.empty(5, 700)[:, 3:604]
    strided_NV.copy_(logits_NV)
    targets_N = torch.stack([targets_N, targets_N], 1)[:, 0]
    upstream = [gradient.expand(2, 5).t()[:, 0] for gradient in upstream_of(5)]
    check(run, strided_NV, targets_N, {}, upstream)


@pytest.mark.parametrize("inverse_temperature", [1.0, 1 / 0.6])
def test_large_and_infinite_logits(run, inverse_temperature):
    logits_NV = torch.randn(6, 5000)
    targets_N = torch.tensor([17, 4999, 0, 3, 2, 1])
    logits_NV[0] += 1e4  # a common offset takes nothing from the differences
    logits_NV[1, 4999] = 1e4  # p -> 1
    if inverse_temperature == 1:  # 1e4 / 0.6 is no fp32 number: as a logsumexp it is 5e-4 off, and so is every p
        logits_NV[2, 1] = 1e4  # p -> 0
    logits_NV[3, ::2] = -torch.inf  # more than whole blocks of lanes
    logits_NV[3, :4096] = -torch.inf
    logits_NV[4, 2] = -torch.inf  # the target itself
    logits_NV[5, 1] = 16.0  # 1 - p = 6e-4
    upstream = upstream_of(6)
    for gradient in upstream:
        gradient[3] = 1.0
    targets_N[3] = 4999
    check(run, logits_NV, targets_N, {"inverse_temperature": inverse_temperature}, upstream)


def test_nan_is_not_hidden(run):
    logits_NV, targets_N = torch.randn(3, 300), torch.tensor([4, 5, 6])
    logits_NV[1, 7] = torch.nan
    found = run(logit_rows.logit_statistics, logits_NV, targets_N, **PLAIN, partial=False)
    assert found[:, 1].isnan().all() and found[:, [0, 2]].isfinite().all()
    logits_NV[1, 7] = 0
    statistics = reference.logit_statistics(logits_NV, targets_N, **PLAIN, partial=False)
    upstream = (torch.tensor([1.0, torch.nan, 0.0]), None, None)
    *_, out_NV = run(logit_rows.logit_gradient, logits_NV, targets_N, statistics, *upstream, **PLAIN, out_NV=logits_NV)
    assert out_NV[1].isnan().all() and out_NV[0].isfinite().all() and (out_NV[2] == 0).all()


def test_through_the_public_functions(interpreted, monkeypatch):
    """STROP_KERNELS=triton in the interpreting process, the plain-torch form here."""
    monkeypatch.setenv("STROP_KERNELS", "reference")
    hidden, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((6, 16), (700, 16), (700,)))
    logits = torch.randn(6, 700, requires_grad=True)
    targets = torch.randint(700, (6,))
    targets[2] = -100
    upstream = [torch.randn(6) for _ in range(3)]
    options = {"temperature": torch.rand(6) + 0.5, "softcap": 5.0, "keep_mask": torch.rand(6, 700) < 0.7}
    options["keep_mask"][[0, 1, 3, 4, 5], targets[[0, 1, 3, 4, 5]]] = True
    close = {"upstream": upstream, "rtol": 1e-5, "atol": 1e-5}
    interpreted.check(logprob, logits, targets, **options, **close)
    interpreted.check(linear_logprob, hidden, weight, targets, **close)
    interpreted.check(linear_logprob, hidden, weight, targets, bias=bias.detach(), **options, **close)
    mask, advantages = targets != -100, torch.randn(6)
    old, spec = torch.randn(6) * 0.1 - 6, LossSpec(aggregation="token-mean", entropy_coef=0.1)
    interpreted.check(
        linear_policy_loss, hidden, weight, targets, old, advantages, mask, spec, denominator=5.0, upstream=[torch.tensor(1.0)],
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("num_rows", "vocab"), [(300, 128_256), (3, 151_936), (1000, 50_257)])
def test_on_a_device(dtype, num_rows, vocab):
    """Rows of a program each and rows shared by programs; 50,257 columns leave rows unaligned. Plain, and with every option."""
    logits_NV, targets_N = (tensor.cuda() for tensor in rows_of(num_rows, vocab, dtype))
    upstream = [gradient.cuda() for gradient in upstream_of(num_rows)]
    options = {
        "inverse_temperature": torch.rand(num_rows, device="cuda") + 0.5, "softcap": 30.0,
        "bias_V": torch.randn(vocab, device="cuda").to(dtype), "keep_mask_NV": torch.rand(num_rows, vocab, device="cuda") < 0.5,
    }  # fmt: skip

    def here(function, *arguments, **keywords):
        return function(*arguments, **keywords)

    # exp and log are right to 3e-7 there, a sum of 1e5 terms and a tanh of 30 to 1e-6
    check(here, logits_NV.clone(), targets_N, {}, upstream, atol=5e-6)
    check(here, logits_NV.clone(), targets_N, options, upstream, atol=1e-5)
    if dtype == torch.float32:
        check(here, logits_NV, targets_N, {}, upstream, out_dtype=torch.bfloat16, atol=5e-6)
