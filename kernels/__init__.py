"""strop.kernels: the ops of RL post-training as plain functions of torch tensors. Needs torch and numpy alone."""

from .moe_permute import ExpertOrder, expert_order, moe_permute, moe_unpermute
from .multi_tensor_copy import multi_tensor_copy
from .quantize_fp8 import quantize_fp8
from .rms_norm import rms_norm
from .rope import rope
from .swiglu import swiglu

__all__ = [
    "ExpertOrder",
    "expert_order",
    "moe_permute",
    "moe_unpermute",
    "multi_tensor_copy",
    "quantize_fp8",
    "rms_norm",
    "rope",
    "swiglu",
]
