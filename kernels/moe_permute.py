"""Tokens sorted by expert, for a grouped matrix product, and back."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import require_dims, require_floating, require_integers, require_same_device, require_shape
from .dispatch import define_op, form

AVAILABLE = ("reference", "triton")


class ExpertOrder(NamedTuple):
    """Where each (token, choice) goes. A = T k assignments, E experts, R rows of the sorted buffer; all int32, on the device.

    R is the worst case, known without reading the device: A + min(A, E) (multiple_of - 1), down to a multiple of multiple_of.
    """

    rows: Tensor
    """[T, k]: the row of each assignment; -1 where its expert id is negative."""
    sources: Tensor
    """[R]: the assignment t k + j in each row; -1 in padding."""
    counts: Tensor
    """[E]: assignments of each expert, without padding."""
    offsets: Tensor
    """[E + 1]: expert e owns the rows offsets[e] .. offsets[e + 1], padding included; offsets[1:] is `offs` of F.grouped_mm.
    The rows from offsets[E] on belong to nobody."""


def expert_order(expert_ids: Tensor, num_experts: int, multiple_of: int = 1) -> ExpertOrder:
    """Sort the assignments of a top-k router by expert; inside an expert by token, then by choice. Drops none.

    expert_ids: int32 or int64 [T, k] in 0..num_experts-1; a negative id takes no part (padding, or another rank's expert).
    multiple_of: each expert's rows are padded to a multiple of it, as grouped products in FP8 (16, 128) demand.

    No host synchronisation, and the same result in every run. On the CPU an id >= num_experts is a ValueError; on a GPU,
    where reading it would synchronise, it takes no part. Raises TypeError for other dtypes, ValueError for wrong shapes,
    num_experts < 1, multiple_of < 1 or 2^31 rows and more.
    """
    require_integers("expert_order", expert_ids=expert_ids)
    require_dims("expert_order", "expert_ids", expert_ids, "[T, k]", exact=2)
    if num_experts < 1 or multiple_of < 1:
        raise ValueError(f"expert_order: num_experts is {num_experts} and multiple_of {multiple_of}: both must be at least 1")
    if most_rows(expert_ids.numel(), num_experts, multiple_of) >= 2**31:
        raise ValueError(f"expert_order: {expert_ids.numel()} assignments need 2^31 rows or more: split the batch")
    return ExpertOrder(*_expert_order(expert_ids, num_experts, multiple_of))


def moe_permute(hidden: Tensor, order: ExpertOrder) -> Tensor:
    """hidden [T, H] -> [R, H] with row r = hidden[order.sources[r] // k], zeros in padding and behind the last expert.

    hidden: float32, bfloat16, float16 or float64, any strides. Differentiable once: a token's gradient is the sum over its
    choices, in fp32 and in their order. Raises TypeError for other dtypes, ValueError for shapes or devices that don't fit
    `order`, RuntimeError for a double backward.
    """
    require_floating("moe_permute", hidden=hidden)
    require_shape("moe_permute", "hidden", hidden, (order.rows.shape[0], *hidden.shape[1:2]), "[T, H] with order's T tokens")
    require_same_device("moe_permute", hidden=hidden, order=order.rows)
    return _moe_permute(hidden, order.rows, order.sources)


def moe_unpermute(expert_out: Tensor, order: ExpertOrder, weights: Tensor) -> Tensor:
    """[R, H] -> [T, H]: token t gets the sum over its choices j of weights[t, j] * expert_out[order.rows[t, j]].

    expert_out: float32, bfloat16, float16 or float64, any strides; padding rows are never read, so they may hold anything.
    weights: [T, k], the router's, any of these dtypes. Summed in fp32, rounded once, in the order of the choices.
    Differentiable once in both; padding rows get gradient 0, an assignment without a row gets weight gradient 0.
    Raises TypeError for other dtypes, ValueError for shapes or devices that don't fit `order`, RuntimeError for a double
    backward.
    """
    require_floating("moe_unpermute", expert_out=expert_out, weights=weights)
    rows = order.sources.shape[0]
    require_shape("moe_unpermute", "expert_out", expert_out, (rows, *expert_out.shape[1:2]), "[R, H] with order's R rows")
    require_shape("moe_unpermute", "weights", weights, order.rows.shape, "one for each assignment of order")
    require_same_device("moe_unpermute", expert_out=expert_out, weights=weights, order=order.rows)
    return _moe_unpermute(expert_out, weights, order.rows, order.sources)


def most_rows(num_assignments: int, num_experts: int, multiple_of: int) -> int:
    """R: whatever the router chooses, the padded experts fit."""
    worst = num_assignments + min(num_assignments, num_experts) * (multiple_of - 1)
    return worst // multiple_of * multiple_of


def _run_order(expert_ids: Tensor, num_experts: int, multiple_of: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if expert_ids.device.type == "cpu" and expert_ids.numel() and (largest := int(expert_ids.max())) >= num_experts:
        raise ValueError(f"expert_order: expert id {largest} in expert_ids, but num_experts is {num_experts}")
    num_rows = most_rows(expert_ids.numel(), num_experts, multiple_of)
    return form("moe_permute", expert_ids, AVAILABLE).expert_order(expert_ids, num_experts, multiple_of, num_rows)


def _fake_order(expert_ids: Tensor, num_experts: int, multiple_of: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (expert_ids.shape, (most_rows(expert_ids.numel(), num_experts, multiple_of),), (num_experts,), (num_experts + 1,))
    return tuple(expert_ids.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _run_permute(hidden: Tensor, rows: Tensor, sources: Tensor) -> Tensor:
    return form("moe_permute", hidden, AVAILABLE).moe_permute(hidden, rows, sources)


def _fake_permute(hidden: Tensor, rows: Tensor, sources: Tensor) -> Tensor:
    return hidden.new_empty(sources.shape[0], hidden.shape[1])


def _save_permute(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _permute_gradient(ctx, dout: Tensor):
    return _moe_permute_backward(dout, *ctx.saved_tensors), None, None


def _run_permute_backward(dout: Tensor, rows: Tensor) -> Tensor:
    return form("moe_permute", dout, AVAILABLE).moe_unpermute(dout, None, rows)


def _fake_permute_backward(dout: Tensor, rows: Tensor) -> Tensor:
    return dout.new_empty(rows.shape[0], dout.shape[1])


def _run_unpermute(expert_out: Tensor, weights: Tensor, rows: Tensor, sources: Tensor) -> Tensor:
    return form("moe_permute", expert_out, AVAILABLE).moe_unpermute(expert_out, weights, rows)


def _fake_unpermute(expert_out: Tensor, weights: Tensor, rows: Tensor, sources: Tensor) -> Tensor:
    return expert_out.new_empty(rows.shape[0], expert_out.shape[1])


def _save_unpermute(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _unpermute_gradient(ctx, dout: Tensor):
    return *_moe_unpermute_backward(dout, *ctx.saved_tensors), None, None


def _run_unpermute_backward(dout: Tensor, expert_out: Tensor, weights: Tensor, rows: Tensor, sources: Tensor):
    return form("moe_permute", expert_out, AVAILABLE).moe_unpermute_backward(dout, expert_out, weights, rows, sources)


def _fake_unpermute_backward(dout: Tensor, expert_out: Tensor, weights: Tensor, rows: Tensor, sources: Tensor):
    return expert_out.new_empty(expert_out.shape), weights.new_empty(weights.shape)


_expert_order = define_op(
    "expert_order(Tensor expert_ids, int num_experts, int multiple_of) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_order, _fake_order, why_no_gradient="it returns integers",
)  # fmt: skip
_moe_permute = define_op(
    "moe_permute(Tensor hidden, Tensor rows, Tensor sources) -> Tensor",
    _run_permute, _fake_permute, save=_save_permute, backward=_permute_gradient,
)  # fmt: skip
_moe_permute_backward = define_op(
    "moe_permute_backward(Tensor dout, Tensor rows) -> Tensor", _run_permute_backward, _fake_permute_backward
)
_moe_unpermute = define_op(
    "moe_unpermute(Tensor expert_out, Tensor weights, Tensor rows, Tensor sources) -> Tensor",
    _run_unpermute, _fake_unpermute, save=_save_unpermute, backward=_unpermute_gradient,
)  # fmt: skip
_moe_unpermute_backward = define_op(
    "moe_unpermute_backward(Tensor dout, Tensor expert_out, Tensor weights, Tensor rows, Tensor sources) -> (Tensor, Tensor)",
    _run_unpermute_backward, _fake_unpermute_backward,
)  # fmt: skip
