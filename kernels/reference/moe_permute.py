"""Tokens sorted by expert and back. Shapes: T tokens, k choices, A = T k assignments, E experts, R rows, H hidden."""

import torch
from torch import Tensor

from .precision import wide


def expert_order(
    expert_ids: Tensor, num_experts: int, multiple_of: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows [T, k], sources [R], counts [E], offsets [E + 1]), int32: a stable sort, each expert padded on its own."""
    ids = expert_ids.flatten().long()
    taking_part = (ids >= 0) & (ids < num_experts)
    ids = torch.where(taking_part, ids, num_experts)
    order = ids.argsort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))
    counts = counts[:num_experts]
    offsets = torch.zeros(num_experts + 1, dtype=torch.long, device=ids.device)
    torch.cumsum((counts + multiple_of - 1) // multiple_of * multiple_of, 0, out=offsets[1:])
    firsts = torch.zeros_like(offsets)  # of each expert in the sorted list, which has no padding
    torch.cumsum(counts, 0, out=firsts[1:])
    place = torch.arange(len(ids), device=ids.device)
    sorted_ids = ids[order]
    row = torch.where(taking_part[order], offsets[sorted_ids] + place - firsts[sorted_ids], -1)
    rows = torch.empty_like(ids).scatter_(0, order, row)
    # One more row takes the assignments without any.
    sources = torch.full((num_rows + 1,), -1, dtype=torch.long, device=ids.device)
    sources.scatter_(0, torch.where(row < 0, num_rows, row), order)
    return rows.view_as(expert_ids).int(), sources[:num_rows].int(), counts.int(), offsets.int()


def moe_permute(hidden: Tensor, rows: Tensor, sources: Tensor) -> Tensor:
    """hidden [T, H] -> [R, H], zeros where a row has no source."""
    tokens = sources.clamp(min=0) // max(rows.shape[1], 1)
    if not len(hidden):
        return hidden.new_zeros(len(sources), hidden.shape[1])
    return torch.where(sources[:, None] < 0, 0, hidden[tokens])


def moe_unpermute(expert_out: Tensor, weights: Tensor | None, rows: Tensor) -> Tensor:
    """[R, H] -> [T, H]: the sum over the choices, weighted unless weights is None."""
    total = wide(expert_out).new_zeros(rows.shape[0], expert_out.shape[1])
    for choice in range(rows.shape[1] if len(expert_out) else 0):
        row = rows[:, choice]
        values = torch.where(row[:, None] < 0, 0, wide(expert_out[row.clamp(min=0)]))
        total += values if weights is None else values * wide(weights[:, choice, None])
    return total.to(expert_out.dtype)


def moe_unpermute_backward(
    dout: Tensor, expert_out: Tensor, weights: Tensor, rows: Tensor, sources: Tensor
) -> tuple[Tensor, Tensor]:
    """(d expert_out, d weights): w dout in each row, and the dot product of dout with what the row held."""
    if not len(expert_out):
        return torch.zeros_like(expert_out), torch.zeros_like(weights)
    held = torch.where(rows[..., None] < 0, 0, wide(expert_out)[rows.clamp(min=0)])  # [T, k, H]
    dweights = (held * wide(dout)[:, None]).sum(-1)
    source = sources.clamp(min=0).long()
    weight = torch.where(sources < 0, 0, wide(weights.flatten()[source]))
    padding = sources[:, None] < 0
    dexpert_out = torch.where(padding, 0, weight[:, None] * wide(dout[source // rows.shape[1]]))
    return dexpert_out.to(expert_out.dtype), dweights.to(weights.dtype)
