"""strop.kernels: the ops of RL post-training as plain functions of torch tensors. Needs torch and numpy alone."""

from .rms_norm import rms_norm
from .rope import rope
from .swiglu import swiglu

__all__ = ["rms_norm", "rope", "swiglu"]
