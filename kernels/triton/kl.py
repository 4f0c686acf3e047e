"""KL estimates and their slopes: one read of each input, one write of each output, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ahead_of_time import FP32, AotCase
from .policy_terms import kl_slope, kl_value

BLOCK = 1024


@triton.jit
def kl_kernel(
    logprob_ptr, ref_ptr, log_ratio_ptr, value_ptr, d_logprob_ptr, d_log_ratio_ptr, num_tokens,
    ESTIMATOR: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < num_tokens
    d = tl.load(ref_ptr + tokens, mask=inside, other=0.0) - tl.load(logprob_ptr + tokens, mask=inside, other=0.0)
    value, slope = kl_value(d, ESTIMATOR), kl_slope(d, ESTIMATOR, GRADIENT)
    if GRADIENT == "unbiased":  # r k3: its slope in the log ratio is itself
        ratio = tl.exp(tl.load(log_ratio_ptr + tokens, mask=inside, other=0.0))
        value, slope = ratio * value, ratio * slope
        tl.store(d_log_ratio_ptr + tokens, value, mask=inside)
    tl.store(value_ptr + tokens, value, mask=inside)
    tl.store(d_logprob_ptr + tokens, slope, mask=inside)


def kl(
    logprob_T: Tensor, ref_T: Tensor, log_ratio_T: Tensor | None, estimator: str, gradient: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(value, its derivative in logprob, its derivative in log_ratio), fp32 [T], all inputs contiguous.

    log_ratio_T, and the last result, only for gradient 'unbiased'.
    """
    value, d_logprob = torch.empty_like(logprob_T), torch.empty_like(logprob_T)
    d_log_ratio = None if log_ratio_T is None else torch.empty_like(logprob_T)
    if value.numel():
        kl_kernel[(triton.cdiv(value.numel(), BLOCK),)](
            logprob_T, ref_T, log_ratio_T, value, d_logprob, d_log_ratio, value.numel(),
            ESTIMATOR=estimator, GRADIENT=gradient, BLOCK=BLOCK,
        )  # fmt: skip
    return value, d_logprob, d_log_ratio


def aot_cases() -> list[AotCase]:
    tensors = dict.fromkeys(("logprob_ptr", "ref_ptr", "value_ptr", "d_logprob_ptr"), FP32)
    without_ratio = {"log_ratio_ptr": None, "d_log_ratio_ptr": None}
    with_ratio = {"log_ratio_ptr": FP32, "d_log_ratio_ptr": FP32}
    return [
        AotCase(kl_kernel, {**tensors, **ratio, "num_tokens": "i32:16", "ESTIMATOR": estimator, "GRADIENT": gradient,
                            "BLOCK": BLOCK}, 4, label=f"{estimator} {gradient}")
        for estimator, gradient, ratio in (("k3", "naive", without_ratio), ("k1", "straight-through", without_ratio),
                                           ("k3", "unbiased", with_ratio))
    ]  # fmt: skip
