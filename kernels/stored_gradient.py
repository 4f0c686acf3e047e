"""Gradients that a forward has computed already, hung into autograd's graph."""

import torch
from torch import Tensor

from .dispatch import define_op, refuse_double_backward

RELATIVE_ERROR = 1e-6
"""How far the upstream gradient may lie from the loss scale it was announced as: a few roundings of fp32."""


def stored_gradient(tensor: Tensor, gradient: Tensor | None, scale: Tensor, *, once: bool, zeros: bool) -> Tensor:
    """A 0-dim 0 in fp32 to be added to a loss, through which backward gives `tensor` this gradient.

    gradient: computed for a loss times `scale` (fp32, 0-dim), so that an upstream gradient u of the loss makes it
    gradient * u / scale. None: it is somewhere else already and tensor.grad stays as it is, but tensor's hooks run, those
    after accumulation included, which is what DistributedDataParallel and trainers with buckets wait for. zeros: it gets
    zeros then, for torch.distributed.pipelining, whose stage_backward_weight refuses a parameter without a gradient.
    once: a part of the gradient has left autograd's reach. So u must be `scale`: ValueError in backward on a CPU, a
    device-side assertion elsewhere and under torch.compile, which costs no wait for the device. And a second backward of
    this node is a RuntimeError (not under torch.compile, which runs no code of ours then).

    One node for each tensor: a pipeline schedule that asks for input and weight gradients at different times runs each once.
    """
    return _stored_gradient(tensor, scale.new_empty(0) if gradient is None else gradient, scale, once, zeros)


def _run(tensor: Tensor, gradient: Tensor, scale: Tensor, once: bool, zeros: bool) -> Tensor:
    return torch.zeros_like(scale)


def _save(ctx, inputs, output) -> None:
    tensor, gradient, scale, ctx.once, zeros = inputs
    ctx.is_given = gradient.shape == tensor.shape
    ctx.zeros = (tensor.shape, tensor.dtype, tensor.device) if zeros and not ctx.is_given else None
    ctx.has_run = False
    ctx.save_for_backward(gradient, scale)


def _backward(ctx, upstream: Tensor):
    refuse_double_backward("linear_policy_loss")
    gradient, scale = ctx.saved_tensors
    # Only an eager CPU tensor shows its value at no cost; what torch.compile traces with is a subclass of Tensor.
    readable = upstream.device.type == "cpu" and type(upstream) is Tensor
    if ctx.once:
        if ctx.has_run:
            raise RuntimeError("linear_policy_loss: a second backward adds nothing to main_grad, which the forward has filled: "
                               "call the loss again, or leave main_grad out")  # fmt: skip
        if not readable:
            torch._assert_async((upstream - scale).abs() <= RELATIVE_ERROR * scale.abs(), mismatch("a value", "loss_scale"))
        elif not abs(upstream - scale) <= RELATIVE_ERROR * abs(scale):
            raise ValueError(mismatch(float(upstream), f"loss_scale {float(scale)}"))
    elif not (readable and upstream == scale):
        # In place saves a copy of weight's size, unless it is read again or an earlier backward has given it away.
        shared = ctx.has_run or torch._C._autograd._get_current_graph_task_keep_graph()
        gradient = torch.mul(gradient, upstream / scale, out=None if shared else gradient)
    ctx.has_run = True
    if ctx.zeros is not None:
        shape, dtype, device = ctx.zeros
        gradient = torch.zeros(shape, dtype=dtype, device=device)
    return gradient if ctx.is_given or ctx.zeros else None, None, None, None, None


def mismatch(upstream: float | str, scale: str) -> str:
    return (f"linear_policy_loss: the loss's upstream gradient is {upstream} other than {scale}, by which main_grad was scaled "
            "in the forward: give what multiplies the loss as loss_scale, or leave main_grad out")  # fmt: skip


_stored_gradient = define_op(
    "stored_gradient(Tensor tensor, Tensor gradient, Tensor scale, bool once, bool zeros) -> Tensor", _run, _run,
    save=_save, backward=_backward,
)  # fmt: skip
