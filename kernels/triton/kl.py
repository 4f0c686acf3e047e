"""KL estimates and their slopes: one read of each input, one write of each output, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ahead_of_time import FP32, AotCase
from .policy_terms import kl_slope, kl_value

BLOCK = 1024


@triton.jit
def load_tokens(values_ptr, tokens, num_tokens, is_whole):
    """Only a mask that may cut through 16 bytes keeps the loads from being that wide."""
    if is_whole:  # noqa: SIM108 (Triton compiles both sides of a ternary)
        values = tl.load(values_ptr + tokens)
    else:
        values = tl.load(values_ptr + tokens, mask=tokens < num_tokens, other=0.0)
    return values


@triton.jit
def store_tokens(values_ptr, tokens, num_tokens, is_whole, values):
    if is_whole:
        tl.store(values_ptr + tokens, values)
    else:
        tl.store(values_ptr + tokens, values, mask=tokens < num_tokens)


@triton.jit(do_not_specialize=["num_tokens"])
def kl_kernel(
    logprob_ptr, ref_ptr, log_ratio_ptr, value_ptr, d_logprob_ptr, d_log_ratio_ptr, num_tokens,
    ESTIMATOR: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    tokens, is_whole = first + tl.arange(0, BLOCK), first + BLOCK <= num_tokens
    d = load_tokens(ref_ptr, tokens, num_tokens, is_whole) - load_tokens(logprob_ptr, tokens, num_tokens, is_whole)
    value, slope = kl_value(d, ESTIMATOR), kl_slope(d, ESTIMATOR, GRADIENT)
    if GRADIENT == "unbiased":  # r k3: its slope in the log ratio is itself
        ratio = tl.exp(load_tokens(log_ratio_ptr, tokens, num_tokens, is_whole))
        value, slope = ratio * value, ratio * slope
        store_tokens(d_log_ratio_ptr, tokens, num_tokens, is_whole, value)
    store_tokens(value_ptr, tokens, num_tokens, is_whole, value)
    store_tokens(d_logprob_ptr, tokens, num_tokens, is_whole, slope)


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
        AotCase(kl_kernel, {**tensors, **ratio, "num_tokens": "i32", "ESTIMATOR": estimator, "GRADIENT": gradient,
                            "BLOCK": BLOCK}, 4, label=f"{estimator} {gradient}")
        for estimator, gradient, ratio in (("k3", "naive", without_ratio), ("k1", "straight-through", without_ratio),
                                           ("k3", "unbiased", with_ratio))
    ]  # fmt: skip
