"""Every argument that linear_logprob and logprob refuse, by name, value and alternative."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from strop.kernels import linear_logprob, logprob

HIDDEN, WEIGHT, TARGETS = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
GROUP = object()
"""Refused before anybody looks at it."""

OF_BOTH = [
    (TypeError, "targets has dtype torch.int32", {"targets": TARGETS.int()}),
    (TypeError, "targets is a list", {"targets": [0, 1, 2]}),
    (ValueError, r"targets has shape \(2,\), expected \(3,\): pass one id for each row", {"targets": TARGETS[:2]}),
    (ValueError, r"targets holds 5, not in 0..4: give rows without a target -100", {"targets": torch.tensor([0, 5, -100])}),
    (ValueError, r"targets holds -100, not in 0..4: give rows without a target 7",
     {"targets": torch.tensor([0, 7, -100]), "ignore_index": 7}),
    (ValueError, "targets holds -1", {"targets": torch.tensor([0, -1, -100])}),
    (ValueError, "targets is on meta, the other arguments on cpu", {"targets": TARGETS.to("meta")}),
    (ValueError, "temperature 0: must be above 0", {"temperature": 0}),
    (ValueError, "temperature nan", {"temperature": float("nan")}),
    (ValueError, "temperature holds 0.0", {"temperature": torch.tensor([1.0, 0.0, 1.0])}),
    (ValueError, "temperature inf: must be above 0 and finite", {"temperature": float("inf")}),
    (TypeError, "temperature is a NoneType: pass a number", {"temperature": None}),
    (ValueError, "temperature holds nan", {"temperature": torch.tensor([1.0, float("nan"), 1.0])}),
    (ValueError, r"temperature has shape \(2,\)", {"temperature": torch.ones(2)}),
    (ValueError, r"temperature has shape \(\), expected \(3,\): pass a number, or one for each row: temperature.expand",
     {"temperature": torch.tensor(1.0)}),
    (TypeError, "softcap is a Tensor: pass a number; None", {"softcap": torch.tensor(30.0)}),
    (TypeError, "ignore_index is a NoneType: pass an int", {"ignore_index": None}),
    (TypeError, r"vocab_range \(0, 5.0\): pass two ints", {"tp_group": GROUP, "vocab_range": (0, 5.0)}),
    (TypeError, r"vocab_range \(0, 2, 5\): pass two ints", {"tp_group": GROUP, "vocab_range": (0, 2, 5)}),
    (TypeError, "temperature has dtype torch.float16", {"temperature": torch.ones(3).half()}),
    (ValueError, "softcap 0", {"softcap": 0}),
    (ValueError, "softcap inf: .* None leaves the logits alone", {"softcap": float("inf")}),
    (ValueError, r"keep_mask has shape \(3, 4\), expected \(3, 5\)", {"keep_mask": torch.ones(3, 4, dtype=torch.bool)}),
    (TypeError, "keep_mask has dtype torch.float32", {"keep_mask": torch.ones(3, 5)}),
    (ValueError, "vocab_range is given without tp_group", {"vocab_range": (0, 5)}),
    (ValueError, "tp_group is given without vocab_range", {"tp_group": GROUP}),
    (ValueError, r"vocab_range \(5, 9\) doesn't fit this rank's 5 tokens: pass \(start, start \+ 5\)",
     {"tp_group": GROUP, "vocab_range": (5, 9)}),
    (ValueError, r"vocab_range \(-1, 4\)", {"tp_group": GROUP, "vocab_range": (-1, 4)}),
]  # fmt: skip
OF_THE_HEAD = [
    (TypeError, "hidden has dtype torch.int64", {"hidden": torch.zeros(3, 4, dtype=torch.int64)}),
    (TypeError, "use float64 for both", {"hidden": HIDDEN.double()}),
    (ValueError, r"hidden \(3, 4\) and weight \(4, 5\) don't fit", {"weight": WEIGHT.t()}),
    (ValueError, r"hidden \(\) and weight", {"hidden": torch.tensor(1.0)}),
    (ValueError, r"weight has shape \(0, 4\)", {"weight": WEIGHT[:0]}),
    (ValueError, "weight is on meta", {"weight": WEIGHT.to("meta")}),
    (ValueError, r"bias has shape \(4,\)", {"bias": torch.ones(4)}),
    (TypeError, "main_grad has dtype torch.bfloat16", {"main_grad": torch.zeros(5, 4, dtype=torch.bfloat16)}),
    (ValueError, r"main_grad has shape \(4, 5\)", {"main_grad": torch.zeros(4, 5)}),
    (ValueError, "main_grad.requires_grad is True, .*pass main_grad.detach",
     {"main_grad": torch.zeros(5, 4, requires_grad=True)}),
    (ValueError, r"main_grad has strides \(0, 1\), several entries", {"main_grad": torch.zeros(4).expand(5, 4)}),
    (ValueError, "weight.requires_grad is False", {"main_grad": torch.zeros(5, 4)}),
]  # fmt: skip
OF_LOGITS = [
    (ValueError, "inplace_backward needs contiguous logits: pass logits.contiguous()",
     {"logits": torch.randn(5, 3).t(), "inplace_backward": True}),
    (ValueError, r"logits has shape \(3, 0\): pass \[..., V\]", {"logits": torch.randn(3, 0)}),
    (TypeError, "logits has dtype torch.int64", {"logits": TARGETS}),
]  # fmt: skip


def names(cases):
    return [message for _, message, _ in cases]


@pytest.mark.parametrize(("error", "message", "change"), OF_BOTH + OF_THE_HEAD, ids=names(OF_BOTH + OF_THE_HEAD))
def test_linear_logprob_refuses(error, message, change):
    with pytest.raises(error, match=message):
        linear_logprob(**{"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS} | change)


@pytest.mark.parametrize(("error", "message", "change"), OF_BOTH + OF_LOGITS, ids=names(OF_BOTH + OF_LOGITS))
def test_logprob_refuses(error, message, change):
    with pytest.raises(error, match=message):
        logprob(**{"logits": torch.randn(3, 5), "targets": TARGETS} | change)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_double_backward_is_refused(kernels, monkeypatch):
    monkeypatch.setenv("STROP_KERNELS", kernels)
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    message = "a double backward isn't supported: call backward without create_graph=True, or write the softmax over whole"
    for results in (linear_logprob(hidden, weight, TARGETS), linear_logprob(hidden, weight, TARGETS, split_backward=True)):
        with pytest.raises(RuntimeError, match=f"linear_logprob: {message}"):
            torch.autograd.grad(results.logprob.sum(), (hidden, weight), create_graph=True)
    with pytest.raises(RuntimeError, match=f"^logprob: {message}"):
        torch.autograd.grad(logprob(hidden, TARGETS).entropy.sum(), hidden, create_graph=True)


def test_deterministic_on_cuda_needs_what_cublas_needs(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with FakeTensorMode():
        hidden, weight = torch.empty(3, 4, device="cuda"), torch.empty(5, 4, device="cuda")
        targets = torch.empty(3, dtype=torch.int64, device="cuda")
        with pytest.raises(ValueError, match="deterministic=True needs CUBLAS_WORKSPACE_CONFIG=:4096:8"):
            linear_logprob(hidden, weight, targets, deterministic=True)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        assert linear_logprob(hidden, weight, targets, deterministic=True).logprob.shape == (3,)


def test_values_are_read_on_a_device_in_debug_mode_only(monkeypatch):
    """A fake CUDA tensor has no values: without CUDA, whoever reads them fails."""
    with FakeTensorMode():
        logits, targets = torch.empty(3, 4, device="cuda"), torch.empty(3, dtype=torch.int64, device="cuda")
        monkeypatch.delenv("STROP_KERNELS_DEBUG", raising=False)
        assert logprob(logits, targets, temperature=torch.ones(3, device="cuda")).entropy.is_cuda
        monkeypatch.setenv("STROP_KERNELS_DEBUG", "1")
        with pytest.raises(Exception, match="not linked with support for cuda"):
            logprob(logits, targets)
