"""RMSNorm."""

import torch
from torch import Tensor

from .checks import require_dims, require_floating, require_same_device, require_shape
from .dispatch import define_op, form

AVAILABLE = ("reference", "triton")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467), in fp32 and rounded once, at the end.

    x: [..., H], float32, bfloat16, float16 or float64 (then computed in float64), any strides. weight: [H], any of these.
    Returns [..., H], contiguous, in x's dtype. Differentiable once in x and weight; weight's gradient is summed in fp32 by
    two stages of fixed order, so it is the same in every run. Saves x and one fp32 number a row for the backward.

    `transformers` rounds the normalised row before it applies the weight too; in fp32 the two are the same.

    Raises TypeError for other dtypes; ValueError for wrong shapes or devices, and for H > 8192 in Triton; RuntimeError for
    a double backward.
    """
    require_floating("rms_norm", x=x, weight=weight)
    require_dims("rms_norm", "x", x, "[..., H]", least=1)
    require_shape("rms_norm", "weight", weight, x.shape[-1:], "the last axis of x")
    require_same_device("rms_norm", x=x, weight=weight)
    if eps < 0:
        raise ValueError(f"rms_norm: eps is {eps}: the mean of squares plus a negative number may have no root; 1e-6 is usual")
    return _rms_norm(x, weight, eps)[0]


def _run(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return form("rms_norm", x, AVAILABLE).rms_norm(x, weight, eps)


def _fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


def _save(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, dy: Tensor, _):
    return *_rms_norm_backward(dy, *ctx.saved_tensors), None


def _run_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return form("rms_norm", x, AVAILABLE).rms_norm_backward(dy, x, weight, rstd)


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


_rms_norm = define_op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _run, _fake, save=_save, backward=_gradient
)
_rms_norm_backward = define_op(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)", _run_backward, _fake_backward
)
