"""Grouped-query attention (arXiv 2305.13245) over packed sequences (training, scoring) or a paged cache (generation).

Shape suffixes: T tokens of the pass, H hidden, N query heads, K key/value heads, D head dimension.
"""

import inspect
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .context import ForwardContext, Packed, Paged
from .layers import RMSNorm, Rotary
from .rectangles import PagedPlan, Rectangles


@cache
def flash_varlen() -> Callable[..., Tensor] | None:
    """torch's attention over packed sequences; None before torch 2.12: 2.10 and 2.11 spell causality and grouped heads
    differently and take the padded path. Imported when a GPU asks for it, since it imports torch.compile: 2 s of a start."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys() else None


class Attention(nn.Module):
    """Projections, optional norm of each q and k head, rotation, attention, output projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden, config.num_heads * head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * head_dim, hidden, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.norm_eps)
            self.k_norm = RMSNorm(head_dim, config.norm_eps)

    def forward(self, x_TH: Tensor, rotary: Rotary, ctx: ForwardContext, cache_index: int) -> Tensor:
        """[T, H] -> [T, H]; cache_index: this layer's place in the caches of a Paged context."""
        q_TND = self.q_proj(x_TH).unflatten(-1, (-1, self.head_dim))
        k_TKD = self.k_proj(x_TH).unflatten(-1, (-1, self.head_dim))
        v_TKD = self.v_proj(x_TH).unflatten(-1, (-1, self.head_dim))
        if self.qk_norm:
            q_TND, k_TKD = self.q_norm(q_TND), self.k_norm(k_TKD)
        q_TND, k_TKD = rotary.rotate(q_TND), rotary.rotate(k_TKD)
        if isinstance(ctx.attention, Packed):
            out_TND = packed_attention(q_TND, k_TKD, v_TKD, ctx.attention, ctx.packed_plan)
        else:
            out_TND = paged_attention(q_TND, k_TKD, v_TKD, ctx.attention, ctx.paged_plan, cache_index)
        return self.o_proj(out_TND.flatten(1))


def packed_attention(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, packed: Packed, plan: Rectangles) -> Tensor:
    """Causal attention inside each sequence: [T, N, D]; zeros, and zero gradients, for padding tokens."""
    if q_TND.is_cuda and q_TND.dtype in (torch.bfloat16, torch.float16) and flash_varlen() is not None:
        return _varlen_attention(q_TND, k_TKD, v_TKD, packed)
    outputs = []
    for q, k, v in zip(plan.fold(q_TND), plan.fold(k_TKD), plan.fold(v_TKD), strict=True):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2))
    return plan.unfold(outputs)


def _varlen_attention(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, packed: Packed) -> Tensor:
    """The flash kernel for packed sequences. It leaves the rows of padding tokens unwritten, in the output and in the
    gradients, so both are masked; with `where`, since uninitialised memory may hold NaN and NaN * 0 is NaN."""
    ends, longest = packed.cu_seqlens, packed.max_seqlen
    is_token = (torch.arange(len(q_TND), device=q_TND.device) < ends[-1])[:, None, None]
    q_TND, k_TKD, v_TKD = (torch.where(is_token, x, 0.0) for x in (q_TND, k_TKD, v_TKD))
    out_TND = flash_varlen()(q_TND, k_TKD, v_TKD, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True)
    return torch.where(is_token, out_TND, 0.0)


def paged_attention(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, paged: Paged, plan: PagedPlan, cache_index: int) -> Tensor:
    """Write the new keys and values into their slots, then let each query attend to its row's cached keys: [T, N, D]."""
    key_cache, value_cache = paged.key_cache[cache_index], paged.value_cache[cache_index]
    key_cache.view(-1, *k_TKD.shape[1:]).index_copy_(0, plan.slots, k_TKD)
    value_cache.view(-1, *v_TKD.shape[1:]).index_copy_(0, plan.slots, v_TKD)
    outputs = []
    for q, window in zip(plan.rectangles.fold(q_TND), plan.windows, strict=True):
        # Whole blocks are gathered: 12 kB pieces, 1.5x faster than gathering slot by slot.
        k, v = (
            cache.index_select(0, window.blocks).flatten(0, 1).unflatten(0, (len(q), -1)).transpose(1, 2)
            for cache in (key_cache, value_cache)
        )
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=window.bias, enable_gqa=True)
        outputs.append(out.transpose(1, 2))
    return plan.rectangles.unfold(outputs)
