"""The structs of csrc/include/strop.h, filled from tensors: what the functions of csrc/cpu and csrc/cuda are called with.

A struct holds addresses, not tensors: those it was made from are kept in its attribute `tensors`, so they live as long as it.
"""

import ctypes
from typing import get_args

import torch
from torch import Tensor

from .loss_code import NUM_CHOICES, LossCode
from .metrics import METRIC_FIELDS
from .specs import AdvantageSpec, Baseline, Scale

TYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
"""strop_type; any other dtype is 0, plain bits."""


class LogitRows(ctypes.Structure):
    """strop_logits."""

    _fields_ = (
        ("logits", ctypes.c_void_p), ("num_rows", ctypes.c_int64), ("vocab", ctypes.c_int64), ("row_stride", ctypes.c_int64),
        ("logit_type", ctypes.c_int32), ("bias_type", ctypes.c_int32), ("targets", ctypes.c_void_p),
        ("inverse_temperature", ctypes.c_void_p), ("scale", ctypes.c_float), ("softcap", ctypes.c_float),
        ("bias", ctypes.c_void_p), ("keep_mask", ctypes.c_void_p), ("mask_stride", ctypes.c_int64),
    )  # fmt: skip


class LossTokens(ctypes.Structure):
    """strop_loss_tokens."""

    _fields_ = (
        ("num_tokens", ctypes.c_int64), ("num_sequences", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in (
            "logprob", "old_logprob", "advantages", "ref_logprob", "rollout_logprob", "entropy", "mask", "cu_seqlens",
            "sequence_stats", "denominator",
        )),
    )  # fmt: skip


class FlatLossCode(ctypes.Structure):
    """strop_loss_code."""

    _fields_ = tuple(
        (name, ctypes.c_int32 if index < NUM_CHOICES else ctypes.c_float) for index, name in enumerate(LossCode._fields)
    )


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Of the first element; NULL for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def logit_rows(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    inverse_temperature: float | Tensor,
    softcap: float | None,
    bias_V: Tensor | None,
    keep_mask_NV: Tensor | None,
) -> LogitRows:
    """Columns of logits_NV and keep_mask_NV are next to each other; rows may lie anywhere."""
    per_row = inverse_temperature.contiguous() if isinstance(inverse_temperature, Tensor) else None
    targets_N, bias_V = targets_N.contiguous(), None if bias_V is None else bias_V.contiguous()
    rows = LogitRows(
        logits=logits_NV.data_ptr(),
        num_rows=logits_NV.shape[0],
        vocab=logits_NV.shape[1],
        row_stride=logits_NV.stride(0),
        logit_type=TYPE_CODES[logits_NV.dtype],
        bias_type=0 if bias_V is None else TYPE_CODES[bias_V.dtype],
        targets=targets_N.data_ptr(),
        inverse_temperature=address(per_row),
        scale=1.0 if per_row is not None else inverse_temperature,
        softcap=softcap or 0.0,
        bias=address(bias_V),
        keep_mask=address(keep_mask_NV),
        mask_stride=0 if keep_mask_NV is None else keep_mask_NV.stride(0),
    )
    rows.tensors = (logits_NV, targets_N, per_row, bias_V, keep_mask_NV)
    return rows


def loss_tokens(
    logprob_T: Tensor,
    old_T: Tensor | None,
    advantages_T: Tensor,
    mask_T: Tensor,
    ref_T: Tensor | None,
    rollout_T: Tensor | None,
    entropy_T: Tensor | None,
    cu_seqlens: Tensor | None,
    sequence_stats: Tensor | None,
    denominator: Tensor,
) -> LossTokens:
    """Every tensor is contiguous: fp32 [T], mask bool [T], cu_seqlens int64 [S + 1], sequence_stats fp32 [S, 6]."""
    given = {
        "logprob": logprob_T, "old_logprob": old_T, "advantages": advantages_T, "ref_logprob": ref_T,
        "rollout_logprob": rollout_T, "entropy": entropy_T, "mask": mask_T, "cu_seqlens": cu_seqlens,
        "sequence_stats": sequence_stats, "denominator": denominator,
    }  # fmt: skip
    tokens = LossTokens(
        num_tokens=len(logprob_T),
        num_sequences=0 if cu_seqlens is None else len(cu_seqlens) - 1,
        **{name: address(tensor) for name, tensor in given.items()},
    )
    tokens.tensors = tuple(given.values())
    return tokens


def loss_results(code: LossCode, logprob_T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Uninitialised (loss, metrics, d_logprob_T, d_entropy_T); the last is None where code.entropy_coef is 0."""
    d_entropy_T = torch.empty_like(logprob_T) if code.entropy_coef else None
    return logprob_T.new_empty(()), logprob_T.new_empty(len(METRIC_FIELDS)), torch.empty_like(logprob_T), d_entropy_T


def advantage_options(spec: AdvantageSpec) -> tuple[ctypes._SimpleCData, ...]:
    """scale, baseline, ddof and eps of strop_cpu_group_advantage; strop_scale and strop_baseline count like specs.py."""
    scale, baseline = get_args(Scale).index(spec.scale), get_args(Baseline).index(spec.baseline)
    return ctypes.c_int(scale), ctypes.c_int(baseline), ctypes.c_int(spec.ddof), ctypes.c_double(spec.eps)
