"""Public op: per-token estimates of the KL divergence to a reference policy."""

from typing import get_args

from torch import Tensor

from .checks import STATISTICS, check_tensor
from .dispatch import choose, define_op, load, refuse_double_backward
from .reference import kl as reference
from .specs import KlEstimator, KlGradient

AVAILABLE = ("reference", "triton")


def kl(
    logprob: Tensor,
    ref_logprob: Tensor,
    *,
    estimator: KlEstimator = "k3",
    gradient: KlGradient = "naive",
    old_logprob: Tensor | None = None,
) -> Tensor:
    """Per-token estimate of KL(current || reference) from the current policy's tokens, of logprob's shape and dtype.

    With d = ref - lp: k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1. gradient and old_logprob (read by 'unbiased' alone; None is the
    detached current one) are those of `LossSpec.kl_gradient`. For a KL in the reward, detach the result and subtract it.
    logprob, ref_logprob, old_logprob: fp32 or fp64 of one shape, any strides. Only logprob gets a gradient; its factors
    (4 to 8 bytes a token) are computed and kept by the forward.

    Raises ValueError for other names and for 'unbiased' with an estimator other than k3, TypeError or ValueError naming the
    argument for other dtypes, shapes and devices, and under STROP_KERNELS=native, as it has no compiled form; RuntimeError
    for a double backward (not where the reference runs).
    """
    for name, value, choices in (("estimator", estimator, get_args(KlEstimator)), ("gradient", gradient, get_args(KlGradient))):
        if value not in choices:
            raise ValueError(f"{name} {value!r}: choose from {', '.join(choices)}")
    if gradient == "unbiased" and estimator != "k3":
        raise ValueError(f"gradient 'unbiased' is r * k3, got estimator {estimator!r}: take 'k3'")
    check_tensor("logprob", logprob, STATISTICS)
    for name, tensor in (("ref_logprob", ref_logprob), ("old_logprob", old_logprob)):
        if tensor is not None or name == "ref_logprob":
            check_tensor(name, tensor, STATISTICS, tuple(logprob.shape), logprob.device, "pass one number a token")
    ref = ref_logprob.detach().to(logprob.dtype)
    log_ratio = None
    if gradient == "unbiased":
        log_ratio = logprob - (logprob if old_logprob is None else old_logprob).detach().to(logprob.dtype)
    implementation = choose("kl", logprob, AVAILABLE)
    if implementation == "reference":
        return reference.kl(logprob, ref, estimator, gradient, log_ratio)
    flat = [None if tensor is None else tensor.reshape(-1) for tensor in (logprob, ref, log_ratio)]
    return _kl(*flat, estimator, gradient, implementation)[0].view(logprob.shape)


def _run(logprob: Tensor, ref: Tensor, log_ratio: Tensor | None, estimator: str, gradient: str, implementation: str):
    value, d_logprob, d_log_ratio = load(implementation, "kl").kl(
        logprob.contiguous(), ref.contiguous(), None if log_ratio is None else log_ratio.contiguous(), estimator, gradient
    )
    return value, d_logprob, logprob.new_empty(0) if d_log_ratio is None else d_log_ratio


def _fake(logprob: Tensor, ref: Tensor, log_ratio: Tensor | None, estimator: str, gradient: str, implementation: str):
    return tuple(logprob.new_empty(size) for size in (len(logprob), len(logprob), 0 if log_ratio is None else len(logprob)))


def _save(ctx, inputs, output) -> None:
    _, d_logprob, d_log_ratio = output
    ctx.mark_non_differentiable(d_logprob, d_log_ratio)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_logprob, d_log_ratio)


def _backward(ctx, upstream: Tensor, *_):
    refuse_double_backward("kl")
    needs_logprob, _, needs_log_ratio, *_ = ctx.needs_input_grad
    d_logprob, d_log_ratio = ctx.saved_tensors
    return (
        upstream * d_logprob if needs_logprob else None, None, upstream * d_log_ratio if needs_log_ratio else None,
        None, None, None,
    )  # fmt: skip


_kl = define_op(
    "kl(Tensor logprob, Tensor ref_logprob, Tensor? log_ratio, str estimator, str gradient, str implementation)"
    " -> (Tensor value, Tensor d_logprob, Tensor d_log_ratio)",
    _run,
    _fake,
    save=_save,
    backward=_backward,
)
