"""The flat ops under `linear_logprob` and `logprob`: tensors, numbers and the name of a process group.

targets are columns of this rank's vocabulary rows, IGNORED for rows without a target (`lm_head.local_targets`).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .dispatch import choose, define_op, form, refuse_double_backward
from .head_gradient import HeadGradient, head_gradient
from .lm_head import AVAILABLE, LmHead, head_statistics, join_shards
from .reference import linear_logprob as reference
from .reference.softmax import LogitShape, RowStatistics, Upstream, statistics_dtype

SHAPE = "Tensor? inverse_temperature, float scale, float? softcap, Tensor? keep_mask, str? group_name"
STATISTICS = "Tensor logprob, Tensor entropy, Tensor logsumexp"
UPSTREAM = "Tensor? g, Tensor? h, Tensor? k"
INSTEAD = "write the softmax over whole logits in plain torch"


class FlatShape(NamedTuple):
    """`LogitShape` and the process group in the types of an op schema."""

    inverse_temperature: Tensor | None
    scale: float
    """1 / T of all rows; read where inverse_temperature [N] is None."""
    softcap: float | None
    keep_mask: Tensor | None
    group_name: str | None

    @property
    def logit_shape(self) -> LogitShape:
        inverse_temperature = self.scale if self.inverse_temperature is None else self.inverse_temperature
        return LogitShape(inverse_temperature, self.softcap, self.keep_mask)

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self.group_name is None else dist.distributed_c10d._resolve_process_group(self.group_name)


def is_reference(tensor: Tensor) -> bool:
    return choose("logit_rows", tensor, AVAILABLE) == "reference"


def apart(statistics_3N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of an op must not share memory."""
    logprob, entropy, logsumexp = statistics_3N.unbind(0)
    return logprob.clone(), entropy.clone(), logsumexp.clone()


def fake_statistics(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logprob, entropy, logsumexp = (inputs.new_empty(inputs.shape[0], dtype=statistics_dtype(inputs)) for _ in range(3))
    return logprob, entropy, logsumexp


def run_linear_logprob(hidden, weight, bias, targets, main_grad, *shape):
    shape = FlatShape(*shape)
    if is_reference(hidden):
        return tuple(reference.linear_logprob(hidden, weight, bias, targets, shape.logit_shape, shape.group))
    return apart(head_statistics(LmHead(hidden, weight, bias, targets, shape.logit_shape, shape.group)))


def save_linear_logprob(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, main_grad, *shape = inputs
    shape = FlatShape(*shape)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, hidden, weight, bias, targets, shape.inverse_temperature, shape.keep_mask)
    ctx.shape = shape._replace(inverse_temperature=None, keep_mask=None)
    ctx.main_grad = main_grad  # not saved as a tensor: other backward passes add to it before this one runs


def differentiate_linear_logprob(ctx, *upstream):
    refuse_double_backward("linear_logprob", INSTEAD)
    *tensors, inverse_temperature, keep_mask = ctx.saved_tensors
    shape = ctx.shape._replace(inverse_temperature=inverse_temperature, keep_mask=keep_mask)
    needs = ctx.needs_input_grad[:3]
    gradients = linear_logprob_backward(*upstream, *tensors, *needs, ctx.main_grad, *shape)
    returned = (needs[0], needs[1] and ctx.main_grad is None, needs[2])
    wanted = (gradient if is_wanted else None for gradient, is_wanted in zip(gradients, returned, strict=True))
    return *wanted, *(None,) * (2 + len(shape))


def run_linear_logprob_backward(
    g, h, k, logprob, entropy, logsumexp, hidden, weight, bias, targets,
    needs_hidden, needs_weight, needs_bias, main_grad, *shape,
):  # fmt: skip
    """Empty tensors where a gradient isn't needed or main_grad takes it."""
    shape, needs = FlatShape(*shape), (needs_hidden, needs_weight, needs_bias)
    if is_reference(hidden):
        gradients = reference.linear_logprob_backward(
            Upstream(g, h, k), RowStatistics(logprob, entropy, logsumexp),
            hidden, weight, bias, targets, shape.logit_shape, shape.group, needs, main_grad,
        )  # fmt: skip
    else:
        head = LmHead(hidden, weight, bias, targets, shape.logit_shape, shape.group)
        gradient = HeadGradient(head, needs, main_grad)
        gradients = head_gradient(gradient, torch.stack((logprob, entropy, logsumexp)), g, h, k)
    return tuple(hidden.new_empty(0) if gradient is None else gradient for gradient in gradients)


def fake_linear_logprob_backward(
    g, h, k, logprob, entropy, logsumexp, hidden, weight, bias, targets,
    needs_hidden, needs_weight, needs_bias, main_grad, *shape,
):  # fmt: skip
    returned = ((hidden, needs_hidden), (weight, needs_weight and main_grad is None), (bias, needs_bias))
    return tuple(hidden.new_empty(0) if not is_wanted else torch.empty_like(like) for like, is_wanted in returned)


linear_logprob = define_op(
    f"linear_logprob(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? main_grad, {SHAPE})"
    " -> (Tensor, Tensor, Tensor)",
    run_linear_logprob,
    lambda hidden, *rest: fake_statistics(hidden),
    save=save_linear_logprob,
    backward=differentiate_linear_logprob,
)
linear_logprob_backward = define_op(
    f"linear_logprob_backward({UPSTREAM}, {STATISTICS}, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    f"bool needs_hidden, bool needs_weight, bool needs_bias, Tensor(a!)? main_grad, {SHAPE}) -> (Tensor, Tensor, Tensor)",
    run_linear_logprob_backward,
    fake_linear_logprob_backward,
)


