"""Gradients that a forward has computed already, hung into autograd's graph."""

import torch
from torch import Tensor

from .dispatch import define_op, refuse_double_backward

RELATIVE_ERROR = 1e-6
"""How far the upstream gradient may lie from the loss scale it was announced as: a few roundings of fp32."""


def stored_gradient(tensor: Tensor, gradient: Tensor | None, scale: Tensor, *, exact: bool) -> Tensor:
    """A 0-dim 0 in fp32 to be added to a loss, through which backward gives `tensor` this gradient.

    gradient: computed for a loss times `scale` (fp32, 0-dim), so that an upstream gradient u of the loss makes it
    gradient * u / scale. None: tensor gets none, the node only checks u (with exact).
    exact: u must be `scale`, since a part of the gradient has left autograd's reach; ValueError in backward on a CPU, a
    device-side assertion elsewhere and under torch.compile, which costs no wait for the device.

    One node for each tensor: a pipeline schedule that asks for input and weight gradients at different times runs each once.
    """
    return _stored_gradient(tensor, scale.new_empty(0) if gradient is None else gradient, scale, exact)


def _run(tensor: Tensor, gradient: Tensor, scale: Tensor, exact: bool) -> Tensor:
    return torch.zeros_like(scale)


def _save(ctx, inputs, output) -> None:
    tensor, gradient, scale, ctx.exact = inputs
    ctx.is_given = gradient.shape == tensor.shape
    ctx.save_for_backward(gradient, scale)


def _backward(ctx, upstream: Tensor):
    refuse_double_backward("linear_policy_loss")
    gradient, scale = ctx.saved_tensors
    # Only an eager CPU tensor shows its value at no cost; what torch.compile traces with is a subclass of Tensor.
    readable = upstream.device.type == "cpu" and type(upstream) is Tensor
    if ctx.exact:
        if not readable:
            torch._assert_async((upstream - scale).abs() <= RELATIVE_ERROR * scale.abs(), mismatch("a value", "loss_scale"))
        elif not abs(upstream - scale) <= RELATIVE_ERROR * abs(scale):
            raise ValueError(mismatch(float(upstream), f"loss_scale {float(scale)}"))
    elif not (readable and upstream == scale):
        gradient = gradient * (upstream / scale)
    return gradient if ctx.is_given else None, None, None, None


def mismatch(upstream: float | str, scale: str) -> str:
    return (f"linear_policy_loss: the loss's upstream gradient is {upstream} other than {scale}, by which main_grad was scaled "
            "in the forward: give what multiplies the loss as loss_scale, or leave main_grad out")  # fmt: skip


_stored_gradient = define_op(
    "stored_gradient(Tensor tensor, Tensor gradient, Tensor scale, bool exact) -> Tensor", _run, _run, save=_save,
    backward=_backward,
)  # fmt: skip