# The weight's own autograd node, for `split_backward`: zeros to be added to the results of a linear_logprob whose weight is
# detached. Its backward is that of the weight and the bias.


def run_weight_node(weight, bias, hidden, targets, logprob, entropy, logsumexp, main_grad, *shape):
    return torch.zeros_like(logprob), torch.zeros_like(entropy), torch.zeros_like(logsumexp)


def save_weight_node(ctx, inputs, output) -> None:
    weight, bias, hidden, targets, logprob, entropy, logsumexp, main_grad, *shape = inputs
    save_linear_logprob(ctx, (hidden, weight, bias, targets, main_grad, *shape), (logprob, entropy, logsumexp))


def differentiate_weight_node(ctx, *upstream):
    refuse_double_backward("linear_logprob", INSTEAD)
    needs_weight, needs_bias = ctx.needs_input_grad[:2]
    *tensors, inverse_temperature, keep_mask = ctx.saved_tensors
    shape = ctx.shape._replace(inverse_temperature=inverse_temperature, keep_mask=keep_mask)
    _, d_weight, d_bias = linear_logprob_backward(*upstream, *tensors, False, needs_weight, needs_bias, ctx.main_grad, *shape)
    if needs_weight and ctx.main_grad is not None:
        d_weight = torch.zeros_like(tensors[4])  # stage_backward_weight refuses a parameter without a gradient
    return d_weight if needs_weight else None, d_bias if needs_bias else None, *(None,) * (6 + len(shape))


weight_node = define_op(
    f"linear_logprob_weight_node(Tensor weight, Tensor? bias, Tensor hidden, Tensor targets, {STATISTICS}, "
    f"Tensor? main_grad, {SHAPE}) -> (Tensor, Tensor, Tensor)",
    run_weight_node,
    run_weight_node,
    save=save_weight_node,
    backward=differentiate_weight_node,
)


def run_logprob(logits, targets, inplace_backward, *shape):
    shape = FlatShape(*shape)
    group, sharded = shape.group, shape.group_name is not None
    kernels = form("logit_rows", logits, AVAILABLE)
    statistics = kernels.logit_statistics(logits, targets, **row_options(shape), partial=sharded)
    return apart(join_shards(statistics, targets, group) if sharded else statistics)


def row_options(shape: FlatShape) -> dict[str, float | Tensor | None]:
    inverse_temperature, softcap, keep_mask = shape.logit_shape
    return {
        "inverse_temperature": inverse_temperature,
        "softcap": softcap,
        "bias_V": None,
        "keep_mask_NV": keep_mask,
    }


def save_logprob(ctx, inputs, output) -> None:
    logits, targets, inplace_backward, *shape = inputs
    shape = FlatShape(*shape)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, logits, targets, shape.inverse_temperature, shape.keep_mask)
    ctx.shape = shape._replace(inverse_temperature=None, keep_mask=None, group_name=None)
    ctx.inplace = inplace_backward


def differentiate_logprob(ctx, *upstream):
    refuse_double_backward("logprob", INSTEAD)
    *tensors, inverse_temperature, keep_mask = ctx.saved_tensors
    shape = ctx.shape._replace(inverse_temperature=inverse_temperature, keep_mask=keep_mask)
    if ctx.inplace:
        logits = tensors[3].detach()
        logprob_backward_(*upstream, *tensors[:3], logits, *tensors[4:], *shape)
        return logits, *(None,) * (2 + len(shape))
    return logprob_backward(*upstream, *tensors, *shape), *(None,) * (2 + len(shape))


def run_logprob_backward(g, h, k, logprob, entropy, logsumexp, logits, targets, *shape):
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    write_logit_gradient(d_logits, g, h, k, logprob, entropy, logsumexp, logits, targets, *shape)
    return d_logits


def run_logprob_backward_(g, h, k, logprob, entropy, logsumexp, logits, targets, *shape):
    write_logit_gradient(logits, g, h, k, logprob, entropy, logsumexp, logits, targets, *shape)


def write_logit_gradient(out, g, h, k, logprob, entropy, logsumexp, logits, targets, *shape):
    kernels = form("logit_rows", logits, AVAILABLE)
    statistics = torch.stack((logprob, entropy, logsumexp))
    kernels.logit_gradient(logits, targets, statistics, g, h, k, **row_options(FlatShape(*shape)), out_NV=out)


logprob = define_op(
    f"logprob(Tensor logits, Tensor targets, bool inplace_backward, {SHAPE}) -> (Tensor, Tensor, Tensor)",
    run_logprob,
    lambda logits, *rest: fake_statistics(logits),
    save=save_logprob,
    backward=differentiate_logprob,
)
logprob_backward = define_op(
    f"logprob_backward({UPSTREAM}, {STATISTICS}, Tensor logits, Tensor targets, {SHAPE}) -> Tensor",
    run_logprob_backward,
    lambda g, h, k, logprob, entropy, logsumexp, logits, *rest: logits.new_empty(logits.shape),
)
logprob_backward_ = define_op(
    f"logprob_backward_({UPSTREAM}, {STATISTICS}, Tensor(a!) logits, Tensor targets, {SHAPE}) -> ()",
    run_logprob_backward_,
    lambda *arguments: None,
)
